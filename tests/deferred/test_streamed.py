"""What people do with logits between a model and its loss or metric needs no values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_net import OPTIONS, L, N, Net, assert_alike, outcome
from torch import Tensor

import elmo_compile as elmo
from elmo_compile.deferred import Deferred

Use = Callable[[Tensor, Tensor], Any]
T = N // 2
"""The logits are [2, T, L] in what follows."""


def loss_of(permuted: Callable[[Tensor], Tensor]) -> Use:
    """Cross entropy whose classes are the second dimension, as torch wants them."""

    def use(z: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(permuted(z.view(2, T, L)), y.view(2, T))
        loss.backward()
        return loss

    return use


def trained(use: Use) -> Use:
    """A use whose result is a loss."""

    def then_backward(z: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = use(z, y)
        loss.backward()
        return loss

    return then_backward


def own(y: Tensor) -> Tensor:
    return y[:, None]


POPULAR = torch.linspace(-1, 1, L)
SEEN = torch.tensor([[n, 3 * n + 1, L - 1] for n in range(N)])

LOSSES: dict[str, Use] = {
    "transpose": loss_of(lambda z: z.transpose(1, 2)),
    "transpose_negative": loss_of(lambda z: torch.transpose(z, -1, -2)),
    "permute": loss_of(lambda z: z.permute(0, 2, 1)),
    "permute_tuple": loss_of(lambda z: z.permute((0, 2, 1))),
    "swapaxes": loss_of(lambda z: z.swapaxes(1, 2)),
    "movedim": loss_of(lambda z: z.movedim(-1, 1)),
    "mT": loss_of(lambda z: z.mT),
    "permute_contiguous": loss_of(lambda z: z.permute(0, 2, 1).contiguous()),
    "time_first": trained(
        lambda z, y: F.cross_entropy(
            z.view(2, T, L).transpose(0, 1).reshape(-1, L), y.view(2, T).t().reshape(-1)
        )
    ),
    "t": trained(lambda z, y: F.cross_entropy(z.t().t(), y)),
    "narrow": trained(lambda z, y: F.cross_entropy(z.narrow(0, 1, 3), y[1:4])),
    "narrow_keywords": trained(
        lambda z, y: F.cross_entropy(z.narrow(dim=0, start=1, length=3), y[1:4])
    ),
    "select": trained(
        lambda z, y: F.cross_entropy(z.view(2, T, L).select(1, -1), y.view(2, T)[:, -1])
    ),
    "index_select": trained(
        lambda z, y: F.cross_entropy(z.index_select(0, torch.tensor([4, 0])), y[[4, 0]])
    ),
    "clone": trained(lambda z, y: F.cross_entropy(z.clone(), y)),
    "clamp": trained(lambda z, y: F.cross_entropy(z.clamp(-0.2, 0.2), y)),
    "relu_squared": trained(lambda z, y: F.cross_entropy(z.relu().square(), y)),
    "popularity": trained(lambda z, y: F.cross_entropy(z - POPULAR, y)),
    "minus": trained(lambda z, y: F.cross_entropy(1 - z, y)),
    "masked_fill": trained(lambda z, y: F.cross_entropy(z.masked_fill(POPULAR > 0.9, -1e9), y)),
    "row_scale": trained(lambda z, y: F.cross_entropy(z * torch.arange(1.0, N + 1)[:, None], y)),
    "scatter": trained(lambda z, y: F.nll_loss(z.scatter(1, SEEN, -1e4).log_softmax(-1), y)),
    "index_fill": trained(
        lambda z, y: F.cross_entropy(z.index_fill(1, torch.tensor([0, 7]), -1e9), (y + 8) % L)
    ),
    "normalised": trained(lambda z, y: F.cross_entropy(F.normalize(z, dim=-1) / 0.1, y)),
    "regularised": trained(lambda z, y: F.cross_entropy(z, y) + 1e-3 * z.pow(2).mean()),
    "norm": trained(lambda z, y: F.cross_entropy(z, y) + 1e-3 * z.norm(dim=-1).mean()),
    "deviation": trained(lambda z, y: F.cross_entropy(z, y) + 1e-3 * z.std(-1).mean()),
    "softplus": trained(lambda z, y: F.softplus(z).sum() - z.gather(1, own(y)).sum()),
    "take_along_dim": trained(
        lambda z, y: -torch.take_along_dim(z.log_softmax(-1), own(y), -1).mean()
    ),
    "largest": trained(lambda z, y: (z.amax(-1) - z.amin(-1)).mean()),
}

METRICS: dict[str, Use] = {
    "rank": lambda z, y: (z > z.gather(1, own(y))).sum(-1),
    "rank_at_least": lambda z, y: torch.count_nonzero(z >= z.gather(1, own(y)), dim=-1),
    "above": lambda z, y: (z.sigmoid() > 0.5).sum(-1),
    "finite": lambda z, y: [torch.isfinite(z).all(), z.isnan().any()],
    "unseen": lambda z, y: z.scatter(1, SEEN, float("-inf")).topk(4)[1],
    "probability": lambda z, y: z.softmax(-1).amax(-1),
    "of_permuted": lambda z, y: z.view(2, T, L).transpose(1, 2).argmax(1),
    "norms": lambda z, y: [z.norm(dim=-1), torch.linalg.vector_norm(z, 1, -1), z.norm(3, -1)],
    "moments": lambda z, y: [z.mean(-1), z.std(-1), z.var(-1, unbiased=False)],
    "entropy": lambda z, y: z.logsumexp(-1) - (z.softmax(-1) * z).sum(-1),
    "entropy_of_logs": lambda z, y: -(z.softmax(-1) * z.log_softmax(-1)).sum(dim=-1),
    "contrast": lambda z, y: F.mse_loss(z[1:], z[:-1]),
    "sharpened": lambda z, y: F.kl_div(
        z.log_softmax(-1), (z * 2).softmax(-1), reduction="batchmean"
    ),
    "squared": lambda z, y: torch.mul(z, other=z).sum(-1),
    "spread": lambda z, y: z.clamp_min(0).exp().sum(-1),
}


@pytest.mark.parametrize("name", [*LOSSES, *METRICS])
def test_no_values(name: str) -> None:
    use = {**LOSSES, **METRICS}[name]
    with torch.set_grad_enabled(name in LOSSES):
        theirs, their_grads, _ = outcome(use, compiled=False)
        mine, my_grads, z = outcome(use, compiled=True)
    assert isinstance(z, Deferred)
    assert z._state.values is None
    assert_alike(mine, theirs)
    for my_grad, their_grad in zip(my_grads, their_grads):
        torch.testing.assert_close(my_grad, their_grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("other", [torch.gt, torch.ne, torch.Tensor.__le__])
def test_comparisons_with_what_has_a_gradient(other: Any) -> None:
    def use(z: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(z, y)
        loss.backward()
        return other(z, z.gather(1, own(y)) + 0.1).sum(-1)

    mine, my_grads, z = outcome(use, compiled=True)
    theirs, their_grads, _ = outcome(use, compiled=False)
    assert z._state.values is None  # type: ignore[attr-defined]
    assert torch.equal(mine, theirs)
    for my_grad, their_grad in zip(my_grads, their_grads):
        torch.testing.assert_close(my_grad, their_grad, rtol=1e-4, atol=1e-6)


def rows_of(z: Tensor) -> list[Tensor]:
    return [part.logsumexp(-1) for part in z.split(16)]


PARTS: dict[str, Callable[[Tensor], Any]] = {
    "split": rows_of,
    "split_sizes": lambda z: [part.mean(-1) for part in torch.split(z, [16, 20, 28], dim=0)],
    "chunk": lambda z: [part.argmax(-1) for part in z.chunk(2)],
    "tensor_split": lambda z: [part.amax(-1) for part in z.tensor_split((20, 40))],
    "unbind": lambda z: [part.logsumexp(-1) for part in z.view(2, 32, L).unbind(0)],
    "unbind_second": lambda z: [part.logsumexp(-1) for part in z.view(32, 2, L).unbind(1)],
    "loop": lambda z: [part.logsumexp(-1) for part in z.view(2, 32, L)],
}


def deferred(rows: int, *, head: bool = False, **options: Any) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Net()
    model.head.requires_grad_(head)
    run: Any = torch.compile(model, backend="elmo", options={**OPTIONS, **options})
    return run(torch.randn(rows, 8)), model


@pytest.mark.parametrize("name", list(PARTS))
def test_parts_of_the_rows(name: str) -> None:
    z, _ = deferred(64)
    expected = PARTS[name](deferred(64)[0].materialize())
    assert_alike(list(PARTS[name](z)), list(expected))
    assert z._state.values is None


def test_the_features_gradient_of_parts() -> None:
    grads = []
    for take in (lambda z: z, lambda z: z.materialize()):
        z, model = deferred(64)
        sum(part.mean() for part in rows_of(take(z))).backward()  # type: ignore[union-attr]
        grads.append(model.encoder.weight.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("rows", "head", "take"),
    [
        (64, True, lambda z: z.split(16)),  # a gradient of the weight for each
        (64, False, lambda z: z.split(4)),  # a pass over the weight for 4 rows
        (64, False, lambda z: z.split(100, 1)),  # not rows
    ],
)
def test_parts_that_are_made(rows: int, head: bool, take: Callable[[Any], Any]) -> None:
    z, _ = deferred(rows, head=head)
    parts = take(z)
    assert z._state.values is not None
    assert_alike(list(parts), list(take(z.materialize())))


def test_arguments_are_as_they_were() -> None:
    z, _ = deferred(8)
    mask, seen = torch.zeros(L, dtype=torch.bool), torch.tensor([[0], [1]] * 4)
    mask[3] = True
    masked, scattered = z.masked_fill(mask, 50.0), z.scatter(1, seen, 60.0)
    above = z.detach() > 1000 * mask
    mask.fill_(True)
    seen.fill_(9)
    assert masked.argmax(-1).tolist() == [3] * 8
    assert scattered.argmax(-1).tolist() == [0, 1] * 4
    assert above[:, 3].sum() == 0
    assert z._state.values is None


def test_large_arguments_make_the_values() -> None:
    z, _ = deferred(8)
    dense = torch.randn(8, L)
    assert (z.detach() + dense).shape == (8, L)
    assert z._state.values is not None


def test_a_fused_head_of_permuted_logits_is_updated() -> None:
    weights = []
    for compiled in (False, True):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model: Any = Net()
        kind = elmo.optim.SGD if compiled else torch.optim.SGD
        opt: Any = kind(model.parameters(), lr=0.5)
        options = {**OPTIONS, "deferred_logits": True}
        run = torch.compile(model, backend="elmo", options=options) if compiled else model
        for _ in range(2):
            x, y = torch.randn(2, T, 8), torch.randint(L, (2, T))
            z = run(x)
            F.cross_entropy(z.transpose(1, 2).clamp(-1, 1), y).backward()
            opt.step()
            opt.zero_grad()
        weights.append(model.head.weight.detach())
    assert elmo.last_report().matches[0].fused_update
    assert z._state.values is None  # type: ignore[attr-defined]
    torch.testing.assert_close(*weights)


KEPT: dict[str, Callable[[Tensor], Tensor]] = {
    "narrow": lambda z: z.narrow(0, 2, 3).argmax(-1),
    "select": lambda z: z.view(2, 4, L).select(1, 1).argmax(-1),
    "index_select": lambda z: z.index_select(0, torch.tensor([5, 1])).argmax(-1),
    "time_first": lambda z: z.view(2, 4, L).transpose(0, 1).argmax(-1),
    "clone": lambda z: z.clone().topk(2)[1],
}


@pytest.mark.parametrize("name", list(KEPT))
def test_rows_of_stale_logits_still_answer(name: str) -> None:
    z, model = deferred(8, head=True, deferred_logits=True)
    expected = KEPT[name](model(torch.zeros(8, 8)) * 0 + z.materialize())
    z, model = deferred(8, head=True, deferred_logits=True)
    torch.optim.SGD(model.parameters(), lr=0.5).step()  # no gradients: not stale
    F.cross_entropy(z, torch.arange(8)).backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    assert torch.equal(KEPT[name](z), expected)
    assert z._state.values is None


@pytest.mark.parametrize("other", [lambda z: z.exp(), lambda z: z > 0, lambda z: z.softmax(-1)])
def test_what_nothing_could_be_read_of_is_stale_at_once(other: Callable[[Tensor], Tensor]) -> None:
    z, model = deferred(8, head=True, deferred_logits=True)
    F.cross_entropy(z, torch.arange(8)).backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    with pytest.raises(elmo.StaleLogitsError):
        other(z)


@pytest.mark.parametrize("options", [{}, {"deferred_logits": True}], ids=["small", "large"])
@pytest.mark.parametrize("written", ["logits", "softmax", "view"])
def test_a_product_of_two_is_as_it_was(written: str, options: dict[str, Any]) -> None:
    found = []
    for take in (lambda z: z, lambda z: z.materialize()):
        z = take(deferred(8, **options)[0])
        with torch.no_grad():
            p = z.softmax(-1)
            product = p * z
            {"logits": z, "softmax": p, "view": z[1:]}[written].zero_()
            found += [product.sum(-1), product + 0, p.sum(-1), z.sum(-1)]
    assert_alike(found[:4], found[4:])


def test_a_product_with_a_gradient_is_made() -> None:
    grads = []
    for take in (lambda z: z, lambda z: z.materialize()):
        z, model = deferred(8, head=True)
        z = take(z)
        (z.softmax(-1) * z).sum().backward()
        grads.append(model.head.weight.grad)
    torch.testing.assert_close(*grads)


def test_values_used_again_and_again() -> None:
    """Each use is written out: beyond a limit the values are made instead."""
    z, _ = deferred(8)
    expected = z.materialize().double()
    with torch.no_grad():
        made = z.double() / 30
        for _ in range(9):
            made = made * made
        assert_alike(made.sum(-1), (expected / 30).pow(512).sum(-1))


@pytest.mark.parametrize(
    ("dtype", "lower"), [(torch.bfloat16, "inductor"), (torch.float16, "eager")], ids=str
)
def test_no_logit_is_larger_than_itself(dtype: torch.dtype, lower: str) -> None:
    """Programs compute in float32; what they return, and what is compared, is rounded."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    rows, outputs = 64, 20_000  # enough for code that is compiled
    model: Any = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, outputs))
    model.to(dtype)
    run = torch.compile(model, backend="elmo", options={"lower": lower})
    y = torch.randint(outputs, (rows, 1))
    with torch.no_grad():
        z = run(torch.randn(rows, 8, dtype=dtype))
        own, best = z.gather(1, y), z.amax(-1, keepdim=True)
        above, at_least, largest = (z > own).sum(-1), (z >= own).sum(-1), (z >= best).sum(-1)
        assert z._state.values is None
        values = torch.cat(
            [z.gather(1, torch.arange(n, n + 1).expand(rows, 1)) for n in range(3)], 1
        )
    assert (at_least > above).all()
    assert (largest >= 1).all()
    assert torch.equal((z[:, :3] > own).sum(-1), (values > own).sum(-1))


