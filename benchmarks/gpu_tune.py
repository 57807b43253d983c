"""Chunks and tiles of the BCE step by time, for `elmo_compile/kernels/triton/configs.py`."""

from __future__ import annotations

import torch
from gpu_common import FP8, NAMES, Bench, fresh, kernel_step, weight
from torch import Tensor

from elmo_compile.bench import Case
from elmo_compile.kernels.triton.configs import Tile
from elmo_compile.tune import Trial
from elmo_compile.tune import tune as tune_tiles


def tune(b: Bench) -> None:
    """Chunks of the BCE step, then its tiles one after the other."""
    # A multiple of every chunk: a ragged last one would be compiled for each tile again.
    N, D, L = b.size(128, 8), b.size(768, 32), b.size(5 << 18, 500)
    for dtype in (torch.bfloat16, FP8):
        with fresh():
            x = torch.randn(N, D, device=b.device).bfloat16()
            w = weight(L, D, dtype, b.device)
            labels = torch.randint(0, L, (N, 5), device=b.device)
            _chunks(b, x, w, labels)
            del x, w, labels
            _tiles(b, N, D, L, dtype)


def _chunks(b: Bench, x: Tensor, w: Tensor, labels: Tensor) -> None:
    chunks = [b.size(n, 100) for n in (1 << 14, 1 << 16, 1 << 17, 1 << 18, 5 << 16, 5 << 18)]
    for chunk in dict.fromkeys(chunks):
        times = b.time(kernel_step(b, x, w, labels, chunk=chunk, value=True))
        b.emit(
            part="tune", dtype=NAMES[w.dtype], kernel="all", chunk=chunk,
            **{"ms": 1e3 * times.device, "ms in a row": 1e3 * times.whole},
        )  # fmt: skip


def _tiles(b: Bench, rows: int, features: int, outputs: int, dtype: torch.dtype) -> None:
    """The search of `elmo-compile tune`, a row each tile; nothing is written down."""
    case = Case(rows=rows, features=features, outputs=outputs, dtype=dtype, device=b.device)
    row = {"part": "tune", "dtype": NAMES[dtype]}

    def told(trial: Trial) -> None:
        named = {**row, "kernel": trial.field, "tile": trial.tile}
        if trial.failed is not None:
            b.emit(**named, failed=trial.failed)
        elif trial.seconds is not None:
            b.emit(**named, ms=1e3 * trial.seconds)

    small = [Tile(16, 32, 32, 1, 1), Tile(32, 32, 32, 1, 1)]
    tiny = {"logits_narrow": small, "shared": [small[0], None]} if b.dry else None
    result = tune_tiles(case, told=told, listed=tiny, timer=lambda step: b.time(step).device)
    for field, kept in result.kept.items():
        b.emit(**row, kernel=field, tile=kept.tile, best=1e3 * kept.seconds)
    b.emit(**row, kernel="all", before=1e3 * result.before, after=1e3 * result.after)
