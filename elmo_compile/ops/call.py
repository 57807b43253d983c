"""What the head's ops share: checking inputs, the kernels' problem, reducing row losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from elmo_compile.errors import InputError
from elmo_compile.kernels.problem import Forward, HeadProblem
from elmo_compile.numerics.features import FP8, round_features
from elmo_compile.numerics.losses import BCE, CE, LossSpec
from elmo_compile.ops.kept import KEPT, collector
from elmo_compile.ops.spread import Spread

NO_SECOND_DERIVATIVE = (
    "a backward with create_graph=True reached a huge head's loss; elmo_compile has no second "
    "derivatives of it. Call the head outside the compiled function, or keep it from being "
    "rewritten (elmo_compile.exclude, min_outputs=)"
)


def forbid_second_derivative(op: Any) -> None:
    """Say so where a result of a backward's op is differentiated again."""

    def backward(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(NO_SECOND_DERIVATIVE)

    op.register_autograd(backward)


def accumulate_dtype(compute: torch.dtype) -> torch.dtype:
    """The dtype logits, losses and dx are accumulated in."""
    return torch.float64 if compute == torch.float64 else torch.float32


def loss_pass(
    problem: HeadProblem, spread: Spread, hold: Callable[[Tensor], None] | None = None
) -> Forward:
    """The loss of each row and its statistics; each row's largest logits too, if anyone wants them
    and the device's kernels can. `hold`, if given, is handed the logits for the backward."""
    from elmo_compile import kernels

    family, top = kernels.select(problem.x_ND.device), new_top_rows(problem)
    problem = spread.gathered(problem)
    held = None if hold is None else family.new_held(problem)
    wanted = {"top": top, "held": held}
    given = {name: value for name, value in wanted.items() if value is not None}
    made = spread.combined(family.forward(problem, **given))
    if hold is not None and held is not None:
        hold(held)
    return made


def new_top_rows(problem: HeadProblem) -> Any:
    """What is to collect each row's largest logits in the pass that follows; None if nobody wants
    them or the device's kernels cannot."""
    from elmo_compile import kernels

    collect = getattr(kernels.select(problem.x_ND.device), "TopRows", None)
    wanted = collector(problem.w_LD)
    if wanted is None or collect is None or problem.w_LD.shape[0] < KEPT:
        return None
    bias = problem.b_L
    bias_L1 = None if bias is None else bias.detach().to(torch.float32)[:, None]
    top = collect(problem.x_ND.shape[0], KEPT, bias_L1)
    wanted.append(top)
    return top


def make_problem(
    x_ND: Tensor,
    w_LD: Tensor,
    b_L: Tensor | None,
    target: Tensor,
    target_aux: Tensor | None,
    spec: LossSpec,
    chunk: int,
    compute: torch.dtype,
    *,
    wide_dw: bool = False,
    num_outputs: int | None = None,
) -> HeadProblem:
    """Check one call's tensors and express sparse targets as sorted pairs. Raises InputError.

    Args:
        num_outputs: that targets may name; None: as many as the weight has rows.
    """
    from elmo_compile.kernels.targets import check_targets, positives_of

    N, L = x_ND.shape[0], w_LD.shape[0] if num_outputs is None else num_outputs
    _check_operands(x_ND, w_LD, b_L)
    _check_target(spec, target, N, L)
    devices = {str(t.device) for t in (x_ND, w_LD, b_L, target, target_aux) if t is not None}
    if len(devices) > 1:
        raise InputError(f"a head's tensors are on {sorted(devices)}; accepted: one device")
    if not w_LD.is_contiguous():
        w_LD = w_LD.contiguous()
    if x_ND.device.type == "cpu":
        check_targets(spec, target, target_aux, N, L)
    sparse = spec.targets not in ("classes", "dense")
    fp8 = compute == FP8
    return HeadProblem(
        x_ND=round_features(x_ND) if fp8 else x_ND,
        w_LD=w_LD,
        b_L=b_L,
        target=positives_of(spec, target, target_aux, N, L) if sparse else target,
        loss=spec,
        chunk=chunk,
        compute_dtype=torch.bfloat16 if fp8 else compute,
        fp8_features=fp8,
        wide_dw=wide_dw,
    )


def agreed_problem(
    spread: Spread,
    asked: Any,
    x_ND: Tensor,
    *operands: Any,
    wide_dw: bool = False,
    check: Callable[[], None] | None = None,
) -> HeadProblem:
    """`make_problem`, in all processes that share the head or in none.

    Args:
        asked: as `Spread.agreed`.
        operands: of `make_problem`, behind the features.
        check: called first; what it raises, all processes do.
    """

    def make() -> HeadProblem:
        if check is not None:
            check()
        return make_problem(x_ND, *operands, wide_dw=wide_dw, num_outputs=spread.num_outputs)

    return spread.agreed(x_ND.device, asked, make)


def labels_out_of_range(
    spec: LossSpec, target: Tensor, target_aux: Tensor | None, num_rows: int, num_outputs: int
) -> Tensor:
    """Whether any label is out of range, as a bool scalar on the targets' device.

    What `check_targets` raises for on a CPU, for devices that must not be waited for; the kernels
    leave such labels out.
    """
    if spec.targets == "dense":
        return torch.zeros((), dtype=torch.bool, device=target.device)
    lowest = {"padded": -1, "pairs": -num_outputs}.get(spec.targets, 0)
    labels = target_aux if spec.targets == "pairs" and target_aux is not None else target
    wrong = (labels < lowest) | (labels >= num_outputs)
    if spec.targets == "classes":
        wrong &= labels != spec.ignore_index
    found = wrong.any()
    if spec.targets == "pairs":
        found = found | ((target < -num_rows) | (target >= num_rows)).any()
    return found


def assert_labels(
    spec: LossSpec, target: Tensor, target_aux: Tensor | None, num_rows: int, num_outputs: int
) -> None:
    """Stop a CUDA program at a label out of range, as torch's own losses do (a device assert)."""
    if target.device.type != "cpu":
        wrong = labels_out_of_range(spec, target, target_aux, num_rows, num_outputs)
        torch._assert_async(~wrong, "elmo_compile: a label is out of range")


def _check_operands(x_ND: Tensor, w_LD: Tensor, b_L: Tensor | None) -> None:
    """Raise InputError unless features, weight and bias fit each other."""
    if x_ND.dim() != 2 or not x_ND.is_floating_point():
        raise InputError(
            f"features are {x_ND.dtype} {tuple(x_ND.shape)}; accepted: floating point "
            "[rows, features]"
        )
    if w_LD.dim() != 2 or w_LD.shape[1] != x_ND.shape[1]:
        raise InputError(
            f"features have {x_ND.shape[1]} columns but the head's weight is {tuple(w_LD.shape)}; "
            "accepted: [outputs, features]"
        )
    if b_L is not None and (b_L.shape != w_LD.shape[:1] or not b_L.is_floating_point()):
        raise InputError(
            f"the head's bias is {b_L.dtype} {tuple(b_L.shape)}; accepted: floating point, one for "
            f"each of {w_LD.shape[0]} outputs"
        )


def _check_target(spec: LossSpec, target: Tensor, num_rows: int, num_outputs: int) -> None:
    """Raise InputError unless the target has the shape and dtype of its form."""
    if spec.targets in ("flat", "pairs"):
        fits, accepted = target.dim() == 1, "[labels]"
    elif spec.targets == "dense":
        fits, accepted = target.shape == (num_rows, num_outputs), f"[{num_rows}, {num_outputs}]"
    elif spec.targets == "classes":
        fits, accepted = target.shape == (num_rows,), f"[{num_rows}], one a row"
    else:
        fits = target.dim() == 2 and target.shape[0] == num_rows
        accepted = f"[{num_rows}, labels a row]"
    if spec.targets != "dense" and target.dtype != torch.int64:
        fits, accepted = False, f"int64 {accepted}"
    if not fits:
        raise InputError(
            f"targets given as {spec.targets!r} are {target.dtype} {tuple(target.shape)}; "
            f"accepted: {accepted}"
        )


def row_factor(
    spec: LossSpec, target: Tensor, num_outputs: int, num_rows: int, scale: float, divisor: int
) -> float | Tensor:
    """`c` such that loss = sum_n c * row_n (or row_n * c for reduction `none`).

    A tensor only where it depends on data: cross entropy's mean divides by the rows that count. It
    is float64, whatever the loss is.
    """
    factor = scale / divisor if divisor else float("nan")
    if spec.reduction != "mean":
        return factor
    if spec.name == CE:
        return factor / (target != spec.ignore_index).sum(dtype=torch.float64)
    assert spec.name == BCE
    return factor / (num_rows * num_outputs) if num_rows else float("nan")


def reduce_rows(rows_N: Tensor, spec: LossSpec, factor: float | Tensor) -> Tensor:
    """The loss from its rows: a scalar, or [N] for reduction `none`."""
    if spec.reduction == "none":
        return rows_N * factor
    return (rows_N.sum(dtype=torch.float64) * factor).to(rows_N.dtype)


def row_scale(
    grad: Tensor, spec: LossSpec, target: Tensor, factor: float | Tensor, num_rows: int
) -> Tensor:
    """dloss/drow_n in float32 (float64): upstream gradient times the reduction's factor, [N].

    Rows that cross entropy ignores get exactly zero, whatever the upstream gradient.
    """
    wide = grad.to(torch.float64 if grad.dtype == torch.float64 else torch.float32)
    scale_N = (wide * factor).to(wide.dtype).expand(num_rows)
    if spec.name == CE:
        scale_N = torch.where(target == spec.ignore_index, torch.zeros_like(scale_N), scale_N)
    return scale_N.contiguous()
