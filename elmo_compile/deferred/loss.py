"""A loss whose value its backward fills in, and which computes itself if it is read before."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from elmo_compile.deferred.origin import FAKES, fake
from elmo_compile.deferred.state import State
from elmo_compile.deferred.step import Step
from elmo_compile.deferred.tensor import Deferred
from elmo_compile.deferred.unchanged import Sample, identity, version
from elmo_compile.errors import StaleLogitsError
from elmo_compile.ops.kept import watch
from elmo_compile.ops.open_calls import OpenLoss
from elmo_compile.ops.owners import Owner


class Loss(State):
    """The loss of one forward of a fused head.

    Args:
        owner: of the head's weight.
        serial: of the call.
        opened: what the graph returned, without a value; the backward of the call fills it in.
    """

    def __init__(self, owner: Owner, serial: int, opened: OpenLoss) -> None:
        with FAKES:
            super().__init__(fake(opened.loss))
        self._owner, self._serial, self._opened = owner, serial, opened
        self._weight, self._sample = identity(owner.param), Sample(owner.param)
        self._read_version = version(opened.read)
        watch(owner.param, self)

    @property
    def available(self) -> bool:
        return True

    @property
    def settled(self) -> bool:
        return self._opened.filled or super().settled

    def remake(self, steps: Sequence[Step]) -> Tensor:
        made = self._filled()
        for step in steps:
            made = step(made)
        return made

    def _make(self) -> Tensor:
        return self._filled().clone()  # What is written into the loss is not its value.

    def _filled(self) -> Tensor:
        opened = self._opened
        if not opened.filled:
            self._check_unchanged()
            assert opened.value is not None
            opened.fill(opened.value())
        return opened.loss

    def _check_unchanged(self) -> None:
        """Raise StaleLogitsError if what the value is computed from was written to."""
        weight = self._owner.param
        if identity(weight) != self._weight or not self._sample.holds():
            what = f"the head weight {self._owner.name} has"
        elif version(self._opened.read) != self._read_version:
            what = "its targets have"
        else:
            return
        raise StaleLogitsError(
            f"the loss was not computed yet, and {what} changed since its forward; read it before, "
            "or compile with options={'loss_value': 'exact'}"
        )

    def before_change(self) -> None:
        """Another backward, or a step, is about to change the weight."""
        if self.outlives_capture:
            return
        if not self._opened.filled and self._owner.filling != self._serial:
            # Too late already: it says so if it is read, which is no business of who changes.
            with contextlib.suppress(StaleLogitsError):
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


def defer_loss(loss: Tensor, owner: Owner, serial: int, opened: OpenLoss) -> Tensor:
    """The loss of one forward as a tensor that has its value when it is read."""
    made: Tensor = DeferLoss.apply(Loss(owner, serial, opened), loss)  # type: ignore[no-untyped-call]
    return made
