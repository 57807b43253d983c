"""What the parts of the GPU benchmark share: sizes, clocks, heads and their steps."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import elmo_compile as elmo
from elmo_compile.tune.clock import device_seconds, warm_up

Rows = list[dict[str, Any]]
Step = Callable[[], Any]
FP8 = torch.float8_e4m3fn
NAMES = {torch.float32: "float32", torch.bfloat16: "bf16", FP8: "fp8"}
MIB = 1 << 20
ROWS = "rows.jsonl"


class Contender(NamedTuple):
    """A step to be timed beside others."""

    step: Step
    products: float = 3.0
    """Its matrix products, in bf16 ones: the floor of its operations."""


class Times(NamedTuple):
    """Seconds of a step."""

    device: float
    """Of the device, kept busy before it: what the kernels take where the host is ahead. Median."""
    whole: float
    """Of several in a row by the clock on the wall, the host's work included."""


@dataclasses.dataclass
class Bench:
    """Where, how large (`dry` keeps every size tiny), and where the rows go."""

    device: str
    dry: bool
    repeats: int
    out: Path
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

    def emit(self, **row: Any) -> None:
        """Keep a row, on disk and on the screen at once: the machine may be gone in a minute."""
        with (self.out / ROWS).open("a") as file:
            file.write(json.dumps(row) + "\n")
        shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
        print(", ".join(shown), flush=True)

    def kept(self) -> Rows:
        """The rows on disk: of this process, and of those before it with the same folder."""
        return [json.loads(line) for line in (self.out / ROWS).read_text().splitlines()]

    def times(self, steps: dict[str, Step], row: dict[str, Any]) -> dict[str, Times]:
        """Times of steps, interleaved; one that fails becomes a row that says so.

        Each is warmed up for a tenth of a second at least: a card that waited for a compiler has
        lowered its clock.
        """
        running = dict(steps)
        for name, step in steps.items():
            try:
                self._warm(step)
            except Exception as error:  # a contender that does not run here is a result
                del running[name]
                self.emit(**row, contender=name, failed=said(error))
        device: dict[str, list[float]] = {name: [] for name in running}
        for _ in range(self.repeats):
            for name, step in running.items():
                device[name].append(device_seconds(step, self.device))
        return {
            name: Times(statistics.median(device[name]), self._in_a_row(step))
            for name, step in running.items()
        }

    def time(self, step: Step) -> Times:
        """Times of one step. Raises what it raises."""
        self._warm(step)
        found = [device_seconds(step, self.device) for _ in range(self.repeats)]
        return Times(statistics.median(found), self._in_a_row(step))

    def _warm(self, step: Step) -> None:
        warm_up(step, self.device, 0.0 if self.dry else 0.1)

    def _in_a_row(self, step: Step) -> float:
        self.wait()
        start = time.perf_counter()
        for _ in range(self.repeats):
            step()
        self.wait()
        return (time.perf_counter() - start) / self.repeats

    def wait(self) -> None:
        """Until the device has nothing left to do."""
        if self.device == "cuda":
            torch.cuda.synchronize()

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
        gc.collect()
        return float("nan") if self.device == "cpu" else torch.cuda.memory_allocated() / MIB

    def compare(
        self, row: dict[str, Any], contenders: dict[str, Contender], *, moved: float, product: float
    ) -> dict[str, float]:
        """Time contenders interleaved, then their memory, a row each; device seconds by name.

        `above MiB` is what a step's peak adds to what exists without it.

        Args:
            row: what all rows have in common.
            moved: bytes that any of them must move.
            product: operations of one of its matrix products.
        """
        found = self.times({name: one.step for name, one in contenders.items()}, row)
        for name, (device, whole) in found.items():
            floor = max(moved / self.copy, contenders[name].products * product / self.flops)
            before = self.allocated()
            allocated, reserved = self.peak(contenders[name].step)
            self.emit(
                **row, contender=name, **{"ms": 1e3 * device, "ms in a row": 1e3 * whole,
                "floor ms": 1e3 * floor, "ratio": device / floor, "above MiB": allocated - before,
                "peak MiB": allocated, "reserved MiB": reserved},
            )  # fmt: skip
        return {name: times.device for name, times in found.items()}


def markdown(rows: Rows, *, without: str = "") -> list[str]:
    """Lines of a table, its columns as the rows have them but for one."""
    names = [n for n in dict.fromkeys(n for row in rows for n in row) if n != without]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in rows:
        cells = (row.get(name, "") for name in names)
        shown = (f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells)
        lines.append(f"| {' | '.join(shown)} |")
    return lines


def said(error: BaseException) -> str:
    """An error as a row's cell."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"


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
    value: bool = False,
) -> Step:
    """The fused BCE step without torch.compile around it; it returns what the kernels do.

    Args:
        chunk: outputs at once; None for the planner's.
        fp8_features: x is rounded to E4M3 for an fp8 product.
        value: the loss itself is made too, as training does.
    """
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

    def step() -> Any:
        nonlocal count
        count += 1
        problem = HeadProblem(
            x_ND=round_features(x) if fp8_features else x, w_LD=w, b_L=None,
            target=positives_of(spec, labels, None, N, L), loss=spec, compute_dtype=x.dtype,
            chunk=chunk or planned.chunk_size, fp8_features=fp8_features,
        )  # fmt: skip
        update = Update(lr=1e-6, rounding="stochastic", step=count)
        return family.backward_update(problem, none, scale, update, need_db=False, need_value=value)

    return step


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
