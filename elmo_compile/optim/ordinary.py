"""Updates from gradients that exist: the same arithmetic and rounding as the fused ones.

Every parameter is seen as a matrix [R, D]: [..., D] as it is, [D] as one row (as [D, 1] where the
state is a number a row), a complex one by its real numbers.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from elmo_compile.errors import OptionError
from elmo_compile.numerics.blockwise import Blockwise
from elmo_compile.numerics.update import Update
from elmo_compile.ops.dtensors import is_sharded
from elmo_compile.ops.rows import update_matrices, update_some_rows
from elmo_compile.optim.sharded import Shard


class Gradient(NamedTuple):
    """A parameter, its gradient, its next update."""

    param: Tensor
    grad: Tensor
    update: Update
    factor: Tensor | None = None
    """What the gradient is to be multiplied with, a scalar; the tensor stays as it is."""


def check_updates(items: Iterable[Gradient]) -> None:
    """Raise OptionError for a sparse gradient that its update cannot honour."""
    for item in items:
        if item.grad.is_sparse:
            _check_sparse(item.update)


def apply_updates(items: Iterable[Gradient], guard: Tensor | None = None) -> None:
    """Update parameters in place. `check_updates` comes first.

    Args:
        guard: None, or one int32 on the device (CUDA): not zero leaves everything as it is.
    """
    matrices, shards = [], []
    for item in items:
        if item.grad.is_sparse:
            _update_rows(item)
            continue
        parts: Any = item[:3]
        if is_sharded(item.param):
            shards.append(Shard(*parts))
            parts = shards[-1].param, shards[-1].grad, shards[-1].update
        matrices.append(_Matrix(*parts))
        matrices[-1].factor = item.factor
    update_matrices([(m.w_RD, m.grad_RD, m.update, m.factor) for m in matrices], guard)
    for matrix in matrices:
        matrix.write_back()
    for shard in shards:
        shard.write_back()


def _update_rows(item: Gradient) -> None:
    grad = item.grad.coalesce()
    rows_K, values = grad.indices()[0], grad.values()
    if not rows_K.numel():
        return
    if item.factor is not None:
        wide = torch.float64 if values.dtype == torch.float64 else torch.float32
        values = values.to(wide) * item.factor.to(values.device, wide)
    width = values[0].numel()
    update_some_rows(item.param.view(-1, width), rows_K, values.reshape(-1, width), item.update)


class _Matrix:
    """A parameter, its gradient and its state as contiguous matrices."""

    factor: Tensor | None = None

    def __init__(self, param: Tensor, grad: Tensor, update: Update) -> None:
        self._copies: list[tuple[Tensor, Tensor]] = []
        if param.is_complex():
            update = dataclasses.replace(
                update,
                state=tuple(torch.view_as_real(s) for s in update.moments if isinstance(s, Tensor)),
            )
            param, grad = torch.view_as_real(param), torch.view_as_real(grad)
        shape = self._shape(param, update)
        self.w_RD = self._rows(param, shape)
        self.grad_RD = grad.reshape(shape)
        if not self.grad_RD.is_contiguous():
            self.grad_RD = self.grad_RD.contiguous()
        seen: dict[str, Any] = {}
        if not update.row_wise:
            seen["state"] = tuple(
                s if isinstance(s, Blockwise) else self._rows(s, shape) for s in update.state
            )
        if update.compensates_all and update.compensation is not None:
            seen["compensation"] = self._rows(update.compensation, shape)
        # Most are matrices already: a copy of the record for each parameter is felt on a GPU.
        same = all(map(operator.is_, seen.get("state", ()), update.state))
        if not same or seen.get("compensation", update.compensation) is not update.compensation:
            update = dataclasses.replace(update, **seen)
        self.update = update

    @staticmethod
    def _shape(param: Tensor, update: Update) -> tuple[int, int]:
        if param.dim() < 2:
            return (param.numel(), 1) if update.row_wise else (1, param.numel())
        columns = param.shape[-1]
        return (param.numel() // columns if columns else 0, columns)

    def _rows(self, t: Tensor, shape: tuple[int, int]) -> Tensor:
        """t as a contiguous matrix: a view, or a copy that `write_back` brings home."""
        if t.requires_grad:
            t = t.detach()
        if t.is_contiguous():
            return t if t.shape == shape else t.view(shape)
        copy = t.contiguous().view(shape)
        self._copies.append((t, copy))
        return copy

    def write_back(self) -> None:
        """Write what was updated in a copy."""
        for home, copy in self._copies:
            home.copy_(copy.view(home.shape))


def _check_sparse(update: Update) -> None:
    """Only rows with a gradient are touched: the rule must leave all others as they are."""
    stays = update.row_wise or (update.rule == "sgd" and not update.state)
    if update.weight_decay or update.compensation is not None or not stays:
        raise OptionError(
            "a sparse gradient is accepted where rows without one do not change: by SGD without "
            "momentum and by Adagrad, without weight_decay and without kahan. Use sparse=False, "
            "or torch.optim.SparseAdam"
        )
