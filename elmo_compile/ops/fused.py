"""`elmo::fused_head_loss`: linear + loss whose backward updates the weight instead of returning dW.

The weight is not an argument: `handle` (int64 [6]: owner key, ticket, serial of the call, whether
the loss value is needed at once, version of the weight, number of the DDP wrapper) names it at run
time. `anchor` is an empty tensor whose gradient flows to the weight's AccumulateGrad node, so that
autograd runs the backward op exactly when it would have computed the weight's gradient. `sink` is
declared mutated by the backward op, which keeps it from being removed, merged or reordered.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from elmo_compile.errors import FusedUpdateError, InputError
from elmo_compile.kernels.problem import HeadProblem
from elmo_compile.numerics.capture import capturing
from elmo_compile.numerics.losses import CE, LossSpec
from elmo_compile.ops.again import not_written, weight_is_wanted
from elmo_compile.ops.call import (
    agreed_problem,
    labels_out_of_range,
    loss_pass,
    reduce_rows,
    row_factor,
    row_scale,
)
from elmo_compile.ops.data_parallel import group_of, number_of, wrapper_of
from elmo_compile.ops.head_loss import fake_outputs
from elmo_compile.ops.owners import Owner, new_serial, owner_by_key
from elmo_compile.ops.reached import note_loss
from elmo_compile.ops.second_pass import keep_head
from elmo_compile.ops.shards import telling
from elmo_compile.ops.spread import Spread, spread_of

UNCAPTURED = (torch.Tag.cudagraph_unsafe,)
"""Tags of ops with a fused update, which Inductor leaves out of its own CUDA graphs: a replay would
not tell the owner on the host what these ops do (which loss is filled in, that a weight changed).
"""


class Anchor(torch.autograd.Function):
    """An empty tensor that requires grad if the weight does; passes no gradient to it."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return torch.empty(0, device=weight.device)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        return None


ANCHOR_NODE = "AnchorBackward"
"""What autograd calls the anchor's node."""


def open_call(owner: Owner) -> tuple[Tensor, Tensor, Tensor]:
    """(anchor, handle, sink) for one forward through a fused head, made outside the graph.

    Raises:
        FusedUpdateError: a CUDA graph is being captured, of an optimizer without capturable=True.
    """
    if capturing(owner.param.device) and not owner.policy().capturable:
        raise FusedUpdateError(
            f"a CUDA graph is being captured, but its replays would update the head weight "
            f"{owner.name} with the rate, the step and the random bits of the capture. Construct "
            "the optimizer with capturable=True, or capture the encoder alone "
            '(torch.compile(mode="reduce-overhead") does)'
        )
    owner.in_use = True
    owner.accumulate_node = torch.autograd.graph.get_gradient_edge(owner.param).node
    # A checkpoint around the call runs it again in backward, as another call with another loss
    # tensor: the one the caller holds could not be filled in.
    at_once = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
    version, wrapper = owner.param._version, number_of(wrapper_of(owner.param))
    values = [owner.key, owner.ticket(), new_serial(), int(at_once), version, wrapper]
    handle = torch.tensor(values, device="cpu")  # whatever torch.set_default_device says
    anchor: Tensor = Anchor.apply(owner.param)  # type: ignore[no-untyped-call]
    if anchor.grad_fn is not None:
        note_loss(owner.param, anchor.grad_fn)
    return anchor, handle, torch.zeros((), dtype=torch.int64, device="cpu")


def serial_if_deferred(handle: Tensor) -> int | None:
    """The serial of a call whose loss its backward fills in; None if it is computed at once."""
    _, _, serial, at_once, *_ = handle.tolist()
    return None if at_once else int(serial)


@torch.library.custom_op(
    "elmo::fused_head_loss",
    mutates_args=(),
    tags=UNCAPTURED,
    schema="(Tensor x, Tensor? bias, Tensor target, Tensor? target_aux, Tensor anchor, "
    "Tensor handle, Tensor sink, str loss, float scale, SymInt divisor, int chunk, "
    "ScalarType compute, bool deferred, bool hold, str shard='') -> (Tensor loss, Tensor stats)",
)
def fused_head_loss(
    x: Tensor,
    bias: Tensor | None,
    target: Tensor,
    target_aux: Tensor | None,
    anchor: Tensor,
    handle: Tensor,
    sink: Tensor,
    loss: str,
    scale: float,
    divisor: int,
    chunk: int,
    compute: torch.dtype,
    deferred: bool,
    hold: bool,
    shard: str = "",
) -> tuple[Tensor, Tensor]:
    spec = LossSpec.decode(loss)
    with telling(shard, x.device):
        owner = owner_by_key(int(handle[0]))
        weight = owner.weight
    spread = spread_of(shard, weight)
    L = spread.num_outputs
    problem = agreed_problem(
        spread, "forward with an update", x, weight, bias, target, target_aux, spec, chunk, compute
    )
    factor = row_factor(spec, target, L, x.shape[0], scale, divisor)
    if deferred and serial_if_deferred(handle) is not None and spec.name != CE:
        if not shard:
            _leave_value(owner, handle, problem, spec, factor)
        value, stats = fake_outputs(x, spec, compute)
        return value.fill_(float("nan")), stats
    keep_logits = None
    if hold and serial_if_deferred(handle) is not None:  # a checkpoint's second run has its own
        keep_logits = functools.partial(owner.hold, int(handle[2]))
    rows_N, stats_2N = loss_pass(problem, spread, keep_logits)
    return reduce_rows(rows_N, spec, factor), stats_2N


