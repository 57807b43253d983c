"""What a backward keeps for an update that `opt.step()` makes, and that update.

A head's gradient is `dw = sum_n scale_n g_n^T x_n` with g a function of the weight, the features,
the targets and the row statistics: these are kept (N x D), never dw (L x D). From them and the
still unchanged weight the update is made in a second pass; the squared norm of dw likewise.

Shapes: N rows, D features, L outputs.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from elmo_compile.kernels.problem import Chunk, HeadProblem
from elmo_compile.numerics.capture import capturing
from elmo_compile.numerics.losses import BCE, LossSpec, Positives
from elmo_compile.numerics.update import Update
from elmo_compile.ops.spread import exchange_of


@dataclasses.dataclass(kw_only=True, eq=False)
class KeptHead:
    """One backward of a head with kernels of its own (BCE, cross entropy)."""

    problem: HeadProblem
    stats_2N: Tensor
    scale_N: Tensor
    norm2: Tensor | None
    """float64: the squared norm of dw, where the backward formed it."""
    wrong: Tensor
    """bool: features, targets or upstream gradient were invalid or not finite."""
    task: int
    """Which run of autograd it was."""
    bias: tuple[Tensor, int] | None = None
    """On a GPU: the bias itself (the problem has a copy) and its version then."""

    def times_(self, factor: float | Tensor) -> None:
        """Scale the gradient."""
        self.scale_N = self.scale_N * factor
        if self.norm2 is not None:
            self.norm2 = self.norm2 * (factor * factor)

    def chunks(self, w_LD: Tensor, chunk: int) -> Iterator[Chunk]:
        """(start, stop, dw in float32) chunk by chunk."""
        from elmo_compile import kernels

        p = dataclasses.replace(self.problem, w_LD=w_LD, chunk=chunk, wide_dw=True)
        found: Iterator[Chunk] = kernels.select(w_LD.device).head_chunks(
            p, self.stats_2N, self.scale_N
        )
        return found

    def merges_with(self, other: KeptHead) -> bool:
        """Whether the rows of both can be stacked: the same loss of the same logits."""
        return self._key() == other._key() and self._has_bias_of(other)

    def _key(self) -> Any:
        p = self.problem
        loss = p.loss.name, p.loss.targets, p.loss.ignore_index
        return *loss, p.compute_dtype, p.fp8_features

    def _has_bias_of(self, other: KeptHead) -> bool:
        """Whether both have equal biases; a GPU is waited for only if they are two tensors."""
        mine, its = self.problem.b_L, other.problem.b_L
        if mine is None or its is None:
            return mine is its
        if self.bias is not None and other.bias is not None:
            if self.bias[0].data_ptr() == other.bias[0].data_ptr():
                return self.bias[1] == other.bias[1]
            if capturing(mine.device):
                return False
        return mine.dtype == its.dtype and torch.equal(mine, its)


@dataclasses.dataclass(kw_only=True, eq=False)
class KeptProgram:
    """One backward of a head whose loss is a program."""

    program: Any
    x: Tensor
    inputs: list[Any]
    """Arguments of the program and what its forward saved."""
    tangents: list[Tensor]
    compute: torch.dtype
    chunk: int
    norm2: Tensor | None
    wrong: Tensor
    task: int
    shard: str = ""
    """How the outputs are spread over processes (`shards.LabelShard`); empty for a whole head."""

    def times_(self, factor: float | Tensor) -> None:
        """Scale the gradient, which is linear in its upstream gradients."""
        self.tangents = [(t * factor).to(t.dtype) for t in self.tangents]
        if self.norm2 is not None:
            self.norm2 = self.norm2 * (factor * factor)

    def chunks(self, w_LD: Tensor, chunk: int) -> Iterator[Chunk]:
        """(start, stop, dw in float32) chunk by chunk."""
        from elmo_compile.kernels.aten.programs import Product, program_chunks

        product = Product(x=self.x, w_LD=w_LD, compute_dtype=self.compute)
        given = [*self.inputs, *self.tangents]
        with exchange_of(self.shard, self.x, self.program.outline) as spread:
            yield from program_chunks(self.program, product, given, chunk, spread)


@dataclasses.dataclass(kw_only=True, eq=False)
class KeptDense:
    """A gradient that exists: of another use of the weight."""

    grad_LD: Tensor
    wrong: Tensor
    factor: float | Tensor = 1.0
    norm2: Tensor | None = None
    task: int = -1

    def times_(self, factor: float | Tensor) -> None:
        """Scale the gradient (not the tensor, which is the user's)."""
        self.factor = self.factor * factor

    def chunks(self, w_LD: Tensor, chunk: int) -> Iterator[Chunk]:
        """(start, stop, dw in float32) chunk by chunk."""
        wide = torch.float64 if w_LD.dtype == torch.float64 else torch.float32
        for start, stop, part in slices(self.grad_LD, chunk):
            yield start, stop, part.to(wide) * self.factor


Kept = KeptHead | KeptProgram | KeptDense


def slices(dw_LD: Tensor, chunk: int) -> Iterator[Chunk]:
    """(start, stop, rows) of a gradient that exists."""
    for start in range(0, dw_LD.shape[0], chunk):
        part = dw_LD[start : start + chunk]
        yield start, start + part.shape[0], part


def keep_dense(grad_LD: Tensor) -> KeptDense:
    """A dense gradient as something kept."""
    return KeptDense(grad_LD=grad_LD, wrong=~torch.isfinite(grad_LD.float().sum()))


def keep_head(
    problem: HeadProblem, stats_2N: Tensor, scale_N: Tensor, norm2: Tensor | None, wrong: Tensor
) -> KeptHead:
    """Keep a backward, with copies of what compiled code may overwrite."""
    target, loss = _copied_target(problem)
    b_L = problem.b_L
    problem = dataclasses.replace(
        problem,
        x_ND=problem.x_ND.detach().clone(),
        b_L=None if b_L is None else b_L.detach().clone(),
        target=target,
        loss=loss,
    )
    return KeptHead(
        problem=problem,
        stats_2N=stats_2N.detach().clone(),
        scale_N=scale_N.detach().clone(),
        norm2=norm2,
        wrong=wrong,
        task=current_task(),
        bias=(b_L, b_L._version) if b_L is not None and b_L.is_cuda else None,
    )


def keep_program(
    program: Any,
    x: Tensor,
    inputs: Sequence[Any],
    tangents: Sequence[Tensor],
    chunk: int,
    compute: torch.dtype,
    norm2: Tensor | None,
    finite: Tensor,
    shard: str = "",
) -> KeptProgram:
    """Keep a backward of a program, with copies of what compiled code may overwrite.

    Args:
        finite: bool: whether the gradient of the logits was.
    """

    def copy(value: Any) -> Any:
        return value.detach().clone() if isinstance(value, Tensor) else value

    finite = torch.stack([finite, *(torch.isfinite(t).all() for t in (x, *tangents))]).all()
    return KeptProgram(
        program=program,
        x=copy(x),
        inputs=[copy(value) for value in inputs],
        tangents=[copy(value) for value in tangents],
        compute=compute,
        chunk=chunk,
        norm2=norm2,
        wrong=~finite,
        task=current_task(),
        shard=shard,
    )


def current_task() -> int:
    """The run of autograd this is called in (a private query, tried on 2.11 to 2.15)."""
    return int(torch._C._current_graph_task_id())


def _copied_target(p: HeadProblem) -> tuple[Tensor | Positives, LossSpec]:
    """The targets as they are now; on a CPU (elsewhere the host would wait for their number) dense
    ones as pairs where that is smaller."""
    target, loss = p.target, p.loss
    if isinstance(target, Positives):
        values_M = None if target.values_M is None else target.values_M.clone()
        return Positives(target.rows_M.clone(), target.cols_M.clone(), values_M), loss
    if loss.targets == "dense" and loss.name == BCE and target.device.type == "cpu":
        cols_M, rows_M = target.t().nonzero(as_tuple=True)
        if pairs_are_smaller(rows_M.numel(), target.numel(), target.dtype):
            pairs = dataclasses.replace(loss, targets="pairs")
            return Positives(rows_M, cols_M, target[rows_M, cols_M].to(torch.float32)), pairs
    return target.detach().clone(), loss


def pairs_are_smaller(pairs: int, elements: int, dtype: torch.dtype) -> bool:
    """Whether pairs (two int64 and a float32 each) take less memory than a dense matrix."""
    return 20 * pairs < elements * dtype.itemsize


def squared_norm(kept: Sequence[Kept], w_LD: Tensor) -> Tensor:
    """The squared norm of the sum of kept gradients, float64, from the unchanged weight."""
    from elmo_compile import kernels

    if len(kept) == 1 and kept[0].norm2 is not None:
        return kept[0].norm2
    (one, *more) = kept
    if not more and isinstance(one, KeptHead):
        p = dataclasses.replace(one.problem, w_LD=w_LD)
        made = kernels.select(w_LD.device).backward(
            p, one.stats_2N, one.scale_N, need_dx=False, need_dw=False, need_db=False,
            need_norm=True,
        )  # fmt: skip
        found: Tensor = made.norm2
        return found
    total = torch.zeros((), dtype=torch.float64, device=w_LD.device)
    for _, _, dw in summed_chunks(kept, w_LD):
        total += torch.linalg.vector_norm(dw, dtype=torch.float64).square()
    return total


def summed_chunks(kept: Sequence[Kept], w_LD: Tensor) -> Iterator[Chunk]:
    """(start, stop, dw in float32), summed over several backwards, advanced side by side."""
    chunk = common_chunk(kept, w_LD)
    for parts in itertools.zip_longest(*(one.chunks(w_LD, chunk) for one in kept)):
        # Where another process has more outputs, a program goes on for it, with empty chunks.
        own = [part for part in parts if part is not None and part[0] < part[1]]
        if not own:
            continue
        start, stop, dw = own[0]
        assert [part[:2] for part in own] == [(start, stop)] * len(kept)
        for _, _, more in own[1:]:
            dw = dw + more
        yield start, stop, dw


def common_chunk(kept: Sequence[Kept], w_LD: Tensor) -> int:
    """Outputs per chunk for several backwards together: at most 16 MiB of dw, 64 on a GPU."""
    most = 1 << 22 if w_LD.device.type == "cpu" else 1 << 24
    sizes = [w_LD.shape[0], most // max(1, w_LD.shape[1])]
    for one in kept:
        if not isinstance(one, KeptDense):
            sizes.append(one.problem.chunk if isinstance(one, KeptHead) else one.chunk)
    chunk = max(1, min(sizes))
    for one in kept:
        if isinstance(one, KeptProgram) and one.shard:  # whose chunks all processes make together
            with exchange_of(one.shard, one.x, "chunk") as spread:
                return int(spread.agree(chunk))
    return chunk


def for_kept(kept: Sequence[Kept], update: Update) -> Update:
    """The update as `apply` can make it of these gradients. Raises as `Update.on_host`."""
    alone = len(kept) == 1 and isinstance(kept[0], KeptHead)
    return update if alone else update.on_host()


def apply(
    kept: Sequence[Kept],
    w_LD: Tensor,
    update: Update,
    reduce: Callable[[Tensor], Tensor] | None = None,
    guard: Tensor | None = None,
) -> None:
    """Update a weight in place from the sum of kept gradients.

    Args:
        guard: None, or one int32 on the device (CUDA): not zero leaves everything as it is.
        reduce: what sums a chunk of dw over processes, where rows could not be gathered.
    """
    from elmo_compile import kernels

    (one, *more) = kept
    if more or reduce is not None or not isinstance(one, KeptHead):
        from elmo_compile.kernels.aten import update_from_chunks

        update_from_chunks(w_LD, summed_chunks(kept, w_LD), update, reduce)
        return
    p = dataclasses.replace(one.problem, w_LD=w_LD)
    kernels.select(w_LD.device).backward_update(
        p, one.stats_2N, one.scale_N, update, need_dx=False, need_db=False,
        **({} if guard is None else {"guard": guard}),
    )  # fmt: skip
