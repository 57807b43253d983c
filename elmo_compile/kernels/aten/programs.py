"""A program's walks on the ATen kernels: products chunk by chunk, chunk graphs between them.

The products, the stored weight and the update are those of the other losses; what lies between a
chunk's logits and their gradient is a graph, compiled by Inductor for large problems. Written for
any device; tried on a CPU.
Shapes: N rows, D features, L outputs, C outputs of a chunk.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from elmo_compile.kernels.aten.compiled import SMALL, graph_piece
from elmo_compile.kernels.aten.head import (
    FeatureGradient,
    GradientNorm,
    Operands,
    WeightGradient,
    wide_product,
)
from elmo_compile.numerics.features import FP8, round_features
from elmo_compile.numerics.update import Update
from elmo_compile.programs.record import Program
from elmo_compile.programs.run import iterate, run


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Product:
    """One head in a program: z = x W^T (a bias is an input of the program)."""

    x: Tensor
    """Features [.., D]."""
    w_LD: Tensor
    compute_dtype: torch.dtype
    """float8_e4m3fn: the features are rounded so, and the products are of bfloat16."""
    wide_dw: bool = False

    def __post_init__(self) -> None:
        if self.compute_dtype == FP8:
            rounded = round_features(self.x.reshape(-1, self.x.shape[-1])).view(self.x.shape)
            object.__setattr__(self, "x", rounded)
            object.__setattr__(self, "compute_dtype", torch.bfloat16)


class ProductGradients:
    """dx [.., D] and dw [L, D] of each product; None where not asked for."""

    def __init__(
        self,
        dx: list[Tensor | None],
        dw: list[Tensor | None],
        inputs: list[Any],
        norm2: Tensor | None = None,
        finite: Tensor | None = None,
    ) -> None:
        self.dx, self.dw, self.inputs = dx, dw, inputs
        self.norm2, self.finite = norm2, finite


class Products:
    """The operands of a program's products, and their logits chunk by chunk."""

    scale = 1.0
    """Of weight gradients."""

    def __init__(
        self,
        program: Program,
        products: Sequence[Product],
        chunk: int,
        updates: dict[int, Update] | None = None,
    ) -> None:
        rows = products[0].x[..., 0].numel()
        self.fast = rows * program.num_outputs >= SMALL
        self.shapes = [p.x.shape[:-1] for p in products]
        self.chunk, self.num_outputs = min(chunk, program.num_outputs), program.num_outputs
        self.operands = [
            Operands(
                p.x.reshape(-1, p.x.shape[-1]), p.w_LD, chunk, p.compute_dtype,
                (updates or {}).get(i), fast=self.fast, wide_dw=p.wide_dw,
            )
            for i, p in enumerate(products)
        ]  # fmt: skip
        self.loaded: dict[int, Tensor] = {}

    def chunks(self, wanted: tuple[int, ...]) -> Iterator[tuple[int, int, list[Tensor]]]:
        """(start, stop, logits [.., C] of the wanted products) of each chunk."""
        for start in range(0, self.num_outputs, self.chunk):
            stop = min(start + self.chunk, self.num_outputs)
            zs = []
            self.loaded.clear()
            for i in wanted:
                self.loaded[i], z_NC = self.operands[i].row_logits(start, stop)
                zs.append(z_NC.view(*self.shapes[i], stop - start))
            yield start, stop, zs

    def weight(self, i: int, start: int, stop: int) -> Tensor:
        """The operand [C, D] of a chunk of a product's weight."""
        found = self.loaded.get(i)
        return self.operands[i].weight.load(start, stop) if found is None else found

    def ready(
        self, start: int, stop: int, gradients: dict[int, Tensor]
    ) -> Iterator[tuple[int, int, dict[int, Tensor]]]:
        """(start, stop, gradients of logits as operands [C, N]) of what may be multiplied with
        features and weights now, given the gradients of a chunk [.., C]."""
        yield start, stop, {i: self.operand(i, g).t() for i, g in gradients.items()}

    def operand(self, i: int, g: Tensor) -> Tensor:
        """A gradient of logits as an operand [N, C]."""
        return g.reshape(-1, g.shape[-1]).to(self.operands[i].operand)

    def features(self, i: int, dx: FeatureGradient) -> Tensor:
        """A product's dx in the shape of its features."""
        return self._shaped(i, dx.result(self._ones(i)))

    def _shaped(self, i: int, dx_ND: Tensor) -> Tensor:
        return dx_ND.view(*self.shapes[i], dx_ND.shape[1])

    def _ones(self, i: int) -> Tensor:
        x_ND = self.operands[i].x_ND
        return torch.ones(x_ND.shape[0], device=x_ND.device)


