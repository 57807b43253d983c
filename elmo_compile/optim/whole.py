"""What must see the whole gradient before anything is updated: its norm, and whether it is finite.

The gradient of a fused head is not a tensor: `Owner.kept` stands for it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from elmo_compile.errors import InputError
from elmo_compile.ops.dtensors import is_sharded
from elmo_compile.ops.owners import Owner
from elmo_compile.optim.sharded import agreed, values_of

Member = tuple[dict[str, Any], Tensor, int]
_TINY = 1e-6  # as in torch.nn.utils.clip_grad_norm_


class Gradients:
    """The gradients of one step: tensors, and those that fused heads kept."""

    def __init__(self, members: Sequence[Member], owners: Iterable[Owner]) -> None:
        owners = list(owners)
        for owner in owners:
            owner.settle()  # may bring what other processes kept
        by_param = {id(owner.param): owner for owner in owners if owner.kept}
        self.kept = [(group, by_param[id(p)]) for group, p, _ in members if id(p) in by_param]
        self.dense = [
            (group, p.grad)
            for group, p, _ in members
            if p.grad is not None and id(p) not in by_param
        ]

    def wrong_on_device(self, owners: Iterable[Owner]) -> Tensor | None:
        """In a CUDA graph: int32, 1 if this step is to change nothing; None if it always may.

        That is where a head's input was invalid, in this step's backward or in what it kept, where
        a gradient with nonfinite="skip" is not finite, or the norm a head is clipped by.
        """
        flags = [flag for owner in owners for flag in owner.captured_wrong()]
        flags += [owner.wrong() for _, owner in self.kept]
        flags += self._dense_not_finite()
        flags += [~torch.isfinite(norm) for norm in self._norms_of_heads().values()]
        if not flags:
            return None
        home = flags[0].device
        return torch.stack([flag.to(home, torch.int32) for flag in flags]).amax()

    def must_skip(self) -> bool:
        """Whether this step changes nothing, as a gradient with nonfinite="skip" is not finite.

        Raises:
            InputError: a head kept something that is not finite or invalid, or is clipped by a norm
                that is not finite, and its group has nonfinite="error".
        """
        skips = False
        for group, owner in self.kept:
            if owner.kept_is_wrong():
                if group["nonfinite"] != "skip":
                    raise InputError(
                        f"the features, targets or upstream gradient of the head {owner.name} are "
                        "invalid (NaN, infinity or a label out of range), or its logits overflow; "
                        "nothing was updated, "
                        "since a NaN stored in the weight would be permanent. Check the loss "
                        "scale, the learning rate and the encoder, or pass nonfinite='skip'"
                    )
                skips = True
        skips = skips or any(bool(flag) for flag in self._dense_not_finite())
        skips = agreed(skips, [g for group, g in self.dense if group["nonfinite"] == "skip"])
        if not skips:
            for max_norm, norm in self._norms_of_heads().items():
                skips |= not bool(torch.isfinite(norm)) and self._skips_for(max_norm)
        return skips

    def _norms_of_heads(self) -> dict[float, Tensor]:
        """The norms that kept gradients are clipped by."""
        clipped = {group["max_norm"] for group, _ in self.kept} - {None}
        return {max_norm: self._norms[max_norm] for max_norm in clipped}

    def _skips_for(self, max_norm: float) -> bool:
        """True where every head clipped by a norm that is not finite skips; else InputError."""
        for group, owner in self.kept:
            if group["max_norm"] == max_norm and group["nonfinite"] != "skip":
                raise InputError(
                    f"the norm of the gradients that the head {owner.name} is clipped with "
                    f"(max_norm={max_norm}) is not finite; nothing was updated, since a NaN "
                    "stored in the weight would be permanent. A gradient of another parameter "
                    "is NaN or infinite; find it, or pass nonfinite='skip'"
                )
        return True

    def _dense_not_finite(self) -> list[Tensor]:
        """For each device a bool scalar: whether a tensor with nonfinite="skip" is not finite."""
        there: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for group, grad in self.dense:
            if group["nonfinite"] != "skip":
                continue
            values = _real_values(values_of(grad))
            if values.dtype.itemsize == 1:
                values = values.float()
            if values.numel():
                there.setdefault((values.device, values.dtype), []).append(values)
        largest: dict[torch.device, list[Tensor]] = {}
        for (device, _), alike in there.items():
            # The largest magnitude, NaN where there is one: it overflows in no dtype.
            largest.setdefault(device, []).extend(torch._foreach_norm(alike, torch.inf))
        return [~torch.isfinite(torch.stack(found)).all() for found in largest.values()]

    def clip_factors(self) -> dict[int, Tensor]:
        """What the gradients of a clipped group are multiplied with, by the group's id().

        `max_norm / (norm + 1e-6)`, at most 1, with the norm over all groups of the same max_norm
        (`torch.nn.utils.clip_grad_norm_`).
        """
        factors = {m: (m / (norm + _TINY)).clamp(max=1.0) for m, norm in self._norms.items()}
        members = [group for group, _ in (*self.dense, *self.kept)]
        return {id(g): factors[g["max_norm"]] for g in members if g["max_norm"] is not None}

    @functools.cached_property
    def _norms(self) -> dict[float, Tensor]:
        """The norm over all gradients of groups of one max_norm, by max_norm."""
        squares: dict[float, list[Tensor]] = {}
        for group, grad in self.dense:
            if group["max_norm"] is not None:
                squares.setdefault(group["max_norm"], []).append(_square(grad))
        for group, owner in self.kept:
            if group["max_norm"] is not None:
                squares.setdefault(group["max_norm"], []).append(owner.squared_norm())
        return {
            max_norm: torch.stack([t.to(found[0].device) for t in found]).sum().sqrt()
            for max_norm, found in squares.items()
        }


def _square(grad: Tensor) -> Tensor:
    """The squared 2-norm of a gradient, float64."""
    values = _real_values(grad)
    found: Any = torch.linalg.vector_norm(values.to(_wide(values)), dtype=torch.float64)
    norm: Tensor = found.full_tensor() if is_sharded(found) else found
    return norm.square()


def _real_values(grad: Tensor) -> Tensor:
    """What a gradient holds, as real numbers."""
    values = grad.coalesce().values() if grad.is_sparse else grad
    return torch.view_as_real(values.resolve_conj()) if values.is_complex() else values


def _wide(t: Tensor) -> torch.dtype:
    """Precision of arithmetic on a gradient."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32
