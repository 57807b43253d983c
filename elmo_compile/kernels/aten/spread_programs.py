"""A program's product whose outputs are spread over processes.

What lies between logits and their gradient is of a process's own rows and runs as it does for a
whole head; only the product is shared. For each step every process multiplies a chunk of its own
outputs with the features of all; what belongs to a process's rows is sent to it, so that it sees a
chunk of each process's outputs, one after the other. Their gradients go back the same way.

Shapes: N rows of this process, A of all, C outputs of a chunk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from elmo_compile.kernels.aten.head import FeatureGradient
from elmo_compile.kernels.aten.programs import Product, Products
from elmo_compile.numerics.update import Update
from elmo_compile.programs.record import Program


class SpreadProducts(Products):
    """The operands of a program's only product, and its logits chunk by chunk.

    Args:
        spread: `ops.spread.Exchange`: who has which outputs, and what sends tensors.
    """

    def __init__(
        self,
        program: Program,
        products: Sequence[Product],
        chunk: int,
        updates: dict[int, Update] | None,
        spread: Any,
    ) -> None:
        (product,) = products
        chunk = spread.agree(chunk)  # planned for each process's outputs
        x_ND = product.x.reshape(-1, product.x.shape[-1])
        of_all = dataclasses.replace(product, x=spread.of_all(x_ND))
        super().__init__(program, [of_all], chunk, updates)
        self._spread, self.shapes = spread, [product.x.shape[:-1]]
        self._pieces: list[Tensor] = []
        self.scale = 1.0 / spread.shard.world
        self._counts = [last - first for first, last in spread.shard.bounds]

    def chunks(self, wanted: tuple[int, ...]) -> Iterator[tuple[int, int, list[Tensor]]]:
        """(start, stop, logits [.., C]) of each chunk of all outputs, not in ascending order."""
        self._spread.agree()
        for begin in range(0, max(self._counts), self.chunk):
            widths = self._widths(begin)
            pieces: list[Tensor] = []
            self.loaded.clear()
            if wanted:
                pieces = self._spread.to_rows(self._logits(begin), widths)
            for rank, width in enumerate(widths):
                if width:
                    start = self._spread.shard.bounds[rank][0] + begin
                    zs = [pieces[rank].view(*self.shapes[0], width)] if wanted else []
                    yield start, start + width, zs

    def _logits(self, begin: int) -> Tensor:
        """[A, C] of this process's outputs from `begin` on."""
        stop = min(begin + self.chunk, self._counts[self._spread.shard.rank])
        if begin >= stop:
            operand = self.operands[0]
            return operand.x_ND.new_empty(operand.num_rows, 0)
        self.loaded[0], z_AC = self.operands[0].row_logits(begin, stop)
        return z_AC

    def _widths(self, begin: int) -> list[int]:
        """Outputs of each process in the chunks from its output `begin` on."""
        return [max(0, min(self.chunk, count - begin)) for count in self._counts]

    def ready(
        self, start: int, stop: int, gradients: dict[int, Tensor]
    ) -> Iterator[tuple[int, int, dict[int, Tensor]]]:
        """(start, stop, gradient [C, A]) of this process's outputs, after the last process's chunk
        of a step; empty where this one has no outputs left."""
        bounds = self._spread.shard.bounds
        rank = next(r for r, (first, last) in enumerate(bounds) if first <= start < last)
        begin = start - bounds[rank][0]
        widths = self._widths(begin)
        self._pieces.append(self.operand(0, gradients[0]))
        if any(widths[rank + 1 :]):
            return
        given = iter(self._pieces)
        none = self._pieces[0].new_empty(self._pieces[0].shape[0], 0)
        pieces = [next(given) if width else none for width in widths]
        own = widths[self._spread.shard.rank]
        g_AC = self._spread.to_outputs(pieces, own)
        self._pieces = []
        yield begin, begin + own, {0: g_AC.t()}

    def features(self, i: int, dx: FeatureGradient) -> Tensor:
        """dx of this process's rows, summed over the processes' outputs."""
        total: Tensor = self._spread.own_sum(dx.result(self._ones(i)))
        return self._shaped(i, total)
