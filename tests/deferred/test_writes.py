"""Writes into deferred logits, their views, and memory they handed out: as into the tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_net import OPTIONS, L, N, Net, assert_alike, outcome
from torch import Tensor, nn

from elmo_compile.deferred import Deferred

Use = Callable[[Tensor, Tensor], Any]


def after(write: Callable[[Tensor], Any], *, grad: bool = True) -> Use:
    """Loss, values and gradients after a write, and copies that were taken before it."""

    def use(z: Tensor, y: Tensor) -> list[Tensor]:
        logits = z if grad else z.detach()
        copies = [logits.detach().softmax(-1), logits[1:].double()[torch.tensor([2, 0])]]
        with torch.set_grad_enabled(grad):
            write(logits)
        loss = F.cross_entropy(logits, y)
        if grad:
            loss.backward()
        rows = [logits.argmax(-1), logits.detach().logsumexp(-1), z.detach()[1:].argmax(-1)]
        return [loss, logits + 0, *rows, *copies]

    return use


def numpy(z: Tensor) -> None:
    z.detach().numpy()[:, :5] = -9


def numpy_of_view(z: Tensor) -> None:
    z.detach()[1:].numpy()[:, :5] = -9


def dlpack(z: Tensor) -> None:
    torch.from_dlpack(z.detach())[:, :5] = -9


def set_data(z: Tensor) -> None:
    z.data[..., :150] = -9


def set_data_of_view(z: Tensor) -> None:
    z.view(2, 3, L).data[1:, :, :150] = -9


def set_detached_view(z: Tensor) -> None:
    z.view(2, 3, L).detach()[..., :150] = -9


def each_row(z: Tensor) -> None:
    for row in z.data.unbind():
        row.mul_(2)


def assign_data(z: Tensor) -> None:
    z.data = z.data * 2


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "relu": lambda z: F.relu(z.view(N, L)[1:], inplace=True),
    "dropout": lambda z: F.dropout(z.view(2, 3, L)[1], 0.3, True, True),
    "masked_fill": lambda z: z[:, 3:].masked_fill_(torch.arange(L - 3) > 300, -9.0),
    "foreach": lambda z: torch._foreach_mul_([z], 2.0),
    "foreach_views": lambda z: torch._foreach_mul_([z[1:], z.view(2, 3, L)[0]], 2.0),
    "detached_view": lambda z: z[1:].detach().mul_(3.0),
    "set_detached_view": set_detached_view,
    "transposed": lambda z: z.T.mul_(2.0),
    "data": lambda z: z.data.mul_(3.0),
    "data_of_view": lambda z: z[1:].data.mul_(3.0),
    "view_of_data": lambda z: z.data[1:].mul_(3.0),
    "data_transposed": lambda z: z.data.detach().t().mul_(3.0),
    "set_data": set_data,
    "set_data_of_view": set_data_of_view,
    "each_row": each_row,
    "assign_data": assign_data,
    "numpy": numpy,
    "numpy_of_view": numpy_of_view,
    "dlpack": dlpack,
}

WITHOUT_GRADIENT: dict[str, Callable[[Tensor], Any]] = {
    "out": lambda z: torch.mul(torch.ones(5, L), 3.0, out=z[1:]),
    "out_itself": lambda z: torch.clamp(z, -0.1, 0.1, out=z),
    "foreach_copy": lambda z: torch._foreach_copy_([z[:2]], [torch.ones(2, L)]),
}


@pytest.mark.parametrize("name", list(WRITES))
def test_a_write(name: str) -> None:
    check(after(WRITES[name]))


@pytest.mark.parametrize("name", [*WRITES, *WITHOUT_GRADIENT])
def test_a_write_without_a_gradient(name: str) -> None:
    check(after({**WRITES, **WITHOUT_GRADIENT}[name], grad=False))


def leaf(z: Tensor, y: Tensor) -> list[Any]:
    part = z[:-1].detach().requires_grad_()
    F.cross_entropy(part, y[1:]).backward()
    return [part.is_leaf, part.grad]


def frozen(z: Tensor, y: Tensor) -> list[Any]:
    part = z[:-1].detach().requires_grad_(False)
    return [part.requires_grad, part.grad_fn is None]


def shown(z: Tensor, y: Tensor) -> list[Any]:
    part = z[:-1].detach()
    z[:, 0] = -3.0
    return [part.requires_grad, part.sum().requires_grad, part.sum()]


def padded(z: Tensor, y: Tensor) -> list[Any]:
    z = z.detach()
    first = z.argmax(-1, keepdim=True)
    first[1:] = 0
    return [first, z.argmax(-1), z.max(-1).indices]


def versions(z: Tensor, y: Tensor) -> list[int]:
    detached = z.detach()
    part = detached.view(2, 3, L)[1:]
    detached.zero_()
    return [z._version, part._version, part.storage_offset()]


def in_inference_mode(z: Tensor, y: Tensor) -> list[Any]:
    with torch.inference_mode():
        part = z[1:]
        read = [part.argmax(-1), z.detach().argmax(-1), part.is_inference(), (2 * z).sum() + 0]
    loss = F.cross_entropy(z, y) + z.T.exp().mean() + part.sum()
    loss.backward()
    return [loss, *read]


def written_in_inference_mode(z: Tensor, y: Tensor) -> list[Tensor]:
    z = z.detach()
    with torch.inference_mode():
        z[1:].mul_(2.0)
    return [F.cross_entropy(z, y), z + 0]


def view_in_another_graph(z: Tensor, y: Tensor) -> list[Tensor]:
    def loss(part: Tensor) -> Tensor:
        return F.cross_entropy(part.float() + 2, y[1:])

    def write(part: Tensor) -> Tensor:
        return part.mul_(2) + 1

    written = torch.compile(write, backend="aot_eager", fullgraph=True)(z[2:])
    found = torch.compile(loss)(z[1:])
    (found + written.exp().mean() + F.cross_entropy(z, y)).backward()
    return [found, written, z + 0]


def grad_of(write: Callable[[Tensor], Any]) -> Use:
    """What was streamed before a write is no part of what the logits became."""

    def use(z: Tensor, y: Tensor) -> Tensor:
        write(z)
        return torch.autograd.grad(z.square().sum(), z)[0]

    return use


def grad_of_loss_before(write: Callable[[Tensor], Any]) -> Use:
    def use(z: Tensor, y: Tensor) -> Tensor | None:
        loss = F.cross_entropy(z, y)
        write(z)
        return torch.autograd.grad(loss, z, allow_unused=True)[0]

    return use


OTHERS: dict[str, Use] = {
    "leaf": leaf,
    "frozen": frozen,
    "shown": shown,
    "padded": padded,
    "versions": versions,
    "in_inference_mode": in_inference_mode,
    "written_in_inference_mode": written_in_inference_mode,
    "view_in_another_graph": view_in_another_graph,
    "grad_of_scaled": grad_of(lambda z: z.mul_(z.mean())),
    "grad_of_normalized": grad_of(lambda z: z.sub_(z.logsumexp(-1, keepdim=True))),
    "grad_of_loss_before": grad_of_loss_before(lambda z: z.mul_(2.0)),
    "grad_of_loss_before_detached": grad_of_loss_before(lambda z: z.detach().mul_(2.0)),
}


@pytest.mark.parametrize("name", list(OTHERS))
def test_as_the_tensor(name: str) -> None:
    check(OTHERS[name])


def check(use: Use) -> None:
    theirs, their_grads, _ = outcome(use, compiled=False)
    mine, my_grads, z = outcome(use, compiled=True)
    assert isinstance(z, Deferred)
    assert_alike(mine, theirs)
    for my_grad, their_grad in zip(my_grads, their_grads):
        assert (my_grad is None) == (their_grad is None)
        if my_grad is not None and their_grad is not None:
            torch.testing.assert_close(my_grad, their_grad, rtol=1e-4, atol=1e-6)


@torch.library.custom_op("elmo_test::double_rows", mutates_args={"z"})
def double_rows(z: Tensor) -> Tensor:
    """An operation that writes into its argument and returns something else."""
    z.mul_(2)
    return z.sum(-1)


def test_an_operation_that_writes_and_returns_something_else() -> None:
    def use(z: Tensor, y: Tensor) -> list[Tensor]:
        with torch.no_grad():
            sums = double_rows(z[1:])
        return [sums, F.cross_entropy(z, y)]

    check(use)


@pytest.mark.parametrize("write_late", [False, True])
def test_a_copy_taken_before_a_write_outlives_an_update(write_late: bool) -> None:
    found = []
    x, y = torch.randn(N, 8), torch.randint(0, L, (N,))
    for through in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model: Any = Net()
        opt = torch.optim.SGD(model.parameters(), 0.1)
        z = (torch.compile(model, backend="elmo", options=OPTIONS) if through else model)(x)
        copy = z.detach().softmax(-1)
        if not write_late:
            z[:, 0] = -9.0
        F.cross_entropy(z, y).backward()
        opt.step()
        if write_late:
            z[1:].detach().zero_()
        found.append([copy.square().sum(), z.detach().sum()])
    assert_alike(found[1], found[0])


SHAPES: dict[str, Callable[[Tensor], Any]] = {
    "squeeze": lambda z: z.squeeze_(0),
    "unsqueeze": lambda z: z.unsqueeze_(0),
    "t": lambda z: z.t_(),
    "transpose": lambda z: z.transpose_(0, 1),
    "resize": lambda z: z.detach().resize_(2, 3),
}


@pytest.mark.parametrize("name", list(SHAPES))
def test_a_shape_does_not_change_in_place(name: str) -> None:
    with pytest.raises(RuntimeError, match=f"change their shape in place .*`{name}_`"):
        outcome(lambda z, y: SHAPES[name](z), compiled=True)


def test_what_reads_no_memory_leaves_losses_streamed() -> None:
    torch._dynamo.reset()
    model = nn.Linear(8, L)
    z = torch.compile(model, backend="elmo", options=OPTIONS)(torch.randn(N, 8))
    y = torch.randint(0, L, (N,))
    z.data[1:].view(5, L).argmax(-1)
    part = z[1:].detach()
    (F.cross_entropy(z.view(2, 3, L)[1], y[3:]) + F.cross_entropy(part, y[1:])).backward()
    assert z._state.values is None
    assert part._state.values is None
