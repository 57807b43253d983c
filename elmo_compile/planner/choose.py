"""The plan of one head: chunk, memory and traffic, or why no chunk fits the budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import sympy

from elmo_compile.config import Options
from elmo_compile.numerics.losses import CE
from elmo_compile.planner.device import DeviceLimits, limits_for
from elmo_compile.planner.memory import HeadMemory, head_memory, operand_size, temporary_formulas
from elmo_compile.planner.shape import C, D, HeadShape
from elmo_compile.planner.traffic import TrafficTable, head_traffic

SMALLEST_CHUNK = 64
"""Outputs; a budget that does not hold even this is refused."""
ENOUGH_LOGITS = 1 << 23
"""Of a chunk on a CPU: a larger one gains nothing."""
ENOUGH_DECODED, FEW_ROWS = 1 << 20, 256
"""Elements of a chunk of weights that is decoded on a CPU: written once and read three times, they
are best kept near the second-level cache. More with more rows than these, where products last."""
ENOUGH_OPERATIONS = 1 << 35
"""Of one product of a chunk on a GPU: 50 us at 700 TFLOP/s, where the host takes 20 to start it."""
ROOM = 64 << 20
"""Bytes of temporaries that such a chunk stays within, and within a quarter of the logits."""
LONGEST_SUM = 4096
"""Outputs that Inductor's code for a CPU adds up in one way; it makes other code for more."""
ROW_BLOCK_BYTES = 64 << 20
"""Logits held at once, by default, where that saves a product."""
FEWEST_ROWS = 128
"""Of a block: with fewer, reading the weight again for each block costs more than a product."""
MOST_ROW_BLOCKS = 8
"""Where the weight gradient is bf16: each block rounds it once more."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How one head is computed, and what that costs."""

    chunk_size: int
    """Outputs per chunk, at most L."""
    row_block: int
    """Rows whose logits are all held, block by block; 0: a chunk's alone are."""
    at_once: bool
    """The gradients are formed in the forward, with the loss."""
    holds_logits: bool
    """All logits are kept from the forward to the backward of a fused update."""
    memory: HeadMemory
    traffic: TrafficTable
    notes: tuple[str, ...] = ()
    """Sentences for the report: where a wish could not be met in full."""

    @property
    def products(self) -> int:
        """Matrix products in a step."""
        return self.traffic.products

    @property
    def logits_bytes(self) -> int:
        """Bytes of the [N, L] logits that are not made."""
        return self.memory.logits.bytes

    @property
    def temporary_bytes(self) -> int:
        """Bytes of what is made and freed within a step instead."""
        return self.memory.temporary_bytes

    @property
    def saves(self) -> bool:
        """Whether the logits exceed four times the temporaries: where the peak is promised."""
        return self.logits_bytes > 4 * self.temporary_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanRefusal:
    """No plan: nothing was chosen, and what would make one possible."""

    reason: str
    remedy: str
    smallest_budget: int
    """Bytes with which the head could be computed."""


def plan(
    shape: HeadShape, options: Options | None = None, limits: DeviceLimits | None = None
) -> Plan | PlanRefusal:
    """Choose the outputs per chunk of a head.

    `chunk_size`, where given, wins. Otherwise the largest multiple of `limits.multiple` whose
    working set stays in the cache share, at least `limits.min_chunk`; then made smaller until the
    temporaries fit `memory_budget`. Dynamic sizes: chosen for their hints. Softmax cross entropy
    that may form its gradients at once does so for blocks of rows, if enough rows fit.

    Args:
        shape: the head.
        options: the user's wishes; None: defaults.
        limits: of the device; None: those of this machine for `shape.device`.
    """
    options = options or Options()
    limits = limits or limits_for(shape.device)
    row_block, chunk = choose_row_block(shape, options, limits)
    if row_block:
        return _plan(shape, chunk, row_block)
    chunk = min(options.chunk_size or cache_chunk(shape, limits), shape.number(shape.outputs))
    if _holds_logits(shape, options, chunk):
        return _plan(shape, chunk, holds_logits=True)
    budget = options.budget_bytes
    if budget is None:
        return _plan(shape, chunk if options.chunk_size else _of_one_kind(shape, chunk, limits))
    if options.chunk_size is not None:
        found = _plan(shape, chunk)
        note = (
            f"chunk_size={chunk} was asked for, and its temporaries "
            f"({found.temporary_bytes} bytes) exceed memory_budget={budget}"
        )
        exceeds = found.temporary_bytes > budget
        return dataclasses.replace(found, notes=(note,)) if exceeds else found
    fitting = budget_chunk(shape, budget, limits.multiple)
    smallest = min(SMALLEST_CHUNK, shape.number(shape.outputs))
    if fitting < smallest:
        return _refuse(shape, budget, smallest)
    return _plan(shape, _of_one_kind(shape, min(chunk, fitting), limits))


def _of_one_kind(shape: HeadShape, chunk: int, limits: DeviceLimits) -> int:
    """At most `chunk` outputs, such that the last chunk, which has fewer, needs no other code."""
    if limits.kind != "cpu" or shape.program is None:
        return chunk
    outputs = shape.number(shape.outputs)
    while chunk > LONGEST_SUM and 0 < outputs % chunk <= LONGEST_SUM:
        chunk = max(LONGEST_SUM, _floor(chunk - 1, limits.multiple))
    return chunk


def _holds_logits(shape: HeadShape, options: Options, chunk: int) -> bool:
    """Whether a fused update keeps its logits: where the user's budget has room for them."""
    budget = options.budget_bytes
    if budget is None or not shape.may_hold_logits:
        return False
    return head_memory(shape, chunk, holds_logits=True).temporary_bytes <= budget


