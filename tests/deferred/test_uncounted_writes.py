"""Weights that change in ways torch's version does not count: through `.data`, by fused kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loop_net import OPTIONS, Net, batches, fresh

import elmo_compile as elmo


def averaged(weight: Any, other: torch.Tensor) -> None:
    weight.data.copy_(other)


def merged(weight: Any, other: torch.Tensor) -> None:
    weight.data += other - weight.data


def swapped(weight: Any, other: torch.Tensor) -> None:
    weight.data = other


@pytest.mark.parametrize(
    ("dtype", "write"),
    [
        (dtype, write)
        for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn)
        for write in (averaged, merged, swapped)
        if not (write is merged and dtype == torch.float8_e4m3fn)  # which torch does not add
    ],
)
@pytest.mark.parametrize("grad", [False, True])
def test_weights_written_through_data(write: Any, dtype: torch.dtype, grad: bool) -> None:
    """Averaged weights, and merged adapters, are put in place so: torch counts no version."""
    torch.manual_seed(0)
    model = fresh(Net())
    if dtype != torch.float32:
        elmo.convert_head(model, dtype=dtype)
    run: Any = torch.compile(model, backend="elmo", options=OPTIONS)
    x, y = batches(1)[0]
    other = (model.head.weight.detach().float() * 1.5).to(dtype)
    for read in (lambda z: z.sum(), lambda z: F.cross_entropy(z, y), lambda z: z.argmax(-1)):
        with torch.set_grad_enabled(grad):
            z, kept = run(x), model.head.weight.data.clone()
            write(model.head.weight, other)
            with pytest.raises(elmo.StaleLogitsError, match="so nothing was kept"):
                read(z)
            model.head.weight.data = kept
            z = run(x)
            torch.testing.assert_close(read(z).detach(), read(model(x)).detach(), rtol=2e-2, atol=0)


@pytest.mark.parametrize("size", [0, "1GiB"], ids=["the top is kept", "values are kept"])
@pytest.mark.parametrize("write", [averaged, merged, swapped])
def test_a_step_beside_logits_of_other_weights(write: Any, size: Any) -> None:
    """Nothing can be kept of them: no business of who steps."""
    torch.manual_seed(0)
    model = fresh(Net())
    run: Any = torch.compile(model, backend="elmo", options={**OPTIONS, "memory_budget": size or 1})
    opt = elmo.optim.SGD(model.parameters(), 0.1, update_at="step")
    x, y = batches(1)[0]
    with torch.no_grad():
        held = run(x)
    write(model.head.weight, model.head.weight.detach() * 1.5)
    F.cross_entropy(run(x), y).backward()
    opt.step()
    for read in (lambda z: z.sum(), lambda z: z.argmax(-1)):
        with pytest.raises(elmo.StaleLogitsError):
            read(held)


@pytest.mark.parametrize("write", [averaged, merged, swapped])
def test_an_unread_loss(write: Any) -> None:
    torch.manual_seed(0)
    model = fresh(Net())

    def loss(x: Any, y: Any) -> Any:
        t = elmo.multi_hot(y[:, None], model.head.out_features)
        return F.binary_cross_entropy_with_logits(model(x), t)

    run: Any = torch.compile(loss, backend="elmo", options=OPTIONS)
    opt = elmo.optim.SGD(model.parameters(), 0.1)
    x, y = batches(1)[0]
    unread = run(x, y)
    write(model.head.weight, model.head.weight.detach() * 1.5)
    with pytest.raises(elmo.StaleLogitsError, match=r"head\.weight.* has changed since"):
        unread.item()
    assert run(x, y).item() == pytest.approx(loss(x, y).item(), rel=1e-5)
    del opt


class WritesData(torch.optim.SGD):
    """As many optimizers of other libraries."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in (p for group in self.param_groups for p in group["params"]):
            p.data.add_(p.grad, alpha=-0.5)


UNCOUNTED = {
    "fused": lambda params: torch.optim.AdamW(params, lr=0.5, fused=True),
    "data": lambda params: WritesData(params, lr=0.5),
}


@pytest.mark.parametrize("name", list(UNCOUNTED))
def test_steps_that_count_no_version(name: str) -> None:
    torch.manual_seed(0)
    model = fresh(Net())
    opt = UNCOUNTED[name](model.parameters())
    run: Any = torch.compile(model, backend="elmo", options={**OPTIONS, "deferred_logits": True})
    x, y = batches(1)[0]
    z, before = run(x), model(x).argmax(-1)
    F.cross_entropy(z, y).backward()
    opt.step()
    assert torch.equal(z.argmax(-1), before)
    for read in (
        lambda: z.exp(),
        lambda: F.cross_entropy(z, y),
        lambda: z.detach().softmax(-1).sum(),
    ):
        with pytest.raises(elmo.StaleLogitsError):
            read()


def test_a_step_without_the_head_leaves_its_logits_readable() -> None:
    torch.manual_seed(0)
    model = fresh(Net())
    opt = torch.optim.AdamW(model.head.parameters(), lr=0.5, fused=True)
    run: Any = torch.compile(model, backend="elmo", options={**OPTIONS, "deferred_logits": True})
    x, _ = batches(1)[0]
    z = run(x)
    opt.step()
    torch.testing.assert_close(z + 0, model(x))
