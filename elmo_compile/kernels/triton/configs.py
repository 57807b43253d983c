"""Tile shapes and pipeline depths, as data: one row a chip and operand type.

Chosen offline for registers (no spills) and shared memory (benchmarks/cubin_table.py), not by time:
nothing here has been timed on a GPU. What `elmo-compile tune` finds on one (tuned.py) goes before
it. The shared pass is for chips whose products read operands from shared memory; with `mma.sync` it
spills.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

from elmo_compile.errors import OptionError

INTERPRETER = 0
"""The "chip" of CPU tensors: small tiles, so that small tests have many."""
CHIPS = (80, 89, 90, 100, 120)
WITHOUT_FP8 = (80,)
"""Chips that have no products of fp8 with fp8."""
SHARED_LIMIT = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
"""Bytes of shared memory a block may have."""
PADDING = 128
"""Rows of the buffer of the logits' gradient are padded to a multiple of it: no tile of a product
that reads it has more outputs."""


class Tile(NamedTuple):
    """One kernel's output tile [rows, columns], the inner step, and how it is run."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """The tiles of the three products."""

    logits: Tile
    """Rows of the batch x outputs, over features."""
    logits_narrow: Tile
    """The same, where the epilogue holds a second float32 tile: see `Call.logits_tile`."""
    features: Tile
    """Rows of the batch x features, over outputs."""
    weights: Tile
    """Outputs x features, over rows of the batch."""
    shared: Tile | None = None
    """dx and the update in one pass: all rows of the batch x features, over outputs. None: no."""
    shared_with_state: Tile | None = None
    """The same, where any state takes registers too."""

    @property
    def weights_with_state(self) -> Tile:
        """The same, where a second moment or a compensation takes registers too."""
        return self.weights._replace(rows=max(16, self.weights.rows // 2))


_SMALL = Tiles(
    logits=Tile(16, 32, 32, 1, 1),
    logits_narrow=Tile(16, 32, 32, 1, 1),
    features=Tile(16, 32, 32, 1, 1),
    weights=Tile(32, 16, 16, 1, 1),
    shared=Tile(32, 16, 16, 1, 1),
    shared_with_state=Tile(32, 16, 16, 1, 1),
)
_FLOAT = Tile(64, 64, 32, 4, 2)
_FLOATS = Tiles(
    logits=_FLOAT,
    logits_narrow=_FLOAT,
    features=_FLOAT._replace(stages=3),
    weights=_FLOAT._replace(stages=3),
)
_TABLE: dict[tuple[int, str], Tiles] = {
    (INTERPRETER, "half"): _SMALL,
    (INTERPRETER, "float"): _SMALL,
    (80, "half"): Tiles(
        logits=Tile(128, 128, 64, 8, 3),
        logits_narrow=Tile(128, 64, 64, 8, 3),
        features=Tile(128, 128, 64, 8, 3),
        weights=Tile(128, 64, 64, 8, 2),
    ),
    (89, "half"): Tiles(
        logits=Tile(128, 128, 32, 8, 3),
        logits_narrow=Tile(64, 64, 32, 8, 3),
        features=Tile(128, 128, 32, 8, 3),
        weights=Tile(128, 64, 64, 8, 2),
    ),
    (90, "half"): Tiles(
        logits=Tile(128, 128, 64, 8, 3),
        logits_narrow=Tile(128, 64, 64, 8, 3),
        features=Tile(128, 128, 64, 8, 3),
        weights=Tile(128, 64, 64, 8, 2),
        shared=Tile(128, 64, 64, 4, 3),
        shared_with_state=Tile(128, 64, 64, 8, 3),
    ),
    (100, "half"): Tiles(
        logits=Tile(128, 128, 64, 8, 3),
        logits_narrow=Tile(128, 64, 64, 8, 3),
        features=Tile(128, 128, 64, 8, 3),
        weights=Tile(128, 64, 64, 8, 2),
        shared=Tile(128, 64, 64, 8, 2),
        shared_with_state=Tile(128, 32, 64, 8, 3),
    ),
} | {(chip, "float"): _FLOATS for chip in CHIPS}
# As much shared memory as sm_89, and its products; 128 x 128 logits spill there.
_TABLE[120, "half"] = dataclasses.replace(_TABLE[89, "half"], logits=Tile(128, 64, 64, 8, 3))

_assumed: contextvars.ContextVar[tuple[int, int] | None] = contextvars.ContextVar(
    "elmo_assumed_chip", default=None
)
_overridden: contextvars.ContextVar[dict[str, Tile | None] | None] = contextvars.ContextVar(
    "elmo_tiles", default=None
)


@contextlib.contextmanager
def assume_chip(chip: int, processors: int = 132) -> Iterator[None]:
    """Plan launches for a chip that is not there: compiling offline, tests."""
    token = _assumed.set((chip, processors))
    try:
        yield
    finally:
        _assumed.reset(token)


def is_assumed() -> bool:
    """Whether launches are planned for a chip that is not there."""
    return _assumed.get() is not None


def chip_of(device: torch.device) -> tuple[int, int]:
    """(row of the table, number of multiprocessors) of a device.

    Raises:
        OptionError: a GPU older than sm_80, which has no bf16 products.
    """
    assumed = _assumed.get()
    if assumed is not None:
        return assumed
    if device.type != "cuda":
        return INTERPRETER, 4
    properties = torch.cuda.get_device_properties(device)
    capability = 10 * properties.major + properties.minor
    if capability < 80:
        raise OptionError(
            f"{properties.name} is sm_{capability}; the Triton kernels need sm_80 or newer. "
            "Move the head to a newer GPU or to the CPU."
        )
    return _nearest_chip(capability), properties.multi_processor_count


def _nearest_chip(capability: int) -> int:
    """The table's row for a capability: consumer chips have the shared memory of sm_89."""
    if capability in (86, 87, 89):
        return 89
    return max(chip for chip in CHIPS if chip <= capability)


@contextlib.contextmanager
def override_tiles(**tiles: Tile | None) -> Iterator[None]:
    """Take these tiles (fields of `Tiles`) and no others: tuning."""
    token = _overridden.set(tiles)
    try:
        yield
    finally:
        _overridden.reset(token)


def tiles_for(
    chip: int, compute_dtype: torch.dtype, tuned: Mapping[str, Tile | None] | None = None
) -> Tiles:
    """The tiles of a call: those of `override_tiles`, else the tuned ones, else the table's."""
    fields = {**(tuned or {}), **(_overridden.get() or {})}
    table = from_table(chip, compute_dtype)
    return dataclasses.replace(table, **fields) if fields else table


def from_table(chip: int, compute_dtype: torch.dtype) -> Tiles:
    """The table's entry for a chip and the operand type of the products."""
    return _TABLE[chip, "float" if compute_dtype == torch.float32 else "half"]


def batch_block(tile_side: int, rows: int) -> int:
    """A tile's side along the batch: the power of two that holds a small batch, at least 16."""
    block = 16
    while block < min(tile_side, rows):
        block *= 2
    return block
