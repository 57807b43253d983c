"""What `head_step.py` times: a case's tensors, the bare products, our steps and the peers'.

Shapes: N rows, D features, L outputs, C outputs of a chunk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import elmo_compile
from elmo_compile.heads import LowPrecisionLinear
from elmo_compile.kernels import aten
from elmo_compile.kernels.problem import HeadProblem
from elmo_compile.kernels.targets import positives_of
from elmo_compile.numerics.losses import BCE, CE, LossSpec
from elmo_compile.numerics.update import Update
from elmo_compile.planner import HeadShape, Plan, plan

Step = Callable[[], Any]
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
LR = 1e-6
"""Small, so that a thousand repetitions leave the problem as it was."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One head: loss `bce` or `ce`, sizes, storage dtype, outputs per chunk."""

    loss: str
    rows: int
    outputs: int
    dtype: str
    features: int = 768
    positives: int = 5
    chunk: int = 0
    """0: the planner's choice."""

    def __str__(self) -> str:
        return f"{self.loss} N={self.rows} D={self.features} L={self.outputs} {self.dtype}"


def planned_chunk(case: Case) -> int:
    """The chunk of a fused update that the backend would choose."""
    compute = torch.float32 if case.dtype == "float32" else torch.bfloat16
    name, targets = (CE, "classes") if case.loss == "ce" else (BCE, "padded")
    shape = HeadShape(
        rows=case.rows,
        features=case.features,
        outputs=case.outputs,
        loss=LossSpec(name=name, targets=targets),  # type: ignore[arg-type]
        weight_dtype=DTYPES[case.dtype],
        feature_dtype=compute,
        compute_dtype=compute,
        positives=0 if case.loss == "ce" else case.rows * case.positives,
        fused_update=True,
    )
    found = plan(shape)
    assert isinstance(found, Plan)
    return found.chunk_size


LOOP_LOGITS = 1792 * 2048
"""Logits at once at which the hand-written loop is best; larger chunks leave its caches."""


class Inputs:
    """Tensors of a case, shared by its contenders."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        n, num = case.rows, case.outputs
        self.case = case if case.chunk else dataclasses.replace(case, chunk=planned_chunk(case))
        self.compute = torch.float32 if case.dtype == "float32" else torch.bfloat16
        self.x = torch.randn(n, case.features).to(self.compute)
        self.w = torch.empty(num, case.features, dtype=DTYPES[case.dtype])
        for start in range(0, num, 65_536):
            rows = self.w[start : start + 65_536]
            rows.copy_(torch.randn(rows.shape) * 0.02)
        shape = (n,) if case.loss == "ce" else (n, case.positives)
        self.labels = torch.randint(0, num, shape)
        self.scale = torch.full((n,), 1 / n)

    def dense(self) -> Tensor:
        """Multi-hot targets as torch's own loss wants them."""
        y = torch.zeros(self.case.rows, self.case.outputs, dtype=self.compute)
        return y.scatter_(1, self.labels, 1.0)


def floor(inputs: Inputs, chunk: int) -> Step:
    """`w x^T`, `z^T w`, `z x` for each chunk; fp8 as bf16, already decoded."""
    x, w, compute, num = inputs.x, inputs.w, inputs.compute, inputs.case.outputs
    z = torch.empty(chunk, x.shape[0], dtype=compute)
    dx, dw = torch.empty_like(x), torch.empty(chunk, x.shape[1], dtype=compute)
    decoded = (torch.randn(chunk, x.shape[1]) * 0.02).to(compute)

    def step() -> None:
        for start in range(0, num, chunk):
            size = min(chunk, num - start)
            w_c = w[start : start + size] if w.dtype == compute else decoded[:size]
            z_c = torch.mm(w_c, x.t(), out=z[:size])
            torch.mm(z_c.t(), w_c, out=dx)
            torch.mm(z_c, x, out=dw[:size])

    return step


