"""Tiles and chunks of the BCE step by time, for `elmo_compile/kernels/triton/configs.py`."""

from __future__ import annotations

import torch
from gpu_common import FP8, NAMES, Bench, Rows, fresh, kernel_step, weight

from elmo_compile.kernels.triton.configs import Tile, override_tiles


def tune(b: Bench) -> Rows:
    """Chunks of the BCE step, then each tile by itself: first dx and the update apart, then both in
    one pass."""
    N, D, L = b.size(128, 8), b.size(768, 32), b.size(1_305_265, 500)
    sides = [(128, 64), (128, 128), (128, 256), (64, 128), (256, 64)]
    apart: list[Tile | None] = [
        Tile(rows, columns, inner, warps, stages)
        for rows, columns in sides
        for inner, warps, stages in ((64, 8, 3), (64, 8, 4), (64, 4, 3), (128, 8, 2))
    ]
    shared: list[Tile | None] = [
        Tile(128, columns, inner, warps, stages)
        for columns, inner, warps in ((64, 64, 4), (64, 64, 8), (128, 64, 8), (64, 128, 8))
        for stages in (2, 3, 4)
    ]
    candidates = [
        ("shared", [None]), ("logits", apart), ("features", apart), ("weights", apart),
        ("shared", [None, *shared]),
    ]  # fmt: skip
    if b.dry:
        small: list[Tile | None] = [Tile(16, 32, 32, 1, 1)]
        candidates = [("shared", [None]), ("logits", small), ("shared", [None, *small])]
    rows: Rows = []
    for dtype in (torch.bfloat16, FP8):
        with fresh():
            x = torch.randn(N, D, device=b.device).bfloat16()
            w = weight(L, D, dtype, b.device)
            labels = torch.randint(0, L, (N, 5), device=b.device)
            for chunk in [b.size(n, 100) for n in (1 << 14, 1 << 16, 1 << 17, 1 << 18, 1 << 20)]:
                seconds = b.time(kernel_step(b, x, w, labels, chunk=chunk))
                row = {"part": "tune", "dtype": NAMES[dtype], "kernel": "all", "chunk": chunk}
                rows.append({**row, "ms": 1e3 * seconds})
            step = kernel_step(b, x, w, labels)
            best: dict[str, Tile | None] = {}
            for field, tiles in candidates:
                timed = {}
                for tile in tiles:
                    row = {"part": "tune", "dtype": NAMES[dtype], "kernel": field, "tile": tile}
                    try:
                        with override_tiles(**{**best, field: tile}):
                            timed[tile] = b.time(step)
                    except Exception as error:  # does not fit the chip: a result
                        rows.append({**row, "failed": type(error).__name__})
                        continue
                    rows.append({**row, "ms": 1e3 * timed[tile]})
                if timed:
                    best[field] = min(timed, key=lambda tile: timed[tile])
                    print(NAMES[dtype], field, best[field], 1e3 * timed[best[field]], flush=True)
    return rows
