"""What a head's loss is, and the element-wise arithmetic of each loss, written once in torch.

Reference and ATen kernels call these functions; the Triton kernels restate them and are tested
against them. Shapes: N rows, D features, L outputs, P positives a row, M positives in a batch.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from elmo_compile.errors import OptionError

LossName = Literal["binary_cross_entropy_with_logits", "cross_entropy"]
TargetForm = Literal["classes", "dense", "padded", "indices", "flat", "pairs"]
Reduction = Literal["none", "sum", "mean"]

BCE: LossName = "binary_cross_entropy_with_logits"
CE: LossName = "cross_entropy"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossSpec:
    """One loss a head carries, as data: it travels through the graph as a short string."""

    name: LossName
    """The function's name in `torch.nn.functional`."""
    targets: TargetForm
    """How targets are given. `classes`: int64 [N]. `dense`: [N, L]. `padded`: int64 [N, P], -1 is
    padding. `indices`: int64 [N, P] without padding, as `scatter_`. `flat`: int64 [M] with offsets
    int64 [N + 1]. `pairs`: rows int64 [M], cols int64 [M], negative ones from the end as
    `index_put_`."""
    duplicates: Literal["once", "count"] = "once"
    """What a label given twice counts: 1 (`multi_hot`, scatter) or 2 (`one_hot().sum()`)."""
    reduction: Reduction = "mean"
    """`none`: one value a row (summed over outputs). `mean`: as torch: over N*L for BCE, over the
    rows that are not ignored for cross entropy."""
    ignore_index: int = -100
    """Cross entropy: rows with this class have neither loss nor gradient."""

    def encode(self) -> str:
        """The spec as `name(targets=..., ...)`, readable in a printed graph."""
        fields = (f for f in dataclasses.fields(self) if f.name != "name")
        return f"{self.name}({', '.join(f'{f.name}={getattr(self, f.name)}' for f in fields)})"

    @classmethod
    def decode(cls, text: str) -> LossSpec:
        """Inverse of `encode`. Raises OptionError on anything `encode` did not write."""
        name, _, rest = text.partition("(")
        try:
            values = dict(item.split("=") for item in rest.rstrip(")").split(", "))
            return cls(
                name=cast(LossName, name),
                targets=cast(TargetForm, values["targets"]),
                duplicates=cast(Literal["once", "count"], values["duplicates"]),
                reduction=cast(Reduction, values["reduction"]),
                ignore_index=int(values["ignore_index"]),
            )
        except (KeyError, ValueError) as error:
            raise OptionError(f"not an encoded LossSpec: {text!r}") from error


class Positives(NamedTuple):
    """Sparse targets of a batch, sorted by column, then row; entries to skip have column L."""

    rows_M: Tensor
    """int64 [M], 0 <= row < N."""
    cols_M: Tensor
    """int64 [M], ascending; L (one past the last output) marks padding and repeats."""
    values_M: Tensor | None
    """float32 [M] target values, or None where every target is 1."""


def bce_value(z: Tensor, y: Tensor) -> Tensor:
    """`max(z, 0) - z y + log(1 + exp(-|z|))`, element by element."""
    return z.clamp_min(0) - z * y + torch.log1p(torch.exp(-z.abs()))


def bce_gradient(z: Tensor, y: Tensor) -> Tensor:
    """`sigmoid(z) - y` as `(1 - y) sigmoid(z) - y sigmoid(-z)`, which does not cancel at y = 1."""
    return (1 - y) * torch.sigmoid(z) - y * torch.sigmoid(-z)


def softplus(z: Tensor) -> Tensor:
    """`log(1 + exp(z))`, the value of a negative: finite for every finite z."""
    return z.clamp_min(0) + log1p_of_unit(torch.exp(-z.abs()))


def log1p_of_unit(s: Tensor) -> Tensor:
    """`log(1 + s)` for 0 <= s <= 1 as `2 atanh(s / (2 + s))`, its series cut off at float32.

    Multiplications and additions alone, where a compiled `log1p` is a call for each vector: the
    relative error is below 3e-7 down to s = 0. float64 takes torch's own.
    """
    if s.dtype == torch.float64:
        return torch.log1p(s)
    t = s / (2.0 + s)
    u = t * t
    series = u * (1 / 13) + 1 / 11
    for odd in (9, 7, 5, 3, 1):
        series = series * u + 1 / odd
    return 2.0 * t * series


def positive_gradient(z: Tensor, values: Tensor | None) -> Tensor:
    """Gradient of BCE at a positive of value v (None: 1): `-sigmoid(-z)` where v is 1."""
    return -torch.sigmoid(-z) if values is None else bce_gradient(z, values)


def two_parts(lse_N: Tensor, dtype: torch.dtype) -> Tensor:
    """A log-sum-exp as the unevaluated sum of a large and a small part, [2, N].

    An ulp of a log-sum-exp of 10 is an error of 1e-6 in every probability of its row. What
    subtracts the parts one after the other is as exact as what subtracts a row's maximum first.
    """
    high_N = lse_N.to(dtype)
    low_N = torch.where(high_N.isfinite(), lse_N - high_N.to(lse_N.dtype), 0.0)
    return torch.stack((high_N, low_N.to(dtype)))


def ce_target_gradient(log_p: Tensor) -> Tensor:
    """`p - 1` at the target class from `log p`: exact where p is close to 1."""
    return torch.expm1(log_p)


def logaddexp(a: Tensor, b: Tensor) -> Tensor:
    """`log(e^a + e^b)`, right where either is -inf."""
    return torch.logaddexp(a, b)


def one_row_reference(z_L: Tensor, y: Tensor, spec: LossSpec) -> Tensor:
    """The loss of one row as torch computes it, for tests: z float [L]; y class id or dense [L]."""
    if spec.name == CE:
        return F.cross_entropy(z_L[None], y[None], reduction="sum", ignore_index=spec.ignore_index)
    return F.binary_cross_entropy_with_logits(z_L, y, reduction="sum")
