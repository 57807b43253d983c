"""What every optimizer of this package has in common: steps, updates, what is counted."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from elmo_compile.errors import FusedUpdateError, InputError
from elmo_compile.numerics.blockwise import Blockwise
from elmo_compile.numerics.philox import ROUNDING_VERSION
from elmo_compile.numerics.state_size import StateSize
from elmo_compile.numerics.update import Update
from elmo_compile.ops.dtensors import is_sharded
from elmo_compile.ops.kept import about_to_change
from elmo_compile.ops.owners import Owner, owner_of
from elmo_compile.optim import options, state, whole
from elmo_compile.optim.nothing_fused import nothing_fused
from elmo_compile.optim.on_device import Graphs, count, rate_of, step_of
from elmo_compile.optim.ordinary import Gradient, apply_updates, check_updates
from elmo_compile.optim.owning import OwningOptimizer
from elmo_compile.optim.sharded import check_sharded, local_update, stepping
from elmo_compile.optim.used import Applied, Used

_INNER = {"params", "param_ids", "param_names", "rounding_version"}
"""Entries of a group that nobody asked for."""


class HeadOptimizer(OwningOptimizer):
    """An optimizer that owns huge heads and rounds what it stores; a rule is a subclass."""

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        self._owners: list[Owner] = []
        self._next_id = 0
        self._ids: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._seen: list[list[Tensor]] = []
        self._owns: list[bool] = []
        self._warned = self._stepped = False
        self._skipped = 0
        self._graphs, self._used, self._applied = Graphs(), Used(defaults), Applied()
        super().__init__(params, defaults)

    # What a rule is

    _row_wise = False
    """Whether its state is a number a row."""

    def _slots(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Names of the state tensors, in the order of `Update.state`."""
        raise NotImplementedError

    def _rule(self, group: dict[str, Any]) -> dict[str, Any]:
        """The rule's fields of an update."""
        raise NotImplementedError

    def _slot(self, name: str, param: Tensor, group: dict[str, Any]) -> Tensor | Blockwise:
        """A state tensor, made at its first use, where its parameter is now."""
        return state.slot(
            self.state[param], name, param, group["state_dtype"], signed=name != "exp_avg_sq"
        )

    # Parameters

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with hyper-parameters of their own. Raises OptionError."""
        checked = {**self.defaults, **param_group}
        options.check_names(param_group)
        options.check_group(checked)
        given = param_group["params"]
        param_group["params"] = [given] if isinstance(given, Tensor) else list(given)
        if checked["kahan_rows"] is not None:
            asked = param_group.get("kahan_rows") is not None  # else it is every group's default
            rows = state.rows_of_group(checked, param_group["params"], asked=asked)
            param_group["kahan_rows"] = rows
        check_sharded(checked, param_group["params"], row_wise=self._row_wise)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["param_ids"] = [self._id_of(param) for param in group["params"]]
        group["rounding_version"] = ROUNDING_VERSION
        self._register()

    @property
    def skipped_steps(self) -> int:
        """Steps that were left out: by `nonfinite="skip"`, and replays of a CUDA graph that were
        given something invalid (for which the host waits)."""
        return self._skipped + self._graphs.skipped

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} ("]
        for number, group in enumerate(self.param_groups):
            lines.append(f"Parameter Group {number}")
            for name in sorted(group.keys() - _INNER):
                value = group[name]
                if isinstance(value, Tensor) and value.dim():
                    value = f"{value.numel()} rows"
                lines.append(f"    {name}: {value}")
        return "\n".join([*lines, ")"])

    # Steps

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient, and allow the next backward.

        With `update_at="step"` the heads are updated here, from what their backwards kept.

        Args:
            closure: called once, first, with gradients enabled: it clears gradients, makes the
                loss, calls backward and returns the loss, which `step` returns.

        Raises:
            FusedUpdateError: a fused head also received a dense gradient; another optimizer took a
                weight over; a weight is inconsistent or was replaced by one nobody owns; a head was
                updated by another rate than the group's of now. Nothing is modified.
            InputError: a head's input was invalid; no update of that head was applied, and nothing
                else is updated. Clear the gradients and go on.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            for member in self._members():  # the step's hook told whoever was there before it
                if member.param.grad is not None:
                    about_to_change(member.param)
        captured, wrong, skips = self._graphs.begin(self._members()), None, False
        self._check_groups()
        with torch.no_grad():
            try:
                with stepping(self._owners):
                    self._check_step()
                gradients = whole.Gradients(self._members(), self._owners)
                heads = [owner for owner in self._owners if owner.pending or owner.kept]
                if captured:
                    wrong = gradients.wrong_on_device(self._owners)
                else:
                    skips = gradients.must_skip()
            except InputError:
                for owner in self._owners:
                    owner.pending = False  # the next backward may come
                self._used.forget()
                raise
            if skips:
                self._skipped += 1
            else:
                self._apply(gradients.clip_factors(), self._graphs.guard(wrong))
                owned = {id(owner.param) for owner in heads}
                others = [m.param for m in self._members() if id(m.param) not in owned]
                self._applied.note(others, heads)
        for owner in self._owners:
            owner.close_step()
        self._used.forget()
        self._warn_if_nothing_fused()
        return loss

    def _check_step(self) -> None:
        """Raise as `step` where it must not be made, in all processes that train a head."""
        try:
            for owner in self._owners:
                owner.check_step()
                self._used.check(owner, self._find(owner.param).group)
            self._applied.check()
        except (FusedUpdateError, InputError):
            any(owner.tell_refusal() for owner in self._owners)  # the first exchange is enough
            raise

    def _apply(self, factors: dict[int, Tensor], guard: Tensor | None = None) -> None:
        """Update everything; gradients of a group are multiplied by its factor.

        Args:
            guard: None, or one int32 on the device: not zero leaves everything as it is.
        """
        done = {id(o.param) for o in self._owners if o.kept or (o.in_use and o.pending)}
        items, counted = [], []
        for m in self._members():
            if m.param.grad is not None and id(m.param) not in done:
                factor = factors.get(id(m.group))
                items.append(Gradient(m.param, m.param.grad, self._update(*m), factor))
                counted.append((self.state[m.param], m.group, m.param))
        check_updates(items)
        # Heads first: their second pass reads biases as they were.
        for owner in self._owners:
            owner.apply_kept(factors.get(id(self._find(owner.param).group)), guard)
        apply_updates(items, guard)
        count(counted, guard)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch.optim; also forgets what backwards kept for `update_at="step"`."""
        params = [p for group in self.param_groups for p in group["params"]]
        if set_to_none or not any(is_sharded(p) for p in params):
            super().zero_grad(set_to_none)
        else:  # torch would hand DTensors and other gradients to one call
            for param in params:
                if param.grad is not None:
                    param.grad = param.grad.detach().zero_()
        self._applied.forget()
        for owner in self._owners:
            owner.give_up_capture()
            owner.forget_kept()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("capturable", False)  # pickled before there was such an option
        if not hasattr(self, "_owners"):
            self._owners, self._warned, self._stepped = [], False, False
            self._skipped, self._graphs, self._used = 0, Graphs(), Used(self.defaults)
            self._applied = Applied()
        self._ids, self._next_id = WeakIdKeyDictionary(), 0
        for group in self.param_groups:
            for param, param_id in zip(group["params"], group["param_ids"]):
                self._ids[param] = param_id
                self._next_id = max(self._next_id, param_id + 1)
        for group in self.param_groups:  # saved lists may be shorter
            group["param_ids"] = [self._id_of(param) for param in group["params"]]
        self._register()

    # Updates

    def _update(self, group: dict[str, Any], param: Tensor, param_id: int) -> Update:
        """The next update of a parameter, with the state it needs (made here at first)."""
        step, lr = (
            step_of(self.state[param], group, param),
            rate_of(group, param, self._graphs.rates),
        )
        shares = group["accumulate"] == "step_each" and not options.scales_with_gradient(group)
        tensors = [self._slot(name, param, group) for name in self._slots(group)]
        rounding, compensation, rows = state.compensation(self.state[param], group, param)
        return Update(
            lr=lr,
            lr_share=group["micro_batches"] if shares else 1,
            weight_decay=group["weight_decay"],
            state=tuple(tensors),
            compensation=compensation,
            kahan_rows=rows,
            rounding=rounding,
            seed=group["seed"],
            param_id=param_id,
            step=step,
            **self._rule(group),
        )

    def next_update(self, param: Tensor) -> Update:
        """The next update of a parameter, for whoever makes it; counts nothing.

        Of a sharded one, that of this process's rows.
        """
        return local_update(param, self._update(*self._find(param)))

    def state_sizes(self, param: Tensor) -> list[StateSize]:
        """What is kept for a parameter, or will be, but for its count of steps."""
        group = self._find(param).group
        sizes = [self._slot_size(name, param, group) for name in self._slots(group)]
        return sizes + state.compensation_sizes(group, param)

    def _slot_size(self, name: str, param: Tensor, group: dict[str, Any]) -> StateSize:
        """The size of what `_slot` makes."""
        return state.slot_size(name, param, group["state_dtype"])

    def _updated(self, owner: Owner, guard: Tensor | None) -> None:
        group = self._find(owner.param).group
        self._used.note(owner, group)
        count([(self.state[owner.param], group, owner.param)], guard)

    def _warn_if_nothing_fused(self) -> None:
        if all(isinstance(g["lr"], float | int) and g["lr"] == 0 for g in self.param_groups):
            return  # torch.distributed.checkpoint steps so to have state made, before it loads one
        first, self._stepped = not self._stepped, True
        if first and self._owners and not self.fused_parameters() and not self._warned:
            self._warned = True
            sentence = nothing_fused(type(self).__name__, self._owners)
            if sentence:
                warnings.warn(sentence, stacklevel=5)  # step() inside torch's two wrappers


def is_fused(param: Tensor) -> bool:
    """Whether a compiled graph updates this parameter itself, without a gradient."""
    owner = owner_of(param)
    return owner is not None and owner.in_use and not owner.superseded