def ours(inputs: Inputs, rounding: str, value: str) -> Step:
    """The fused step. value: `none`, `deferred` (with the update), `exact` (own product) or `held`
    (its logits are kept for the update)."""
    case = inputs.case
    problem = _problem(inputs)
    count = 0

    def step() -> None:
        nonlocal count
        update = Update(lr=LR, rounding=rounding, step=count)  # type: ignore[arg-type]
        count += 1
        held = aten.new_held(problem) if value == "held" else None
        first = case.loss == "ce" or value == "exact"
        stats = aten.forward(problem, held=held).stats_2N if first else torch.empty(0)
        need = value == "deferred" and case.loss == "bce"
        aten.backward_update(
            problem, stats, inputs.scale, update, need_db=False, need_value=need, held=held
        )

    return step


def _problem(inputs: Inputs) -> HeadProblem:
    case = inputs.case
    if case.loss == "ce":
        target: Any = inputs.labels
        spec = LossSpec(name=CE, targets="classes")
    else:
        spec = LossSpec(name=BCE, targets="padded")
        target = positives_of(spec, inputs.labels, None, case.rows, case.outputs)
    return HeadProblem(
        x_ND=inputs.x,
        w_LD=inputs.w,
        b_L=None,
        target=target,
        loss=spec,
        chunk=case.chunk,
        compute_dtype=inputs.compute,
    )


class HeadModel(torch.nn.Module):
    """The program a user compiles: a head and its loss; the features are an input."""

    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        case = inputs.case
        with torch.device("meta"):
            self.head = torch.nn.Linear(case.features, case.outputs, bias=False)
        self.head.weight = torch.nn.Parameter(inputs.w)
        if case.dtype == "fp8":
            self.head = LowPrecisionLinear.of(self.head, inputs.w.dtype)
            self.head.weight = torch.nn.Parameter(inputs.w)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy, or BCE summed over outputs, mean over rows."""
        z = self.head(x)
        if labels.ndim == 1:
            return F.cross_entropy(z, labels)
        y = elmo_compile.multi_hot(labels, z.shape[-1])
        return F.binary_cross_entropy_with_logits(z, y, reduction="sum") / z.shape[0]


def through_backend(inputs: Inputs, value: str, *, budget: str | None = None) -> Step:
    """A whole step of `torch.compile(model, backend="elmo")` with elmo_compile.optim.SGD."""
    model = HeadModel(inputs)
    options = {"loss_value": value, "chunk_size": inputs.case.chunk, "memory_budget": budget}
    step_fn = torch.compile(model, backend="elmo", options=options)
    optimizer = elmo_compile.optim.SGD(model.parameters(), lr=LR)
    return _step_of(inputs, step_fn, optimizer)


def unfused(inputs: Inputs) -> Step:
    """The backend alone: a real weight gradient, which torch.optim.SGD applies."""
    model = HeadModel(inputs)
    step_fn = torch.compile(model, backend="elmo")
    return _step_of(inputs, step_fn, torch.optim.SGD(model.parameters(), lr=LR))


def _step_of(
    inputs: Inputs, step_fn: Callable[..., Tensor], optimizer: torch.optim.Optimizer
) -> Step:
    x = inputs.x.clone().requires_grad_()

    def step() -> None:
        step_fn(x, inputs.labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        x.grad = None

    return step


def torch_step(inputs: Inputs, loss: Callable[[Tensor, Tensor], Tensor]) -> Step:
    """Autograd of a loss of (x, w), then SGD on w."""
    x = inputs.x.clone().requires_grad_()
    w = inputs.w.detach().requires_grad_()

    def step() -> None:
        loss(x, w).backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            assert w.grad is not None
            w.add_(w.grad, alpha=-LR)
        w.grad = x.grad = None

    return step


def torch_loss(inputs: Inputs) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss as a user of torch writes it."""
    if inputs.case.loss == "ce":
        return lambda x, w: F.cross_entropy(F.linear(x, w), inputs.labels)
    y = inputs.dense()
    factor = float(inputs.case.outputs)
    return lambda x, w: F.binary_cross_entropy_with_logits(F.linear(x, w), y) * factor


