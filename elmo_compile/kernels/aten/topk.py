"""The k largest logits of each row, streamed over chunks of outputs.

Shapes: N rows, D features, L outputs, C outputs of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from elmo_compile.errors import InputError
from elmo_compile.kernels.aten.compiled import SMALL
from elmo_compile.kernels.aten.stored import StoredWeight

_LOW = 0xFFFFFFFF


def topk(
    x_ND: Tensor,
    w_LD: Tensor,
    b_L: Tensor | None,
    k: int,
    chunk: int,
    compute_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Values float32 [N, k], largest first, and indices int64 [N, k] of `x w^T + b`.

    Ties go to the lower index, whatever the chunk: logit and index are compared as one integer.

    Args:
        x_ND, w_LD, b_L: as in `HeadProblem`.
        k: 1 <= k <= L.
        chunk: outputs per chunk.
        compute_dtype: operand dtype of the products; logits are compared in float32.

    Raises:
        InputError: k is out of range.
    """
    num_outputs = w_LD.shape[0]
    if not 1 <= k <= num_outputs:
        raise InputError(f"k={k} is out of range; accepted: 1 <= k <= {num_outputs} outputs")
    operand = torch.float32 if compute_dtype == torch.float16 else compute_dtype
    fast = x_ND.shape[0] * num_outputs >= SMALL
    weight = StoredWeight(w_LD, operand, min(chunk, num_outputs), None, fast)
    x_ND = weight.features(x_ND.to(operand))
    best_NK = torch.empty(x_ND.shape[0], 0, dtype=torch.int64)
    for start in range(0, num_outputs, chunk):
        stop = min(start + chunk, num_outputs)
        z_NC = torch.mm(x_ND, weight.load(start, stop).t()).to(torch.float32)
        if b_L is not None:
            z_NC = z_NC + b_L[start:stop].to(torch.float32)
        keys_NC = _keys(z_NC, start)
        keys_NC = keys_NC.topk(min(k, stop - start), dim=1, sorted=False).values
        best_NK = torch.cat((best_NK, keys_NC), 1)
        best_NK = best_NK.topk(min(k, best_NK.shape[1]), dim=1).values
    return _values(best_NK), _LOW - (best_NK & _LOW)


def _keys(z_NC: Tensor, start: int) -> Tensor:
    """int64 that orders as (logit, then lower index first): the logit's bits above the index's."""
    # -0 becomes 0, and every NaN the one that ranks above infinity, as in torch.topk.
    bits = torch.where(z_NC == z_NC, z_NC + 0.0, torch.nan).view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    index = torch.arange(start, start + z_NC.shape[1])
    return (ordered << 32) | (_LOW - index)


def _values(keys: Tensor) -> Tensor:
    """The logits of `_keys`."""
    ordered = (keys >> 32).to(torch.int32)
    return torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).view(torch.float32)
