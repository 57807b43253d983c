"""Operations on a chunk of outputs that name outputs by number: picks, scatters, maxima, targets.

`columns` are the numbers of the chunk's outputs, int64 [C], consecutive. Numbers outside the chunk
take no part. These functions are called from chunk graphs and are compiled with them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gather(h: Tensor, dim: int, index: Tensor, columns: Tensor) -> Tensor:
    """The share of `gather` over all outputs that lies in this chunk; 0 elsewhere."""
    local, here = _local(index, columns)
    return torch.where(
        here, torch.gather(h, dim, local), torch.zeros((), dtype=h.dtype, device=h.device)
    )


def index(
    h: Tensor, indices: Sequence[Tensor | None], place: int, total: int, columns: Tensor
) -> Tensor:
    """The share of `h[indices]`, where `indices[place]` are outputs out of `total`."""
    given = list(indices)
    outputs = given[place]
    assert outputs is not None
    local, here = _local(torch.where(outputs < 0, outputs + total, outputs), columns)
    given[place] = local
    found = torch.ops.aten.index.Tensor(h, given)
    behind = found.dim() - _first(given) - max(i.dim() for i in given if i is not None)
    here = here.reshape(here.shape + (1,) * behind)
    return torch.where(here, found, torch.zeros((), dtype=h.dtype, device=h.device))


def _first(indices: Sequence[Tensor | None]) -> int:
    """The dimension of a result where those of its index tensors begin: 0 where they are apart."""
    given = [i for i, index in enumerate(indices) if index is not None]
    return given[0] if given[-1] - given[0] == len(given) - 1 else 0


def scatter(h: Tensor, dim: int, index: Tensor, src: Tensor | float, columns: Tensor) -> Tensor:
    """`scatter` into this chunk."""
    wide, local = _with_spare(h, dim, index, columns)
    return _without_spare(torch.scatter(wide, dim, local, src), dim)


def scatter_add(h: Tensor, dim: int, index: Tensor, src: Tensor, columns: Tensor) -> Tensor:
    """`scatter_add` into this chunk."""
    wide, local = _with_spare(h, dim, index, columns)
    return _without_spare(torch.scatter_add(wide, dim, local, src), dim)


def index_put(
    h: Tensor,
    indices: Sequence[Tensor | None],
    values: Tensor,
    accumulate: bool,
    place: int,
    total: int,
    columns: Tensor,
) -> Tensor:
    """`index_put` into this chunk, where `indices[place]` are outputs out of `total`."""
    given = list(indices)
    outputs = given[place]
    assert outputs is not None
    outputs = torch.where(outputs < 0, outputs + total, outputs)
    wide, local = _with_spare(h, place, outputs, columns)
    given[place] = local
    put = torch.ops.aten.index_put(wide, given, values, accumulate)
    return _without_spare(put, place)


def multi_hot(indices: Tensor, offsets: Tensor | None, columns: Tensor) -> Tensor:
    """`elmo_compile.multi_hot` of this chunk: float32 [N, C]."""
    if offsets is not None:
        rows = torch.searchsorted(offsets, torch.arange(indices.numel(), device=indices.device),
                                  right=True) - 1  # fmt: skip
        one = torch.ones((), dtype=torch.float32, device=indices.device)
        empty = one.new_zeros(offsets.numel() - 1, columns.numel())
        return index_put(empty, [rows, indices], one, False, 1, 0, columns)
    shape = (indices.shape[0], columns.numel())
    empty = torch.zeros(shape, dtype=torch.float32, device=indices.device)
    return scatter(empty, 1, indices, 1.0, columns)


def log_sum_exp(h: Tensor, dim: int, keepdim: bool) -> tuple[Tensor, Tensor]:
    """Largest value and `sum e^(h - largest)`; largest is 0 where it is infinite."""
    top = h.amax(dim, keepdim=True)
    top = torch.where(top.isinf(), torch.zeros_like(top), top)
    total = torch.exp(h - top).sum(dim, keepdim=keepdim)
    return (top if keepdim else top.squeeze(dim)), total


def extreme(
    h: Tensor, dim: int, keepdim: bool, largest: bool, columns: Tensor
) -> tuple[Tensor, Tensor]:
    """Largest (smallest) value and the number of its output."""
    found = h.max(dim, keepdim=keepdim) if largest else h.min(dim, keepdim=keepdim)
    return found.values, found.indices + columns[0]


def top(h: Tensor, k: int, dim: int, largest: bool, columns: Tensor) -> tuple[Tensor, Tensor]:
    """The k largest (smallest) and the numbers of their outputs."""
    found = torch.topk(h, min(k, h.shape[dim]), dim, largest)
    return found.values, found.indices + columns[0]


def _local(numbers: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Positions in the chunk (0 where outside), and which are inside."""
    local = numbers - columns[0]
    here = (local >= 0) & (local < columns.shape[0])
    return torch.where(here, local, torch.zeros_like(local)), here


def _with_spare(h: Tensor, dim: int, numbers: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """h with one more output, and positions in it: the spare one for outputs outside the chunk."""
    local = numbers - columns[0]
    size = columns.shape[0]
    local = torch.where((local >= 0) & (local < size), local, torch.full_like(local, size))
    shape = list(h.shape)
    shape[dim] = 1
    return torch.cat((h, h.new_zeros(shape)), dim), local


def _without_spare(h: Tensor, dim: int) -> Tensor:
    return h.narrow(dim, 0, h.shape[dim] - 1)
