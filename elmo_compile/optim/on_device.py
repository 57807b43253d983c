"""Rates and step counts that live on the device, so that a CUDA graph may hold a step.

What a graph reads must stay where it is: a group's rate, a parameter's count and its state are made
by ordinary steps, and the captured one writes to them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from elmo_compile.errors import FusedUpdateError
from elmo_compile.numerics.capture import capturing

Group = dict[str, Any]


def is_on_device(group: Group, param: Tensor) -> bool:
    """Whether a parameter's rate and count are kept on its device."""
    return bool(group["capturable"]) and param.is_cuda


def rate_of(group: Group, param: Tensor, kept: dict[int, Tensor]) -> float | Tensor:
    """The group's rate: a number, or a float64 scalar on the parameter's device.

    There a number's place in the group is taken by a tensor: always the same, which graphs read.

    Args:
        kept: the tensor of each group, by the number of its first parameter.

    Raises:
        FusedUpdateError: a CUDA graph is being captured, and the rate is not on the device.
    """
    lr = group["lr"]
    if not is_on_device(group, param):
        return float(lr)
    if not (isinstance(lr, Tensor) and lr.is_cuda):
        if capturing(param.device):
            raise FusedUpdateError(
                f"a CUDA graph is being captured, but lr={lr!r} is no tensor on the device: "
                "replays would keep it whatever a schedule says. Run an ordinary step first, and "
                'change the rate by group["lr"].fill_(...)'
            )
        mine = kept.get(group["param_ids"][0])
        if mine is None:
            mine = torch.empty((), dtype=torch.float64, device=param.device)
        lr = group["lr"] = mine.fill_(float(lr))
    kept[group["param_ids"][0]] = lr
    found: Tensor = lr.to(param.device, torch.float64)
    return found


def step_of(held: dict[str, Any], group: Group, param: Tensor) -> int | Tensor:
    """How many updates a parameter has had: a number, or an int64 scalar on its device.

    Args:
        held: the parameter's state.

    Raises:
        FusedUpdateError: a CUDA graph is being captured, and the count or the state beside it is
            not on the device yet, or the group is not `capturable`.
    """
    found = held.get("step", 0)
    if not is_on_device(group, param):
        if capturing(param.device):
            raise FusedUpdateError(
                "a CUDA graph is being captured, but its replays would repeat the rate, the step "
                "and the random bits of the capture. Construct the optimizer with capturable=True"
            )
        return int(found)
    if not (isinstance(found, Tensor) and found.device == param.device):
        if capturing(param.device):
            raise FusedUpdateError(
                f"a CUDA graph is being captured, but a parameter of shape {tuple(param.shape)} "
                "has no optimizer state on the device yet: every replay would begin with a new "
                "one. Run an ordinary forward, backward and step before the capture"
            )
        found = held["step"] = torch.full((), int(found), dtype=torch.int64, device=param.device)
    return found


class Graphs:
    """What the steps of one optimizer write to that CUDA graphs hold."""

    def __init__(self) -> None:
        self.rates: dict[int, Tensor] = {}
        """The rate of each group, by the number of its first parameter."""
        self._skipped: Tensor | None = None
        self._go_ahead: Tensor | None = None

    @property
    def skipped(self) -> int:
        """Replays that changed nothing, for which the host waits."""
        return 0 if self._skipped is None else int(self._skipped)

    def begin(self, members: Iterable[tuple[Group, Tensor, int]]) -> bool:
        """Whether this step is being captured; if not, make what one that is will write to.

        Raises:
            FusedUpdateError: in a capture: no ordinary step came before, or a parameter with a
                gradient is on another device, where replays would not update it.
        """
        there = [(group, param) for group, param, _ in members]
        home = next((param.device for _, param in there if param.is_cuda), None)
        if home is None:
            return False
        captured, ours = capturing(home), any(is_on_device(*one) for one in there)
        if captured:
            if ours and self._skipped is None:
                raise FusedUpdateError(
                    "a CUDA graph is being captured before any ordinary step of this optimizer. "
                    "Run a forward, a backward and a step first"
                )
            for _, param in there:
                if param.grad is not None and param.device != home:
                    raise FusedUpdateError(
                        f"a CUDA graph is being captured on {home}, but a parameter of shape "
                        f"{tuple(param.shape)} is on {param.device}: replays would not update it. "
                        "Give it an optimizer whose step() is outside the graph"
                    )
        elif ours and self._skipped is None:
            self._skipped = torch.zeros((), dtype=torch.int64, device=home)
            self._go_ahead = torch.zeros((), dtype=torch.int32, device=home)
        return captured

    def guard(self, wrong: Tensor | None) -> Tensor | None:
        """The int32 that a step obeys; None without `capturable` groups.

        Ordinary steps have one too (0): a kernel with it is another than one without, and must not
        be compiled in a capture.

        Args:
            wrong: in a capture, not zero where the step must change nothing.
        """
        if wrong is None or self._skipped is None:
            return self._go_ahead
        self._skipped += wrong
        return wrong


def count(items: Iterable[tuple[dict[str, Any], Group, Tensor]], guard: Tensor | None) -> None:
    """Count one update of each parameter; on its device not where `guard` is not zero.

    Args:
        items: (state, group, parameter). guard: None, or an int32 scalar on a device.
    """
    there: dict[torch.device, list[Tensor]] = {}
    for held, group, param in items:
        if is_on_device(group, param):
            there.setdefault(param.device, []).append(held["step"])
            continue
        # A tensor, since distributed checkpoints restore nothing else; a new one, since a state
        # dict that was taken holds the old.
        held["step"] = torch.tensor(int(held.get("step", 0)) + 1, device="cpu")
    for device, steps in there.items():
        if guard is None:
            torch._foreach_add_(steps, 1)
        else:  # alpha, or the tensor would be read as a number
            torch._foreach_add_(steps, (guard == 0).to(device, torch.int64), alpha=1)
