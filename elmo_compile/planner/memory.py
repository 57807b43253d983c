"""Bytes a head holds during one step, term by term: as the program was, and rewritten."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import sympy
import torch

from elmo_compile.numerics.losses import CE
from elmo_compile.numerics.state_size import StateSize
from elmo_compile.planner.shape import C, D, HeadShape, L, M, N

LOSS = "loss"
UPDATE = "weight gradient"
CHUNK_OF_LOGITS = "chunk of logits, then gradient"
ROUNDING_KEYS = 12 << 16
"""Bytes: int32 keys of 2^16 rows of weight, and 64-bit words while they are made."""
EAGER_BELOW = 1 << 20
EAGER_WEIGHT_BELOW = 1 << 22
"""Logits below which the CPU kernels do not compile their vector code (kernels.aten.compiled), and
elements of the weight below which they then do not compile its update either."""
EAGER_UPDATE = 24
EAGER_DECODE = 12
"""Bytes for each weight of a chunk where these run eagerly, as measured on torch 2.13."""
SPLIT_SUMS = 8 << 20
"""Bytes: about one 128 x 128 float32 tile a multiprocessor (132 on an H100)."""
SPLIT_SUMS_A_ROW = 132 * 128 * 4
"""The same, where a batch is smaller than a tile."""
ROW_PARTS = 4 * 132
"""Programs that each hold statistics of a row, at most."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Term:
    """One tensor, or one kind of temporary, that is held."""

    name: str
    expr: Any
    """Bytes, as a sympy expression in N, D, L, C and M."""
    bytes: int
    """`expr` at the sizes of this head (hints for dynamic ones)."""
    moments: tuple[str, ...] = ()
    """When it is held, of `loss` (the gradient of the logits is formed) and `weight gradient`;
    empty: all the time."""
    temporary: bool = False
    """Made and freed within the step by the rewritten head: what `memory_budget` bounds."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadMemory:
    """The terms before and after the rewrite; totals are peaks over the moments of a step."""

    before: tuple[Term, ...]
    """What the program as written holds (a lower bound: no element-wise temporaries)."""
    after: tuple[Term, ...]
    logits: Term
    """The [N, L] logits on their own, the matrix that no longer exists."""

    @property
    def total_before(self) -> Any:
        """Peak bytes of `before`, a sympy expression."""
        return _peak([(t.moments, t.expr) for t in self.before])

    @property
    def total_after(self) -> Any:
        """Peak bytes of `after`, a sympy expression."""
        return _peak([(t.moments, t.expr) for t in self.after])

    @property
    def temporaries(self) -> Any:
        """Bytes of the temporaries of `after`, a sympy expression."""
        return sympy.Add(*(t.expr for t in self.after if t.temporary))

    @property
    def bytes_before(self) -> int:
        """`total_before` as a number."""
        return int(_peak([(t.moments, sympy.Integer(t.bytes)) for t in self.before]))

    @property
    def bytes_after(self) -> int:
        """`total_after` as a number."""
        return int(_peak([(t.moments, sympy.Integer(t.bytes)) for t in self.after]))

    @property
    def temporary_bytes(self) -> int:
        """`temporaries` as a number."""
        return sum(t.bytes for t in self.after if t.temporary)


def with_state(
    memory: HeadMemory, state: Sequence[StateSize], *, outputs: int, features: int
) -> HeadMemory:
    """The same with an optimizer's state, before as after."""
    formulas = {size.label: state_bytes(size) for size in state}
    sizes = {L: outputs, D: features}
    terms = tuple(
        Term(name=name, expr=expr, bytes=int(expr.subs(sizes))) for name, expr in formulas.items()
    )
    return dataclasses.replace(memory, before=memory.before + terms, after=memory.after + terms)


def head_memory(
    shape: HeadShape, chunk: int, row_block: int = 0, *, holds_logits: bool = False
) -> HeadMemory:
    """Every term of a head whose outputs are walked in chunks of `chunk`.

    Args:
        row_block: rows whose logits are all held at a time; 0: none.
        holds_logits: all are, from forward to backward.
    """

    def term(name: str, expr: Any, *moments: str, temporary: bool = False) -> Term:
        expr = sympy.sympify(expr)
        number = shape.number(expr.subs(C, chunk))
        return Term(name=name, expr=expr, bytes=number, moments=moments, temporary=temporary)

    resident = [term(name, expr) for name, expr in _resident(shape)]
    before = [term(name, expr, *moments) for name, expr, moments in _eager(shape)]
    after = [term(name, expr) for name, expr in _gradients(shape)]
    after += [
        term(name, expr, temporary=True)
        for name, expr in temporaries_of(shape, row_block, holds_logits=holds_logits)
    ]
    return HeadMemory(
        before=tuple(resident + before),
        after=tuple(resident + after),
        logits=term("logits", shape.compute_dtype.itemsize * N * L, LOSS),
    )


