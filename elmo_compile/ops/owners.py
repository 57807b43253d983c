"""Who updates a head's weight: the registry that connects a Parameter to an optimizer at run time.

Dynamo does not guard on the identity of a parameter, so a compiled graph may be called with another
model's weight. The owner is therefore looked up from the actual Parameter at every call, and a
compiled graph carries only a `handle` tensor holding the owner's key and a ticket.
"""

from __future__ import annotations

import itertools
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from elmo_compile.errors import FusedUpdateError, InputError
from elmo_compile.numerics.update import Update
from elmo_compile.ops.kept import about_to_change

_MAX_OPEN_LOSSES = 256


class Owner:
    """One weight whose update is fused into its head's backward.

    The optimizer holds its owners; the registry holds them weakly, so that a discarded optimizer
    stops updating.
    """

    def __init__(self, param: Tensor, name: str, next_update: Callable[[], Update]) -> None:
        self.param = param
        self.name = name
        self.key = next(_keys)
        self.next_update = next_update
        """Reads the hyper-parameters now and returns the update to apply; counts nothing."""
        self.on_update: Callable[[], None] = lambda: None
        """Called after an update was applied."""
        self.updates = 0
        """Updates so far in this process: the ticket a forward takes."""
        self.pending = False
        """An update was applied that no `opt.step()` has acknowledged."""
        self.inconsistent = False
        """A backward died while the weight was being written."""
        self.superseded = False
        """Another optimizer took this weight over."""
        self.in_use = False
        """A compiled graph fuses this weight's update."""
        self.replaced_by_unowned = False
        """Since its last update the head was called, gradients on, with a weight nobody owns."""
        self.invalid: Tensor | None = None
        """CUDA: int32 flag, non-zero once an input was invalid and the update was not applied."""
        self.accumulate_node: Any = None
        self.filling: int | None = None
        """The serial of the call whose backward is updating the weight now."""
        self._open_losses: OrderedDict[int, Tensor] = OrderedDict()
        self._unread: dict[int, Callable[[], Tensor]] = {}

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

    def fill_loss(self, serial: int, value: Tensor) -> None:
        """Write the value into the loss tensor that this forward returned."""
        loss = self._open_losses.pop(serial, None)
        if loss is not None:
            loss.copy_(value.reshape(loss.shape))

    def check_ticket(self, ticket: int) -> None:
        """Raise FusedUpdateError if a backward for `ticket` must not update the weight."""
        if self.superseded:
            raise FusedUpdateError(
                f"the head weight {self.name} was taken over by a newer optimizer after this "
                "forward; run the forward again"
            )
        self.check_consistent()
        if ticket != self.updates:
            raise FusedUpdateError(
                f"the head weight {self.name} was already updated since this forward, so its "
                "gradient would be taken at other weights. Run one backward per forward, and "
                "opt.step() between them; to run several backwards, construct the optimizer with "
                "fused=False (gradient accumulation needs update_at='step' or fused=False)"
            )
        if self.pending:
            raise FusedUpdateError(
                f"a second backward would update the head weight {self.name} before opt.step() "
                "was called (the step of the elmo_compile optimizer that owns it; delete that "
                "optimizer if another one trains the weight now). Call it after every backward; to "
                "accumulate gradients use update_at='step' with accumulate=, or fused=False"
            )

    def check_consistent(self) -> None:
        """Raise FusedUpdateError if the weight was left half updated."""
        if self.inconsistent:
            raise FusedUpdateError(
                f"the head weight {self.name} is inconsistent: a backward stopped while it was "
                "being updated. Load it and the optimizer's state from the last checkpoint"
            )

    def check_step(self) -> None:
        """Raise if `opt.step()` must not acknowledge this weight's update.

        FusedUpdateError: see `SGD.step`. InputError: as `check_invalid`.
        """
        if self.superseded:
            raise FusedUpdateError(
                f"the head weight {self.name} belongs to a newer elmo_compile optimizer; step that "
                "one"
            )
        self.check_consistent()
        if self.in_use and self.pending and self.param.grad is not None:
            raise FusedUpdateError(
                f"the head weight {self.name} was updated inside backward() and also received a "
                "dense gradient: another use of the weight (a tied embedding, a penalty, an "
                "uncompiled call) is outside the compiled head, or an older gradient was left in "
                ".grad. Construct the optimizer with fused=False, use the weight in one place, or "
                "clear gradients with zero_grad(set_to_none=True)"
            )
        if self.in_use and self.replaced_by_unowned and not self.pending:
            raise FusedUpdateError(
                f"the head weight {self.name} was replaced: the model now trains with a Parameter "
                "that this optimizer does not own (load_state_dict(assign=True)?). Construct the "
                "optimizer again from the model's parameters"
            )
        self.check_invalid()

    def check_invalid(self) -> None:
        """Raise InputError if, on CUDA, an invalid input kept an update from being applied.

        Waits for the device to have finished the head's backward.
        """
        if self.invalid is not None:
            flag, self.invalid = self.invalid, None
            if int(flag):
                raise InputError(
                    f"the features, targets or upstream gradient of the head {self.name} were "
                    "invalid (NaN, infinity or a label out of range); its update was not applied"
                )

    @contextmanager
    def applying(self, serial: int | None = None) -> Iterator[None]:
        """Around the writes of one update: marks the weight inconsistent if they do not finish.

        Args:
            serial: of the call whose backward this is.
        """
        self.filling = serial
        about_to_change(self.param)
        self.inconsistent = True
        yield
        torch.autograd.graph.increment_version(self.param)
        self.updates += 1
        self.pending = True
        self.replaced_by_unowned = False
        self._open_losses.clear()
        self.on_update()
        self.inconsistent = False


_keys = itertools.count(1)
_serials = itertools.count(1)
_by_param: WeakIdKeyDictionary = WeakIdKeyDictionary()
_by_key: weakref.WeakValueDictionary[int, Owner] = weakref.WeakValueDictionary()


def register(owner: Owner) -> None:
    """Make `owner` the one that updates its parameter; an earlier owner is superseded."""
    previous = owner_of(owner.param)
    if previous is not None:
        previous.superseded = True
        previous._open_losses.clear()
    _by_param[owner.param] = weakref.ref(owner)
    _by_key[owner.key] = owner


def unregister(owner: Owner) -> None:
    """Forget `owner`; its parameter gets an ordinary gradient again."""
    if owner_of(owner.param) is owner:
        del _by_param[owner.param]
    _by_key.pop(owner.key, None)


def owner_of(param: Tensor) -> Owner | None:
    """The live owner of this very Parameter object, or None."""
    reference = _by_param.get(param)  # type: ignore[no-untyped-call]
    return None if reference is None else reference()


def owner_by_key(key: int) -> Owner:
    """The owner a handle names. Raises FusedUpdateError if its optimizer is gone."""
    owner = _by_key.get(key)
    if owner is None:
        raise FusedUpdateError(
            "the optimizer that owned this head was deleted between forward and backward; keep it "
            "alive until backward() has run"
        )
    return owner


def live_owners() -> list[Owner]:
    """Every live owner in this process."""
    return list(_by_key.values())


def new_serial() -> int:
    """A number that names one forward call."""
    return next(_serials)
