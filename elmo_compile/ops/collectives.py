"""Tensors of different lengths, sent between processes. Sent as bytes, so that any dtype may.

A process that is alone in its group sends nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def exchange(numbers: Sequence[int], device: torch.device, group: Any) -> list[list[int]]:
    """The numbers of every process: as many in each. Waits for a GPU."""
    if dist.get_world_size(group) == 1:
        return [list(numbers)]
    mine = torch.tensor(list(numbers), dtype=torch.int64, device=device)
    received = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(received, mine, group=group)
    return [one.tolist() for one in received]


def gather_rows(t: Tensor, sizes: Sequence[int], group: Any) -> list[Tensor]:
    """Every process's tensor, of these lengths and otherwise of one shape."""
    if len(sizes) == 1:
        return [t]
    each = math.prod(t.shape[1:]) * t.element_size()
    longest = torch.zeros(max(sizes) * each, dtype=torch.uint8, device=t.device)
    if not longest.numel():
        return [t.new_empty(size, *t.shape[1:]) for size in sizes]
    longest[: t.shape[0] * each].view(t.dtype).view(t.shape).copy_(t)
    received = [torch.empty_like(longest) for _ in sizes]
    dist.all_gather(received, longest, group=group)
    return [
        data[: size * each].view(t.dtype).view(size, *t.shape[1:])
        for data, size in zip(received, sizes)
    ]


def swap(parts: Sequence[Tensor], shapes: Sequence[tuple[int, int]], group: Any) -> list[Tensor]:
    """What every process has for this one.

    Args:
        parts: for each process, of one dtype.
        shapes: of what comes from each.
    """
    if len(parts) == 1:
        return [parts[0]]
    first = parts[0]
    given, sizes = (
        [math.prod(shape) * first.element_size() for shape in of_each]
        for of_each in ([part.shape for part in parts], shapes)
    )
    sent, received = (
        torch.empty(sum(each), dtype=torch.uint8, device=first.device) for each in (given, sizes)
    )
    for place, part in zip(torch.split(sent, given), parts):
        place.view(part.dtype).view(part.shape).copy_(part)
    dist.all_to_all_single(received, sent, sizes, given, group=group)
    return [
        data.view(first.dtype).view(shape)
        for data, shape in zip(torch.split(received, sizes), shapes)
    ]


def sum_over(t: Tensor, group: Any) -> Tensor:
    """t <- its sum over the processes."""
    if dist.get_world_size(group) > 1:
        dist.all_reduce(t, group=group)
    return t
