"""Updates of every rule, rounding and state dtype, for weights of a given shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from elmo_compile.numerics.update import Update

BF16, E5M2 = torch.bfloat16, torch.float8_e5m2


def _numbers(shape: tuple[int, ...], dtype: torch.dtype, unit: float = 1.0) -> Tensor:
    """Small multiples of `unit`, of both signs."""
    count = torch.Size(shape).numel()
    values = torch.arange(count, dtype=torch.float32).remainder_(13).sub_(6).mul_(unit)
    return values.view(shape).to(dtype)


def sgd(rows: int, columns: int, **options: Any) -> Update:
    return Update(lr=205 / 2**14, **options)


def momentum(rows: int, columns: int, dtype: torch.dtype, **options: Any) -> Update:
    state = (_numbers((rows, columns), dtype, 0.25),)
    return sgd(rows, columns, beta1=0.5, state=state, **options)


def adamw(rows: int, columns: int, dtype: torch.dtype, **options: Any) -> Update:
    m = _numbers((rows, columns), dtype, 0.25)
    v = _numbers((rows, columns), dtype, 0.125).abs()
    return Update(
        rule="adamw", lr=0.0123, weight_decay=0.01, beta1=0.75, beta2=0.875, eps=1e-8,
        state=(m, v), **options,
    )  # fmt: skip


def lion(rows: int, columns: int, dtype: torch.dtype, **options: Any) -> Update:
    state = (_numbers((rows, columns), dtype, 0.25),)
    return Update(
        rule="lion", lr=0.0123, weight_decay=0.01, beta1=0.75, beta2=0.875, state=state, **options
    )


def adagrad(rows: int, columns: int, **options: Any) -> Update:
    state = (_numbers((rows,), torch.float32).abs(),)
    return Update(rule="adagrad", lr=0.0123, eps=1e-10, state=state, **options)


def kahan(rows: int, columns: int, base: Update, dtype: torch.dtype, every: int = 1) -> Update:
    """`base` with compensation of every row, or of every n-th."""
    ids = None if every == 1 else torch.arange(1, rows, every)
    count = rows if ids is None else len(ids)
    c = _numbers((count, columns), torch.float32, 2.0**-12).to(dtype)
    return dataclasses.replace(base, compensation=c, kahan_rows=ids)


Maker = Callable[[int, int], Update]

UPDATES: dict[str, Maker] = {
    "sgd": sgd,
    "nearest": lambda r, c: sgd(r, c, rounding="nearest"),
    "decay": lambda r, c: sgd(r, c, weight_decay=0.125, step=2**40 + 1),
    "momentum": lambda r, c: momentum(r, c, torch.float32, weight_decay=0.01),
    "momentum, nearest": lambda r, c: momentum(r, c, torch.float32, rounding="nearest"),
    "nesterov, bf16": lambda r, c: momentum(r, c, BF16, nesterov=True),
    "eco": lambda r, c: momentum(r, c, BF16, eco=True),
    "adamw": lambda r, c: adamw(r, c, torch.float32),
    "adamw, bf16": lambda r, c: adamw(r, c, BF16),
    "adamw, nearest": lambda r, c: adamw(r, c, BF16, rounding="nearest"),
    "adamw, eco": lambda r, c: adamw(r, c, BF16, eco=True),
    "lion, bf16": lambda r, c: lion(r, c, BF16),
    "adagrad": adagrad,
    "kahan": lambda r, c: kahan(r, c, sgd(r, c), BF16),
    "kahan, e5m2": lambda r, c: kahan(r, c, sgd(r, c), E5M2),
    "kahan, adamw": lambda r, c: kahan(r, c, adamw(r, c, BF16), BF16),
    "kahan rows": lambda r, c: kahan(r, c, sgd(r, c), BF16, every=7),
    "kahan rows, adamw, e5m2": lambda r, c: kahan(r, c, adamw(r, c, BF16), E5M2, every=3),
    "kahan rows, adagrad, nearest": lambda r, c: kahan(
        r, c, adagrad(r, c, rounding="nearest"), BF16, every=5
    ),
    "a shard far down": lambda r, c: sgd(r, c, row_offset=2**32 - 40),
}


def with_copies(update: Update, device: str = "cpu") -> Update:
    """The same update with state of its own, on a device."""

    def copy(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(device, copy=True)

    return dataclasses.replace(
        update,
        state=tuple(s.to(device, copy=True) for s in update.state),
        compensation=copy(update.compensation),
        kahan_rows=copy(update.kahan_rows),
    )


def tensors(update: Update) -> dict[str, Tensor]:
    """What an update writes besides the weight, by name."""
    found = {f"state {i}": s for i, s in enumerate(update.state)}
    if update.compensation is not None:
        found["compensation"] = update.compensation
    return found
