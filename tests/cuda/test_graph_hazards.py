"""What a captured step must not do, is refused, or leaves behind."""

from __future__ import annotations

import gc
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import LAST, WARM, Run, assert_same, refused, side_stream
from steps import batch, net, on_device
from torch import nn
from training import compiled

import elmo_compile as elmo
from elmo_compile.errors import StaleLogitsError

SLOW = pytest.mark.slow


@pytest.mark.parametrize("fused", [True, False])
def test_what_is_not_capturable_is_refused(fused, options):
    run = Run("sgd", options, fused=fused)
    run.warm()
    before = run.bits()
    with refused("capturable=True"):
        run.capture()
    run.opt.zero_grad()
    assert_same(run.bits(), before)


def test_a_capture_needs_ordinary_steps_before(options):
    run = Run("sgd", options, capturable=True, fused=False)
    run.step(*on_device(0)).backward()  # compiled, but nothing was updated yet
    run.opt.zero_grad()
    with refused("before any ordinary step"):
        run.capture()


@pytest.mark.parametrize("options", ["eager"], indirect=True)  # Inductor would load kernels there
def test_a_parameter_without_state_is_refused(options):
    run = Run("adamw", options, capturable=True, fused=False)
    bias = run.model.encoder.bias.requires_grad_(False)
    run.warm()
    bias.requires_grad_()
    with refused("Run an ordinary forward, backward and step"):
        run.capture()


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=SLOW)])
def test_a_head_beside_parameters_of_another_device(where, options):
    """Ordinary steps of a capturable optimizer may have some."""

    def run(**hyper: Any) -> nn.Module:
        model = net("bce").to(where)
        other = nn.Parameter(torch.ones(4, device="cuda" if where == "cpu" else "cpu"))
        step = compiled(model, options)
        opt = elmo.optim.SGD([*model.parameters(), other], 0.5, update_at="step", **hyper)
        for seed in range(2):
            (other * other).sum().backward()
            step(*(t.to(where) for t in batch(seed))).backward()
            opt.step()
            opt.zero_grad()
        assert not torch.equal(other.cpu(), torch.ones(4))
        return model

    for a, b in zip(run(capturable=True).parameters(), run().parameters()):
        assert torch.equal(a, b)


def test_a_rate_that_is_a_number_is_refused(options):
    run = Run("sgd", options, capturable=True)
    run.warm()
    run.opt.param_groups[0]["lr"] = 0.05
    with refused(r"lr=0\.05 is no tensor"):
        run.capture()


def test_a_loss_without_kernels_is_refused(options):
    model = net("focal").to("cuda")
    step = compiled(model, options)
    opt = elmo.optim.SGD(model.parameters(), 0.1, capturable=True)
    given = on_device(0)
    with side_stream():
        step(*given).backward()
        opt.step()
        opt.zero_grad()
    with refused("Leave it out of the capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        step(*given).backward()


def test_a_backward_captured_without_its_step_is_refused(options):
    run = Run("sgd", options, capturable=True)
    run.warm()
    given = on_device(WARM)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        run.step(*given).backward()
    with refused("Capture both in one graph"):
        run.opt.step()


def owner_of(run: Run) -> Any:
    (owner,) = [o for o in run.opt._owners if o.in_use]
    return owner


def test_nothing_of_a_step_outlives_it_in_autograd(options):
    """A gradient accumulator of another stream would make the captured backward wait for that."""
    run = Run("adamw", options, capturable=True)
    loss = run.step(*on_device(0))
    node = owner_of(run).accumulate_node
    node.metadata["of"] = "the first step"
    loss.backward()
    run.opt.step()
    run.opt.zero_grad()
    del loss, node
    gc.collect()
    run.step(*on_device(1))
    assert "of" not in owner_of(run).accumulate_node.metadata


@pytest.mark.parametrize(
    "case", ["clipped at the step", *(pytest.param(c, marks=SLOW) for c in ("sgd", "adagrad"))]
)
def test_no_kernel_is_compiled_in_a_capture(case, options):
    host_cuda = sys.modules.get("host_cuda")
    if host_cuda is None:
        pytest.skip("counts launches of the pretended device")
    run = Run(case, options, capturable=True)
    with host_cuda.kernels_launched() as before:
        run.warm()
    with host_cuda.kernels_launched() as captured:
        run.capture()
    assert captured
    assert captured <= before


def test_a_rate_set_as_a_number_reaches_replays_at_the_next_ordinary_step(options):
    run = Run("sgd", options, capturable=True)
    run.warm()
    run.capture()
    run.replay(WARM)
    (group,) = run.opt.param_groups
    tensor = group["lr"]
    group["lr"] = 0.0
    run.replay(WARM + 1)  # reads the former rate, not memory of something else
    assert float(tensor) == 0.1
    run.opt.zero_grad()
    run.ordinary(WARM + 2)
    assert group["lr"] is tensor
    before = run.bits()
    run.replay(WARM + 3)
    for name, value in run.bits().items():
        assert name.startswith("step") or torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    "hyper",
    [{}, pytest.param({"update_at": "step"}, marks=SLOW)],
    ids=["backward", "step"],
)
def test_a_capture_that_failed_leaves_training_as_it_was(hyper, options):
    plain = Run("adamw", options, **hyper)
    run = Run("adamw", options, capturable=True, **hyper)
    for seed in range(LAST):
        plain.ordinary(seed)
    run.warm()
    given = on_device(WARM)

    def fails() -> None:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            run.step(*given).backward()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    run.opt.zero_grad()
    run.ordinary(WARM)
    with pytest.raises(ZeroDivisionError):
        fails()
    run.opt.zero_grad()
    run.capture()
    run.replay(WARM + 1)
    assert_same(run.bits(), plain.bits())


