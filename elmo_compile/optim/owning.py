"""Which weights an optimizer owns: graphs update those themselves and ask it how."""

from __future__ import annotations

import operator
import weakref
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from elmo_compile.errors import FusedUpdateError, OptionError
from elmo_compile.numerics.state_size import StateSize
from elmo_compile.numerics.update import Update
from elmo_compile.ops.dtensors import is_head, is_sharded
from elmo_compile.ops.kept_gradients import Policy
from elmo_compile.ops.owners import Owner, register, unregister
from elmo_compile.optim import guards, options
from elmo_compile.optim.checkpoints import Checkpoints


class Member(NamedTuple):
    """One parameter of an optimizer."""

    group: dict[str, Any]
    param: Tensor
    param_id: int


class OwningOptimizer(Checkpoints):
    """An optimizer that owns the matrices of its fused groups, and numbers all its parameters."""

    _ids: WeakIdKeyDictionary
    """The number of each parameter's rounding stream."""
    _next_id: int
    _seen: list[list[Tensor]]
    """The groups' parameters as they were registered."""
    _owns: list[bool]
    """Whether each group owned its heads then."""

    def next_update(self, param: Tensor) -> Update:
        """The next update of a parameter, for whoever makes it; counts nothing."""
        raise NotImplementedError

    def state_sizes(self, param: Tensor) -> list[StateSize]:
        """What is kept for a parameter, or will be, but for its count of steps."""
        raise NotImplementedError

    def _updated(self, owner: Owner, guard: Tensor | None) -> None:
        """A head was updated, unless the guard says no."""
        raise NotImplementedError

    def fused_parameters(self) -> list[Tensor]:
        """The weights whose update a compiled graph has fused so far."""
        return [owner.param for owner in self._owners if owner.in_use]

    def counters(self) -> dict[str, dict[str, float]]:
        """What rounding did to each fused head, from a sample of its rows every 64 updates.

        Returns:
            For each head: `updates` so far, and shares (of sampled elements) that are `unchanged`
            by an update (with rounding="nearest": updates lost), `saturated` (stored as the
            format's largest value) and `zero`.
        """
        return {o.name: o.counters.shares(o.updates) for o in self._owners if o.in_use}

    def _members(self) -> list[Member]:
        self._follow_groups()
        return [
            Member(group, param, param_id)
            for group in self.param_groups
            for param, param_id in zip(group["params"], group["param_ids"])
        ]

    def _follow_groups(self) -> None:
        """Take in what was written into the groups' lists of parameters by hand.

        Raises:
            FusedUpdateError: a weight whose gradient was taken by its head is gone.
        """
        now = [group["params"] for group in self.param_groups]
        if len(now) == len(self._seen) and all(map(_same_objects, now, self._seen)):
            return
        left = {id(param) for params in now for param in params}
        for owner in self._owners:
            if id(owner.param) not in left and (owner.pending or owner.kept):
                raise _removed()
        for group in self.param_groups:
            group["param_ids"] = [self._id_of(param) for param in group["params"]]
        self._register()

    def _check_groups(self) -> None:
        """Raise OptionError for what was written into a group and is refused at construction."""
        for group, owns in zip(self.param_groups, self._owns):
            options.check_whole_gradient(group)
            if options.owns_heads(group) != owns:
                raise OptionError(
                    f"fused={group['fused']}, accumulate={group['accumulate']!r} were written into "
                    "a group that was made otherwise; whether an optimizer owns its heads is "
                    "decided when a group is added: construct the optimizer with them"
                )

    def _id_of(self, param: Tensor) -> int:
        """The number of a parameter's rounding stream; a new one's is the next."""
        if param not in self._ids:
            self._ids[param] = self._next_id
            self._next_id += 1
        return int(self._ids[param])

    def _register(self) -> None:
        """Own every matrix of a fused group, and nothing else."""
        self._seen = [list(group["params"]) for group in self.param_groups]
        self._owns = [options.owns_heads(group) for group in self.param_groups]
        owned = {id(owner.param): owner for owner in self._owners}
        wanted: list[Owner] = []
        for group in self.param_groups:
            if not options.owns_heads(group):
                continue
            guards.install()
            names = group.get("param_names") or []
            for index, (param, param_id) in enumerate(zip(group["params"], group["param_ids"])):
                if param.dim() == 2 and (not is_sharded(param) or is_head(param)):
                    known_name = names[index : index + 1]
                    name = known_name[0] if known_name else f"#{param_id} {tuple(param.shape)}"
                    known = owned.pop(id(param), None) if id(param) in owned else None
                    wanted.append(known or self._own(param, name))
        for owner in owned.values():
            unregister(owner)
        self._owners = wanted

    def _own(self, param: Tensor, name: str) -> Owner:
        # The registry must not keep a discarded optimizer alive.
        me, this = weakref.ref(self), weakref.ref(param)
        owner = Owner(param, name, lambda: _alive(me).next_update(_alive(this)))
        mine = weakref.ref(owner)
        owner.on_update = lambda guard: _alive(me)._updated(_alive(mine), guard)
        owner.state_sizes = lambda: _alive(me).state_sizes(_alive(this))
        owner.policy = lambda: _alive(me)._policy(_alive(this))
        register(owner)
        return owner

    def _find(self, param: Tensor) -> Member:
        for member in self._members():
            if member.param is param:
                return member
        raise _removed()

    def _policy(self, param: Tensor) -> Policy:
        """How a head is updated, by what its group says now."""
        group = self._find(param).group
        self._check_groups()
        return Policy(
            at_step=group["update_at"] == "step",
            accumulate=group["accumulate"],
            clips=group["max_norm"] is not None,
            capturable=group["capturable"],
        )


def _same_objects(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(map(operator.is_, some, others))


def _removed() -> FusedUpdateError:
    return FusedUpdateError(
        "a head's weight was removed from its optimizer's param_groups between a forward of its "
        "head and opt.step(); remove it after opt.step()"
    )


def _alive(reference: weakref.ref[Any]) -> Any:
    target = reference()
    if target is None:
        raise FusedUpdateError("the optimizer that owned this head was deleted before backward()")
    return target
