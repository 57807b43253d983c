"""Whole training steps on a CUDA device (backend, ops, kernels, optimizer) are those of a CPU."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from steps import BF16, CHUNK, FP8, KINDS, WITH_KERNELS, D, L, N, Net, batch, net, on_device
from torch import Tensor, nn
from training import Saturated, compiled, integers

import elmo_compile as elmo

Step = Callable[..., Any]


def eager_run(kind: str, optimizer: Step, steps: int = 2) -> tuple[Net, list[float]]:
    """A model after some steps of torch alone, on the CPU, and its losses."""
    model, losses = net(kind), []
    opt = optimizer(model.parameters())
    for seed in range(steps):
        loss = model(*batch(seed))
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    return model, losses


def assert_same(got: nn.Module, want: nn.Module, tolerance: float) -> None:
    """Parameters agree up to a share of the largest."""
    for (name, a), b in zip(got.named_parameters(), want.parameters()):
        error = (a.detach().cpu().float() - b.detach().float()).abs().max()
        assert error <= tolerance * b.detach().float().abs().max(), name


RULES = {
    "sgd": (lambda p: elmo.optim.SGD(p, 0.5), lambda p: torch.optim.SGD(p, 0.5)),
    "momentum": (
        lambda p: elmo.optim.SGD(p, 0.2, momentum=0.9, nesterov=True, weight_decay=0.01),
        lambda p: torch.optim.SGD(p, 0.2, momentum=0.9, nesterov=True, weight_decay=0.01),
    ),
    "adamw": (lambda p: elmo.optim.AdamW(p, 1e-2), lambda p: torch.optim.AdamW(p, 1e-2)),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", KINDS)
def test_fused_training_is_torch_s(kind, rule, options, no_host_reads):
    ours, theirs = RULES[rule]
    want, losses = eager_run(kind, theirs)
    model = net(kind).to("cuda")
    step, opt = compiled(model, options), ours(model.parameters())
    found = []
    for seed in range(2):
        given = on_device(seed)
        if seed and kind in WITH_KERNELS:
            with no_host_reads():
                loss = step(*given)
                loss.backward()
                opt.step()
                opt.zero_grad()
        else:
            loss = step(*given)
            loss.backward()
            opt.step()
            opt.zero_grad()
        assert model.head.weight.grad is None
        found.append(loss.item())
    assert elmo.is_fused(model.head.weight)
    assert found == pytest.approx(losses, rel=1e-5)
    assert_same(model, want, 2e-5 if rule != "adamw" else 1e-3)


@pytest.mark.parametrize("kind", ["bce", "ce"])
def test_a_step_whose_graph_inductor_compiled(kind):
    want, _ = eager_run(kind, RULES["sgd"][1])
    model = net(kind).to("cuda")
    step = compiled(model, {"min_outputs": CHUNK, "chunk_size": CHUNK})
    opt = elmo.optim.SGD(model.parameters(), 0.5)
    for seed in range(2):
        step(*on_device(seed)).backward()
        opt.step()
        opt.zero_grad()
    assert elmo.is_fused(model.head.weight)
    assert_same(model, want, 2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_backend_alone_gives_torch_s_gradients(kind, options, no_host_reads):
    want, model = net(kind), net(kind).to("cuda")
    step = compiled(model, options)
    for seed in range(2):
        want.zero_grad()
        model.zero_grad()
        expected = want(*batch(seed))
        expected.backward()
        given = on_device(seed)
        if seed and kind in WITH_KERNELS:
            with no_host_reads():
                loss = step(*given)
                loss.backward()
        else:
            loss = step(*given)
            loss.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        for a, b in zip(model.parameters(), want.parameters()):
            assert (a.grad.cpu() - b.grad).abs().max() <= 2e-5 * b.grad.abs().max()
    assert len(elmo.last_report().matches) == 1


@pytest.mark.parametrize(
    "dtype",
    [pytest.param(torch.float32, marks=pytest.mark.slow), BF16],
    ids=["float32", "bf16"],
)
def test_softmax_of_row_blocks(dtype, no_host_reads):
    """The logits of a block of rows are held, and no product is made twice."""
    rows, outputs = 512, 300
    make = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, D, generator=make).to(dtype) for n in (rows, outputs))
    y = torch.randint(0, outputs, (rows,), generator=make)

    def loss(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, w), y)

    want = [t.double().requires_grad_() for t in (x, w)]
    loss(*want, y).backward()
    got = [t.to("cuda").requires_grad_() for t in (x, w)]
    step = compiled(loss, {"min_outputs": 256, "lower": "eager"})
    for again in (False, True):
        for t in got:
            t.grad = None
        with no_host_reads() if again else contextlib.nullcontext():
            step(*got, y.to("cuda")).backward()
    (match,) = elmo.last_report().matches
    assert match.products == 3
    assert "head_loss_at_once" in elmo.last_report().graph_after.code
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for a, b in zip(got, want):
        assert (a.grad.cpu().double() - b.grad).norm() <= tolerance * b.grad.norm()


@pytest.mark.parametrize("rounding", ["stochastic", "nearest", "kahan"])
@pytest.mark.parametrize("dtype", [BF16, FP8], ids=["bf16", "fp8"])
@pytest.mark.parametrize("kind", ["bce", "ce", "focal"])
def test_low_precision_heads_train_as_on_a_cpu(kind, dtype, rounding, options):
    def run(device: str) -> Net:
        model = elmo.convert_head(net(kind), dtype).to(device)
        assert model.head.weight.dtype == dtype
        step = compiled(model, options)
        opt = elmo.optim.SGD(model.parameters(), 0.1, rounding=rounding)
        for seed in range(3):
            step(*(t.to(device) for t in batch(seed))).backward()
            opt.step()
            opt.zero_grad()
        assert elmo.is_fused(model.head.weight)
        return model

    got, want = run("cuda").head.weight.float().cpu(), run("cpu").head.weight.float()
    start = elmo.convert_head(net(kind), dtype).head.weight.float()
    assert (want != start).float().mean() > 0.001
    # The same random bits: what differs is where gradients differ in their last places.
    assert (got - want).norm() <= 0.2 * (want - start).norm()


@pytest.mark.parametrize("dtype", [BF16, FP8], ids=["bf16", "fp8"])
def test_stored_bits_do_not_depend_on_the_device(dtype, options):
    def run(device: str, chunk: int) -> Tensor:
        model = Saturated(dtype).to(device)
        step = compiled(model, options, chunk_size=chunk)
        opt = elmo.optim.SGD(model.parameters(), 2.0**-13)
        for seed in range(3):
            step(*(t.to(device) for t in integers(seed))).backward()
            opt.step()
            opt.zero_grad()
        assert elmo.is_fused(model.head.weight)
        return model.head.weight.detach().cpu().view(torch.uint8)

    want = run("cpu", 256)
    assert not torch.equal(want, Saturated(dtype).head.weight.detach().view(torch.uint8))
    for chunk in (256, 100):
        assert torch.equal(run("cuda", chunk), want)


def test_updates_at_the_step_see_the_whole_gradient(options):
    hyper: dict[str, Any] = {"update_at": "step", "accumulate": "stash", "max_norm": 0.3}

    def run(device: str) -> tuple[Net, list[float]]:
        model, losses = net("ce").to(device), []
        step, opt = compiled(model, options), elmo.optim.SGD(model.parameters(), 0.5, **hyper)
        for seed in range(2):
            for part in range(2):
                loss = step(*(t.to(device) for t in batch(2 * seed + part)))
                loss.backward()
                losses.append(loss.item())
            opt.step()
            opt.zero_grad()
        return model, losses

    (got, losses), (want, expected) = run("cuda"), run("cpu")
    assert losses == pytest.approx(expected, rel=1e-5)
    assert_same(got, want, 2e-5)


def test_logits_outside_the_graph_are_deferred(options):
    model = nn.Sequential(nn.Linear(24, D), nn.Linear(D, L))
    twin = copy.deepcopy(model)
    model.to("cuda")
    step = compiled(model, options, deferred_logits=True)
    opt = elmo.optim.SGD(model.parameters(), 0.5)
    (x, labels), (x_gpu, labels_gpu) = batch(0), on_device(0)
    logits, want = step(x_gpu), twin(x)
    loss = F.cross_entropy(logits.float(), labels_gpu[:, 0])
    assert torch.equal(logits.argmax(-1).cpu(), want.argmax(-1))
    assert torch.equal(logits.topk(3).indices.cpu(), want.topk(3).indices)
    loss.backward()
    assert elmo.is_fused(model[1].weight)
    assert torch.equal(logits.argmax(-1).cpu(), want.argmax(-1))
    opt.step()
    assert loss.item() == pytest.approx(F.cross_entropy(want, labels[:, 0]).item(), rel=1e-5)
    assert torch.allclose(step(x_gpu).cpu(), model.cpu()(x), atol=1e-5)


@pytest.mark.parametrize("value", ["exact", "deferred", "auto"])
def test_the_loss_value(value, options):
    model = net("bce").to("cuda")
    want = net("bce")(*batch(0)).item()
    step = compiled(model, options, loss_value=value)
    opt = elmo.optim.SGD(model.parameters(), 0.5)
    loss = step(*on_device(0))
    if value == "auto":
        assert loss.item() == pytest.approx(want, rel=1e-5)
    loss.backward()
    opt.step()
    assert loss.item() == pytest.approx(want, rel=1e-5)


def test_two_kinds_of_gradient_of_one_weight(options):
    """A fused loss and a penalty of the same weight: added chunk by chunk, at the step."""

    def run(device: str) -> Net:
        model = net("bce").to(device)
        step = compiled(model, options)
        opt = elmo.optim.SGD(model.parameters(), 0.5, update_at="step", max_norm=1.0)
        for seed in range(2):
            step(*(t.to(device) for t in batch(seed))).backward()
            (0.1 * model.head.weight.square().sum()).backward()
            opt.step()
            opt.zero_grad()
        return model

    assert_same(run("cuda"), run("cpu"), 2e-5)


def test_a_checkpoint_continues_bit_for_bit(options, tmp_path):
    def start() -> tuple[Net, Any, Any]:
        model = elmo.convert_head(net("bce"), FP8).to("cuda")
        step = compiled(model, options)
        return model, step, elmo.optim.SGD(model.parameters(), 0.5, momentum=0.9)

    def train(step: Any, opt: Any, seeds: range) -> None:
        for seed in seeds:
            step(*on_device(seed)).backward()
            opt.step()
            opt.zero_grad()

    model, step, opt = start()
    train(step, opt, range(2))
    torch.save((model.state_dict(), opt.state_dict()), tmp_path / "saved.pt")
    train(step, opt, range(2, 4))
    other, again, opt2 = start()
    weights, state = torch.load(tmp_path / "saved.pt")
    other.load_state_dict(weights)
    opt2.load_state_dict(state)
    assert all(held["step"].device.type == "cpu" for held in opt2.state.values())
    train(again, opt2, range(2, 4))
    for a, b in zip(model.parameters(), other.parameters()):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_clipping_over_parameters_of_two_devices(options):
    def run(device: str) -> list[Tensor]:
        first, model = nn.Parameter(torch.ones(6)), net("ce").to(device)
        step = compiled(model, options)
        opt = elmo.optim.SGD([first, *model.parameters()], 0.5, update_at="step", max_norm=0.2)
        for seed in range(2):
            (first * torch.arange(6)).sum().backward()
            step(*(t.to(device) for t in batch(seed))).backward()
            opt.step()
            opt.zero_grad()
        return [p.detach().cpu() for p in (first, *model.parameters())]

    for got, want in zip(run("cuda"), run("cpu")):
        assert torch.allclose(got, want, atol=1e-6)


def test_a_number_written_into_logits(options):
    def loss(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = F.linear(x, w)
        z[:, 0] = -5.0
        return F.cross_entropy(z, y)

    make = torch.Generator().manual_seed(0)
    given = [torch.randn(n, D, generator=make) for n in (N, L)]
    y = torch.randint(0, L, (N,), generator=make)
    want = [t.clone().requires_grad_() for t in given]
    loss(*want, y).backward()
    got = [t.to("cuda").requires_grad_() for t in given]
    compiled(loss, options)(*got, y.to("cuda")).backward()
    assert len(elmo.last_report().matches) == 1
    for a, b in zip(got, want):
        assert (a.grad.cpu() - b.grad).abs().max() <= 2e-5 * b.grad.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_makes_no_logits(kind):
    model = net(kind).to("cuda").eval()
    want = net(kind).eval()(*batch(0)).item()
    step = compiled(model, {"min_outputs": 256, "lower": "eager"})  # the planner's chunk
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context():
            assert step(*on_device(0)).item() == pytest.approx(want, rel=1e-5)
        assert len(elmo.last_report().matches) == 1, elmo.last_report()


@pytest.mark.parametrize("kind", ["bce", "ce"])
@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_a_gradient_made_in_the_forward_is_scaled_in_place(kind, factor, monkeypatch):
    """By a kernel that leaves it alone where the upstream gradient is 1."""
    from elmo_compile import lowering
    from elmo_compile.kernels import triton as family

    calls: list[tuple[int, bool]] = []
    scale_ = family.scale_

    def watched(made: Tensor, by: Tensor) -> None:
        before = made.clone()
        scale_(made, by)
        calls.append((made.data_ptr(), torch.equal(before, made)))

    monkeypatch.setattr(lowering, "LARGE", D * L)
    monkeypatch.setattr(family, "scale_", watched)
    reference = net(kind)
    (factor * reference(*batch(0))).backward()
    model = net(kind).to("cuda")
    options = {"min_outputs": 256, "memory_budget": "1GiB", "strict": True}
    step = compiled(model, options)
    (factor * step(*on_device(0))).backward()
    assert calls == [(model.head.weight.grad.data_ptr(), factor == 1.0)]
    for mine, theirs in zip(model.parameters(), reference.parameters()):
        torch.testing.assert_close(mine.grad.cpu(), theirs.grad, rtol=1e-4, atol=1e-6)
