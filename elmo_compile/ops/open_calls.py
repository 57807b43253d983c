"""What forwards of a fused head leave for their backwards: losses to fill in, logits to use."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable

from torch import Tensor

_MAX_OPEN_LOSSES = 256
"""Losses without a value that wait for their backward, of those that cannot compute themselves."""


class OpenLoss:
    """The loss tensor of one forward, and how its value is computed until it has one.

    Args:
        loss: what the graph returned.
        value: computes the value with the weight as it is.
        read: what that reads of tensors that others may write to (dense targets).
    """

    def __init__(
        self, loss: Tensor, value: Callable[[], Tensor] | None = None, read: Tensor | None = None
    ) -> None:
        self.loss = loss.detach()
        self.value, self.read = value, read
        self.filled = False

    def fill(self, value: Tensor) -> None:
        """Write the value, if there is none yet; what it is computed from is dropped."""
        if not self.filled:
            self.loss.copy_(value.reshape(self.loss.shape))
        self.filled = True
        self.drop_value()

    def drop_value(self) -> None:
        """Hold nothing that the value is computed from."""
        self.value = self.read = None


class OpenCalls:
    """The calls of one head whose backward has not run, by their serial."""

    def __init__(self) -> None:
        self.filling: int | None = None
        """The serial of the call whose backward is updating the weight now."""
        self._open: weakref.WeakValueDictionary[int, OpenLoss] = weakref.WeakValueDictionary()
        self._kept_open: deque[OpenLoss] = deque(maxlen=_MAX_OPEN_LOSSES)
        self._unread: dict[int, tuple[Callable[[], Tensor], Tensor | None]] = {}
        self._held: dict[int, Tensor] = {}

    def open_loss(self, serial: int, loss: Tensor) -> OpenLoss:
        """The loss of one forward, which its backward fills in as long as somebody holds it, and
        with it what `leave_value` kept."""
        made = OpenLoss(loss, *self._unread.pop(serial, (None, None)))
        self._open[serial] = made
        return made

    def keep_open(self, loss: OpenLoss) -> None:
        """Hold a loss that nobody computes before its backward."""
        loss.drop_value()
        self._kept_open.append(loss)

    def leave_value(
        self, serial: int, value: Callable[[], Tensor], read: Tensor | None = None
    ) -> None:
        """Keep, until the call returns, how its loss would be computed (see `OpenLoss`)."""
        self._unread = {serial: (value, read)}

    def hold(self, serial: int, logits: Tensor) -> None:
        """Keep the logits of one forward for its backward; those of an earlier one are dropped."""
        self._held = {serial: logits}

    def take_held(self, serial: int) -> Tensor | None:
        """What `hold` kept."""
        return self._held.pop(serial, None)

    def fill_loss(self, serial: int, value: Tensor) -> None:
        """Write the value into the loss tensor that this forward returned."""
        loss = self._open.pop(serial, None)
        if loss is not None:
            loss.fill(value)

    def forget_calls(self) -> None:
        """The weight has changed: no backward of theirs may come."""
        self._open.clear()
        self._kept_open.clear()
        self._held.clear()
