"""Updates from gradients that exist: the same arithmetic and rounding as the fused ones.

Every parameter is seen as a matrix [R, D]: [..., D] as it is, [D] as one row (as [D, 1] where the
state is a number a row), a complex one by its real numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor

from elmo_compile.errors import OptionError
from elmo_compile.numerics.blockwise import Blockwise
from elmo_compile.numerics.update import Update
from elmo_compile.ops.rows import update_matrices, update_some_rows

Item = tuple[Tensor, Tensor, Update]


def apply_updates(items: Iterable[Item]) -> None:
    """Update parameters in place, each (parameter, its gradient, its update).

    Raises:
        OptionError: a sparse gradient that the update cannot honour. Nothing is modified.
    """
    dense: list[Item] = []
    sparse: list[Item] = []
    for item in items:
        (sparse if item[1].is_sparse else dense).append(item)
    for _, _, update in sparse:
        _check_sparse(update)
    matrices = [_Matrix(*item) for item in dense]
    update_matrices([(m.w_RD, m.grad_RD, m.update) for m in matrices])
    for matrix in matrices:
        matrix.write_back()
    for param, grad, update in sparse:
        grad = grad.coalesce()
        rows_K, values = grad.indices()[0], grad.values()
        if rows_K.numel():
            width = values[0].numel()
            w_RD = param.view(-1, width)
            update_some_rows(w_RD, rows_K, values.reshape(-1, width), update)


class _Matrix:
    """A parameter, its gradient and its state as contiguous matrices."""

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
        if not update.row_wise:
            state = tuple(
                s if isinstance(s, Blockwise) else self._rows(s, shape) for s in update.state
            )
            update = dataclasses.replace(update, state=state)
        if update.compensates_all and update.compensation is not None:
            compensation = self._rows(update.compensation, shape)
            update = dataclasses.replace(update, compensation=compensation)
        self.update = update

    @staticmethod
    def _shape(param: Tensor, update: Update) -> tuple[int, int]:
        if param.dim() < 2:
            return (param.numel(), 1) if update.row_wise else (1, param.numel())
        columns = param.shape[-1]
        return (param.numel() // columns if columns else 0, columns)

    def _rows(self, t: Tensor, shape: tuple[int, int]) -> Tensor:
        """t as a contiguous matrix: a view, or a copy that `write_back` brings home."""
        t = t.detach()
        if t.is_contiguous():
            return t.view(shape)
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
