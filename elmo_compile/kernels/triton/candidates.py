"""Tiles worth timing for a head on a chip, and the arithmetic that leaves out the others.

A rule here never costs a good tile: shared memory and registers are lower bounds of what a kernel
takes (tests hold them against the compiled kernels of benchmarks/results/cubins.json).
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch

from elmo_compile.kernels.triton.configs import (
    PADDING,
    SHARED_LIMIT,
    Tile,
    Tiles,
    batch_block,
    from_table,
)

FIELDS = ("logits_narrow", "logits", "features", "weights", "shared", "shared_with_state")
"""Of `Tiles`, each with candidates of its own."""
OPTIONAL = ("shared", "shared_with_state")
"""Fields that may be None: no such pass."""
ACCUMULATORS_LIMIT = 192
"""Float32 accumulators a thread: the rest of its 255 registers is for operands and addresses."""
FROM_SHARED = (90, 100)
"""Chips whose products of halves read operands from shared memory: a buffer for each stage. Those
of others are a step ahead in registers, and need one buffer less."""
_WARPS, _STAGES = (1, 2, 4, 8, 16), range(1, 9)


class HeadKey(NamedTuple):
    """What the best tiles of a head depend on, apart from the chip."""

    operand_bytes: int
    """Of an operand of the products: 2 or 4."""
    weight_bytes: int
    """Of the weight as stored: 1, 2 or 4."""
    rows: int
    """The power of two that holds the batch, at least 16."""
    features: int

    @classmethod
    def of(cls, rows: int, features: int, weight: torch.dtype, compute: torch.dtype) -> HeadKey:
        """The key of a head of `rows` rows and its types."""
        return cls(compute.itemsize, weight.itemsize, batch_block(rows, rows), features)

    def described(self) -> str:
        """As one reads it."""
        return (
            f"up to {self.rows} rows of {self.features} features, "
            f"weights of {8 * self.weight_bytes} bits, products of {8 * self.operand_bytes}"
        )

    def table(self, chip: int) -> Tiles:
        """The table's tiles for it."""
        return from_table(chip, torch.float32 if self.operand_bytes == 4 else torch.bfloat16)


class Candidate(NamedTuple):
    """A tile, and why it need not be timed, if so."""

    tile: Tile | None
    dropped: str | None = None


def candidates(field: str, key: HeadKey, chip: int) -> list[Candidate]:
    """What to try for a field of `Tiles`: the table's own tile first, dropped ones included."""
    own = getattr(key.table(chip), field)
    found, seen = [Candidate(own)], {_clipped(field, own, key)}
    # A pass of the table's that this head does not take is no other thing than none.
    without = field in OPTIONAL and own is not None and objection(field, own, key, chip) is None
    for tile in [*([None] if without else []), *_grid(field, key)]:
        clipped = _clipped(field, tile, key)
        reason = "the same as another for this batch and head"
        if clipped not in seen:
            reason = None if clipped is None else objection(field, clipped, key, chip)
        found.append(Candidate(clipped if reason is None else tile, reason))
        seen.add(clipped)
    return found


def objection(field: str, tile: Tile, key: HeadKey, chip: int) -> str | None:
    """Why a tile cannot run, or not well, on a chip; None if nothing speaks against it."""
    for side in (tile.rows, tile.columns, tile.inner):
        if side < 16 or side & (side - 1):
            return f"a side of {side}: not a power of two of at least 16"
    if tile.warps not in _WARPS or tile.stages not in _STAGES:
        return f"{tile.warps} warps and {tile.stages} stages: not 1 to 16 and 1 to 8"
    outputs = {"weights": tile.rows, "shared": tile.inner, "shared_with_state": tile.inner}
    if outputs.get(field, 0) > PADDING:
        return f"{outputs[field]} outputs: the gradient's rows are padded to {PADDING}"
    if field in OPTIONAL and tile.rows < key.rows:
        return f"{tile.rows} rows do not hold a batch of {key.rows}"
    if field in OPTIONAL and key.features % 16 and key.rows > 64:
        return f"{key.features} features: not a multiple of 16, and more than 64 rows"
    accumulators = accumulators_of(field, tile)
    if accumulators > ACCUMULATORS_LIMIT:
        return f"{accumulators} accumulators a thread: more than {ACCUMULATORS_LIMIT}"
    needed = shared_bytes(field, tile, key, chip)
    if needed > SHARED_LIMIT[chip]:
        return f"{needed} bytes of shared memory: more than {SHARED_LIMIT[chip]}"
    return None


def accumulators_of(field: str, tile: Tile) -> int:
    """Float32 registers of a thread that hold sums: a second tile where the epilogue has one."""
    elements = tile.rows * tile.columns
    if field == "logits_narrow":
        elements *= 2
    if field in OPTIONAL:
        elements += tile.inner * tile.columns  # dx, and the step's dw
    return elements // (32 * tile.warps)


def shared_bytes(field: str, tile: Tile, key: HeadKey, chip: int) -> int:
    """The least bytes of shared memory a tile's kernels take: their operands, buffered."""
    rows = tile.rows if field == "weights" else batch_block(tile.rows, key.rows)
    # Rows of x and w that do not begin at whole 16 bytes are not copied ahead.
    x, w = (0, 0) if key.features % 16 else (key.operand_bytes, key.weight_bytes)
    g = key.operand_bytes
    left, right = {"weights": (g, x), "features": (g, w)}.get(field, (x, w))
    resident = 0
    if field in OPTIONAL:
        left, resident = g, rows * tile.columns * x
    ahead = chip in FROM_SHARED and key.operand_bytes == 2 and rows >= 64
    buffers = tile.stages if ahead else tile.stages - 1
    return resident + buffers * tile.inner * (rows * left + tile.columns * right)


def _clipped(field: str, tile: Tile | None, key: HeadKey) -> Tile | None:
    """The tile with no side longer than what it lies along."""
    if tile is None:
        return None
    batch = "inner" if field == "weights" else "rows"
    features = "inner" if field.startswith("logits") else "columns"
    return tile._replace(
        **{batch: batch_block(getattr(tile, batch), key.rows)},
        **{features: batch_block(getattr(tile, features), key.features)},
    )


def _grid(field: str, key: HeadKey) -> list[Tile]:
    """The tiles of a field before anything is left out."""
    if field in OPTIONAL:
        runs = itertools.product(((64, 64, 4), (64, 64, 8), (128, 64, 8), (64, 128, 8)), (2, 3, 4))
        return [Tile(128, *shape, stages) for shape, stages in runs]
    sides = [(128, 64), (128, 128), (128, 256), (64, 128)]
    half = key.operand_bytes // 2  # floats: as many bytes a step
    runs = [(32, 8, 4), (64, 8, 3), (64, 8, 4), (64, 4, 3), (128, 8, 2)]
    return [
        Tile(*side, inner // half, warps, stages) for side in sides for inner, warps, stages in runs
    ]
