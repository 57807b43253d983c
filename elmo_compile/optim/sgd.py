"""SGD for low-precision weights, fused into the backward of huge heads."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from elmo_compile.errors import FusedUpdateError, OptionError
from elmo_compile.numerics.philox import ROUNDING_VERSION
from elmo_compile.numerics.update import Rounding, Update
from elmo_compile.ops.owners import Owner, owner_of, register, unregister
from elmo_compile.optim import guards, options
from elmo_compile.optim.ordinary import apply_update, buffer_dtype

_MODE = ("fused", "update_at", "accumulate", "max_norm", "nonfinite")
"""Entries of a group that say how to update, not by how much."""


class SGD(torch.optim.Optimizer):
    """Stochastic gradient descent that owns huge heads and rounds what it stores.

    `g <- g + weight_decay w; m <- momentum m + g; w <- round(w - lr (m or g))`, in float32 on the
    loaded values (torch.optim.SGD's rule), with one rounding at the store for bf16 and fp8.

    In a model compiled with `backend="elmo"`, the weight of a rewritten head is updated inside
    `backward()` by the loss's own kernel: its `.grad` stays None. `step()` updates everything else
    with the same rule, and must be called between one backward and the next.

    Args:
        params: parameters or parameter groups, as for torch.optim.
        lr: rate, read when the update happens, so schedulers work.
        momentum: in [0, 1). The buffer has the weight's dtype (bf16 for fp8 weights), bf16 ones
            being rounded stochastically.
        nesterov: needs momentum.
        weight_decay: added to the gradient, at least 0.
        rounding: "stochastic" or "nearest", for weights stored in bf16 or fp8. float32, float64 and
            float16 weights are stored to nearest.
        seed: of the rounding, in [0, 2^32).
        fused: False: every parameter gets an ordinary gradient and is updated by `step()`.
        update_at, accumulate, max_norm, nonfinite: what must see the whole gradient before the
            update. This version accepts the defaults only.

    Raises:
        OptionError: a hyper-parameter is out of range, or not available with these others.

    Source: ELMO (arXiv 2510.11168); torch.optim.SGD for the rule.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        rounding: Rounding = "stochastic",
        seed: int = 0,
        fused: bool = True,
        update_at: Literal["backward", "step"] = "backward",
        accumulate: str = "error",
        max_norm: float | None = None,
        nonfinite: str = "error",
    ) -> None:
        self._owners: list[Owner] = []
        self._next_id = 0
        self._warned = self._stepped = False
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "nesterov": nesterov,
                "weight_decay": weight_decay,
                "rounding": rounding,
                "seed": seed,
                "fused": fused,
                "update_at": update_at,
                "accumulate": accumulate,
                "max_norm": max_norm,
                "nonfinite": nonfinite,
            },
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with hyper-parameters of their own. Raises OptionError."""
        options.check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        count = len(group["params"])
        group["param_ids"] = list(range(self._next_id, self._next_id + count))
        group["rounding_version"] = ROUNDING_VERSION
        self._next_id += count
        self._register()

    def fused_parameters(self) -> list[Tensor]:
        """The weights whose update a compiled graph has fused so far."""
        return [owner.param for owner in self._owners if owner.in_use]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient, and allow the next backward.

        Raises:
            FusedUpdateError: a fused head also received a dense gradient; another optimizer took a
                weight over; a weight is inconsistent or was replaced by one nobody owns. Nothing
                is modified.
            InputError: on CUDA, a head's input was invalid and its update was not applied.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for owner in self._owners:
            owner.check_step()
        with torch.no_grad():
            for group in self.param_groups:
                for param, param_id in zip(group["params"], group["param_ids"]):
                    if param.grad is not None:
                        apply_update(param, param.grad, self._update(group, param, param_id))
                        self._count(param)
        for owner in self._owners:
            owner.pending = False
        self._warn_if_nothing_fused()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim; holds rounding streams and counters, so that a resumed run continues."""
        for owner in self._owners:
            owner.check_consistent()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch.optim; how to update (`fused`, `update_at`, ...) stays as constructed.

        Raises:
            OptionError: the state was saved by a version with other rounding bits.
        """
        groups = []
        for group, mine in zip(state_dict["param_groups"], self.param_groups):
            version = group.get("rounding_version")
            if version != ROUNDING_VERSION:
                raise OptionError(
                    f"this optimizer state has rounding_version={version!r}; this version of "
                    f"elmo_compile continues only rounding_version={ROUNDING_VERSION}"
                )
            groups.append({**group, **{key: mine[key] for key in _MODE}})
        if len(groups) == len(state_dict["param_groups"]):
            state_dict = {**state_dict, "param_groups": groups}
        super().load_state_dict(state_dict)
        self._restore_buffers(state_dict)
        for owner in self._owners:
            owner.inconsistent = owner.pending = False

    def _restore_buffers(self, state_dict: dict[str, Any]) -> None:
        """Momentum as saved: torch.optim casts it to the weight's dtype, which may be fp8."""
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for index, param in zip(saved, params):
            buffer = state_dict["state"].get(index, {}).get("momentum_buffer")
            if buffer is not None:
                self.state[param]["momentum_buffer"] = buffer.to(
                    param.device, buffer_dtype(param.dtype), copy=True
                )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not hasattr(self, "_owners"):
            self._owners, self._warned, self._stepped = [], False, False
        ids = [i for group in self.param_groups for i in group["param_ids"]]
        self._next_id = 1 + max(ids, default=-1)
        self._register()

    def _register(self) -> None:
        """Own every matrix of a fused group, and nothing else."""
        owned = {id(owner.param): owner for owner in self._owners}
        wanted: list[Owner] = []
        for group in self.param_groups:
            if not group["fused"]:
                continue
            guards.install()
            names = group.get("param_names")
            for index, (param, param_id) in enumerate(zip(group["params"], group["param_ids"])):
                if param.dim() == 2:
                    name = names[index] if names else f"#{param_id} {tuple(param.shape)}"
                    known = owned.pop(id(param), None) if id(param) in owned else None
                    wanted.append(known or self._own(param, name))
        for owner in owned.values():
            unregister(owner)
        self._owners = wanted

    def _own(self, param: Tensor, name: str) -> Owner:
        # The registry must not keep a discarded optimizer alive.
        me, this = weakref.ref(self), weakref.ref(param)
        owner = Owner(param, name, lambda: _alive(me)._update(*_alive(me)._find(_alive(this))))
        owner.on_update = lambda: _alive(me)._count(_alive(this))
        register(owner)
        return owner

    def _find(self, param: Tensor) -> tuple[dict[str, Any], Tensor, int]:
        for group in self.param_groups:
            for candidate, param_id in zip(group["params"], group["param_ids"]):
                if candidate is param:
                    return group, param, param_id
        raise FusedUpdateError(
            "a head's weight was removed from its optimizer's param_groups while it was fused; "
            "construct the optimizer again"
        )

    def _update(self, group: dict[str, Any], param: Tensor, param_id: int) -> Update:
        state = self.state[param]
        buffer = state.get("momentum_buffer")
        if group["momentum"] and buffer is None:
            buffer = torch.zeros_like(param, dtype=buffer_dtype(param.dtype))
            state["momentum_buffer"] = buffer
        if buffer is not None:  # The weight may have been moved or cast by `.to()`.
            buffer = buffer.to(param.device, buffer_dtype(param.dtype))
            state["momentum_buffer"] = buffer
        return Update(
            lr=float(group["lr"]),
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            nesterov=group["nesterov"],
            buffer=buffer if group["momentum"] else None,
            rounding=group["rounding"],
            seed=group["seed"],
            param_id=param_id,
            step=state.get("step", 0),
        )

    def _count(self, param: Tensor) -> None:
        state = self.state[param]
        state["step"] = state.get("step", 0) + 1

    def _warn_if_nothing_fused(self) -> None:
        first, self._stepped = not self._stepped, True
        wanted = any(group["fused"] for group in self.param_groups)
        if first and wanted and not self.fused_parameters() and not self._warned:
            self._warned = True
            warnings.warn(
                "elmo_compile.optim.SGD is used, but no head's update was fused: either the model "
                'is not compiled with backend="elmo", or no head was rewritten (see '
                "elmo_compile.last_report()). Pass fused=False to silence this",
                stacklevel=5,  # step() inside torch's two wrappers
            )


def is_fused(param: Tensor) -> bool:
    """Whether a compiled graph updates this parameter inside backward()."""
    owner = owner_of(param)
    return owner is not None and owner.in_use and not owner.superseded


def _alive(reference: weakref.ref[Any]) -> Any:
    target = reference()
    if target is None:
        raise FusedUpdateError("the optimizer that owned this head was deleted before backward()")
    return target
