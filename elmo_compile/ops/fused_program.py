"""`elmo::fused_head_program`: `elmo::head_program` whose backward updates the weight in place.

As `elmo::fused_head_loss`: the weight is named by `handle`, autograd reaches it through `anchor`,
and `sink` keeps the backward from being removed, merged or reordered. Gradients of the program's
inputs leave the backward in one flat tensor: an op that writes may not return a list.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from elmo_compile.errors import FusedUpdateError
from elmo_compile.ops.again import not_written, weight_is_wanted
from elmo_compile.ops.data_parallel import group_of
from elmo_compile.ops.fused import UNCAPTURED, check_finite
from elmo_compile.ops.head_program import (
    fake_results,
    find_program,
    input_gradients,
    products_of,
    tangents_of,
    unaliased,
    work_dtype,
)
from elmo_compile.ops.owners import owner_by_key
from elmo_compile.ops.second_pass import keep_program
from elmo_compile.ops.shards import telling
from elmo_compile.ops.spread import exchange_of


@torch.library.custom_op(
    "elmo::fused_head_program",
    mutates_args=(),
    tags=UNCAPTURED,
    schema="(Tensor x, Tensor[] inputs, Tensor anchor, Tensor handle, Tensor sink, SymInt[] sizes, "
    "str program, int chunk, ScalarType compute, str shard='') -> Tensor[]",
)
def fused_head_program(
    x: Tensor,
    inputs: list[Tensor],
    anchor: Tensor,
    handle: Tensor,
    sink: Tensor,
    sizes: list[int],
    program: str,
    chunk: int,
    compute: torch.dtype,
    shard: str = "",
) -> list[Tensor]:
    from elmo_compile.kernels.aten.programs import forward

    found = find_program(program)
    with exchange_of(shard, x, found.outline) as spread:
        weight = owner_by_key(int(handle[0])).weight
        products = products_of([x], [weight], compute, [False])
        results = forward(found, products, found.arguments(inputs, sizes), chunk, spread)
    return unaliased(results, inputs)


@fused_head_program.register_fake
def _(
    x: Tensor, inputs: list[Tensor], anchor: Any, handle: Any, sink: Any, sizes: list[int],
    program: str, chunk: int, compute: torch.dtype, shard: str = "",
) -> list[Tensor]:  # fmt: skip
    return fake_results([x], inputs, sizes, program, compute)


@torch.library.custom_op(
    "elmo::fused_head_program_backward",
    mutates_args=("sink",),
    tags=UNCAPTURED,
    schema="(Tensor[] tangents, Tensor x, Tensor[] inputs, Tensor[] saved, Tensor handle, "
    "Tensor(a!) sink, SymInt[] sizes, str program, int chunk, ScalarType compute, bool need_dx, "
    "str shard='') -> (Tensor dx, Tensor grads)",
)
def fused_head_program_backward(
    tangents: list[Tensor],
    x: Tensor,
    inputs: list[Tensor],
    saved: list[Tensor],
    handle: Tensor,
    sink: Tensor,
    sizes: list[int],
    program: str,
    chunk: int,
    compute: torch.dtype,
    need_dx: bool,
    shard: str = "",
) -> tuple[Tensor, Tensor]:
    from elmo_compile.kernels.aten.programs import backward

    not_written(sink)
    found = find_program(program)
    key, ticket, _, _, version, wrapper = handle.tolist()
    with telling(shard, x.device):
        owner = owner_by_key(key)
        policy, wanted = owner.policy(), weight_is_wanted(owner)
    arguments = [*found.arguments(inputs, sizes), *saved, *tangents]
    asked = found.outline, need_dx, wanted, policy.at_step, policy.clips
    with exchange_of(shard, x, asked) as spread:
        owner.check_values(ticket, version)
        products = products_of([x], [owner.weight], compute, [False])
        if not wanted or policy.at_step:
            if wanted:
                owner.check_keep(ticket)
            made = backward(
                found, products, arguments, chunk, need_dx=[need_dx], need_dw=[False],
                need_norm=wanted and policy.clips, need_finite=wanted, spread=spread,
            )  # fmt: skip
            if wanted:
                assert made.finite is not None
                kept = keep_program(
                    found,
                    x,
                    [*found.arguments(inputs, sizes), *saved],
                    tangents,
                    chunk,
                    compute,
                    made.norm2,
                    made.finite,
                    shard,
                )
                if spread is not None:
                    kept.wrong = spread.any(kept.wrong)
                # What a sharded head keeps is made into the processes' mean by its update.
                owner.keep(kept, None if shard else group_of(wrapper))
        else:
            owner.check_ticket(ticket)
            update = owner.next_update().on_host()
            for given in (x, *tangents):
                check_finite(owner, "features" if given is x else "upstream gradient", given)
            if spread is not None:
                spread.agree()
            with owner.applying():
                made = backward(
                    found, products, arguments, chunk, need_dx=[need_dx], need_dw=[True],
                    updates={0: update}, need_finite=True, spread=spread,
                )  # fmt: skip
            assert made.finite is not None
            finite = made.finite if spread is None else ~spread.any(~made.finite)
            owner.notice_stored(finite)
    dx = made.dx[0]
    grads = input_gradients(found, inputs, made.inputs)
    flat = [grad.reshape(-1).to(work_dtype(compute)) for grad in grads]
    return (
        x.new_empty(0) if dx is None else dx.to(x.dtype),
        torch.cat(flat) if flat else x.new_empty(0, dtype=work_dtype(compute)),
    )


@fused_head_program_backward.register_fake
def _(
    tangents: Any, x: Tensor, inputs: list[Tensor], saved: Any, handle: Any, sink: Any, sizes: Any,
    program: str, chunk: int, compute: torch.dtype, need_dx: bool, shard: str = "",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    count: Any = sum(t.numel() for t in find_program(program).wanted_of(inputs))
    return (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_dx else x.new_empty(0),
        x.new_empty(count, dtype=work_dtype(compute)),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, tensors, _anchor, handle, sink, *config = inputs
    found = find_program(config[1])
    saved = output[found.num_results :]
    ctx.count = len(tensors)
    ctx.save_for_backward(x, handle, sink, *tensors, *saved)
    *ctx.config, ctx.shard = config
    ctx.results = [(r.shape, r.dtype, r.device) for r in output[: found.num_results]]
    ctx.mark_non_differentiable(*(r for i, r in enumerate(output) if i not in found.differentiable))


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        raise FusedUpdateError(
            "a backward with create_graph=True reached a head whose update is fused into "
            "backward(); second derivatives need an optimizer with fused=False"
        )
    x, handle, sink, *kept = ctx.saved_tensors
    tensors, saved = kept[: ctx.count], kept[ctx.count :]
    found = find_program(ctx.config[1])
    need_x, need_inputs, need_anchor = ctx.needs_input_grad[:3]
    dx, flat = torch.ops.elmo.fused_head_program_backward(
        tangents_of(found, grads, ctx.results),
        x,
        tensors,
        saved,
        handle,
        sink,
        *ctx.config,
        need_x,
        ctx.shard,
    )
    wanted = found.wanted_of(tensors)
    parts = flat.split([t.numel() for t in wanted]) if wanted else ()
    rest = [part.view(t.shape).to(t.dtype) for part, t in zip(parts, wanted)]
    return (
        dx if need_x else None,
        found.spread(rest, need_inputs),
        x.new_zeros((0,)) if need_anchor else None,
        *(None for _ in range(2)),
        None if ctx.config[0] else [],
        *(None for _ in ctx.needs_input_grad[6:]),  # torch leaves out arguments with their default
    )


fused_head_program.register_autograd(_backward, setup_context=_setup)
