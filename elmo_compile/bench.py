"""Time one head step of this package against eager torch, on sizes the user names.

The contenders run in turn within each round, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from elmo_compile.config import Options
from elmo_compile.errors import OptionError
from elmo_compile.kernels.problem import HeadProblem, UpdateResult
from elmo_compile.numerics.losses import BCE, CE, LossName, LossSpec
from elmo_compile.numerics.state_size import StateSize
from elmo_compile.numerics.update import Update
from elmo_compile.optim import SGD, AdamW
from elmo_compile.optim.base import HeadOptimizer
from elmo_compile.planner import (
    HeadShape,
    Plan,
    PlanRefusal,
    default_compute_dtype,
    limits_for,
    plan,
)

LR = 0.01
FUSED, UNFUSED, EAGER = "elmo, fused update", "elmo, real gradient", "eager"
OptimizerName = Literal["sgd", "momentum", "adamw"]
_OURS: dict[str, Callable[..., HeadOptimizer]] = {
    "sgd": SGD,
    "momentum": functools.partial(SGD, momentum=0.9),
    "adamw": AdamW,
}
_TORCHS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "momentum": functools.partial(torch.optim.SGD, momentum=0.9),
    "adamw": torch.optim.AdamW,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What to time: sizes, dtype, loss and device of one head."""

    rows: int
    features: int
    outputs: int
    dtype: torch.dtype = torch.bfloat16
    """Storage of the weight; eager runs fp8 heads in bfloat16, since it has no fp8 products."""
    loss: LossName = BCE
    positives: int = 5
    """Labels per row (BCE)."""
    optimizer: OptimizerName = "sgd"
    state_dtype: Any = None
    """Of the optimizer's state, as `elmo_compile.optim` takes it; eager's is the weight's dtype."""
    device: str = "cpu"
    rounds: int = 5
    options: Options = dataclasses.field(default_factory=Options)

    def __post_init__(self) -> None:
        """Every count is at least 1, and there is a state where its dtype is given."""
        for name in ("rows", "features", "outputs", "positives", "rounds"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name}={getattr(self, name)} cannot be used; at least 1.")
        if self.optimizer not in get_args(OptimizerName):
            raise OptionError(
                f"optimizer={self.optimizer!r} cannot be used; accepted: "
                f"{', '.join(get_args(OptimizerName))}."
            )
        if self.optimizer == "sgd" and self.state_dtype is not None:
            raise OptionError("state_dtype cannot be used with optimizer='sgd': it has no state.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """One contender's median step."""

    name: str
    seconds: float
    """Wall time."""
    cpu_seconds: float
    """Time of all threads of this process together."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """The timings of one case, the bare products first."""

    case: Case
    plan: Plan
    unfused_plan: Plan
    """Of the contender with a real weight gradient."""
    eager_bytes: int
    """What eager torch holds."""
    timings: tuple[Timing, ...]
    skipped: tuple[str, ...]
    """A sentence for each contender that could not run."""


def run(case: Case) -> Result:
    """Time the bare products, this package's step (fused; with a real gradient) and eager torch.

    Raises:
        OptionError: no chunk fits the budget.
    """
    chosen, unfused = planned(case, fused=True), planned(case, fused=False)
    as_stored = dataclasses.replace(case, state_dtype=None)
    eager_bytes = planned(as_stored, fused=False).memory.bytes_before
    steps: dict[str, Callable[[], object]] = {
        "three bare products": _products(case, chosen.chunk_size),
        FUSED: _fused(case, chosen),
    }
    skipped: list[str] = []
    available = available_bytes(case.device)
    others: list[tuple[str, Callable[[], Callable[[], object]], int]] = [
        (UNFUSED, lambda: _unfused(case, unfused), unfused.memory.bytes_after),
        (EAGER, lambda: _eager(case), eager_bytes),
    ]
    for name, build, needed in others:
        if available is not None and needed > available:
            skipped.append(f"{name}: needs {needed} bytes and {available} are available")
        else:
            steps[name] = build()
    timings = _interleaved(steps, case.rounds, case.device)
    return Result(
        case=case,
        plan=chosen,
        unfused_plan=unfused,
        eager_bytes=eager_bytes,
        timings=timings,
        skipped=tuple(skipped),
    )


def planned(case: Case, *, fused: bool) -> Plan:
    """The planner's choice for the case's device. Raises OptionError if no chunk fits."""
    device, cache = torch.device(case.device), None
    shape = head_shape(case, fused=fused)
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
    found = plan(shape, case.options, limits_for(shape.device, cache))
    if isinstance(found, PlanRefusal):
        raise OptionError(f"{found.reason}; {found.remedy}.")
    return found


def head_shape(case: Case, *, fused: bool = True) -> HeadShape:
    """The case as the planner reads it."""
    kind = torch.device(case.device).type
    if kind not in ("cpu", "cuda"):
        raise OptionError(f"device={case.device!r} cannot be used; accepted: 'cpu', 'cuda'.")
    device: Any = kind
    compute = case.options.compute or default_compute_dtype(case.dtype, device)
    return HeadShape(
        rows=case.rows,
        features=case.features,
        outputs=case.outputs,
        loss=_spec(case),
        positives=0 if case.loss == CE else case.rows * case.positives,
        weight_dtype=case.dtype,
        feature_dtype=compute,
        compute_dtype=compute,
        fused_update=fused,
        at_once=not fused and case.dtype != torch.float16,
        loss_value="deferred" if fused else "exact",
        state=state_of(case),
        device=device,
    )


def state_of(case: Case) -> tuple[StateSize, ...]:
    """What the case's optimizer keeps for the weight."""
    weight = torch.empty(case.outputs, case.features, dtype=case.dtype, device="meta")
    return tuple(_optimizer(case, weight).state_sizes(weight))


def _optimizer(case: Case, weight: Tensor) -> HeadOptimizer:
    """The optimizer of this package, as what it makes updates with."""
    return _OURS[case.optimizer]([weight], LR, fused=False, state_dtype=case.state_dtype)


def available_bytes(device: str) -> int | None:
    """Memory that can still be had on a device; None where the system does not say."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def _spec(case: Case) -> LossSpec:
    return LossSpec(name=case.loss, targets="classes" if case.loss == CE else "padded")


def _inputs(case: Case, storage: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Features [N, D], weight [L, D] as stored, and class ids [N] or labels [N, P]."""
    generator = torch.Generator().manual_seed(0)
    compute = head_shape(case).compute_dtype
    x_ND = torch.randn(case.rows, case.features, generator=generator).to(compute)
    w_LD = torch.empty(case.outputs, case.features, dtype=storage, device=case.device)
    few = min(case.outputs, 1 << 16)  # and again: random numbers for all would take minutes
    values = (0.05 * torch.randn(few, case.features, generator=generator)).to(case.device)
    for part in torch.split(w_LD, few):
        part.copy_(values[: len(part)])
    shape = (case.rows,) if case.loss == CE else (case.rows, case.positives)
    labels = torch.randint(case.outputs, shape, generator=generator)
    return x_ND.to(case.device), w_LD, labels.to(case.device)


def problem_of(case: Case, chosen: Plan) -> tuple[HeadProblem, Tensor]:
    """The case's call on random numbers, and the factor of each row's loss (mean reduction)."""
    from elmo_compile.kernels.targets import positives_of

    x_ND, w_LD, labels = _inputs(case, case.dtype)
    spec = _spec(case)
    sparse = spec.targets != "classes"
    problem = HeadProblem(
        x_ND=x_ND,
        w_LD=w_LD,
        b_L=None,
        target=positives_of(spec, labels, None, case.rows, case.outputs) if sparse else labels,
        loss=spec,
        chunk=chosen.chunk_size,
        compute_dtype=x_ND.dtype,
    )
    factor = 1 / case.rows if case.loss == CE else 1 / (case.rows * case.outputs)
    return problem, torch.full((case.rows,), factor, device=w_LD.device)


def _fused(case: Case, chosen: Plan) -> Callable[[], object]:
    """As `loss_value="auto"` runs it: BCE's value comes with its gradient."""
    problem, scale_N = problem_of(case, chosen)
    first = _optimizer(case, problem.w_LD).next_update(problem.w_LD)
    count = 0

    def step() -> None:
        nonlocal count
        update = dataclasses.replace(first, step=count)
        fused_step(problem, scale_N, chosen, update, value=case.loss == BCE)
        count += 1

    return step


def fused_step(
    problem: HeadProblem, scale_N: Tensor, chosen: Plan, update: Update, *, value: bool
) -> UpdateResult:
    """One step by the kernels of the problem's device, the weight updated in place.

    value: the loss is made in the backward; cross entropy has it from its forward.
    """
    from elmo_compile import kernels

    family = kernels.select(problem.x_ND.device)
    stats, more = scale_N.new_empty(0), {}
    if problem.loss.name == CE:
        held = family.new_held(problem) if chosen.holds_logits else None
        more = {} if held is None else {"held": held}
        stats = family.forward(problem, **more).stats_2N
    result: UpdateResult = family.backward_update(
        problem, stats, scale_N, update, need_db=False, need_value=value, **more
    )
    return result


def _unfused(case: Case, chosen: Plan) -> Callable[[], object]:
    """A real weight gradient; applying it is the optimizer's, and not timed."""
    from elmo_compile import kernels

    problem, scale_N = problem_of(case, chosen)
    family = kernels.select(scale_N.device)
    return lambda: family.loss_and_gradients(problem, scale_N, chosen.row_block, need_db=False)


def _eager(case: Case) -> Callable[[], object]:
    storage = torch.bfloat16 if case.dtype.itemsize == 1 else case.dtype
    x_ND, w_LD, labels = _inputs(case, storage)
    x_ND, w_LD = x_ND.to(storage).requires_grad_(), w_LD.requires_grad_()
    optimizer = _TORCHS[case.optimizer]([w_LD], lr=LR)

    def step() -> None:
        z_NL = F.linear(x_ND, w_LD)
        if case.loss == CE:
            loss = F.cross_entropy(z_NL, labels)
        else:
            y_NL = torch.zeros_like(z_NL).scatter_(1, labels, 1)
            loss = F.binary_cross_entropy_with_logits(z_NL, y_NL)
        _, w_LD.grad = torch.autograd.grad(loss, (x_ND, w_LD))
        optimizer.step()
        w_LD.grad = None

    return step


def _products(case: Case, chunk: int) -> Callable[[], object]:
    x_ND, w_LD, _ = _inputs(case, head_shape(case).compute_dtype)

    def step() -> None:
        for w_CD in torch.split(w_LD, chunk):
            z_NC = x_ND @ w_CD.t()
            _ = z_NC @ w_CD, z_NC.t() @ x_ND

    return step


def _interleaved(
    steps: dict[str, Callable[[], object]], rounds: int, device: str
) -> tuple[Timing, ...]:
    """Median of `rounds` after one unmeasured round."""
    wall: dict[str, list[float]] = {name: [] for name in steps}
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            _synchronize(device)
            start, cpu_start = time.perf_counter(), time.process_time()
            step()
            _synchronize(device)
            if number:
                wall[name].append(time.perf_counter() - start)
                cpu[name].append(time.process_time() - cpu_start)
    return tuple(
        Timing(
            name=name,
            seconds=statistics.median(wall[name]),
            cpu_seconds=statistics.median(cpu[name]),
        )
        for name in steps
    )


def _synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
