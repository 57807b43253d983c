"""Whole training steps captured in a CUDA graph: its replays are the steps that would have come."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from steps import BF16, FP8, batch, net, on_device
from torch import Tensor, nn
from training import compiled

import elmo_compile as elmo
from elmo_compile.errors import FusedUpdateError, InputError

WARM, LAST = 2, 4
"""The first and the last batch of replays; those before are ordinary steps."""

Hyper = dict[str, Any]

CASES: dict[str, tuple[str, Any, Callable[..., Any], Hyper]] = {
    "sgd": ("bce", BF16, elmo.optim.SGD, {"lr": 0.1}),
    "momentum, decay": (
        "ce",
        FP8,
        elmo.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    ),
    "adamw": ("bce", FP8, elmo.optim.AdamW, {"lr": 1e-2}),
    "adamw, float32": ("ce", None, elmo.optim.AdamW, {"lr": 1e-2}),
    "adamw, kahan": ("bce", BF16, elmo.optim.AdamW, {"lr": 1e-3, "rounding": "kahan"}),
    "adamw, eco": ("bce, dense", BF16, elmo.optim.AdamW, {"lr": 1e-2, "eco": True}),
    "lion, some kahan": ("bce", FP8, elmo.optim.Lion, {"lr": 1e-3, "kahan_rows": 40}),
    "adagrad": ("ce", BF16, elmo.optim.Adagrad, {"lr": 0.1}),
    "adamw, 8 bits": ("bce", BF16, elmo.optim.AdamW, {"lr": 1e-2, "state_dtype": "8bit"}),
    "clipped at the step": (
        "bce",
        BF16,
        elmo.optim.AdamW,
        {"lr": 1e-2, "update_at": "step", "max_norm": 0.05, "nonfinite": "skip"},
    ),
    "not fused": ("bce", BF16, elmo.optim.AdamW, {"lr": 1e-2, "fused": False, "max_norm": 0.05}),
}


def model_of(kind: str, dtype: Any) -> nn.Module:
    """A Net on the device, its head stored in a narrow type if one is named."""
    model = net(kind)
    return (model if dtype is None else elmo.convert_head(model, dtype)).to("cuda")


@contextlib.contextmanager
def side_stream() -> Iterator[None]:
    """Where ordinary steps must run before a capture, as torch asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


class Run:
    """A model in training: `ordinary` steps, then `capture` and `replay`."""

    def __init__(self, case: str, options: Hyper, **hyper: Any) -> None:
        kind, dtype, optimizer, given = CASES[case]
        self.model = model_of(kind, dtype)
        self.step = compiled(self.model, options)
        self.opt = optimizer(self.model.parameters(), **{**given, **hyper})

    def ordinary(self, seed: int) -> float:
        loss = self.step(*on_device(seed))
        loss.backward()
        self.opt.step()
        self.opt.zero_grad()
        return loss.item()

    def warm(self) -> None:
        with side_stream():
            for seed in range(WARM):
                self.ordinary(seed)

    def capture(self) -> None:
        self.given = on_device(WARM)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = self.step(*self.given)
            self.loss.backward()
            self.opt.step()

    def replay(self, seed: int) -> float:
        for static, fresh in zip(self.given, batch(seed)):
            static.copy_(fresh)
        self.graph.replay()
        return self.loss.item()

    def bits(self) -> dict[str, Tensor]:
        """Weights and state."""
        found = {f"weight {i}": p.detach() for i, p in enumerate(self.model.parameters())}
        for i, held in enumerate(self.opt.state.values()):
            found |= {f"{name} {i}": t for name, t in held.items() if isinstance(t, Tensor)}
        return {name: t.cpu().clone().reshape(-1).view(torch.uint8) for name, t in found.items()}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(got[name], value), name