def _plan(shape: HeadShape, chunk: int, row_block: int = 0, holds_logits: bool = False) -> Plan:
    """The plan that follows from a chunk."""
    # Softmax needs a row's whole log-sum-exp before any gradient: without its logits, a second
    # product, and nothing is gained.
    at_once = shape.forms_gradients_at_once and (shape.loss.name != CE or row_block > 0)
    return Plan(
        chunk_size=chunk,
        row_block=row_block,
        at_once=at_once,
        holds_logits=holds_logits,
        memory=head_memory(shape, chunk, row_block, holds_logits=holds_logits),
        traffic=head_traffic(shape, at_once=at_once, row_block=row_block, held=holds_logits),
    )


def choose_row_block(shape: HeadShape, options: Options, limits: DeviceLimits) -> tuple[int, int]:
    """(rows a block, outputs a chunk) of softmax cross entropy; (0, 0) where blocks do not pay."""
    none = (0, 0)
    if not shape.forms_gradients_at_once or shape.loss.name != CE:
        return none
    plain = shape.weight_dtype == shape.compute_dtype and shape.loss.targets == "classes"
    if options.chunk_size is not None or (shape.device == "cuda" and not plain):
        return none
    rows, outputs = shape.number(shape.rows), shape.number(shape.outputs)
    budget = options.budget_bytes
    per_row = operand_size(shape) * outputs
    least = -(-rows // MOST_ROW_BLOCKS) if shape.rounds_dw_to_narrow else 1
    if budget is None:
        most = max(ROW_BLOCK_BYTES // per_row, least)
        block = min(most, rows // 4)  # what is promised of the peak: well below the logits
    else:
        block = min(rows, budget // per_row)
    if 64 < block < rows:
        block = _floor(block, 32)
    if block < max(least, min(rows, FEWEST_ROWS)) or block == 0:
        return none
    one = dataclasses.replace(shape, rows=block, hints={})
    chunk = min(cache_chunk(one, limits), outputs)
    while budget is not None and head_memory(shape, chunk, block).temporary_bytes > budget:
        chunk //= 2
        if chunk < min(SMALLEST_CHUNK, outputs):
            return none
    return block, chunk


def cache_chunk(shape: HeadShape, limits: DeviceLimits) -> int:
    """Outputs whose weight and chunk temporaries fit the cache share; at least the minimum.

    More, where the logits are so large that it hardly counts: what starting a product costs weighs
    more than misses, up to `ENOUGH_LOGITS` a chunk on a CPU and `ENOUGH_OPERATIONS` on a GPU. Fewer
    on a CPU where a chunk's weights are decoded (benchmarks/NOTES.md).
    """
    fixed, slope = _line(shape, temporary_formulas(shape))
    per_output = slope + shape.number(shape.weight_dtype.itemsize * D)
    rows, outputs = shape.number(shape.rows), shape.number(shape.outputs)
    logits = shape.compute_dtype.itemsize * rows * outputs
    room = max(0, min(ROOM, logits // 4) - fixed - 1) // max(1, slope)
    if limits.kind == "cpu":
        enough = min(limits.cache_bytes * 3 // 2 // per_output, ENOUGH_LOGITS // rows)
    else:
        enough = ENOUGH_OPERATIONS // (2 * rows * shape.number(shape.features))
    chunk = max(limits.working_set // per_output, min(room, enough))
    if limits.kind == "cpu" and operand_size(shape) != shape.weight_dtype.itemsize:
        decoded = ENOUGH_DECODED * max(1, rows // FEW_ROWS)
        chunk = min(chunk, decoded // max(1, shape.number(shape.features)))
    if limits.kind == "cuda":  # alike, so that the last one fills the chip as well
        chunk = -(-outputs // max(1, -(-outputs // max(chunk, limits.min_chunk))))
        return max(limits.min_chunk, -(-chunk // limits.multiple) * limits.multiple)
    return max(limits.min_chunk, _floor(chunk, limits.multiple))


def budget_chunk(shape: HeadShape, budget: int, multiple: int) -> int:
    """The most outputs whose temporaries fit `budget`; 0 if what every chunk needs does not."""
    fixed, slope = _line(shape, temporary_formulas(shape))
    most = max(0, (budget - fixed) // max(1, slope))
    for step in (multiple, SMALLEST_CHUNK):
        if most >= step:
            return _floor(most, step)
    return most


def _line(shape: HeadShape, formulas: list[tuple[str, Any]]) -> tuple[int, int]:
    """Temporaries as `fixed + slope * C`, numbers at the hinted sizes. The slope is 0 of a loss
    without gradients on a GPU, whose kernels keep a tile of logits in registers."""
    total = sympy.expand(sympy.Add(*(expr for _, expr in formulas)))
    number: Callable[[Any], int] = shape.number
    return number(total.subs(C, 0)), number(total.coeff(C, 1))


def _floor(value: int, multiple: int) -> int:
    return value // multiple * multiple


def _refuse(shape: HeadShape, budget: int, smallest: int) -> PlanRefusal:
    fixed, slope = _line(shape, temporary_formulas(shape))
    needed = fixed + slope * smallest
    return PlanRefusal(
        reason=f"memory_budget={budget} bytes is below the {needed} bytes that chunks of "
        f"{smallest} outputs need at N={shape.number(shape.rows)}, "
        f"D={shape.number(shape.features)}",
        remedy=f"set memory_budget to at least {needed}, or use fewer rows per step",
        smallest_budget=needed,
    )
