"""Deferred logits do what the tensor they stand for does: values, gradients, in-place writes."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_net import OPTIONS, L, N, Net, assert_alike, outcome
from torch import Tensor, nn

from elmo_compile.deferred import Deferred


def backward(loss: Tensor) -> Tensor:
    loss.backward()
    return loss


def set_column(z: Tensor, y: Tensor) -> Tensor:
    z[:, 0] = -9.0
    return backward(F.cross_entropy(z, y))


def write_view(z: Tensor, y: Tensor) -> Tensor:
    z[1:].mul_(3.0)
    return backward(F.cross_entropy(z, y))


def write_view_of_view(z: Tensor, y: Tensor) -> Tensor:
    part = z.view(2, 3, L)[1:]
    part[..., 3] = 1.0
    return backward(F.cross_entropy(z, y) + part.sum())


def cast_then_write(z: Tensor, y: Tensor) -> Tensor:
    before = z.double()
    z.mul_(2.0)
    return backward(before.exp().mean() + F.cross_entropy(z, y))


def retained(z: Tensor, y: Tensor) -> Tensor | None:
    z.retain_grad()
    backward(F.cross_entropy(z, y))
    return z.grad


def hooked(z: Tensor, y: Tensor) -> list[Tensor]:
    seen: list[Tensor] = []
    z.register_hook(lambda grad: seen.append(grad.clone()))
    backward(F.cross_entropy(z, y))
    assert seen
    return seen


def saved(z: Tensor, y: Tensor) -> Any:
    file = io.BytesIO()
    torch.save({"logits": z}, file)
    file.seek(0)
    return torch.load(file)["logits"]


def in_another_graph(z: Tensor, y: Tensor) -> Tensor:
    def loss(z: Tensor) -> Tensor:
        return F.cross_entropy(z.float() * 2, y)

    return backward(torch.compile(loss, backend="aot_eager", fullgraph=True)(z))


def written_in_another_graph(z: Tensor, y: Tensor) -> Tensor:
    def write(z: Tensor) -> Tensor:
        return z.mul_(2) + 1

    made = torch.compile(write, backend="aot_eager", fullgraph=True)(z)
    return backward(made.exp().mean() + F.cross_entropy(z, y))


def own_leaf(z: Tensor, y: Tensor) -> Tensor | None:
    leaf = z.detach().requires_grad_()
    backward(F.cross_entropy(leaf, y))
    return leaf.grad


def beside(z: Tensor, y: Tensor) -> Tensor:
    """A loss of detached logits passes nothing on."""
    shown = F.cross_entropy(z.detach(), y)
    assert not shown.requires_grad
    return backward(F.cross_entropy(z, y) + 2 * shown)


def learned_temperature(z: Tensor, y: Tensor) -> Tensor | None:
    log_t = torch.zeros((), requires_grad=True)
    backward(F.cross_entropy(z.detach() * log_t.exp(), y))
    return log_t.grad


def view_made_before_a_write(z: Tensor, y: Tensor) -> Tensor:
    view = z.view(2, 3, L)
    z.mul_(2.0)
    return backward(F.cross_entropy(view.view(-1, L), y))


def cast_of_a_view_before_a_write(z: Tensor, y: Tensor) -> Tensor:
    view = z.view(2, 3, L)
    cast = view.double()
    view.mul_(2.0)
    return backward(cast.exp().mean() + F.cross_entropy(z, y) + view.sum())


def view_of_a_view_before_a_write(z: Tensor, y: Tensor) -> list[Tensor]:
    d = z.detach()
    part, top = d.view(2, 3, L)[:, 1], d.view(2, 3, L)[0]
    d.zero_()
    return [part.sum(), top.argmax(-1), top[1:].logsumexp(-1)]


def view_of_a_cast_before_a_write(z: Tensor, y: Tensor) -> Tensor:
    """A cast is a copy: what is written later does not reach it, nor its views."""
    part = z.double()[1:]
    z.mul_(2.0)
    return backward(F.cross_entropy(part[1:], y[2:]) + F.cross_entropy(z, y))


def write_view_of_a_cast(z: Tensor, y: Tensor) -> Tensor:
    cast = z.double()
    part = cast[1:]
    z.mul_(2.0)
    part.mul_(3.0)
    return backward(F.cross_entropy(cast, y) + F.cross_entropy(z, y))


def write_into_a_cast_to_itself(z: Tensor, y: Tensor) -> Tensor:
    for same in (z.float(), z.contiguous(), z.to(torch.float32), z.reshape(N, L)):
        same[:, 0] += 1.0
    return backward(F.cross_entropy(z, y))


def temperature_changed_later(z: Tensor, y: Tensor) -> Tensor:
    temperature = torch.tensor(0.5)
    scaled = z.detach() / temperature
    temperature.fill_(100.0)
    return F.cross_entropy(scaled, y)


def hook_on_what_it_is_made_from(z: Tensor, y: Tensor) -> Tensor | None:
    cast = z.double()
    z.retain_grad()
    backward(F.cross_entropy(cast, y))
    return z.grad


def with_other_data(z: Tensor, y: Tensor) -> Tensor:
    z.data = torch.ones(N, L)
    return F.cross_entropy(z, y)


def penalty(*steps: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """A penalty on the gradient of what the logits are made from, beside a loss of them."""

    def use(z: Tensor, y: Tensor) -> Tensor:
        made = z
        for step in steps:
            made = step(made)
        (g,) = torch.autograd.grad((made * made).sum(), z.features, create_graph=True)  # type: ignore[attr-defined]
        return backward(F.cross_entropy(z, y) + g.pow(2).sum())

    return use


def penalty_of_logits(z: Tensor, y: Tensor) -> Tensor:
    p = z.softmax(-1)
    (g,) = torch.autograd.grad((p * p).sum(), z, create_graph=True)
    return backward(F.cross_entropy(z, y) + g.pow(2).sum())


def grad_of_a_detached_leaf(z: Tensor, y: Tensor) -> list[Tensor]:
    leaf = z.detach().requires_grad_()
    loss = 3 * F.cross_entropy(z, y) + F.cross_entropy(leaf, y)
    return [*torch.autograd.grad(loss, [leaf, z])]


def grad_of_a_scale(z: Tensor, y: Tensor) -> list[Tensor | None]:
    scale = torch.ones((), requires_grad=True)
    loss = F.cross_entropy(z.detach() * scale, y) + F.cross_entropy(z, y)
    return [*torch.autograd.grad(loss, [z, scale])]


def backward_for(z: Tensor, *inputs: Tensor, loss: Tensor, **kwargs: Any) -> list[Tensor | None]:
    loss.backward(inputs=[z, *inputs], **kwargs)
    return [z.grad, *(each.grad for each in inputs)]


def backward_for_logits_twice(z: Tensor, y: Tensor) -> list[Tensor | None]:
    first, second = F.cross_entropy(z.double(), y), z[1:].logsumexp(-1).sum()
    torch.autograd.backward([first, 2 * second], inputs=z, retain_graph=True)
    assert z.grad is not None
    seen = z.grad.clone()
    return [seen, *backward_for(z, loss=F.cross_entropy(z, y))]


def backward_for_logits_and_features(z: Tensor, y: Tensor) -> list[Tensor | None]:
    loss = 3 * F.cross_entropy(z, y) + z.exp().sum()
    return backward_for(z, z.features, loss=loss)  # type: ignore[attr-defined]


STREAMED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "cross_entropy": lambda z, y: backward(F.cross_entropy(z, y)),
    "module": lambda z, y: backward(nn.BCEWithLogitsLoss()(z, F.one_hot(y, L).float())),
    "smoothed": lambda z, y: backward(F.cross_entropy(z, y, label_smoothing=0.1)),
    "weighted": lambda z, y: backward(F.cross_entropy(z, y, weight=torch.linspace(0.1, 1, L))),
    "keyword": lambda z, y: backward(F.cross_entropy(input=z, target=y)),
    "shifted": lambda z, y: backward(
        F.cross_entropy(z.float()[:-1].contiguous().view(-1, L), y[1:])
    ),
    "masked_rows": lambda z, y: backward(F.cross_entropy(z[y > 100], y[y > 100])),
    "temperature": lambda z, y: backward(F.cross_entropy(z / 0.5, y)),
    "softcap": lambda z, y: backward(F.cross_entropy(torch.tanh(z / 30) * 30, y)),
    "nll": lambda z, y: backward(F.nll_loss(F.log_softmax(z, -1), y)),
    "detached_beside": beside,
    "rows": lambda z, y: backward(F.cross_entropy(z, y, reduction="none").mean()),
    "own_loss": lambda z, y: backward((z.logsumexp(-1) - z.gather(1, y[:, None])[:, 0]).mean()),
    "log_probability": lambda z, y: z.detach().log_softmax(-1).gather(1, y[:, None]),
    "numpy_scale": lambda z, y: backward(F.cross_entropy(z / np.sqrt(768) * np.float32(0.5), y)),
    "numpy_index": lambda z, y: z[np.int64(2)].softmax(-1),
    "numpy_indices": lambda z, y: backward(F.cross_entropy(z[np.array([0, 2])], y[[0, 2]])),
    "numpy_mask": lambda z, y: backward(F.cross_entropy(z[(y > 100).numpy()], y[y > 100])),
    "numpy_slice": lambda z, y: backward(F.cross_entropy(z[np.int64(1) : np.int64(3)], y[1:3])),
    "numpy_k": lambda z, y: list(z.topk(np.int64(3))),
    "numpy_smoothing": lambda z, y: backward(
        F.cross_entropy(z, y, label_smoothing=np.float32(0.25))
    ),
    "argmax": lambda z, y: z.argmax(-1),
    "argmax_of_permuted": lambda z, y: z[:, torch.arange(L - 1, -1, -1)].argmax(-1),
    "temperature_changed_later": temperature_changed_later,
    "argmax_keepdim": lambda z, y: torch.argmax(z, dim=1, keepdim=True),
    "topk": lambda z, y: list(z.topk(3)),
    "topk_many": lambda z, y: list(z.topk(7)),
    "max": lambda z, y: list(z.max(1)),
    "entry": lambda z, y: z.softmax(-1)[..., 3],
    "sigmoid_topk": lambda z, y: list(z.detach().sigmoid().topk(3)),
    "attributes": lambda z, y: [
        z.requires_grad, z.is_leaf, z.shape, z.dtype, z.ndim, len(z), z.stride(), z.numel(),
        z.is_contiguous(), z.device, z.size(-1), z.element_size(), isinstance(z, Tensor),
    ],
}  # fmt: skip
"""Uses that do not make the values."""

MADE: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "two_losses": lambda z, y: backward(F.cross_entropy(z, y) + (z * z).mean()),
    "elementwise_loss": lambda z, y: backward(
        F.binary_cross_entropy_with_logits(z, F.one_hot(y, L).float(), reduction="none").sum()
    ),
    "written": lambda z, y: backward(F.cross_entropy(z.mul_(2), y)),
    "set_column": set_column,
    "write_view": write_view,
    "write_view_of_view": write_view_of_view,
    "cast_then_write": cast_then_write,
    "materialize": lambda z, y: backward(
        F.cross_entropy(z.materialize() if isinstance(z, Deferred) else z, y)
    ),
    "numpy_factors": lambda z, y: (z.detach() * np.linspace(0, 1, L, dtype=np.float32)).sum(),
    "argmax_of_all": lambda z, y: z.argmax(),
    "item": lambda z, y: z[2, 5].item(),
    "numpy": lambda z, y: torch.from_numpy(z.detach().numpy()),
    "tolist": lambda z, y: torch.tensor(z.tolist()),
    "deepcopy": lambda z, y: copy.deepcopy(z.detach()),
    "pickle": lambda z, y: pickle.loads(pickle.dumps(z.detach())),
    "saved": saved,
    "dlpack": lambda z, y: torch.from_dlpack(z.detach()),
    "printed": lambda z, y: str(z.detach()),
    "data_ptr": lambda z, y: z.data_ptr() != 0,
    "view_made_before_a_write": view_made_before_a_write,
    "cast_of_a_view_before_a_write": cast_of_a_view_before_a_write,
    "hook_on_what_it_is_made_from": hook_on_what_it_is_made_from,
    "view_of_a_view_before_a_write": view_of_a_view_before_a_write,
    "view_of_a_cast_before_a_write": view_of_a_cast_before_a_write,
    "write_view_of_a_cast": write_view_of_a_cast,
    "write_into_a_cast_to_itself": write_into_a_cast_to_itself,
    "data_replaced": with_other_data,
    "stacked": lambda z, y: torch.stack([z, z]),
    "own_leaf": own_leaf,
    "learned_temperature": learned_temperature,
    "grad_of_values": lambda z, y: torch.autograd.grad(z.exp().sum(), z)[0],
    "grad_of_streamed": lambda z, y: torch.autograd.grad(F.cross_entropy(z, y), z)[0],
    "grad_of_cast": lambda z, y: torch.autograd.grad(3 * F.cross_entropy(z.double(), y), [z])[0],
    "grad_of_both": lambda z, y: torch.autograd.grad(F.cross_entropy(z, y) + z.exp().sum(), z)[0],
    "grad_of_top": lambda z, y: torch.autograd.grad(
        F.cross_entropy(z, y) + z.double().topk(3)[0].sum() + z.max(-1)[0].sum(), z
    )[0],
    "grad_of_a_detached_leaf": grad_of_a_detached_leaf,
    "grad_of_a_scale": grad_of_a_scale,
    "backward_for_logits": lambda z, y: backward_for(z, loss=F.cross_entropy(z, y)),
    "backward_for_logits_of_rows": lambda z, y: backward_for(
        z, loss=F.cross_entropy(z, y, reduction="none"), gradient=torch.arange(N).float()
    ),
    "backward_for_logits_twice": backward_for_logits_twice,
    "backward_for_logits_and_features": backward_for_logits_and_features,
    "retain_grad": retained,
    "hook": hooked,
    "penalty": penalty(),
    "penalty_of_softmax": penalty(lambda z: z[1:], lambda z: z.softmax(-1)),
    "penalty_of_logits": penalty_of_logits,
    "in_another_graph": in_another_graph,
    "written_in_another_graph": written_in_another_graph,
}
"""Uses that make them, once."""


@pytest.mark.parametrize("name", [*STREAMED, *MADE])
def test_as_the_tensor(name: str) -> None:
    use = {**STREAMED, **MADE}[name]
    theirs, their_grads, _ = outcome(use, compiled=False)
    mine, my_grads, z = outcome(use, compiled=True)
    assert isinstance(z, Deferred)
    assert (z._state.values is None) == (name in STREAMED)
    assert_alike(mine, theirs)
    for my_grad, their_grad in zip(my_grads, their_grads):
        assert (my_grad is None) == (their_grad is None)
        if my_grad is not None and their_grad is not None:
            torch.testing.assert_close(my_grad, their_grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["numpy", "deepcopy", "dlpack"])
def test_what_a_tensor_with_a_gradient_refuses(name: str) -> None:
    uses: dict[str, Callable[[Tensor, Tensor], Any]] = {
        "numpy": lambda z, y: z.numpy(),
        "deepcopy": lambda z, y: copy.deepcopy(z),
        "dlpack": lambda z, y: torch.from_dlpack(z),
    }
    errors = []
    for compiled in (False, True):
        with pytest.raises((RuntimeError, BufferError)) as caught:
            outcome(uses[name], compiled=compiled)
        errors.append((caught.type, str(caught.value)))
    assert errors[0] == errors[1]


WATCHERS: dict[str, Callable[[Tensor], Any]] = {
    "register_hook": lambda z: z.register_hook(lambda grad: grad * 0),
    "retain_grad": lambda z: z.retain_grad(),
}
BESIDE = {**WATCHERS, "backward(inputs=)": lambda z: z.sum().backward(inputs=[z])}


@pytest.mark.parametrize("name", list(WATCHERS))
def test_asking_for_the_gradient_after_the_loss_is_refused(name: str) -> None:
    def use(z: Tensor, y: Tensor) -> None:
        F.cross_entropy(z.double(), y)
        WATCHERS[name](z)

    def after_metrics(z: Tensor, y: Tensor) -> None:
        F.cross_entropy(z.detach(), y)
        z.argmax(-1)
        WATCHERS[name](z)

    with pytest.raises(RuntimeError, match=f"`{name}` of deferred logits .* before the loss"):
        outcome(use, compiled=True)
    outcome(after_metrics, compiled=True)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", list(BESIDE))
def test_asking_for_the_gradient_beside_a_loss_of_the_same_graph_is_refused(
    name: str, smoothing: float
) -> None:
    torch._dynamo.reset()
    model = Net()

    def both(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = model(x)
        return F.cross_entropy(z, y, label_smoothing=smoothing), z

    run = torch.compile(both, backend="elmo", options=OPTIONS)
    x, y = torch.randn(N, 8), torch.randint(0, L, (N,))
    loss, z = run(x, y)
    with pytest.raises(RuntimeError, match="'deferred_logits': False"):
        BESIDE[name](z)
    loss.backward()
    BESIDE[name](z.detach().requires_grad_())
