"""What the planner is told about one head: sizes, dtypes and what is asked for.

Formulas are written in five symbols: N rows, D features, L outputs, C outputs per chunk and M
listed positives. Sizes may themselves be expressions (a dynamic batch), with hints to number them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import sympy
import torch

from elmo_compile.config import LossValue
from elmo_compile.numerics.losses import BCE, CE, LossSpec
from elmo_compile.numerics.state_size import StateSize

DeviceKind = Literal["cpu", "cuda"]
Size = Any
"""An int or a sympy expression (sympy has no types for mypy)."""

# No assumptions, so that a reader's own sympy.symbols("N D L") substitute into the formulas.
N, D, L, C, M = sympy.symbols("N D L C M")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramSize:
    """What a loss without kernels of its own costs."""

    forward: int
    """Logits' products in the forward: one a walk over the outputs."""
    backward: int
    """Logits' products in the backward, before those of the gradients."""
    live: int
    """Chunk-sized float32 values alive at once, where they are not fused by a compiler."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadShape:
    """One head and its loss, as sizes and choices; no graph and no tensors."""

    rows: Size
    """N: rows of the features, int or sympy expression."""
    features: Size
    """D: columns of features and weight."""
    outputs: Size
    """L: rows of the weight."""
    loss: LossSpec
    weight_dtype: torch.dtype
    """As stored."""
    feature_dtype: torch.dtype
    compute_dtype: torch.dtype
    """Operands of the matrix products; see `default_compute_dtype`."""
    has_bias: bool = False
    positives: Size = 0
    """M: entries of sparse targets in the batch (N * P where padded); 0 for dense and classes."""
    dense_target_dtype: torch.dtype = torch.float32
    """Dense targets: the dtype of the [N, L] tensor. Sparse targets: of the multi-hot matrix that
    the program would build."""
    logits_upcast: bool = False
    """The program casts its logits to float32 before the loss."""
    features_trainable: bool = True
    weight_trainable: bool = True
    fused_update: bool = False
    """The weight is updated in the backward; no weight gradient is made."""
    state: tuple[StateSize, ...] = ()
    """What the optimizer keeps for the weight, where that is known."""
    device: DeviceKind = "cpu"
    loss_value: LossValue = "exact"
    at_once: bool = False
    """The gradients may be formed in the forward, up to the upstream gradient (a reduced loss)."""
    program: ProgramSize | None = None
    """For a loss without kernels of its own."""
    hints: Mapping[Any, int] = dataclasses.field(default_factory=dict)
    """A number for each free symbol of the sizes: the sizes that were traced."""

    def number(self, expr: Size) -> int:
        """`expr` (in N, D, L, M or the caller's own symbols) at the hinted sizes."""
        sizes = {N: self.rows, D: self.features, L: self.outputs, M: self.positives}
        return int(sympy.sympify(expr).subs(sizes).subs(dict(self.hints)))

    @property
    def trains(self) -> bool:
        """Whether a backward will be asked for."""
        return self.features_trainable or self.weight_trainable

    @property
    def value_in_backward(self) -> bool:
        """Whether the loss value costs no product of its own: deferred, BCE, fused update."""
        return (
            self.loss_value != "exact"
            and self.fused_update
            and self.trains
            and self.loss.name == BCE
            and self.program is None
        )

    @property
    def forms_gradients_at_once(self) -> bool:
        """Whether the gradients are formed in the forward, from logits that exist anyway."""
        return self.at_once and not self.fused_update and self.trains and self.program is None

    @property
    def may_hold_logits(self) -> bool:
        """Whether a fused update's backward can take over the logits of its forward."""
        softmax = self.loss.name == CE and self.program is None
        return softmax and self.fused_update and self.trains and self.device == "cpu"

    @property
    def rounds_dw_to_narrow(self) -> bool:
        """Whether each sum into the weight gradient is rounded to 16 bits."""
        return self.weight_trainable and self.weight_gradient_dtype.itemsize == 2

    @property
    def weight_gradient_dtype(self) -> torch.dtype:
        """Of a weight gradient tensor where there is one: float32 for fp8 weights."""
        return torch.float32 if self.weight_dtype.itemsize == 1 else self.weight_dtype


def default_compute_dtype(weight_dtype: torch.dtype, device: DeviceKind) -> torch.dtype:
    """Operand dtype of the products: the storage dtype, bfloat16 for fp8.

    float16 weights are computed in float32 on a CPU, where float16 products are 10 to 40 times
    slower (measured on torch 2.13).
    """
    if weight_dtype.itemsize == 1:
        return torch.bfloat16
    if weight_dtype == torch.float16 and device == "cpu":
        return torch.float32
    return weight_dtype