TRANSFORMED: dict[str, Callable[[Tensor], Tensor]] = {
    "vmap": lambda z: torch.vmap(lambda t: (z * t).logsumexp(-1))(torch.tensor([0.5, 2.0])),
    "vmap_compared": lambda z: torch.vmap(lambda t: (z > t).sum(-1))(torch.tensor([0.5, 2.0])),
    "jvp": lambda z: torch.func.jvp(
        lambda t: (z * t).logsumexp(-1), (torch.ones(()),), (torch.ones(()),)
    )[1],
    "grad": lambda z: torch.func.grad(lambda t: (t * (z > t)).sum())(torch.ones(())),
}


@pytest.mark.parametrize("name", list(TRANSFORMED))
def test_inside_torch_func(name: str) -> None:
    z, _ = deferred(8)
    expected = TRANSFORMED[name](deferred(8)[0].materialize().detach())
    assert_alike(TRANSFORMED[name](z.detach()), expected)


def test_values_that_are_there_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    z, _ = deferred(8)
    expected = z.materialize()
    monkeypatch.setattr(type(z._state.recipe()[0].origin), "program", None)  # type: ignore[attr-defined]
    assert_alike(z.logsumexp(-1), expected.logsumexp(-1))
    assert_alike(z.view(2, 4, L).norm(dim=-1), expected.view(2, 4, L).norm(dim=-1))
    assert torch.equal(z.exp().argmax(-1), expected.argmax(-1))