@SLOW
def test_a_program_at_the_step_is_refused_and_nothing_is_marked(options):
    model = net("focal").to("cuda")
    step = compiled(model, options)
    opt = elmo.optim.SGD(model.parameters(), 0.1, capturable=True, update_at="step")
    given = on_device(0)

    def ordinary() -> None:
        step(*given).backward()
        opt.step()
        opt.zero_grad()

    ordinary()

    def captured() -> None:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            step(*given).backward()
            opt.step()

    with refused("Leave it out of the capture"):
        captured()
    opt.zero_grad()
    before = model.head.weight.detach().clone()
    ordinary()
    assert not torch.equal(model.head.weight, before)


def test_a_parameter_elsewhere_is_refused(options):
    run = Run("sgd", options, capturable=True)
    elsewhere = nn.Parameter(torch.ones(3, device="cpu"))
    run.opt.add_param_group({"params": [elsewhere]})
    run.warm()
    elsewhere.grad = torch.ones_like(elsewhere)
    with refused("replays would not update it"):
        run.capture()


def test_deferred_logits_are_not_those_of_other_weights(options):
    """A replay moves no version counter of torch."""
    model = nn.Sequential(nn.Linear(24, 32), nn.Linear(32, 520)).to("cuda")
    step = compiled(model, options, deferred_logits=True)
    opt = elmo.optim.SGD(model.parameters(), 0.5, capturable=True)
    x, labels = on_device(0)

    def forward_backward() -> None:
        F.cross_entropy(step(x).float(), labels[:, 0]).backward()
        opt.step()

    with side_stream():
        for _ in range(2):
            forward_backward()
            opt.zero_grad()
    with torch.no_grad():  # a graph of this stream would make the captured backward wait for it
        held = step(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward_backward()
    with pytest.raises(StaleLogitsError):
        held.sum().item()
    held, again = step(x), step(x)
    want = model(x).detach()
    assert torch.allclose(again, want, atol=1e-5)
    loss = F.cross_entropy(step(x).float(), labels[:, 0])
    graph.replay()
    with pytest.raises(StaleLogitsError):
        held.sum().item()
    with refused("was already updated since this forward"):
        loss.backward()
    opt.zero_grad()
    assert not torch.allclose(step(x), want, atol=1e-5)


def test_a_state_dict_holds_the_rate_as_it_was(options):
    run = Run("sgd", options, capturable=True)
    run.warm()
    saved = run.opt.state_dict()
    run.opt.param_groups[0]["lr"].fill_(0.5)
    assert saved["param_groups"][0]["lr"] == 0.1
    plain = Run("sgd", options)
    plain.opt.load_state_dict(saved)
    assert plain.opt.param_groups[0]["lr"] == 0.1