def hand_loop(inputs: Inputs) -> Step:
    """The chunk loop a careful user writes: fused SGD, rounding to nearest, eager element-wise."""
    x, w, case = inputs.x, inputs.w, inputs.case
    size = min(case.chunk, LOOP_LOGITS // case.rows)
    starts = range(0, case.outputs, size)
    rows = torch.arange(case.rows).unsqueeze(1).expand(-1, case.positives)

    def step() -> None:
        dx, lse = torch.zeros(x.shape, dtype=torch.float32), torch.empty(0)
        if case.loss == "ce":
            lse = torch.full((case.rows,), -torch.inf)
            for s in starts:
                z = torch.mm(x, w[s : s + size].t()).float()
                lse = torch.logaddexp(lse, z.logsumexp(1))
        for s in starts:
            w_c = w[s : s + size]
            z = torch.mm(x, w_c.t())
            if case.loss == "ce":
                g = (z.float() - lse[:, None]).exp_()
                here = (inputs.labels >= s) & (inputs.labels < s + size)
                g[here, inputs.labels[here] - s] -= 1
            else:
                g = z.float().sigmoid_()
                here = (inputs.labels >= s) & (inputs.labels < s + size)
                g[rows[here], inputs.labels[here] - s] -= 1
            g = g.mul_(1 / case.rows).to(x.dtype)
            dx += torch.mm(g, w_c)
            w_c.addmm_(g.t(), x, alpha=-LR)

    return step


def contenders(inputs: Inputs) -> dict[str, Callable[[], Step]]:
    """Builders by name. The floor is tried at several chunk sizes; the fastest counts."""
    case = inputs.case  # with a chunk
    builders: dict[str, Callable[[], Step]] = {
        f"floor, chunk {chunk}": lambda c=chunk: floor(inputs, c)  # type: ignore[misc]
        for chunk in sorted({1024, 4096, case.chunk})
    }
    value = "none" if case.loss == "bce" else "exact"
    if case.dtype != "float32":
        builders["elmo fused, stochastic"] = lambda: ours(inputs, "stochastic", value)
    builders["elmo fused, nearest"] = lambda: ours(inputs, "nearest", value)
    rounding = "nearest" if case.dtype == "float32" else "stochastic"
    if case.loss == "bce":
        builders["elmo fused, value deferred"] = lambda: ours(inputs, rounding, "deferred")
        builders["elmo fused, value exact"] = lambda: ours(inputs, rounding, "exact")
    deferred = "deferred" if case.loss == "bce" else "exact"
    builders["elmo, through torch.compile"] = lambda: through_backend(inputs, deferred)
    if case.loss == "ce":
        builders["elmo fused, logits held"] = lambda: ours(inputs, rounding, "held")
        builders["elmo, through torch.compile, held"] = lambda: through_backend(
            inputs, deferred, budget="4GiB"
        )
    if case.dtype == "fp8":  # torch has no fp8 products and cannot add to fp8 weights
        return builders
    builders["elmo, through torch.compile, real gradient"] = lambda: unfused(inputs)
    builders["hand-written chunk loop"] = lambda: hand_loop(inputs)
    builders["eager"] = lambda: torch_step(inputs, torch_loss(inputs))
    builders["torch.compile"] = lambda: torch_step(
        inputs, torch.compile(torch_loss(inputs), dynamic=False)
    )
    if case.loss == "ce" and hasattr(torch.nn, "LinearCrossEntropyOptions"):
        builders["F.linear_cross_entropy"] = lambda: torch_step(
            inputs, lambda x, w: F.linear_cross_entropy(x, w, inputs.labels)
        )
        rows = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=512)
        builders["F.linear_cross_entropy, 512 rows"] = lambda: torch_step(
            inputs, lambda x, w: F.linear_cross_entropy(x, w, inputs.labels, options=rows)
        )
        chosen = torch.nn.LinearCrossEntropyOptions()
        builders["F.linear_cross_entropy, own chunks"] = lambda: torch_step(
            inputs, lambda x, w: F.linear_cross_entropy(x, w, inputs.labels, options=chosen)
        )
    return builders
