"""Whether a tensor is what it was when something deferred was made from it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from elmo_compile.numerics.capture import capturing
from elmo_compile.ops.owners import replayed_updates


def is_weight(value: Any) -> bool:
    return type(value) is torch.nn.Parameter and value.ndim == 2 and value.numel() > 0


def identity(value: Any) -> tuple[int, int]:
    """Changes with counted writes, and with `weight.data = other`."""
    return version(value), value.data_ptr() if is_weight(value) else 0


def can_sample(value: Any) -> bool:
    """Whether `Sample` reads a value: an ordinary tensor."""
    return type(value) in (Tensor, torch.nn.Parameter) and value.layout == torch.strided


class Sample:
    """Some elements of a weight or another tensor: what writes through `.data` (weights averaged or
    merged in place) changes all of it, uncounted."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight
        self._bytes = None if capturing(weight.device) else self._read()

    def holds(self) -> bool:
        """Whether they are what they were; a GPU is waited for."""
        if self._bytes is None or capturing(self._weight.device):
            return True
        now = self._read()
        return now.device == self._bytes.device and torch.equal(now, self._bytes)

    def _read(self) -> Tensor:
        steps = [max(1, size // (4 if dim else 64)) for dim, size in enumerate(self._weight.shape)]
        with torch.no_grad():
            some = self._weight.detach()[tuple(slice(None, None, step) for step in steps)]
            return some.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


def version(value: Any) -> int:
    """How often a tensor was written in place, as far as torch counts it, or an owner's replays."""
    if not isinstance(value, Tensor) or value.is_inference():
        return 0
    replayed = replayed_updates(value) if isinstance(value, torch.nn.Parameter) else 0
    return int(value._version) + replayed
