"""The k largest logits of each row, without the logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from elmo_compile import kernels
from elmo_compile.errors import InputError, OptionError
from elmo_compile.planner import default_compute_dtype

WEIGHT_DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float64,
)  # fmt: skip
CHUNK = 8192
"""Outputs scored at once on a CPU, and at least on CUDA."""
_KEYS = 1 << 24
"""Logits scored at once on CUDA, where each is a key of 8 bytes: few launches, 128 MiB."""


class TopK(NamedTuple):
    """The largest logits, in descending order."""

    values: Tensor
    """float32 [..., k]."""
    indices: Tensor
    """int64 [..., k]; of equal logits the lower index comes first."""


def topk(features: Tensor, weight: Tensor, k: int, *, bias: Tensor | None = None) -> TopK:
    """The k largest of `x W^T + b` for each row, scored a chunk of outputs at a time.

    Args:
        features: x [..., D], floating point.
        weight: W [L, D], float32, bfloat16, float16, float8_e4m3fn or float64.
        k: at least 1, at most L.
        bias: b [L], or None.

    Returns:
        TopK of float32 values and int64 indices, each [..., k]. No gradient flows.

    Raises:
        InputError: shapes or devices that do not fit.
        OptionError: k is no int in [1, L].
    """
    if weight.dim() != 2 or features.dim() < 1 or features.shape[-1] != weight.shape[1]:
        raise InputError(
            f"topk: features {tuple(features.shape)} do not fit weight {tuple(weight.shape)}; "
            "accepted: [..., D] and [L, D]"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_floating_point()):
        raise InputError(
            f"topk: bias {tuple(bias.shape)} of {bias.dtype}; accepted: [{weight.shape[0]}], "
            "floating point, one an output"
        )
    if weight.dtype not in WEIGHT_DTYPES:
        raise InputError(f"topk: weight is {weight.dtype}; accepted: {WEIGHT_DTYPES}")
    if not features.is_floating_point() or features.device != weight.device:
        raise InputError(
            f"topk: features are {features.dtype} on {features.device}, the weight is on "
            f"{weight.device}; accepted: floating point, on the weight's device"
        )
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= weight.shape[0]:
        raise OptionError(f"topk: k={k!r}; accepted: an int from 1 to {weight.shape[0]}")
    compute = default_compute_dtype(weight.dtype, "cuda" if weight.device.type == "cuda" else "cpu")
    rows = features.detach().reshape(-1, features.shape[-1])
    values, indices = kernels.select(weight.device).topk(
        rows, weight.detach(), None if bias is None else bias.detach(), k,
        _chunk(rows.shape[0], weight.device), compute,
    )  # fmt: skip
    shape = (*features.shape[:-1], k)
    return TopK(values.to(torch.float32).reshape(shape), indices.reshape(shape))


def _chunk(rows: int, device: torch.device) -> int:
    if device.type != "cuda":
        return CHUNK
    return max(CHUNK, _KEYS // max(1, rows))
