"""The k largest logits of each row, without the logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from elmo_compile import kernels
from elmo_compile.errors import InputError, OptionError
from elmo_compile.ops.collectives import gather_rows, swap
from elmo_compile.ops.dtensors import is_sharded, local_of
from elmo_compile.ops.shards import Agreement, LabelShard
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


def topk(
    features: Tensor,
    weight: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    exclude: Tensor | None = None,
) -> TopK:
    """The k largest of `x W^T + b` for each row, scored a chunk of outputs at a time.

    With the weight of a sharded head (`elmo_compile.distributed.shard_head`) every process calls it
    with rows of its own, and gets the largest of all outputs for them.

    Args:
        features: x [..., D], floating point.
        weight: W [L, D], float32, bfloat16, float16, float8_e4m3fn or float64.
        k: at least 1, at most L.
        bias: b [L], or None; sharded where the weight is.
        exclude: int64 [..., S], padded with -1: outputs that a row must not be given, in any order
            (items a user has had). The k + S largest are found, so S counts as k does; with a
            sharded head S is the same in all processes.

    Returns:
        TopK of float32 values and int64 indices, each [..., k]. No gradient flows. A row with fewer
        than k outputs left ends in indices -1 of values -inf.

    Raises:
        InputError: shapes, dtypes or devices that do not fit, or (on a CPU) an excluded number
            below -1 or not below L.
        OptionError: k is no int in [1, L].
    """
    if exclude is not None:
        _check_k(k, weight)
        _check_excluded(exclude, features, weight)
        most = min(k + exclude.shape[-1], weight.shape[0])
        return _without(topk(features, weight, most, bias=bias), exclude, k)
    if is_sharded(weight) or is_sharded(bias):
        return _of_shards(features, weight, k, bias)
    _check(features, weight, k, bias)
    shape = (*features.shape[:-1], k)
    rows = features.detach().reshape(-1, features.shape[-1])
    values, indices = _largest(rows, weight.detach(), k, bias)
    return TopK(values.reshape(shape), indices.reshape(shape))


def _of_shards(features: Tensor, weight: Any, k: int, bias: Any) -> TopK:
    """The same of a weight whose rows are spread over processes: each finds the largest of its own,
    and sends them where the row is."""
    if not all(p is None or _is_by_rows(p) for p in (weight, bias)):
        raise InputError(
            f"topk: the weight is a {type(weight).__name__}, the bias a {type(bias).__name__}; "
            "accepted: both whole, or both DTensors with Shard(0) over a mesh of one dimension"
        )
    shard = LabelShard.of(weight)
    must = "k, features' columns and dtypes, and whether there is a bias"
    with Agreement(shard.group, weight.device, "topk of a sharded head", must) as agreement:
        _check(features, weight, k, bias)
        rows = features.detach().reshape(-1, features.shape[-1])
        same = k, rows.shape[1], rows.dtype, weight.dtype, bias is None
        agreement.tell(rows.shape[0], same=same)
    counts = agreement.told(0)
    x_AD = torch.cat(gather_rows(rows, counts, shard.group))
    values, indices = _largest(
        x_AD, local_of(weight), min(k, shard.count), None if bias is None else local_of(bias)
    )
    found = [
        torch.cat(
            swap(
                torch.split(part, counts),
                [(rows.shape[0], min(k, last - first)) for first, last in shard.bounds],
                shard.group,
            ),
            1,
        )
        for part in (values, indices + shard.first)
    ]
    # Of equal logits those of lower index come first: processes are in the order of their outputs.
    values, order = found[0].sort(dim=1, descending=True, stable=True)
    shape = (*features.shape[:-1], k)
    indices = found[1].gather(1, order[:, :k])
    return TopK(values[:, :k].reshape(shape), indices.reshape(shape))


def _is_by_rows(t: Any) -> bool:
    return is_sharded(t) and t.device_mesh.ndim == 1 and t.placements[0].is_shard(0)


def _check(features: Tensor, weight: Tensor, k: int, bias: Tensor | None) -> None:
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
    _check_k(k, weight)


def _check_k(k: int, weight: Tensor) -> None:
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= weight.shape[0]:
        raise OptionError(f"topk: k={k!r}; accepted: an int from 1 to {weight.shape[0]}")


def _check_excluded(exclude: Tensor, features: Tensor, weight: Tensor) -> None:
    rows = tuple(features.shape[:-1])
    if exclude.dtype != torch.int64 or tuple(exclude.shape[:-1]) != rows or exclude.dim() < 1:
        raise InputError(
            f"topk: exclude is {exclude.dtype} {tuple(exclude.shape)}; accepted: int64 "
            f"[{', '.join(map(str, rows))}, S], padded with -1"
        )
    if exclude.device != features.device:
        raise InputError(f"topk: exclude is on {exclude.device}, features on {features.device}")
    if exclude.device.type == "cpu" and exclude.numel():
        low, high = map(int, exclude.aminmax())
        if low < -1 or high >= weight.shape[0]:
            wrong = low if low < -1 else high
            raise InputError(f"topk: exclude has {wrong}; accepted: -1 to {weight.shape[0] - 1}")


def _without(found: TopK, exclude: Tensor, k: int) -> TopK:
    """The first k that are not excluded."""
    values, indices = found
    if exclude.shape[-1]:
        numbers = exclude.sort(dim=-1).values
        place = torch.searchsorted(numbers, indices).clamp_max_(numbers.shape[-1] - 1)
        out = numbers.gather(-1, place) == indices
        values, indices = values.masked_fill(out, -torch.inf), indices.masked_fill(out, -1)
        order = out.to(torch.uint8).argsort(dim=-1, stable=True)[..., :k]
        values, indices = values.gather(-1, order), indices.gather(-1, order)
    return TopK(values, indices)


def _largest(x_ND: Tensor, w_LD: Tensor, k: int, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(values float32, indices) [N, k] of a weight that this process has whole."""
    compute = default_compute_dtype(w_LD.dtype, "cuda" if w_LD.device.type == "cuda" else "cpu")
    values, indices = kernels.select(w_LD.device).topk(
        x_ND, w_LD, None if bias is None else bias.detach(), k,
        _chunk(x_ND.shape[0], w_LD.device), compute,
    )  # fmt: skip
    return values.to(torch.float32), indices


def _chunk(rows: int, device: torch.device) -> int:
    if device.type != "cuda":
        return CHUNK
    return max(CHUNK, _KEYS // max(1, rows))
