"""The hyper-parameters that updates inside backward() took, until `opt.step()` has seen them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from elmo_compile.errors import FusedUpdateError
from elmo_compile.ops.owners import Owner
from elmo_compile.optim.options import HOW

Group = dict[str, Any]


_HELD = 1 << 20
"""Elements of a gradient that may be held on to."""


class Applied:
    """What the last step that updated heads had of gradients, to notice it being applied again.

    torch applies gradients that nobody cleared once more; a fused head has none.
    """

    def __init__(self) -> None:
        self._grad: Tensor | None = None
        self._of: Tensor | None = None
        self._version = 0
        self._heads: list[Owner] = []

    def note(self, params: Iterable[Tensor], heads: Iterable[Owner]) -> None:
        """A step is over: `heads` were updated in it, and these parameters were its others."""
        self._heads, self._of, self._grad = list(heads), None, None
        small = [p for p in params if p.grad is not None and p.numel() <= _HELD]
        if small and self._heads:
            self._of = min(small, key=Tensor.numel)
            self._grad = self._of.grad
            assert self._grad is not None
            self._version = self._grad._version

    def forget(self) -> None:
        """Gradients were cleared."""
        self.note((), ())

    def check(self) -> None:
        """Raise FusedUpdateError if a step would apply the same gradients, but not the heads'."""
        if self._grad is None or self._of is None or self._of.grad is not self._grad:
            return
        if self._grad._version != self._version:
            return
        for owner in self._heads:
            if not (owner.pending or owner.kept) and owner.param.requires_grad:
                raise FusedUpdateError(
                    "opt.step() was called twice with the same gradients. What is not fused would "
                    f"be updated by them again, but not the head weight {owner.name}, whose "
                    "gradient is gone. Call opt.zero_grad() and backward() between two steps"
                )


class Used:
    """What each head's group said when the head was first updated in this step."""

    def __init__(self, names: Iterable[str]) -> None:
        """names: what a group may say; of it, what an update is made from is compared."""
        self._names = set(names) - {*HOW, "kahan_rows"}
        self._by_head: dict[int, Group] = {}

    def note(self, owner: Owner, group: Group) -> None:
        """A head was updated."""
        self._by_head.setdefault(owner.key, self._read(group))

    def forget(self) -> None:
        """A step is over."""
        self._by_head.clear()

    def check(self, owner: Owner, group: Group) -> None:
        """Raise FusedUpdateError if the head was updated by other numbers than those of now.

        Whatever `opt.step()` updates would be trained by another rate than the head.
        """
        before = self._by_head.get(owner.key)
        if before is None or not owner.pending:
            return
        now = self._read(group)
        for name in before:
            if before[name] != now.get(name):
                raise FusedUpdateError(
                    f"{name} of the head weight {owner.name} was {before[name]} in backward(), "
                    f"which updated it, and is {now.get(name)} in opt.step(), for the rest. "
                    "Change it before backward() (schedulers: after opt.step()), or construct the "
                    "optimizer with update_at='step'"
                )

    def _read(self, group: Group) -> Group:
        return {name: _comparable(group[name]) for name in self._names if name in group}


def _comparable(value: Any) -> Any:
    """A number for a tensor; one on a GPU, which is not waited for, by how often it was written."""
    if not isinstance(value, Tensor):
        return value
    if value.is_cuda:
        return f"version {value._version} of tensor {id(value):#x}"
    return value.item() if value.numel() == 1 else value.tolist()
