"""Who updates a head's weight: the registry that connects a Parameter to an optimizer at run time.

Dynamo does not guard on the identity of a parameter, so a compiled graph may be called with another
model's weight. The owner is therefore looked up from the actual Parameter at every call, and a
compiled graph carries only a `handle` tensor holding the owner's key and a ticket.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from elmo_compile.errors import FusedUpdateError, InputError
from elmo_compile.numerics.capture import capturing
from elmo_compile.numerics.state_size import StateSize
from elmo_compile.numerics.update import Update
from elmo_compile.ops.counters import Counters
from elmo_compile.ops.device_flag import DeviceFlag
from elmo_compile.ops.dtensors import local_of
from elmo_compile.ops.kept import about_to_change
from elmo_compile.ops.kept_gradients import KeptGradients
from elmo_compile.ops.open_calls import OpenCalls
from elmo_compile.ops.reached import reaches_two_losses, reaches_values
from elmo_compile.ops.replays import Replays
from elmo_compile.ops.second_pass import Kept, apply, current_task, for_kept


class Owner(KeptGradients, OpenCalls):
    """One weight whose update is fused into its head's backward.

    The optimizer holds its owners; the registry holds them weakly, so that a discarded optimizer
    stops updating.
    """

    def __init__(self, param: Tensor, name: str, next_update: Callable[[], Update]) -> None:
        super().__init__(param, name)
        self.key = next(_keys)
        self.next_update = next_update
        """Reads the hyper-parameters now and returns the update to apply; counts nothing."""
        self.on_update: Callable[[Tensor | None], None] = lambda guard: None
        """Called after an update was applied, unless the device finds that `guard` is not zero."""
        self.state_sizes: Callable[[], list[StateSize]] = list
        """What the optimizer keeps for the weight, or will."""
        self.counters = Counters()
        self.updates = 0
        """Updates so far in this process, but for replays of CUDA graphs."""
        self.replays = Replays()
        self.pending = False
        """An update was applied that no `opt.step()` has acknowledged."""
        self.inconsistent = False
        """A backward died while the weight was being written."""
        self.other_steps = 0
        """Steps of other optimizers over this weight while it waited for its own."""
        self._replaced_by: weakref.ref[Tensor] | None = None
        self.invalid = DeviceFlag()
        """CUDA: an input was invalid and the update was not applied."""
        self.spoiled = DeviceFlag()
        """CUDA: an update stored what is not finite."""
        self.accumulate_node: Any = None
        """Of the last forward, until the weight is updated: kept longer it would outlive its
        stream, and a CUDA graph captured on another one could not hold the next backward."""

    def check_values(self, ticket: int, version: int) -> None:
        """Raise FusedUpdateError if somebody else wrote to the weight since the forward.

        Args:
            ticket: of the forward; the owner's own updates are `check_ticket`'s.
            version: of the weight, in the forward.
        """
        if version != self.param._version and ticket == self.ticket():
            raise FusedUpdateError(
                f"the head weight {self.name} was modified in place between forward and backward "
                "(another optimizer, load_state_dict, a write under no_grad), so its gradient "
                "would be taken at other weights. Modify it before the forward or after "
                "opt.step()"
            )

    def check_ticket(self, ticket: int) -> None:
        """Raise FusedUpdateError if a backward for `ticket` must not update the weight."""
        self._check_owned(ticket)
        self.give_up_capture()
        if self.pending and self.policy().accumulate != "step_each":
            raise FusedUpdateError(
                f"a second backward would update the head weight {self.name} before opt.step() "
                "was called (the step of the elmo_compile optimizer that owns it; delete that "
                "optimizer if another one trains the weight now). Call it after every backward; to "
                "accumulate gradients use update_at='step' with accumulate='stash', or fused=False"
            )
        if self._has_gradient():
            raise self._beside_a_gradient("would be updated inside backward(), but has a")
        if reaches_two_losses(self.param):
            raise FusedUpdateError(
                f"one backward reaches two losses of the head weight {self.name}, and each would "
                "update it; nothing was changed. Compile the function that computes their sum, "
                "construct the optimizer with update_at='step' and accumulate='stash', which adds "
                "them up, or with fused=False"
            )
        if reaches_values(self.param):
            raise FusedUpdateError(
                f"one backward reaches a loss that would update the head weight {self.name} and "
                "values of its logits, whose gradient would be taken at other weights; nothing "
                "was changed. Compile the function that computes both, take both from what "
                "streams (docs/logits.md), or construct the optimizer with update_at='step'"
            )

    def check_keep(self, ticket: int) -> None:
        """Raise FusedUpdateError if a backward for `ticket` must not add to what is kept."""
        self._check_owned(ticket)
        self.give_up_capture()
        again = bool(self.kept) and self.kept[-1].task != current_task()
        if again and self.policy().accumulate == "error":
            raise FusedUpdateError(
                f"a second backward reached the head weight {self.name} before opt.step() or "
                "opt.zero_grad() was called. To accumulate gradients construct the optimizer with "
                "accumulate='stash'"
            )

    def ticket(self) -> int:
        """What a forward takes and its backward must still find: how often the weight changed."""
        return self.updates + self.replays.made()

    def give_up_capture(self) -> None:
        """Forget a backward that was captured without its step: the capture failed."""
        if self._captured_flags() and not capturing(self.param.device):
            self.pending = False
            self._clear_flags()
            self.forget_kept()

    def captured_wrong(self) -> list[Tensor]:
        """In a CUDA graph: int32 scalars, not zero where this step is to change nothing."""
        return [*self.invalid.captured, *self.spoiled.captured]

    def _captured_flags(self) -> list[Tensor]:
        return [*self.captured_wrong(), *self._kept_invalid.captured]

    def _clear_flags(self) -> None:
        self.invalid.clear()
        self.spoiled.clear()

    def notice_stored(self, finite: Tensor, guard: Tensor | None = None) -> None:
        """An update was made from a gradient of which `finite` (bool) tells what it says.

        Args:
            guard: as `applying` was given it.

        Raises:
            InputError: it was not, on a CPU; elsewhere `check_invalid` raises.
        """
        if self.param.is_cuda:
            bad = ~finite if guard is None else ~finite & (guard == 0)
            self.spoiled.add(bad.to(torch.int32))
        elif not bool(finite):
            self._raise_spoiled()

    def _raise_spoiled(self) -> None:
        self.inconsistent = True
        raise InputError(
            f"the gradient of the head {self.name} was not finite (NaN or infinity in its targets, "
            "or logits that overflow), which shows only after the update: the weight now holds NaN "
            "or infinity. Load it and the optimizer's state from the last checkpoint; with "
            "update_at='step' nothing would have been stored"
        )

    def _check_owned(self, ticket: int) -> None:
        if self.superseded:
            raise FusedUpdateError(
                f"the head weight {self.name} was taken over by a newer optimizer after this "
                "forward; run the forward again"
            )
        self.check_consistent()
        if ticket != self.ticket():
            raise FusedUpdateError(
                f"the head weight {self.name} was already updated since this forward, so its "
                "gradient would be taken at other weights: by another loss of the same backward, "
                "by another backward, or by opt.step(). Compile the function that adds the losses "
                "up, run backward() and opt.step() before the next forward, or construct the "
                "optimizer with update_at='step' (several uses and backwards are added up) or "
                "fused=False"
            )

    def check_consistent(self) -> None:
        """Raise FusedUpdateError if the weight was left half updated."""
        if self.inconsistent:
            raise FusedUpdateError(
                f"the head weight {self.name} is inconsistent: a backward stopped while it was "
                "being updated, or stored NaN in it. Load it and the optimizer's state from the "
                "last checkpoint"
            )

    def notice_replacement(self, weight: Tensor) -> None:
        """The head was called, gradients on, with `weight` in this one's place."""
        self._replaced_by = weakref.ref(weight)

    @property
    def replaced_by_unowned(self) -> bool:
        """Whether that was so since the last update, and nobody owns that weight yet."""
        weight = None if self._replaced_by is None else self._replaced_by()
        return weight is not None and owner_of(weight) is None

    def check_step(self) -> None:
        """Raise if `opt.step()` must not acknowledge this weight's update.

        FusedUpdateError: see `SGD.step`. InputError: as `check_invalid`.
        """
        if self.superseded and not (self.in_use or self._heir_in_use()):
            return  # Two optimizers of an ordinary matrix, as torch has it.
        if self.superseded:
            raise FusedUpdateError(
                f"the head weight {self.name} belongs to a newer elmo_compile optimizer; step that "
                "one"
            )
        self.check_consistent()
        if self.in_use and self.pending and self._has_gradient():
            raise self._beside_a_gradient("was updated inside backward() and also received a")
        if self.in_use and self.replaced_by_unowned and not (self.pending or self.kept):
            raise FusedUpdateError(
                f"the head weight {self.name} was replaced: the model now trains with a Parameter "
                "that this optimizer does not own (load_state_dict(assign=True), "
                "dequantize_head()?). Construct the optimizer again from the model's parameters, "
                "or add it by add_param_group()"
            )
        if self.kept:
            self._check_unchanged()
        self.check_invalid()

    def _beside_a_gradient(self, what: str) -> FusedUpdateError:
        return FusedUpdateError(
            f"the head weight {self.name} {what} dense gradient: another use of the weight (a tied "
            "embedding, a penalty, logits whose values were made, an uncompiled call) is outside "
            "the compiled head, or an older gradient was left in .grad. Construct the optimizer "
            "with update_at='step', which adds them up, or with fused=False, use the weight in one "
            "place, or clear gradients with zero_grad()"
        )

    def _has_gradient(self) -> bool:
        """Whether `.grad` says anything: zero_grad(set_to_none=False) leaves zeros there."""
        grad = self.param.grad
        if grad is None or grad.is_sparse or capturing(self.param.device):
            return grad is not None
        return bool(local_of(grad).any())

    def _heir_in_use(self) -> bool:
        heir = owner_of(self.param)
        return heir is not None and heir.in_use

    def check_invalid(self) -> None:
        """Raise InputError if, on CUDA, an invalid input kept an update from being applied.

        Waits until the device has looked at the head's inputs, not for what follows them. While a
        CUDA graph is captured nothing is known yet.

        Raises:
            FusedUpdateError: the backward is in a CUDA graph that `opt.step()` is not in.
        """
        if capturing(self.param.device):
            return
        if self._captured_flags():
            raise FusedUpdateError(
                f"backward() of the head weight {self.name} was captured in a CUDA graph, and "
                "opt.step() is called outside it. Capture both in one graph: the rest of a step "
                "must not be applied where the head's input was invalid. After a capture that "
                "failed call opt.zero_grad()"
            )
        wrong, spoiled = self.invalid.is_set(), self.spoiled.is_set()
        self._clear_flags()
        if spoiled:
            self._raise_spoiled()
        if wrong:
            raise InputError(
                f"the features, targets or upstream gradient of the head {self.name} were "
                "invalid (NaN, infinity or a label out of range); its update was not applied"
            )

    def keep(self, kept: Kept, reduce_over: Any = None) -> None:
        """As `KeptGradients.keep`; the weight is this one."""
        super().keep(kept, reduce_over)
        self._replaced_by = None

    def apply_kept(self, factor: Any = None, guard: Tensor | None = None) -> None:
        """Update the weight from what was kept, its gradient times `factor`.

        Args:
            guard: None, or one int32 on the device (CUDA): not zero leaves everything as it is.
        """
        if not self.kept:
            return
        parts = [*self.kept, *self._dense]
        update = for_kept(parts, self.next_update())
        if guard is not None:
            guard = guard.to(self.param.device) if self.param.is_cuda else None
        for one in parts:
            if factor is not None:
                one.times_(factor.to(self.param.device))
        with self.applying(guard=guard):
            apply(parts, self.weight, update, guard=guard)
        self.forget_kept()

    def close_step(self) -> None:
        """`opt.step()` is over: the next backward may come."""
        self.pending = False
        self.other_steps = 0
        self._clear_flags()
        self.forget_kept()

    @contextmanager
    def applying(self, serial: int | None = None, guard: Tensor | None = None) -> Iterator[None]:
        """Around the writes of one update: marks the weight inconsistent if they do not finish.

        Args:
            serial: of the call whose backward this is.
            guard: None, or one int32 on the device: not zero leaves everything as it is.
        """
        self.filling = serial
        about_to_change(self.param)
        self.counters.before(self.weight, self.updates)
        if self.policy().capturable:
            self.replays.prepare(self.param.device)
        self.inconsistent = True
        yield
        torch.autograd.graph.increment_version(self.param)
        self.counters.after(self.weight)
        self.updates += 1
        self.accumulate_node = None
        if capturing(self.param.device):
            self.replays.captured()
        self.pending = True
        self._replaced_by = None
        self.forget_calls()
        self.on_update(guard)
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
        previous.forget_calls()
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


def replayed_updates(param: Tensor) -> int:
    """Updates of a parameter by replays of CUDA graphs, which its version does not count."""
    owner = owner_of(param)
    return 0 if owner is None else owner.replays.made()


def live_owners() -> list[Owner]:
    """Every live owner in this process."""
    return list(_by_key.values())


def update_shares() -> dict[str, dict[str, float]]:
    """The counters of every fused head, by its name."""
    return {o.name: o.counters.shares(o.updates) for o in live_owners() if o.in_use}


def new_serial() -> int:
    """A number that names one forward call."""
    return next(_serials)
