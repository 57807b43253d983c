"""What the matcher knows about a huge value: one small frozen class for each kind.

A rule maps the kinds of an ATen node's arguments to the kind of its result. Shapes: N rows, D
features, L outputs, P positives a row.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
import torch.fx as fx

from elmo_compile.numerics.losses import LossSpec, TargetForm
from elmo_compile.passes.records import RowOp

Extent = Literal["elements", "rows", "scalar"]


@dataclasses.dataclass(frozen=True, eq=False)
class WeightView:
    """The weight or its transpose, perhaps cast."""

    node: fx.Node
    transposed: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Logits:
    """x W^T + b, rows rearranged by `row_ops`; the outputs are in dimension `class_dim`."""

    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    compute_dtype: torch.dtype
    row_ops: tuple[RowOp, ...] = ()
    upcast: bool = False
    class_dim: Literal["last", "second"] = "last"


@dataclasses.dataclass(frozen=True, eq=False)
class Targets:
    """A multi-label target matrix [N, L] given by `form` (see LossSpec.targets)."""

    form: Literal["zeros", "ones_at", "dense"]
    spec_form: TargetForm = "dense"
    node: fx.Node | None = None
    aux: fx.Node | None = None
    duplicates: Literal["once", "count"] = "once"
    row_ops: tuple[RowOp, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class OneHot:
    """`one_hot(indices, L)` before the sum over a row's positives: [N, P, L] or [N, L]."""

    indices: fx.Node


@dataclasses.dataclass(frozen=True, eq=False)
class Loss:
    """A loss: element by element (`elements`), one value a row (`rows`) or one value (`scalar`)."""

    logits: Logits
    spec: LossSpec
    target: fx.Node
    target_aux: fx.Node | None
    target_ops: tuple[RowOp, ...]
    built: torch.dtype | None
    rows: Any
    """N, as the trace knows it."""
    extent: Extent
    scale: float = 1.0
    divisors: tuple[Any, ...] = ()


Kind = WeightView | Logits | Targets | OneHot | Loss
