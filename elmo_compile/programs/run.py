"""Evaluate a schedule: small values whole, walks chunk by chunk, partial results combined.

Sums are in arithmetic precision within a chunk and in float64 across chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from elmo_compile import host_memory
from elmo_compile.ops.in_range import check_numbers
from elmo_compile.programs.record import Result, Schedule, Walk

Chunks = Callable[[tuple[int, ...]], Iterable[tuple[int, int, list[Tensor]]]]
"""Products -> (start, stop, chunk of each one's logits [rows.., C]) of every chunk."""
Sink = Callable[[int, int, dict[int, Tensor]], None]
"""Takes (start, stop, gradient of each product's logits [rows.., C])."""
Compiler = Callable[[fx.GraphModule], Callable[..., Any]]


def run(
    schedule: Schedule,
    inputs: Sequence[Any],
    chunks: Chunks,
    num_outputs: int,
    compiler: Compiler,
    sink: Sink | None = None,
) -> list[Any]:
    """The schedule's outputs; gradients of logits go to `sink`, and are None among them."""
    env: dict[str, Any] = {}
    for start, stop, gradients in iterate(schedule, inputs, chunks, num_outputs, compiler, env):
        assert sink is not None
        sink(start, stop, gradients)
    return [None if name is None else env[name] for name in schedule.outputs]


def iterate(
    schedule: Schedule,
    inputs: Sequence[Any],
    chunks: Chunks,
    num_outputs: int,
    compiler: Compiler,
    env: dict[str, Any],
) -> Iterator[tuple[int, int, dict[int, Tensor]]]:
    """Evaluate into `env`, giving (start, stop, gradient of each product's logits) of the chunks of
    the walks that form such gradients."""
    env.update(zip(schedule.inputs, inputs))
    for step in schedule.steps:
        if isinstance(step, Walk):
            yield from _walk(step, env, chunks, num_outputs, compiler)
        else:
            for node in step:
                env[node.name] = _evaluate(node, env)


def _evaluate(node: fx.Node, env: dict[str, Any]) -> Any:
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: env[n.name])
    target: Any = node.target
    return target(*args, **kwargs)


def _walk(
    walk: Walk,
    env: dict[str, Any],
    chunks: Chunks,
    num_outputs: int,
    compiler: Compiler,
) -> Iterator[tuple[int, int, dict[int, Tensor]]]:
    for name, lowest in walk.numbers:
        check_numbers(env[name], lowest, num_outputs)
    step = compiler(walk.graph)
    totals = [_Total(result, num_outputs) for result in walk.results]
    device = next((v.device for v in env.values() if isinstance(v, Tensor)), None)
    for start, stop, zs in chunks(walk.products):
        columns = torch.arange(start, stop, device=zs[0].device if zs else device)
        arguments = [_cut(env[name], dim, start, stop) for name, dim in walk.arguments]
        parts = list(step(*zs, columns, *arguments))
        at = 0
        for total in totals:
            total.add(parts[at : at + total.result.parts], start)
            at += total.result.parts
        if walk.gradients:
            yield start, stop, dict(zip(walk.gradients, parts[at:]))
    for total in totals:
        env[total.result.name] = total.value()


def _cut(value: Any, dim: int | None, start: int, stop: int) -> Any:
    return value if dim is None else value.narrow(dim, start, stop - start)


