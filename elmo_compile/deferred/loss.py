"""A loss whose value its backward fills in, and which computes itself if it is read before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from elmo_compile.deferred.origin import FAKES, fake
from elmo_compile.deferred.state import State, version
from elmo_compile.deferred.step import Step
from elmo_compile.deferred.tensor import Deferred
from elmo_compile.errors import StaleLogitsError
from elmo_compile.ops.kept import watch
from elmo_compile.ops.owners import Owner


class Loss(State):
    """The loss of one forward of a fused head.

    Args:
        loss: what the graph returned, without a value; the backward of the call fills it in.
        owner: of the head's weight.
        serial: of the call.
        value: computes the value with the weight as it is.
    """

    def __init__(
        self, loss: Tensor, owner: Owner, serial: int, value: Callable[[], Tensor]
    ) -> None:
        with FAKES:
            super().__init__(fake(loss))
        self.loss = loss.detach()
        self._owner, self._serial, self._value = owner, serial, value
        self._version = version(owner.param)
        watch(owner.param, self)

    @property
    def available(self) -> bool:
        return True

    def remake(self, steps: Sequence[Step]) -> Tensor:
        made = self._filled()
        for step in steps:
            made = step(made)
        return made

    def _make(self) -> Tensor:
        return self._filled().clone()  # What is written into the loss is not its value.

    def _filled(self) -> Tensor:
        if self._owner.is_open(self._serial):
            if version(self._owner.param) != self._version:
                raise StaleLogitsError(
                    f"the loss was not computed yet, and the head weight {self._owner.name} has "
                    "changed since its forward; read it before, or compile with "
                    "options={'loss_value': 'exact'}"
                )
            self._owner.fill_loss(self._serial, self._value())
        return self.loss

    def before_change(self) -> None:
        """Another backward, or a step, is about to change the weight."""
        if self.outlives_capture:
            return
        if self._owner.is_open(self._serial) and self._owner.filling != self._serial:
            self.real()

    def top(self) -> None:
        return None


class DeferLoss(torch.autograd.Function):
    """The loss as it is, in a tensor that computes itself."""

    @staticmethod
    def forward(ctx: Any, state: Loss, loss: Tensor) -> Tensor:
        return Deferred(state)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, grads[0]


def defer_loss(loss: Tensor, owner: Owner, serial: int, value: Callable[[], Tensor]) -> Tensor:
    """The loss of one forward as a tensor that has its value when it is read."""
    made: Tensor = DeferLoss.apply(Loss(loss, owner, serial, value), loss)  # type: ignore[no-untyped-call]
    return made