def temporaries_of(
    shape: HeadShape, row_block: int = 0, *, holds_logits: bool = False
) -> list[tuple[str, Any]]:
    """Name and bytes of a step's temporaries, with logits held or not: see `head_memory`."""
    if holds_logits:
        others = [term for term in temporary_formulas(shape) if term[0] != CHUNK_OF_LOGITS]
        return [("all logits, then gradient", operand_size(shape) * N * L), *others]
    if not row_block:
        return temporary_formulas(shape)
    held = ("block of logits, then gradient", operand_size(shape) * row_block * L)
    if shape.device == "cuda":
        return [held, *_triton_block_buffers(shape, row_block)]
    block = dataclasses.replace(shape, rows=row_block)
    terms = [
        (name, sympy.sympify(expr).subs(N, row_block))
        for name, expr in temporary_formulas(block)
        if name != CHUNK_OF_LOGITS
    ]
    if shape.features_trainable:
        terms.append(("feature gradient, of all rows and as joined", 8 * N * D))
    return [held, *terms]


def temporary_formulas(shape: HeadShape) -> list[tuple[str, Any]]:
    """Name and bytes, in N, D, C and M, of what the kernels make and free in a step."""
    triton = shape.device == "cuda" and shape.program is None
    terms = _triton_buffers(shape) if triton else _aten_buffers(shape)
    if shape.positives != 0:
        terms.append(("sorted positives", 16 * M))
    if shape.program is not None:
        # Eagerly all that is alive; compiled, what leaves the kernel: a gradient in float32.
        live = shape.program.live if shape.number(N * L) < EAGER_BELOW else 2
        terms.append(("loss by a traced program, element-wise", 4 * live * N * C))
    return terms


def _aten_buffers(shape: HeadShape) -> list[tuple[str, Any]]:
    """As kernels/aten, which also runs traced losses on a GPU: products write whole chunks, vector
    code works in place on them."""
    operand = operand_size(shape)
    accumulate = max(4, operand)
    # A second pass over a traced loss updates eagerly, however large the weight is.
    by_weight = shape.program is None and shape.number(L * D) >= EAGER_WEIGHT_BELOW
    eager = shape.number(N * L) < EAGER_BELOW and not by_weight
    terms: list[tuple[str, Any]] = [(CHUNK_OF_LOGITS, operand * N * C)]
    if operand != shape.weight_dtype.itemsize:
        terms.append(("chunk of weight, decoded", operand * C * D))
        scratch = EAGER_DECODE if eager else operand
        terms.append(("decoding, element-wise", scratch * C * D))
    if _writes_weight_gradient_chunk(shape, operand):
        terms.append(("chunk of weight gradient", operand * C * D))
    # Features as operand; in a backward also scaled by the rows' factors, formed in float32.
    scaled = operand + 2 * accumulate if shape.trains else 0
    terms.append(("features as operands", (operand + scaled) * N * D))
    if shape.features_trainable:
        part = operand if operand < accumulate else 0
        terms.append(("feature gradient, summed over chunks", (accumulate + part) * N * D))
    terms.append(("row reductions, partial", N * C))
    if shape.value_in_backward or (shape.forms_gradients_at_once and shape.loss.name != CE):
        # Inductor keeps the exponential that value and gradient share.
        terms.append(("loss beside its gradient, element-wise", 4 * N * C))
    if shape.fused_update and eager:
        terms.append(("update, element-wise", EAGER_UPDATE * C * D))
    # float64 sums; cross entropy adds maxima, log-sum-exps and target logits.
    terms.append(("row statistics", (48 if shape.loss.name == CE else 16) * N))
    if shape.weight_trainable and shape.fused_update and shape.weight_dtype.itemsize < 4:
        terms.append(("rounding keys", sympy.Integer(ROUNDING_KEYS)))
    return terms


def _writes_weight_gradient_chunk(shape: HeadShape, operand: int) -> bool:
    """Whether a chunk of the weight gradient is a tensor of its own on a CPU.

    Not where the product writes straight into the weight (float32 SGD) or into the gradient.
    """
    if not shape.weight_trainable:
        return False
    if shape.fused_update and not shape.state and operand >= 4:
        return shape.weight_dtype.itemsize != operand
    return shape.fused_update or shape.weight_gradient_dtype.itemsize != operand


