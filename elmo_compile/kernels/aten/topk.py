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
_NOTHING = torch.iinfo(torch.int64).min
_AT_ONCE = 1 << 17
"""Logits ranked at once: 1 MiB of keys."""
_BLOCKS = 16
"""Of a chunk, whose maxima bound its k largest from below."""


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
    top = TopRows(x_ND.shape[0], k, None if b_L is None else b_L.to(torch.float32)[:, None])
    for start in range(0, num_outputs, chunk):
        stop = min(start + chunk, num_outputs)
        top.add(torch.mm(weight.load(start, stop), x_ND.t()), start)
    return top.result()


class TopRows:
    """The k largest logits of each row, of chunks as they come.

    Only logits that may be among a row's k largest are ranked: those at least its k-th so far and
    at least the k-th largest of the maxima of a chunk's blocks.
    """

    def __init__(self, rows: int, k: int, bias_L1: Tensor | None) -> None:
        self.rows, self.k, self._bias_L1 = rows, k, bias_L1
        self._best_NK = torch.full((rows, k), _NOTHING, dtype=torch.int64)

    def add(self, z_CN: Tensor, start: int) -> None:
        """Take in the logits of outputs from `start` on, without bias; columns past N are none."""
        last_N = self._best_NK[:, -1]
        z_CN = z_CN[:, : last_N.shape[0]]
        if self._bias_L1 is not None:
            z_CN = z_CN.to(torch.float32) + self._bias_L1[start : start + z_CN.shape[0]]
        top_N = z_CN.amax(0).to(torch.float32)
        least_N = torch.where(last_N == _NOTHING, -torch.inf, _values(last_N))
        better_N = (top_N > least_N) | (last_N == _NOTHING) | top_N.isnan()
        if not bool(better_N.any()):
            return
        block = z_CN.shape[0] // _BLOCKS
        found: Tensor | None = None
        if block and self.k <= _BLOCKS and not bool(top_N.isnan().any()):
            maxima = z_CN[: block * _BLOCKS].view(_BLOCKS, block, -1).amax(1).to(torch.float32)
            bound_N = torch.maximum(maxima.topk(self.k, dim=0).values[-1], least_N)
            bound_N = torch.where(better_N, bound_N, torch.inf).to(z_CN.dtype)
            found = torch.nonzero(z_CN >= bound_N)
        if found is not None and found.shape[0] <= _AT_ONCE:
            self._merge(found[:, 1], _keys(z_CN[found[:, 0], found[:, 1]], start + found[:, 0]))
            return
        rows = better_N.nonzero().squeeze(1)
        index = torch.arange(start, start + z_CN.shape[0])
        for part in torch.split(rows, max(1, _AT_ONCE // z_CN.shape[0])):
            keys = _keys(z_CN[:, part].t(), index)
            keys = keys.topk(min(self.k, keys.shape[1]), dim=1, sorted=False).values
            best = torch.cat((self._best_NK[part], keys), 1)
            self._best_NK[part] = best.topk(self.k, dim=1).values

    def _merge(self, rows_M: Tensor, keys_M: Tensor) -> None:
        """Take in logits given one by one."""
        order = keys_M.argsort(descending=True)
        rows_M, by_row = rows_M[order].sort(stable=True)
        keys_M = keys_M[order][by_row]
        first_N = torch.searchsorted(rows_M, torch.arange(self._best_NK.shape[0]))
        rank_M = torch.arange(rows_M.shape[0]) - first_N[rows_M]
        kept_M = rank_M < self.k
        fresh = torch.full_like(self._best_NK, _NOTHING)
        fresh[rows_M[kept_M], rank_M[kept_M]] = keys_M[kept_M]
        self._best_NK = torch.cat((self._best_NK, fresh), 1).topk(self.k, dim=1).values

    def part(self, start: int, stop: int) -> TopRows:
        """The same for some of the rows; `put` back what it collects."""
        part = TopRows(stop - start, self.k, self._bias_L1)
        part._best_NK = self._best_NK[start:stop]
        return part

    def put(self, start: int, part: TopRows) -> None:
        """Take over what was collected for the rows from `start` on."""
        self._best_NK[start : start + part.rows] = part._best_NK

    def result(self) -> tuple[Tensor, Tensor]:
        """Values float32 [N, k], largest first, and indices int64 [N, k]."""
        return _values(self._best_NK), _LOW - (self._best_NK & _LOW)


def _keys(z: Tensor, index: Tensor) -> Tensor:
    """int64 that orders as (logit, then lower index first): the logit's bits above the index's."""
    # -0 becomes 0, and every NaN the one that ranks above infinity, as in torch.topk.
    z = z.to(torch.float32)
    bits = torch.where(z == z, z + 0.0, torch.nan).view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    return (ordered << 32) | (_LOW - index)


def _values(keys: Tensor) -> Tensor:
    """The logits of `_keys`."""
    ordered = (keys >> 32).to(torch.int32)
    return torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).view(torch.float32)
