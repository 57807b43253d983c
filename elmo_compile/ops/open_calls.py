"""What forwards of a fused head leave for their backwards: losses to fill in, logits to use."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor

_MAX_OPEN_LOSSES = 256


class OpenCalls:
    """The calls of one head whose backward has not run, by their serial."""

    def __init__(self) -> None:
        self.filling: int | None = None
        """The serial of the call whose backward is updating the weight now."""
        self._open_losses: OrderedDict[int, Tensor] = OrderedDict()
        self._unread: dict[int, Callable[[], Tensor]] = {}
        self._held: dict[int, Tensor] = {}

    def open_loss(self, serial: int, loss: Tensor) -> None:
        """Remember the loss tensor of one forward, to be filled in by its backward."""
        self._open_losses[serial] = loss.detach()
        while len(self._open_losses) > _MAX_OPEN_LOSSES:
            self._open_losses.popitem(last=False)

    def is_open(self, serial: int) -> bool:
        """Whether the loss of a forward still waits for its value."""
        return serial in self._open_losses

    def leave_value(self, serial: int, value: Callable[[], Tensor]) -> None:
        """Keep, until the call returns, how the value of its loss would be computed."""
        self._unread = {serial: value}

    def take_value(self, serial: int) -> Callable[[], Tensor] | None:
        """What `leave_value` kept."""
        return self._unread.pop(serial, None)

    def hold(self, serial: int, logits: Tensor) -> None:
        """Keep the logits of one forward for its backward; those of an earlier one are dropped."""
        self._held = {serial: logits}

    def take_held(self, serial: int) -> Tensor | None:
        """What `hold` kept."""
        return self._held.pop(serial, None)

    def fill_loss(self, serial: int, value: Tensor) -> None:
        """Write the value into the loss tensor that this forward returned."""
        loss = self._open_losses.pop(serial, None)
        if loss is not None:
            loss.copy_(value.reshape(loss.shape))

    def forget_calls(self) -> None:
        """The weight has changed: no backward of theirs may come."""
        self._open_losses.clear()
        self._held.clear()