BY_OTHERS = ("sgd", "adamw")
"""Cases that the tests below replay too."""


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=pytest.mark.slow if c in BY_OTHERS else ()) for c in CASES],
)
def test_replays_are_the_steps_that_would_have_come(case, options):
    plain = Run(case, options)
    losses = [plain.ordinary(seed) for seed in range(LAST)]
    run = Run(case, options, capturable=True)
    run.warm()
    before = run.bits()
    run.capture()
    assert_same(run.bits(), before)  # a capture does nothing
    found = [run.replay(seed) for seed in range(WARM, LAST)]
    assert found == losses[WARM:]
    assert_same(run.bits(), plain.bits())
    assert elmo.is_fused(run.model.head.weight) == ("fused" not in CASES[case][3])
    assert run.opt.skipped_steps == 0


def test_a_schedule_moves_the_rate_of_replays(options):
    def scheduled(run: Run) -> Any:
        return torch.optim.lr_scheduler.ExponentialLR(run.opt, 0.5)

    plain, run = Run("adamw", options), Run("adamw", options, capturable=True)
    schedule = scheduled(plain)
    for seed in range(LAST):
        plain.ordinary(seed)
        schedule.step()
    schedule = scheduled(run)
    with side_stream():
        for seed in range(WARM):
            run.ordinary(seed)
            schedule.step()
    run.capture()
    for seed in range(WARM, LAST):
        run.replay(seed)
        schedule.step()
    assert float(run.opt.param_groups[0]["lr"]) == plain.opt.param_groups[0]["lr"]
    assert_same(run.bits(), plain.bits())


@pytest.mark.parametrize("case", ["sgd", "clipped at the step"])
def test_a_replay_with_invalid_input_changes_nothing(case, options):
    plain, run = Run(case, options), Run(case, options, capturable=True)
    for seed in range(LAST):
        plain.ordinary(seed)
    run.warm()
    run.capture()
    run.replay(WARM)
    before = run.bits()
    x, labels = batch(WARM + 1)
    run.given[0].copy_(x * float("inf"))
    run.given[1].copy_(labels)
    run.graph.replay()
    assert_same(run.bits(), before)
    assert run.opt.skipped_steps == 1
    for seed in range(WARM + 1, LAST):
        run.replay(seed)
    assert_same(run.bits(), plain.bits())
    assert run.opt.skipped_steps == 1


def test_ordinary_steps_go_on_after_replays(options):
    plain, run = Run("adamw", options), Run("adamw", options, capturable=True)
    for seed in range(LAST + 1):
        plain.ordinary(seed)
    run.warm()
    run.capture()
    for seed in range(WARM, LAST):
        run.replay(seed)
    run.opt.zero_grad()
    x, labels = on_device(0)
    run.step(x * float("inf"), labels).backward()
    with pytest.raises(InputError):
        run.opt.step()
    run.opt.zero_grad()
    run.ordinary(LAST)
    assert_same(run.bits(), plain.bits())


@pytest.mark.parametrize("capturable", [True, False])
def test_a_checkpoint_of_replays_continues(capturable, options):
    plain, run = Run("adamw", options), Run("adamw", options, capturable=True)
    for seed in range(LAST + 1):
        plain.ordinary(seed)
    run.warm()
    run.capture()
    for seed in range(WARM, LAST):
        run.replay(seed)
    saved, weights = run.opt.state_dict(), run.model.state_dict()
    steps = {int(held["step"]) for held in saved["state"].values()}
    again = Run("adamw", options, capturable=capturable)
    again.model.load_state_dict(weights)
    again.opt.load_state_dict(saved)
    run.replay(0)
    assert {int(held["step"]) for held in saved["state"].values()} == steps == {LAST}
    again.ordinary(LAST)
    assert_same(again.bits(), plain.bits())


def refused(match: str) -> Any:
    return pytest.raises(FusedUpdateError, match=match)


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
    with refused("Run an ordinary forward, backward and step"):
        run.capture()


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
    loss = step(*given)
    with refused("Leave it out of the capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        loss.backward()


def test_a_backward_captured_without_its_step_is_refused(options):
    run = Run("sgd", options, capturable=True)
    run.warm()
    given = on_device(WARM)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        run.step(*given).backward()
    with refused("Capture both in one graph"):
        run.opt.step()