def _triton_buffers(shape: HeadShape) -> list[tuple[str, Any]]:
    """As kernels/triton: only the gradient of the logits and partial sums leave the registers."""
    operand = operand_size(shape)
    terms: list[tuple[str, Any]] = []
    if shape.trains:
        terms.append(("chunk of logit gradient", operand * N * C))
    if shape.feature_dtype != shape.compute_dtype:
        terms.append(("features as operands", operand * N * D))
    if shape.features_trainable:
        terms.append(("feature gradient", 4 * N * D))
        sums = sympy.Min(SPLIT_SUMS, SPLIT_SUMS_A_ROW * N)
        terms.append(("feature gradient, split sums", sums + 4 * N * D))
    if shape.weight_trainable and shape.fused_update:
        rounded = int(shape.weight_dtype.itemsize < 4) + sum(s.is_rounded for s in shape.state)
        terms += [("rounding keys", 4 * rounded * C)] if rounded else []
    # One float32 maximum and one float64 sum a row from each of `ROW_PARTS` programs.
    terms.append(("row statistics", (12 * ROW_PARTS if shape.loss.name == CE else 8) * N))
    return terms


def _triton_block_buffers(shape: HeadShape, row_block: int) -> list[tuple[str, Any]]:
    """As kernels/triton/row_blocks.py, beside the logits it holds."""
    terms: list[tuple[str, Any]] = []
    if shape.feature_dtype != shape.compute_dtype:
        terms.append(("features as operands", operand_size(shape) * N * D))
    if shape.features_trainable:
        terms.append(("feature gradient", 4 * N * D + 4 * row_block * D))
    if shape.has_bias and shape.weight_trainable:
        terms.append(("bias gradient of a block", 4 * L))
    # A float32 maximum and a float64 sum a row from each of its stretches.
    terms.append(("row statistics", 8 * N + 12 * max(row_block, 2048)))
    return terms


def operand_size(shape: HeadShape) -> int:
    """Bytes of one operand of the products: the CPU kernels compute float16 in float32."""
    if shape.device == "cpu" and shape.compute_dtype == torch.float16:
        return 4
    return shape.compute_dtype.itemsize


def state_bytes(size: StateSize) -> Any:
    """Bytes of one tensor of the optimizer's state, in L and D."""
    rows = L if size.rows is None else size.rows
    return sympy.Rational(size.each) * rows * (D if size.columns is None else size.columns)


def _resident(shape: HeadShape) -> list[tuple[str, Any]]:
    """What exists whatever the head does."""
    terms: list[tuple[str, Any]] = [("weight", shape.weight_dtype.itemsize * L * D)]
    if shape.has_bias:
        terms.append(("bias", 4 * L))
    terms += [(size.label, state_bytes(size)) for size in shape.state]
    terms.append(("features", shape.feature_dtype.itemsize * N * D))
    if shape.loss.targets == "dense":
        terms.append(("dense targets (given)", shape.dense_target_dtype.itemsize * N * L))
    return terms


def _eager(shape: HeadShape) -> list[tuple[str, Any, tuple[str, ...]]]:
    """What the program as written adds, and when it is held."""
    compute = shape.compute_dtype.itemsize
    loss = 4 if shape.logits_upcast else compute
    terms: list[tuple[str, Any, tuple[str, ...]]] = [("logits", compute * N * L, (LOSS,))]
    if shape.logits_upcast and compute != 4:
        terms.append(("logits in float32", 4 * N * L, (LOSS,)))
    if shape.loss.name == CE:
        terms.append(("log-probabilities", loss * N * L, (LOSS,)))
    if shape.loss.targets not in ("classes", "dense"):
        dense = shape.dense_target_dtype.itemsize
        terms.append(("multi-hot targets", dense * N * L, (LOSS,)))
    if shape.trains:
        terms.append(("gradient of the logits", loss * N * L, (LOSS,)))
        if loss != compute:
            cast = "gradient of the logits, cast back"
            terms.append((cast, compute * N * L, (UPDATE,)))
        else:
            terms[-1] = (terms[-1][0], terms[-1][1], (LOSS, UPDATE))
    if shape.features_trainable:
        terms.append(("feature gradient", compute * N * D, (UPDATE,)))
    if shape.weight_trainable:
        size = shape.weight_gradient_dtype.itemsize
        terms.append(("weight gradient", size * L * D, (UPDATE,)))
        if shape.has_bias:
            terms.append(("bias gradient", 4 * L, (UPDATE,)))
    return terms


def _gradients(shape: HeadShape) -> list[tuple[str, Any]]:
    """Gradients the rewritten head returns; a fused update returns none for the weight."""
    terms: list[tuple[str, Any]] = []
    if shape.weight_trainable and not shape.fused_update:
        terms.append(("weight gradient", shape.weight_gradient_dtype.itemsize * L * D))
    if shape.weight_trainable and shape.has_bias:
        terms.append(("bias gradient", 4 * L))
    return terms


def _peak(terms: list[tuple[tuple[str, ...], Any]]) -> Any:
    """The largest sum of what is held at one moment."""
    sums = [
        sympy.Add(*(expr for moments, expr in terms if not moments or moment in moments))
        for moment in (LOSS, UPDATE)
    ]
    return sums[0] if sums[0] == sums[1] else sympy.Max(*sums)
