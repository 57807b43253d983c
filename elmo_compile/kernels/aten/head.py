"""The head step on a CPU: bare matrix products, chunk by chunk, with vector code between them.

For each chunk of C outputs, in the compute dtype with float32 accumulation inside a product:

    z = w_c x^T              the operand w_c is the stored chunk, or its decoded copy
    g = dloss/dz             in place of z
    dx += g^T w_c            a chunk's product may be bf16; the sum over chunks is float32
    w_c <- round(sgd(w_c, g (scale x)))

Logits are [C, N]: of the layouts tried this one has the fastest products (benchmarks/NOTES.md).
The scale of a row of g is folded into the row of x, relative to the largest, whose size is applied
in float32 where the update is formed; a uniform scale is thereby exact.
Shapes: N rows, D features, L outputs, C outputs of a chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from elmo_compile import host_memory
from elmo_compile.kernels.aten import pieces
from elmo_compile.kernels.aten.chunk_loss import ChunkLoss
from elmo_compile.kernels.aten.compiled import SMALL, piece
from elmo_compile.kernels.aten.stored import StoredWeight
from elmo_compile.kernels.factor import GramFactor
from elmo_compile.kernels.problem import HeadProblem
from elmo_compile.numerics.update import Update

_PAGE, _PAD = 4096, 64
"""Bytes by which rows of a chunk must not lie apart, or columns of it share cache sets; elements
that keep them from it."""
_NARROW_GRADIENTS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def uses_lanes(p: HeadProblem) -> bool:
    """Whether logits are handled as words of two bf16."""
    return p.compute_dtype == torch.bfloat16 and p.loss.targets != "dense"


def operand_rows(p: HeadProblem) -> int:
    """Rows of the features as an operand: whole words where logits are words."""
    rows = p.x_ND.shape[0]
    return rows + (rows % 2 if uses_lanes(p) else 0)


def operand_dtype(compute: torch.dtype, device: torch.device) -> torch.dtype:
    """Of the products: float16 ones are two orders of magnitude slower than float32 on a CPU."""
    return torch.float32 if compute == torch.float16 and device.type == "cpu" else compute


def new_held(p: HeadProblem) -> Tensor:
    """Room for all logits of a call, which `forward` fills and its backward uses up."""
    operand = operand_dtype(p.compute_dtype, p.w_LD.device)
    rows = operand_rows(p)
    return host_memory.empty((p.w_LD.shape[0], _padded(rows, operand)), operand)[:, :rows]


def _padded(rows: int, dtype: torch.dtype) -> int:
    """Rows of the operand that logits [C, rows] have room for."""
    return rows + (_PAD if rows and rows * dtype.itemsize % _PAGE == 0 else 0)


class Operands:
    """Features and weight of one product, as its matrix products take them."""

    def __init__(
        self,
        x_ND: Tensor,
        w_LD: Tensor,
        chunk: int,
        compute_dtype: torch.dtype,
        update: Update | None = None,
        *,
        fast: bool,
        rows: int | None = None,
        wide_dw: bool = False,
        weight: StoredWeight | None = None,
    ) -> None:
        """rows: of the operand, where it is padded to more than N; wide_dw: see `HeadProblem`;
        weight: of another call on the same weight and chunk, whose buffers to take over."""
        self.w_LD, self.wide_dw, self.fast, self.update = w_LD, wide_dw, fast, update
        self.num_rows, self.num_outputs = x_ND.shape[0], w_LD.shape[0]
        self.operand = operand_dtype(compute_dtype, w_LD.device)
        self.work = torch.float64 if self.operand == torch.float64 else torch.float32
        self.chunk = min(chunk, self.num_outputs)
        self.weight = weight or StoredWeight(w_LD, self.operand, self.chunk, update, fast)
        rows = self.num_rows if rows is None else rows
        self.x_ND = torch.zeros(rows, x_ND.shape[1], dtype=self.operand, device=x_ND.device)
        self.x_ND[: self.num_rows] = self.weight.features(x_ND.detach())

    @functools.cached_property
    def _logits(self) -> Tensor:
        """A chunk's logits, [C, rows of the operand]."""
        rows = self.x_ND.shape[0]
        shape = (self.chunk, _padded(rows, self.operand))
        return host_memory.scratch(self, shape, self.operand, self.x_ND.device)[:, :rows]

    @functools.cached_property
    def _row_logits(self) -> Tensor:
        """A chunk's logits row by row, flat."""
        size = self.num_rows * self.chunk
        return host_memory.scratch(self, (size,), self.operand, self.x_ND.device)

    def row_logits(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Weight operand [C, D] and logits [N, C] without bias of a chunk."""
        size = stop - start
        z_NC = self._row_logits[: self.num_rows * size].view(self.num_rows, size)
        w_CD = self.weight.load(start, stop)
        return w_CD, torch.mm(self.x_ND[: self.num_rows], w_CD.t(), out=z_NC)


class Head(Operands):
    """Operands, buffers and loss of one call."""

    def __init__(
        self,
        p: HeadProblem,
        update: Update | None = None,
        held: Tensor | None = None,
        *,
        fill: bool = False,
        weight: StoredWeight | None = None,
    ) -> None:
        """held: all logits [L, rows of the operand], to be filled (`fill`) or used up. weight: see
        `Operands`."""
        self.p, self._held, self._fill = p, held, fill
        num_rows, num_outputs = p.x_ND.shape[0], p.w_LD.shape[0]
        fast = num_rows * num_outputs >= SMALL
        lanes = uses_lanes(p)
        rows = operand_rows(p)
        super().__init__(
            p.x_ND, p.w_LD, p.chunk, p.compute_dtype, update, fast=fast, rows=rows,
            wide_dw=p.wide_dw, weight=weight,
        )  # fmt: skip
        self.loss = ChunkLoss(p, rows, lanes, self.work, fast)

    def weights(self) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, weight operand [C, D]) of each chunk."""
        for start in range(0, self.num_outputs, self.chunk):
            stop = min(start + self.chunk, self.num_outputs)
            yield start, stop, self.weight.load(start, stop)

    def chunks(self) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """(start, stop, weight operand [C, D], logits [C, N] without bias) of each chunk."""
        held = self._held
        for start, stop, w_CD in self.weights():
            z_CN = self._logits[: stop - start] if held is None else held[start:stop]
            if held is None or self._fill:
                torch.mm(w_CD, self.x_ND.t(), out=z_CN)
            yield start, stop, w_CD, z_CN

    def scaled_features(self, scale_N: Tensor) -> tuple[Tensor, float]:
        """`(x scale / s, s)` with `s = max |scale|` (1 where all are 0)."""
        scale_N = scale_N.detach().to(self.work)
        largest = float(scale_N.abs().max()) if self.num_rows else 0.0
        largest = largest or 1.0
        relative_N = torch.zeros(self.x_ND.shape[0], dtype=self.work)
        relative_N[: self.num_rows] = scale_N / largest
        scaled_ND = (self.x_ND.to(self.work) * relative_N[:, None]).to(self.operand)
        return scaled_ND, largest

    def row_statistics(self, stats_2N: Tensor) -> tuple[Tensor, Tensor] | None:
        """The rows' log-sum-exp as the gradient wants it; infinite (p = 0) where ignored.

        Lanes take the large parts of even and of odd rows, since their probabilities are rounded
        to bf16; else it is the large and the small part of every row.
        """
        if not self.loss.is_ce:
            return None
        high_N, low_N = stats_2N.detach().to(self.work)
        if self.p.loss.targets == "classes":
            assert isinstance(self.p.target, Tensor)
            high_N = torch.where(self.p.target == self.p.loss.ignore_index, torch.inf, high_N)
        first, odd = self.loss.split(high_N, torch.inf)
        return first, self.loss.split(low_N, 0.0)[0] if odd is None else odd


class FeatureGradient:
    """dx: products of each chunk, summed over chunks in float32."""

    def __init__(self, head: Operands) -> None:
        self._head = head
        rows, features = head.x_ND.shape
        device = head.x_ND.device
        self._sum = torch.zeros(rows, features, dtype=head.work, device=device)
        self._narrow = head.operand != head.work
        self._part: Tensor | None = None
        if self._narrow:
            self._part = torch.empty(rows, features, dtype=head.operand, device=device)

    def add(self, g_CN: Tensor, w_CD: Tensor) -> None:
        """dx += g^T w_c."""
        if self._part is None:
            self._sum.addmm_(g_CN.t(), w_CD)
        else:
            self._sum.add_(torch.mm(g_CN.t(), w_CD, out=self._part))

    def result(self, scale_N: Tensor) -> Tensor:
        """dx [N, D] with the rows' scale."""
        dx_ND = self._head.weight.restore(self._sum[: self._head.num_rows])
        return dx_ND.mul_(scale_N.detach().to(dx_ND.dtype)[:, None])


class WeightGradient:
    """dw as a tensor, written a chunk at a time."""

    def __init__(self, head: Operands) -> None:
        self._head = head
        w_LD = head.w_LD
        narrow = w_LD.dtype in _NARROW_GRADIENTS and not head.wide_dw
        dtype = w_LD.dtype if narrow else torch.float32
        self.dw_LD = host_memory.empty(w_LD.shape, dtype, w_LD.device)
        self._direct = dtype == head.operand and head.weight.layout != "quads"
        self._part: Tensor | None = None
        if not self._direct:
            shape = (head.chunk, w_LD.shape[1])
            self._part = host_memory.scratch(self, shape, head.operand, w_LD.device)

    def put(
        self,
        start: int,
        stop: int,
        g_CN: Tensor,
        xs_ND: Tensor,
        scale: float,
        *,
        add: bool = False,
    ) -> None:
        """dw[start:stop] = scale g xs, or that added to it."""
        out = self.dw_LD[start:stop]
        if self._part is None:
            torch.addmm(out, g_CN, xs_ND, beta=int(add), alpha=scale, out=out)
            return
        part = self._head.weight.restore(torch.mm(g_CN, xs_ND, out=self._part[: stop - start]))
        if add:
            out.add_(part, alpha=scale)
        else:
            out.copy_(part).mul_(scale)


class GradientNorm:
    """The squared norm of dw = g^T x, without dw."""

    def __init__(self, xs_ND: Tensor, scale: float) -> None:
        self._factor, self._scale = GramFactor(xs_ND), scale
        self._sum = torch.zeros((), dtype=torch.float64, device=xs_ND.device)

    def add(self, g_CN: Tensor) -> None:
        """Add a chunk's gradient."""
        self._sum += self._factor.row_squares(g_CN).sum()

    def result(self) -> Tensor:
        """The squared norm, float64."""
        return self._sum * (self._scale * self._scale)


def wide_product(g_CN: Tensor, xs_ND: Tensor) -> Tensor:
    """`g x` in float32 (float64): a chunk of dw that is not rounded to the operands' dtype."""
    work = torch.float64 if xs_ND.dtype == torch.float64 else torch.float32
    return torch.mm(g_CN.to(work), xs_ND.to(work))


class BiasGradient:
    """db, a chunk at a time; added to `db_L` where it is given."""

    def __init__(self, head: Head, scale_N: Tensor, db_L: Tensor | None = None) -> None:
        self._loss, self._fast = head.loss, head.fast
        self._scale = head.loss.split(scale_N.detach(), 0.0)
        self._add = db_L is not None
        self.db_L = torch.empty(head.num_outputs, dtype=head.work) if db_L is None else db_L

    def put(self, start: int, stop: int, g_CN: Tensor) -> None:
        """db[start:stop] = sum_n scale_n g."""
        run = piece(pieces.weighted_sums, self._fast, lanes=self._loss.lanes)
        parts = run(self._loss.words(g_CN), *self._scale)
        out = self.db_L[start:stop]
        if self._add:
            out.add_(parts[0])
        else:
            out.copy_(parts[0])
        if len(parts) == 2:
            out.add_(parts[1])
