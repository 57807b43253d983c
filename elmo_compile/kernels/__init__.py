"""Kernel families for one head step: modules with `forward`, `backward`, `backward_update`.

`reference` is the specification (dense, any dtype), `aten` runs on a CPU, `triton` on CUDA;
`problem` holds the records they exchange and `targets` turns every spelling of sparse targets into
the one they read. `select` names the family of a device.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

from elmo_compile.errors import InputError

_FAMILIES = {"cpu": "aten", "cuda": "triton"}


def select(device: torch.device) -> ModuleType:
    """The kernel family that runs on `device`, imported on first use. Raises InputError."""
    family = _FAMILIES.get(device.type)
    if family is None:
        raise InputError(f"no head kernels for device {device}; accepted: {sorted(_FAMILIES)}")
    return importlib.import_module(f"elmo_compile.kernels.{family}")
