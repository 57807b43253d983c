"""What is saved of an optimizer, and how it is taken back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from elmo_compile.ops.owners import Owner
from elmo_compile.optim import loading, options
from elmo_compile.optim.sharded import state_like
from elmo_compile.optim.used import Applied, Used


class Checkpoints(torch.optim.Optimizer):
    """An optimizer whose state holds rounding streams and counters, and fp8 weights' moments."""

    _owners: list[Owner]
    _used: Used
    _applied: Applied

    def _follow_groups(self) -> None:
        """Take in what was written into the groups' lists of parameters by hand."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim; holds rounding streams and counters, so that a resumed run continues."""
        for owner in self._owners:
            owner.check_consistent()
        self._follow_groups()
        saved = super().state_dict()
        for held in saved["state"].values():
            if isinstance(held.get("step"), Tensor):
                held["step"] = held["step"].clone()  # on a device it is counted in place
        for group in saved["param_groups"]:
            if group["capturable"]:
                group["lr"] = float(group["lr"])  # and this one written to
            group.update(_named(group))
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch.optim; how to update (`fused`, `update_at`, ...) stays as constructed.

        Raises:
            OptionError: the state was saved by a version with other rounding bits, by another
                rule, or for parameters of other shapes. Nothing is modified.
        """
        taken: list[dict[str, Any]] = []

        def take(_: Any, given: dict[str, Any]) -> dict[str, Any]:
            taken.append(self._to_load(given))
            return taken[-1]

        # Behind the user's hooks, which may change what is loaded or what was.
        before = self.register_load_state_dict_pre_hook(take)
        after = self.register_load_state_dict_post_hook(
            lambda _: self._loaded(taken[-1]), prepend=True
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def _to_load(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A saved state with how to update as it is here. Raises as `load_state_dict`."""
        loading.check_groups(state_dict["param_groups"], self.param_groups)
        loading.check_shapes(state_dict, self.param_groups)
        groups = [
            {**group, **_dtypes(group), **{key: mine[key] for key in options.HOW}}
            for group, mine in zip(state_dict["param_groups"], self.param_groups)
        ]
        if len(groups) == len(state_dict["param_groups"]):
            state_dict = {**state_dict, "param_groups": groups}
        return state_dict

    def _loaded(self, state_dict: dict[str, Any]) -> None:
        """torch.optim has loaded a state."""
        self._restore_state(state_dict)
        for owner in self._owners:
            if owner.inconsistent:
                owner.forget_kept()  # else gradients stay, as torch's do
            owner.inconsistent = owner.pending = False
        self._used.forget()
        self._applied.forget()

    def _restore_state(self, state_dict: dict[str, Any]) -> None:
        """State as saved: torch.optim casts it to the weight's dtype, which may be fp8."""
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for index, param in zip(saved, params):
            for name, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    if name != "step":
                        value = state_like(value, param)
                    home = torch.device("cpu") if name == "step" else param.device
                    self.state[param][name] = value.detach().to(home, copy=True)


_DTYPES = ("state_dtype", "compensation_dtype")


def _named(group: dict[str, Any]) -> dict[str, str]:
    """A group's dtypes by name: torch.distributed.checkpoint gathers no others."""
    found = {key: group.get(key) for key in _DTYPES}
    dtypes = {key: value for key, value in found.items() if isinstance(value, torch.dtype)}
    return {key: str(value).removeprefix("torch.") for key, value in dtypes.items()}


def _dtypes(group: dict[str, Any]) -> dict[str, torch.dtype]:
    """The dtypes of a saved group that are there by name."""
    found = {key: getattr(torch, str(group.get(key)), None) for key in _DTYPES}
    return {key: value for key, value in found.items() if isinstance(value, torch.dtype)}