def _leave_value(
    owner: Owner, handle: Tensor, problem: HeadProblem, spec: LossSpec, factor: Any
) -> None:
    """Leave with the owner how this call's loss is computed, should somebody read it early.

    The features are copied: a compiled graph reuses memory that its backward does not need. So is
    the bias, which somebody may write to; of dense targets [N, L] it is noted that they are read.
    """
    from elmo_compile import kernels

    bias = None if problem.b_L is None else problem.b_L.detach().clone()
    kept = dataclasses.replace(problem, x_ND=problem.x_ND.detach().clone(), b_L=bias)
    family = kernels.select(kept.x_ND.device)
    owner.leave_value(
        int(handle[2]),
        lambda: reduce_rows(family.forward(kept).rows_N, spec, factor),
        read=problem.target if isinstance(problem.target, Tensor) else None,
    )


@fused_head_loss.register_fake
def _(
    x: Tensor, bias: Any, target: Any, target_aux: Any, anchor: Any, handle: Any, sink: Any,
    loss: str, scale: float, divisor: int, chunk: int, compute: torch.dtype, deferred: bool,
    hold: bool, shard: str = "",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return fake_outputs(x, LossSpec.decode(loss), compute)


@torch.library.custom_op(
    "elmo::fused_head_loss_backward",
    mutates_args=("sink",),
    tags=UNCAPTURED,
    schema="(Tensor grad, Tensor x, Tensor? bias, Tensor target, Tensor? target_aux, "
    "Tensor stats, Tensor handle, Tensor(a!) sink, str loss, float scale, SymInt divisor, "
    "int chunk, ScalarType compute, bool deferred, bool hold, bool need_dx, bool need_db, "
    "str shard='') -> (Tensor dx, Tensor db)",
)
def fused_head_loss_backward(
    grad: Tensor,
    x: Tensor,
    bias: Tensor | None,
    target: Tensor,
    target_aux: Tensor | None,
    stats: Tensor,
    handle: Tensor,
    sink: Tensor,
    loss: str,
    scale: float,
    divisor: int,
    chunk: int,
    compute: torch.dtype,
    deferred: bool,
    hold: bool,
    need_dx: bool,
    need_db: bool,
    shard: str = "",
) -> tuple[Tensor, Tensor]:
    from elmo_compile import kernels

    not_written(sink)
    spec = LossSpec.decode(loss)
    key, ticket, serial, at_once, version, wrapper = handle.tolist()
    need_value = deferred and not at_once and spec.name != CE
    with telling(shard, x.device):
        owner = owner_by_key(key)
        weight, policy, wanted = owner.weight, owner.policy(), weight_is_wanted(owner)
    spread = spread_of(shard, weight)
    L = spread.num_outputs

    def check() -> None:
        owner.check_values(ticket, version)
        if wanted and policy.at_step:
            owner.check_keep(ticket)
        elif wanted:
            owner.check_ticket(ticket)

    asked = "update", need_dx, need_db, need_value, wanted, policy.at_step, policy.clips
    problem = agreed_problem(
        spread, asked, x, weight, bias, target, target_aux, spec, chunk, compute, check=check
    )
    problem = dataclasses.replace(problem, capturable=policy.capturable)
    factor = row_factor(spec, target, L, x.shape[0], scale, divisor)
    scale_N = row_scale(grad, spec, target, factor, x.shape[0])
    bad_labels = _bad_labels(spread, spec, target, target_aux, x)
    problem = spread.gathered(problem)
    stats, scale_N = spread.gathered_rows(stats, scale_N)
    family = kernels.select(x.device)
    held = owner.take_held(serial) if hold else None
    given = {} if held is None else {"held": held}
    # What is not finite in the logits' gradient reaches dx; else db, which costs no product.
    sums = need_db or (wanted and not need_dx)
    if not wanted or policy.at_step:
        made = family.backward(
            problem, stats, scale_N, need_dx=need_dx, need_dw=False, need_db=sums,
            need_value=need_value, need_norm=wanted and policy.clips, **given,
        )  # fmt: skip
        dx, db, rows = made.dx_ND, made.db_L, made.rows_N
        if wanted:
            wrong = _wrong(problem, scale_N, bad_labels) | ~_all_finite(spread, dx, db)
            # What a sharded head keeps is of all processes already.
            group = None if shard else group_of(wrapper)
            owner.keep(keep_head(problem, stats, scale_N, made.norm2, wrong), group)
        if rows is not None:
            owner.fill_loss(serial, reduce_rows(spread.row_losses(rows), spec, factor))
    else:
        guard = _guard(owner, problem, scale_N, bad_labels, deferred=need_value)
        update = owner.next_update()
        with owner.applying(serial, **guard):
            dx, db, rows = family.backward_update(
                problem,
                stats,
                scale_N,
                update,
                need_dx=need_dx,
                need_db=sums,
                need_value=need_value,
                **guard,
                **given,
            )
            if rows is not None:
                owner.fill_loss(serial, reduce_rows(spread.row_losses(rows), spec, factor))
        owner.notice_stored(_all_finite(spread, dx, db), **guard)
    return (
        x.new_empty(0) if dx is None else spread.features(dx).to(x.dtype),
        x.new_empty(0) if db is None or bias is None or not need_db else db.to(bias.dtype),
    )


@fused_head_loss_backward.register_fake
def _(
    grad: Tensor, x: Tensor, bias: Tensor | None, target: Any, target_aux: Any, stats: Any,
    handle: Any, sink: Any, loss: str, scale: float, divisor: int, chunk: int,
    compute: torch.dtype, deferred: bool, hold: bool, need_dx: bool, need_db: bool, shard: str = "",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_dx else x.new_empty(0),
        torch.empty(bias.shape, dtype=bias.dtype, device=x.device)
        if need_db and bias is not None
        else x.new_empty(0),
    )


_DEFERRED = (
    "; with loss_value='deferred' the loss is NaN until backward() has run, so nothing but "
    "scaling and summing may be done to it before"
)


def check_finite(owner: Owner, what: str, tensor: Tensor, *, deferred: bool = False) -> None:
    """Raise InputError where an update would store NaN in a weight for good."""
    if not bool(torch.isfinite(tensor).all()):
        raise InputError(
            f"the {what} of the head {owner.name} hold NaN or infinity; the update was not "
            "applied, since a NaN stored in the weight would be permanent. Check the loss "
            "scale, the learning rate and the encoder" + (_DEFERRED if deferred else "")
        )


def _guard(
    owner: Owner,
    problem: HeadProblem,
    scale_N: Tensor,
    bad_labels: Tensor | None,
    *,
    deferred: bool,
) -> dict[str, Tensor]:
    """Stop an update from bad input: now on a CPU; elsewhere by a flag the kernel reads.

    The flag is non-zero if the update must not be applied; `opt.step()` reads it.
    """
    x = problem.x_ND
    if x.device.type == "cpu":
        for what, tensor in (("features", x), ("upstream gradient", scale_N)):
            check_finite(owner, what, tensor, deferred=deferred)
        return {}
    guard = _wrong(problem, scale_N, bad_labels).to(torch.int32)
    owner.invalid.add(guard)
    return {"guard": guard}


def _all_finite(spread: Spread, dx_ND: Tensor | None, db_L: Tensor | None) -> Tensor:
    """Whether the gradient of the logits was finite, by what was formed from it."""
    seen = db_L if dx_ND is None else dx_ND
    assert seen is not None
    return ~spread.any(~torch.isfinite(seen).all())


def _bad_labels(
    spread: Spread, spec: LossSpec, target: Tensor, target_aux: Tensor | None, x: Tensor
) -> Tensor | None:
    """Whether a label is out of range (bool); None on a CPU, where labels were checked already."""
    if x.device.type == "cpu":
        return None
    return spread.any(labels_out_of_range(spec, target, target_aux, x.shape[0], spread.num_outputs))


def _wrong(problem: HeadProblem, scale_N: Tensor, bad_labels: Tensor | None) -> Tensor:
    """Whether features or upstream gradient are not finite, or labels were bad."""
    wrong = ~(torch.isfinite(problem.x_ND).all() & torch.isfinite(scale_N).all())
    return wrong if bad_labels is None else wrong | bad_labels


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, bias, target, target_aux, _anchor, handle, sink, *config = inputs
    ctx.save_for_backward(x, bias, target, target_aux, output[1], handle, sink)
    *ctx.config, ctx.shard = config
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _grad_stats: Tensor | None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise FusedUpdateError(
            "a backward with create_graph=True reached a head whose update is fused into "
            "backward(); second derivatives need an optimizer with fused=False"
        )
    x, bias, target, target_aux, stats, handle, sink = ctx.saved_tensors
    need_dx, need_db = ctx.needs_input_grad[:2]
    dx, db = torch.ops.elmo.fused_head_loss_backward(
        grad,
        x,
        bias,
        target,
        target_aux,
        stats,
        handle,
        sink,
        *ctx.config,
        need_dx,
        need_db,
        ctx.shard,
    )
    return (
        dx if need_dx else None,
        db if need_db else None,
        None,
        None,
        grad.new_zeros((0,)) if ctx.needs_input_grad[4] else None,
        *(None for _ in range(3 + len(ctx.config))),
    )


fused_head_loss.register_autograd(_backward, setup_context=_setup)