def products_held(
    program: Program,
    products: Sequence[Product],
    chunk: int,
    updates: dict[int, Update] | None,
    spread: Any,
) -> Products:
    """The operands of a call, here or spread over processes (`ops.spread.Exchange`)."""
    if spread is None:
        return Products(program, products, chunk, updates)
    from elmo_compile.kernels.aten.spread_programs import SpreadProducts

    return SpreadProducts(program, products, chunk, updates, spread)


def forward(
    program: Program,
    products: Sequence[Product],
    inputs: Sequence[Any],
    chunk: int,
    spread: Any = None,
) -> list[Any]:
    """The program's results and saved values.

    Args:
        spread: the outputs of the only product are spread over processes.
    """
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        held = products_held(program, products, chunk, None, spread)
        compiler = functools.partial(graph_piece, use_compiled=held.fast)
        return run(program.forward, inputs, held.chunks, program.num_outputs, compiler)


def backward(
    program: Program,
    products: Sequence[Product],
    inputs: Sequence[Any],
    chunk: int,
    *,
    need_dx: Sequence[bool],
    need_dw: Sequence[bool],
    updates: dict[int, Update] | None = None,
    need_norm: bool = False,
    need_finite: bool = False,
    spread: Any = None,
) -> ProductGradients:
    """Gradients of features, weights and inputs.

    Args:
        inputs: of the program, then its saved values, then the upstream gradients.
        updates: products whose weight is updated in place instead of getting a gradient.
        need_norm: of the only product's dw: the sum of its squares.
        need_finite: whether the logits' gradient is.
        spread: as in `forward`; norm and finiteness are those of this process's outputs.
    """
    assert program.backward is not None
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        held = products_held(program, products, chunk, updates, spread)
        dx = [FeatureGradient(o) if need else None for o, need in zip(held.operands, need_dx)]
        dw = [
            WeightGradient(o) if need and i not in (updates or {}) else None
            for i, (o, need) in enumerate(zip(held.operands, need_dw))
        ]

        norm = GradientNorm(held.operands[0].x_ND, held.scale) if need_norm else None
        sums: list[Tensor] = []

        def sink(start: int, stop: int, gradients: dict[int, Tensor]) -> None:
            for own_start, own_stop, operands in held.ready(start, stop, gradients):
                if own_start < own_stop:
                    multiply(own_start, own_stop, operands)

        def multiply(start: int, stop: int, operands: dict[int, Tensor]) -> None:
            for i, g_CN in operands.items():
                head, w_CD = held.operands[i], held.weight(i, start, stop)
                if need_finite:
                    sums.append(
                        g_CN.sum(
                            dtype=torch.float64 if g_CN.dtype == torch.float64 else torch.float32
                        )
                    )
                into = dx[i]
                if into is not None:
                    into.add(g_CN, w_CD)
                if norm is not None:
                    norm.add(g_CN)
                to = dw[i]
                if to is not None:
                    to.put(start, stop, g_CN, head.x_ND, held.scale)
                elif i in (updates or {}):
                    head.weight.step(start, stop, g_CN, head.x_ND, held.scale)

        compiler = functools.partial(graph_piece, use_compiled=held.fast)
        grads = run(program.backward, inputs, held.chunks, program.num_outputs, compiler, sink)
        return ProductGradients(
            [None if d is None else held.features(i, d) for i, d in enumerate(dx)],
            [None if d is None else d.dw_LD for d in dw],
            grads[len(products) :],
            None if norm is None else norm.result(),
            _are_finite(sums, held.operands[0].x_ND.device) if need_finite else None,
        )


def program_chunks(
    program: Program, product: Product, inputs: Sequence[Any], chunk: int, spread: Any = None
) -> Iterator[tuple[int, int, Tensor]]:
    """(start, stop, dw in float32) of each chunk of the only product's outputs.

    Spread over processes, of this one's outputs: as many chunks in each, so that of them that have
    fewer outputs the last are empty.

    To be consumed under `torch.no_grad()`, by whoever may overwrite a chunk's weight after it.
    """
    assert program.backward is not None
    held = products_held(program, [product], chunk, None, spread)
    compiler = functools.partial(graph_piece, use_compiled=held.fast)
    head = held.operands[0]
    for start, stop, gradients in iterate(
        program.backward, inputs, held.chunks, program.num_outputs, compiler, {}
    ):
        for own_start, own_stop, operands in held.ready(start, stop, gradients):
            dw = head.weight.restore(wide_product(operands[0], head.x_ND))
            yield own_start, own_stop, dw if held.scale == 1.0 else dw * held.scale


def _are_finite(sums: Sequence[Tensor], device: torch.device) -> Tensor:
    return torch.isfinite(torch.stack([torch.zeros((), device=device), *sums])).all()
