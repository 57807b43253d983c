"""What the parts of the GPU benchmark share: sizes, clocks, heads and their steps."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import elmo_compile as elmo

Rows = list[dict[str, Any]]
Step = Callable[[], Any]
FP8 = torch.float8_e4m3fn
NAMES = {torch.float32: "float32", torch.bfloat16: "bf16", FP8: "fp8"}
MIB = 1 << 20


@dataclasses.dataclass
class Bench:
    """Where and how large; `dry` keeps every size tiny."""

    device: str
    dry: bool
    repeats: int
    paper: Path | None = None
    """A checkout of the paper's repository; None: its part has nothing to run."""
    copy: float = 1.0
    """Bytes a second, read plus written."""
    flops: float = 1.0

    def size(self, real: int, tiny: int) -> int:
        """A size, or its stand-in of a dry run."""
        return tiny if self.dry else real

    @property
    def options(self) -> dict[str, Any]:
        """Of the backend: a dry run's heads are tiny, and rewritten all the same."""
        return {"min_outputs": 64} if self.dry else {}

    def time(self, step: Step) -> float:
        """Median seconds of a step, after two to warm up."""
        step(), step()
        times = []
        for _ in range(self.repeats):
            if self.device == "cpu":
                start = time.perf_counter()
                step()
                times.append(time.perf_counter() - start)
                continue
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            step()
            last.record()
            last.synchronize()
            times.append(first.elapsed_time(last) / 1e3)
        return statistics.median(times)

    def peak(self, step: Step) -> tuple[float, float]:
        """MiB (allocated, reserved) at the peak of one step, all that exists included."""
        if self.device == "cpu":
            return float("nan"), float("nan")
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / MIB, torch.cuda.max_memory_reserved() / MIB

    def allocated(self) -> float:
        """MiB that exist now."""
        return float("nan") if self.device == "cpu" else torch.cuda.memory_allocated() / MIB


@contextlib.contextmanager
def fresh() -> Iterator[None]:
    """Nothing compiled or cached before; nothing left behind."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    try:
        yield
    finally:
        torch._dynamo.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def weight(outputs: int, features: int, dtype: torch.dtype, device: str) -> Tensor:
    """Random weights, made in pieces."""
    w = torch.empty(outputs, features, dtype=dtype, device=device)
    for start in range(0, outputs, 1 << 18):
        rows = w[start : start + (1 << 18)]
        rows.copy_(0.02 * torch.randn(rows.shape, device=device))
    return w


class Head(nn.Module):
    """A head and its loss; features are an input."""

    def __init__(self, w: Tensor, *, bias: bool = False) -> None:
        super().__init__()
        with torch.device("meta"):
            head = nn.Linear(w.shape[1], w.shape[0], bias=bias)
        if w.dtype == FP8:
            head = elmo.heads.LowPrecisionLinear.of(head, w.dtype)
        head.weight = nn.Parameter(w)
        if bias:
            head.bias = nn.Parameter(torch.zeros(w.shape[0], device=w.device))
        self.head = head

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy of classes [N], BCE (sum over labels, mean over rows) of lists [N, P]."""
        z = self.head(x)
        if labels.ndim == 1:
            return F.cross_entropy(z, labels)
        y = elmo.multi_hot(labels, z.shape[-1])
        return F.binary_cross_entropy_with_logits(z, y, reduction="sum") / z.shape[0]


def kernel_step(
    b: Bench,
    x: Tensor,
    w: Tensor,
    labels: Tensor,
    *,
    chunk: int | None = None,
    fp8_features: bool = False,
) -> Step:
    """The fused BCE step without torch.compile around it; chunk: None for the planner's."""
    from elmo_compile import kernels
    from elmo_compile.kernels.problem import HeadProblem
    from elmo_compile.kernels.targets import positives_of
    from elmo_compile.numerics.features import round_features
    from elmo_compile.numerics.losses import BCE, LossSpec
    from elmo_compile.numerics.update import Update
    from elmo_compile.planner import HeadShape, Plan, limits_for, plan

    spec = LossSpec(name=BCE, targets="padded")
    (N, D), L, family = x.shape, w.shape[0], kernels.select(x.device)
    kind: Any = x.device.type
    cache = torch.cuda.get_device_properties(0).L2_cache_size if kind == "cuda" else None
    shape = HeadShape(
        rows=N, features=D, outputs=L, loss=spec, weight_dtype=w.dtype, feature_dtype=x.dtype,
        compute_dtype=x.dtype, positives=labels.numel(), fused_update=True, device=kind,
        loss_value="deferred",
    )  # fmt: skip
    planned = plan(shape, None, limits_for(kind, cache))
    assert isinstance(planned, Plan)
    scale, none, count = torch.full((N,), 1 / N, device=b.device), x.new_empty(0).float(), 0

    def step() -> None:
        nonlocal count
        count += 1
        problem = HeadProblem(
            x_ND=round_features(x) if fp8_features else x, w_LD=w, b_L=None,
            target=positives_of(spec, labels, None, N, L), loss=spec, compute_dtype=x.dtype,
            chunk=chunk or planned.chunk_size, fp8_features=fp8_features,
        )  # fmt: skip
        update = Update(lr=1e-6, rounding="stochastic", step=count)
        family.backward_update(problem, none, scale, update, need_db=False)

    return step


def timed(b: Bench, step: Step, floor: float) -> dict[str, Any]:
    """Time and memory of a step; `above MiB` is what its peak adds to what exists without it."""
    seconds, before = b.time(step), b.allocated()
    allocated, reserved = b.peak(step)
    return {
        "ms": 1e3 * seconds, "floor ms": 1e3 * floor, "ratio": seconds / floor,
        "above MiB": allocated - before, "peak MiB": allocated, "reserved MiB": reserved,
    }  # fmt: skip


def model_step(b: Bench, model: nn.Module, x: Tensor, labels: Tensor, **options: Any) -> Step:
    """A step through the backend, the head's update fused."""
    step_fn = torch.compile(model, backend="elmo", options={**b.options, **options})
    optimizer = elmo.optim.SGD(model.parameters(), lr=1e-6)
    x = x.clone().requires_grad_()

    def step() -> None:
        step_fn(x, labels).backward()
        optimizer.step()
        x.grad = None

    return step