class _Total:
    """One result, combined over chunks."""

    def __init__(self, result: Result, num_outputs: int) -> None:
        self.result, self._L = result, num_outputs
        self._parts: list[Tensor] = []
        self._last = -1
        self._ascending = True
        """Whether chunks came in the order of their outputs, as they do where a head is whole."""

    def add(self, parts: list[Tensor], start: int) -> None:
        """Combine with a chunk's parts."""
        combine = self.result.combine
        self._ascending &= start > self._last
        self._last = start
        if combine == "slice":
            self._write(parts[0], start)
            return
        if combine == "sum" and parts[0].is_floating_point():
            parts = [parts[0].double()]
        elif combine == "logsumexp":
            parts = [part.double() for part in parts]
        if not self._parts:
            self._parts = [part.clone() for part in parts]
            return
        if not self._ascending and combine in _BY_NUMBER:
            self._parts = _by_number(self.result, self._parts, parts)
            return
        self._parts = _COMBINE[combine](self.result, self._parts, parts)

    def _write(self, part: Tensor, start: int) -> None:
        dim = self.result.dim
        if not self._parts:
            shape = list(part.shape)
            shape[dim] = self._L
            self._parts = [host_memory.empty(shape, self.result.meta.dtype, part.device)]
        self._parts[0].narrow(dim, start, part.shape[dim]).copy_(part)

    def value(self) -> Any:
        """The result: a tensor, or a pair where the operation returns one."""
        meta, parts = self.result.meta, self._parts
        if self.result.combine == "logsumexp":
            top, total = parts
            lse = torch.where(total == 0, -torch.inf, top + total.log())
            return lse.to(meta.dtype)
        if isinstance(meta, tuple | list):
            return tuple(part.to(m.dtype) for part, m in zip(parts, meta))
        return parts[-1].to(meta.dtype)


def _sum(result: Result, a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    return [a[0].add_(b[0])]


def _max(result: Result, a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    return [torch.maximum(a[0], b[0])]


def _min(result: Result, a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    return [torch.minimum(a[0], b[0])]


def _any(result: Result, a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    return [a[0] | b[0]]


def _all(result: Result, a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    return [a[0] & b[0]]


def _logsumexp(result: Result, a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    tops = [torch.where(total == 0, -torch.inf, top) for top, total in (a, b)]
    together = torch.maximum(*tops)
    safe = torch.where(together == -torch.inf, 0.0, together)
    scaled = [
        # The sum of a chunk with an infinite logit, which no factor makes smaller.
        torch.where(total.isinf(), total, total * torch.exp(top - safe))
        for top, (_, total) in zip(tops, (a, b))
    ]
    return [safe, scaled[0] + scaled[1]]


def _argmax(result: Result, a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    better = (b[0] > a[0]) | (b[0].isnan() & ~a[0].isnan())
    return [torch.where(better, new, old) for old, new in zip(a, b)]


def _argmin(result: Result, a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    better = (b[0] < a[0]) | (b[0].isnan() & ~a[0].isnan())
    return [torch.where(better, new, old) for old, new in zip(a, b)]


def _topk(result: Result, a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    values = torch.cat((a[0], b[0]), result.dim)
    numbers = torch.cat((a[1], b[1]), result.dim)
    order = torch.sort(values, dim=result.dim, descending=result.largest, stable=True).indices
    order = order.narrow(result.dim, 0, min(result.k, values.shape[result.dim]))
    return [values.gather(result.dim, order), numbers.gather(result.dim, order)]


def _by_number(result: Result, a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    """`argmax`, `argmin` and `topk` of chunks in any order: of equal values the first output's."""
    largest = result.largest if result.combine == "topk" else result.combine == "argmax"
    if result.combine == "topk":
        values, numbers = (torch.cat(pair, result.dim) for pair in zip(a, b))
        order = numbers.argsort(dim=result.dim)
        kept = [values.gather(result.dim, order), numbers.gather(result.dim, order)]
        nothing = [part.narrow(result.dim, 0, 0) for part in kept]
        return _topk(result, kept, nothing)
    better = (b[0] > a[0]) if largest else (b[0] < a[0])
    better |= b[0].isnan() & ~a[0].isnan()
    same = (b[0] == a[0]) | (b[0].isnan() & a[0].isnan())
    better |= same & (b[1] < a[1])
    return [torch.where(better, new, old) for old, new in zip(a, b)]


_BY_NUMBER = frozenset({"argmax", "argmin", "topk"})

_COMBINE: dict[str, Callable[[Result, list[Tensor], list[Tensor]], list[Tensor]]] = {
    "sum": _sum, "max": _max, "min": _min, "any": _any, "all": _all, "logsumexp": _logsumexp,
    "argmax": _argmax, "argmin": _argmin, "topk": _topk,
}  # fmt: skip
