"""What every kernel family (reference, ATen, Triton) is handed, and what it must provide.

Shapes: N rows, D features, L outputs, P positives a row, M positives in a batch. A family is a
module with these functions; each walks the outputs in chunks of `problem.chunk` and never holds
an [N, L] tensor, nor (except as the returned gradient) an [L, D] one.

`forward(p) -> Forward`
    The loss of each row before reduction, and the row statistics its gradient needs.
`backward(p, stats_2N, scale_N, need_dx=, need_dw=, need_db=, need_value=, need_norm=) -> Gradients`
    With `g_NL = dloss_n/dz_nl`: dx = scale_n g w, dw = (scale g)^T x, db = (scale g) summed; and,
    without dw, its squared norm.
`loss_and_gradients(p, scale_N, rows, need_dx=, need_dw=, need_db=, top=) -> Gradients`
    Both at once, the row losses included: three products where `rows` rows' logits may be held.
`backward_update(p, stats_2N, scale_N, update, need_dx=, need_db=, need_value=) -> UpdateResult`
    The same dx and db from the weight as it was, then the weight and its state updated in place
    chunk by chunk with `update`; a chunk's weight is overwritten only after its last use.
`head_chunks(p, stats_2N, scale_N) -> Iterator[Chunk]`
    dw of one chunk after the other, for what needs several gradients of a weight side by side.

Row losses are summed over outputs in float32 within a chunk and float64 across chunks.
`stats_2N` is, for cross entropy, the row log-sum-exp as two float32 numbers whose sum it is
(`numerics.losses.two_parts`), and an empty tensor for BCE.
Rows ignored by cross entropy have loss 0 and gradient 0.
Inputs were checked by the caller: shapes, dtypes, devices, label range.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from elmo_compile.numerics.losses import LossSpec, Positives


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class HeadProblem:
    """One call of a head and its loss."""

    x_ND: Tensor
    """Features, any floating dtype; kernels cast to `compute_dtype`."""
    w_LD: Tensor
    """Weight as stored: float64, float32, bfloat16, float16 or float8_e4m3fn; contiguous."""
    b_L: Tensor | None
    """Bias, any floating dtype but fp8; added once, in float32."""
    target: Tensor | Positives
    """Classes int64 [N]; dense [N, L] of any real dtype; or `Positives`."""
    loss: LossSpec
    chunk: int
    """Outputs per chunk, at least 1; need not divide L."""
    compute_dtype: torch.dtype
    """Operand dtype of the matrix products: float64, float32, float16 or bfloat16. Logits and their
    gradient are computed in float32 (float64 for float64), the gradient stored at most in this
    dtype."""
    fp8_features: bool = False
    """Whether x is as `numerics.features.round_features` leaves it, so that the logits' product may
    be one of fp8 with fp8; `compute_dtype` is bfloat16 and the weight float8_e4m3fn then."""
    wide_dw: bool = False
    """Whether the weight gradient is float32 whatever the weight is stored in."""
    capturable: bool = False
    """Whether a CUDA graph is to hold the call: without solver libraries, which it may not."""


Chunk = tuple[int, int, Tensor]
"""(start, stop, dw of these outputs in float32, to be used before the next chunk is asked for)."""


class Forward(NamedTuple):
    rows_N: Tensor
    """float32 [N] (float64 for float64 compute): loss of each row, summed over outputs."""
    stats_2N: Tensor
    """float32 [2, N] log-sum-exp in two parts (float64 for float64 compute), or an empty tensor."""


class Gradients(NamedTuple):
    dx_ND: Tensor | None
    """float32 (float64 for float64 compute)."""
    dw_LD: Tensor | None
    """In the weight's dtype where that is float64, float32, bfloat16 or float16; float32 for fp8,
    and where the problem asks for `wide_dw`."""
    db_L: Tensor | None
    """float32 (float64 for float64 compute)."""
    rows_N: Tensor | None = None
    """As `Forward.rows_N`; None unless asked for."""
    norm2: Tensor | None = None
    """float64 scalar: the sum of the squares of dw; None unless asked for."""


class UpdateResult(NamedTuple):
    dx_ND: Tensor | None
    db_L: Tensor | None
    rows_N: Tensor | None
    """As `Forward.rows_N`, from the weights before the update; None unless asked for."""
