"""Tiles and chunks of the BCE step by time, for `elmo_compile/kernels/triton/configs.py`."""

from __future__ import annotations

import torch
from gpu_common import FP8, NAMES, Bench, Step, fresh, kernel_step, weight
from torch import Tensor

from elmo_compile.kernels.triton.configs import Tile, override_tiles


def tune(b: Bench) -> None:
    """Chunks of the BCE step, then each tile by itself: first dx and the update apart, then both in
    one pass. The step makes the loss too, as training does (tile `logits_narrow`), and once not."""
    # A multiple of every chunk: a ragged last one would be compiled for each tile again.
    N, D, L = b.size(128, 8), b.size(768, 32), b.size(5 << 18, 500)
    for dtype in (torch.bfloat16, FP8):
        with fresh():
            x = torch.randn(N, D, device=b.device).bfloat16()
            w = weight(L, D, dtype, b.device)
            labels = torch.randint(0, L, (N, 5), device=b.device)
            _chunks(b, x, w, labels)
            _tiles(b, x, w, labels)


def _chunks(b: Bench, x: Tensor, w: Tensor, labels: Tensor) -> None:
    chunks = [b.size(n, 100) for n in (1 << 14, 1 << 16, 1 << 17, 1 << 18, 5 << 16, 5 << 18)]
    for chunk in dict.fromkeys(chunks):
        times = b.time(kernel_step(b, x, w, labels, chunk=chunk, value=True))
        b.emit(
            part="tune", dtype=NAMES[w.dtype], kernel="all", chunk=chunk,
            **{"ms": 1e3 * times.device, "ms in a row": 1e3 * times.whole},
        )  # fmt: skip


def _candidates(dry: bool) -> list[tuple[str, list[Tile | None]]]:
    """(field of `Tiles`, what to try), in order: the best of one is kept for the next."""
    if dry:
        small: list[Tile | None] = [Tile(16, 32, 32, 1, 1)]
        return [("shared", [None]), ("logits_narrow", small), ("shared", [None, *small])]
    inner = ((64, 8, 3), (64, 8, 4), (64, 4, 3), (128, 8, 2))

    def tiles(*sides: tuple[int, int]) -> list[Tile | None]:
        return [Tile(*side, *rest) for side in sides for rest in inner]

    shared: list[Tile | None] = [
        Tile(128, columns, depth, warps, stages)
        for columns, depth, warps in ((64, 64, 4), (64, 64, 8), (128, 64, 8), (64, 128, 8))
        for stages in (2, 3, 4)
    ]
    batch = ((128, 64), (128, 128), (128, 256), (64, 128))  # the first side holds rows of x
    return [
        ("shared", [None]),
        ("logits_narrow", tiles(*batch)),
        ("features", tiles(*batch)),
        ("weights", tiles(*batch, (256, 64))),
        ("shared", [None, *shared]),
        ("logits", tiles(*batch)),
    ]


def _tiles(b: Bench, x: Tensor, w: Tensor, labels: Tensor) -> None:
    kept = w.clone()
    best: dict[str, Tile | None] = {}
    for field, tiles in _candidates(b.dry):
        step = kernel_step(b, x, w, labels, value=field != "logits")
        want = _result(step, w, kept)
        timed: dict[Tile | None, float] = {}
        for tile in tiles:
            row = {"part": "tune", "dtype": NAMES[w.dtype], "kernel": field, "tile": tile}
            try:
                with override_tiles(**{**best, field: tile}):
                    if not _same(_result(step, w, kept), want):
                        b.emit(**row, failed="wrong")
                        continue
                    timed[tile] = b.time(step).device
            except Exception as error:  # does not fit the chip: a result
                b.emit(**row, failed=type(error).__name__)
                continue
            b.emit(**row, ms=1e3 * timed[tile])
        if timed:
            best[field] = min(timed, key=lambda tile: timed[tile])
            b.emit(
                part="tune", dtype=NAMES[w.dtype], kernel=field, tile=best[field],
                best=1e3 * timed[best[field]],
            )  # fmt: skip


def _result(step: Step, w: Tensor, kept: Tensor) -> Tensor:
    """dx of one step from the same weights."""
    w.copy_(kept)
    dx: Tensor = step().dx_ND
    return dx


def _same(got: Tensor, want: Tensor) -> bool:
    """Up to the order of sums."""
    return bool((got - want).norm() <= 1e-3 * want.norm())
