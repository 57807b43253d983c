"""What must see the whole gradient before anything is updated: its norm, and whether it is finite.

The gradient of a fused head is not a tensor: `Owner.kept` stands for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from elmo_compile.errors import InputError
from elmo_compile.ops.owners import Owner
from elmo_compile.optim.sharded import agreed, is_sharded, values_of

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

        That is where a head's input was invalid, in this step's backward or in what it kept, and
        where a gradient with nonfinite="skip" is not finite.
        """
        flags = [flag for owner in owners for flag in owner.captured_wrong()]
        flags += [owner.wrong() for _, owner in self.kept]
        for group, grad in self.dense:
            if group["nonfinite"] == "skip":
                flags.append(~torch.isfinite(grad).all())
        if not flags:
            return None
        home = flags[0].device
        return torch.stack([flag.to(home, torch.int32) for flag in flags]).amax()

    def must_skip(self) -> bool:
        """Whether this step changes nothing, as a gradient with nonfinite="skip" is not finite.

        Raises:
            InputError: a head kept something that is not finite or invalid, and its group has
                nonfinite="error".
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
        for group, grad in self.dense:
            if group["nonfinite"] == "skip" and not skips:
                skips = not bool(torch.isfinite(values_of(grad)).all())
        return agreed(skips, [g for group, g in self.dense if group["nonfinite"] == "skip"])

    def clip_factors(self) -> dict[int, Tensor]:
        """What the gradients of a clipped group are multiplied with, by the group's id().

        `max_norm / (norm + 1e-6)`, at most 1, with the norm over all groups of the same max_norm
        (`torch.nn.utils.clip_grad_norm_`).
        """
        squares: dict[float, list[Tensor]] = {}
        groups: dict[int, float] = {}
        for group, grad in self.dense:
            if group["max_norm"] is not None:
                groups[id(group)] = group["max_norm"]
                squares.setdefault(group["max_norm"], []).append(_square(grad))
        for group, owner in self.kept:
            if group["max_norm"] is not None:
                groups[id(group)] = group["max_norm"]
                squares.setdefault(group["max_norm"], []).append(owner.squared_norm())
        factors = {}
        for max_norm, found in squares.items():
            norm = torch.stack([t.to(found[0].device) for t in found]).sum().sqrt()
            factors[max_norm] = (max_norm / (norm + _TINY)).clamp(max=1.0)
        return {group: factors[max_norm] for group, max_norm in groups.items()}


def _square(grad: Tensor) -> Tensor:
    """The squared 2-norm of a gradient, float64."""
    values = grad.coalesce().values() if grad.is_sparse else grad
    values = torch.view_as_real(values) if values.is_complex() else values
    found: Any = torch.linalg.vector_norm(values.to(_wide(values)), dtype=torch.float64)
    norm: Tensor = found.full_tensor() if is_sharded(found) else found
    return norm.square()


def _wide(t: Tensor) -> torch.dtype:
    """Precision of arithmetic on a gradient."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32
