"""`elmo::head_program`: heads and whatever follows their logits, as one functional op.

The program (see `elmo_compile.programs`) is named by its key. Results come first among the outputs,
then what the backward needs: values with one entry a row, never one an output.
Shapes: features [.., D] and weight [L, D] of each product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from elmo_compile.errors import ElmoError, InputError
from elmo_compile.ops.call import forbid_second_derivative
from elmo_compile.ops.head_loss import gradient_dtype
from elmo_compile.ops.spread import exchange_of


def find_program(key: str) -> Any:
    """The program of a key. Raises ElmoError where the process has not made it."""
    from elmo_compile.programs.record import find

    try:
        return find(key)
    except KeyError:
        raise ElmoError(
            f"the compiled graph names a loss program ({key}) that this process has not made; "
            "compile the model in this process"
        ) from None


def products_of(
    xs: list[Tensor], ws: list[Tensor], compute: torch.dtype, wide: list[bool]
) -> list[Any]:
    """The products of a call. Raises InputError unless features and weights fit each other."""
    from elmo_compile.kernels.aten.programs import Product

    for x, w in zip(xs, ws):
        if w.dim() != 2 or x.shape[-1] != w.shape[1]:
            raise InputError(
                f"features have {x.shape[-1]} columns but the head's weight is {tuple(w.shape)}; "
                "accepted: [outputs, features]"
            )
    return [
        Product(x=x, w_LD=w if w.is_contiguous() else w.contiguous(), compute_dtype=compute,
                wide_dw=wide_dw)
        for x, w, wide_dw in zip(xs, ws, wide)
    ]  # fmt: skip


def work_dtype(compute: torch.dtype) -> torch.dtype:
    """Arithmetic precision of what is computed from logits."""
    return torch.float64 if compute == torch.float64 else torch.float32


@torch.library.custom_op(
    "elmo::head_program",
    mutates_args=(),
    schema="(Tensor[] xs, Tensor[] ws, Tensor[] carriers, Tensor[] inputs, SymInt[] sizes, "
    "str program, int chunk, ScalarType compute, str shard='') -> Tensor[]",
)
def head_program(
    xs: list[Tensor],
    ws: list[Tensor],
    carriers: list[Tensor],
    inputs: list[Tensor],
    sizes: list[int],
    program: str,
    chunk: int,
    compute: torch.dtype,
    shard: str = "",
) -> list[Tensor]:
    from elmo_compile.kernels.aten.programs import forward

    found = find_program(program)
    with exchange_of(shard, xs[0], found.outline) as spread:
        products = products_of(xs, ws, compute, [False] * len(xs))
        results = forward(found, products, found.arguments(inputs, sizes), chunk, spread)
    return unaliased(results, inputs)


def unaliased(results: list[Any], inputs: list[Tensor]) -> list[Tensor]:
    """Outputs of an op may share memory neither with its inputs nor with each other."""
    seen = {t.untyped_storage().data_ptr() for t in inputs}
    fresh = []
    for result in results:
        if result.untyped_storage().data_ptr() in seen:
            result = result.clone()
        seen.add(result.untyped_storage().data_ptr())
        fresh.append(result)
    return fresh


@head_program.register_fake
def _(
    xs: list[Tensor], ws: list[Tensor], carriers: Any, inputs: list[Tensor], sizes: list[int],
    program: str, chunk: int, compute: torch.dtype, shard: str = "",
) -> list[Tensor]:  # fmt: skip
    return fake_results(xs, inputs, sizes, program, compute)


def fake_results(
    xs: list[Tensor],
    inputs: list[Tensor],
    sizes: list[int],
    program: str,
    compute: torch.dtype,
) -> list[Tensor]:
    """Shapes and dtypes of the outputs, by running the program on fake logits."""
    found = find_program(program)
    work = work_dtype(compute)
    zs = [x.new_empty((*x.shape[:-1], found.num_outputs), dtype=work) for x in xs]
    results = found.shapes(*zs, *found.arguments(inputs, sizes))
    return [torch.empty(r.shape, dtype=r.dtype, device=r.device) for r in results]


@torch.library.custom_op(
    "elmo::head_program_backward",
    mutates_args=(),
    schema="(Tensor[] tangents, Tensor[] xs, Tensor[] ws, Tensor[] inputs, Tensor[] saved, "
    "SymInt[] sizes, str program, int chunk, ScalarType compute, bool[] need_dx, bool[] need_dw, "
    "bool[] wide, str shard='') -> Tensor[]",
)
def head_program_backward(
    tangents: list[Tensor],
    xs: list[Tensor],
    ws: list[Tensor],
    inputs: list[Tensor],
    saved: list[Tensor],
    sizes: list[int],
    program: str,
    chunk: int,
    compute: torch.dtype,
    need_dx: list[bool],
    need_dw: list[bool],
    wide: list[bool],
    shard: str = "",
) -> list[Tensor]:
    from elmo_compile.kernels.aten.programs import backward

    found = find_program(program)
    with exchange_of(shard, xs[0], (found.outline, need_dx, need_dw)) as spread:
        made = backward(
            found,
            products_of(xs, ws, compute, wide),
            [*found.arguments(inputs, sizes), *saved, *tangents],
            chunk,
            need_dx=need_dx,
            need_dw=need_dw,
            spread=spread,
        )
    return [
        *(x.new_empty(0) if dx is None else dx.to(x.dtype) for x, dx in zip(xs, made.dx)),
        *(
            w.new_empty(0, dtype=torch.float32) if dw is None else dw.to(gradient_dtype(w, wide_dw))
            for w, dw, wide_dw in zip(ws, made.dw, wide)
        ),
        *input_gradients(found, inputs, made.inputs),
    ]


def input_gradients(found: Any, inputs: list[Tensor], grads: list[Any]) -> list[Tensor]:
    """Gradients of the wanted inputs in their dtypes; zeros where there is none."""
    return [
        torch.zeros_like(like) if grad is None else grad.to(like.dtype).clone()
        for like, grad in zip(found.wanted_of(inputs), grads)
    ]


@head_program_backward.register_fake
def _(
    tangents: Any, xs: list[Tensor], ws: list[Tensor], inputs: list[Tensor], saved: Any, sizes: Any,
    program: str, chunk: int, compute: torch.dtype, need_dx: list[bool], need_dw: list[bool],
    wide: list[bool], shard: str = "",
) -> list[Tensor]:  # fmt: skip
    found = find_program(program)
    return [
        *(
            torch.empty(x.shape, dtype=x.dtype, device=x.device) if need else x.new_empty(0)
            for x, need in zip(xs, need_dx)
        ),
        *(
            torch.empty(w.shape, dtype=gradient_dtype(w, wide_dw), device=w.device)
            if need
            else torch.empty(0, device=w.device)
            for w, need, wide_dw in zip(ws, need_dw, wide)
        ),
        *(torch.empty_like(t) for t in found.wanted_of(inputs)),
    ]  # fmt: skip


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    xs, ws, carriers, tensors, sizes, program, chunk, compute, ctx.shard = inputs
    found = find_program(program)
    saved = output[found.num_results :]
    ctx.counts = (len(xs), len(tensors), len(saved))
    ctx.save_for_backward(*xs, *ws, *tensors, *saved)
    ctx.config = (sizes, program, chunk, compute)
    ctx.carried = len(carriers)
    ctx.wide = [bool(carriers) and carriers[0].dtype != w.dtype for w in ws]
    ctx.results = [(r.shape, r.dtype, r.device) for r in output[: found.num_results]]
    constant = [r for i, r in enumerate(output) if i not in found.differentiable]
    ctx.mark_non_differentiable(*constant)


def tangents_of(found: Any, grads: list[Tensor | None], results: list[Any]) -> list[Tensor]:
    """Upstream gradients of the differentiable results, zeros where there is none."""
    made = []
    for i in found.differentiable:
        shape, dtype, device = results[i]
        grad = grads[i]
        made.append(
            torch.zeros(shape, dtype=dtype, device=device) if grad is None else grad.contiguous()
        )
    return made


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    n, m, _ = ctx.counts
    sizes, program, chunk, compute = ctx.config
    found = find_program(program)
    kept = list(ctx.saved_tensors)
    xs, ws, tensors, saved = kept[:n], kept[n : 2 * n], kept[2 * n : 2 * n + m], kept[2 * n + m :]
    need_xs, need_ws, need_carriers, need_inputs = ctx.needs_input_grad[:4]
    carried = bool(ctx.carried)
    reached = [i in found.trained for i in range(n)]
    need_dx = [need and got for need, got in zip(need_xs, reached)]
    need_dw = [need and got for need, got in zip(need_carriers if carried else need_ws, reached)]
    out = torch.ops.elmo.head_program_backward(
        tangents_of(found, grads, ctx.results), xs, ws, tensors, saved, sizes, program, chunk,
        compute, need_dx, need_dw, ctx.wide, ctx.shard,
    )  # fmt: skip
    dx = [d if need else None for d, need in zip(out[:n], need_dx)]
    dw = [d if need else None for d, need in zip(out[n : 2 * n], need_dw)]
    return (
        dx,
        [None] * n if carried else dw,
        dw if carried else [],
        found.spread(out[2 * n :], need_inputs),
        None if sizes else [],
        *(None for _ in ctx.needs_input_grad[5:]),  # torch leaves out arguments with their default
    )


head_program.register_autograd(_backward, setup_context=_setup)
forbid_second_derivative(head_program_backward)
