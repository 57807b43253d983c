"""Whole training steps captured in a CUDA graph: its replays are the steps that would have come."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graphs import CASES, LAST, WARM, Run, assert_same, side_stream
from steps import batch, on_device

import elmo_compile as elmo
from elmo_compile.errors import InputError

BY_OTHERS = ("sgd", "adamw", "adamw, float32", "adamw, eco", "adamw, 8 bits")
BY_OTHERS += ("lion, some kahan", "not fused")
"""Cases that other tests replay, or cases of the same kernels."""


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=pytest.mark.slow if c in BY_OTHERS else ()) for c in CASES],
)
def test_replays_are_the_steps_that_would_have_come(case, options):
    # Norms of rows are summed otherwise where a graph may hold them.
    plain = Run(case, options, capturable=case in ("adagrad", "clipped at the step"))
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


@pytest.mark.parametrize("capturable", [pytest.param(True, marks=pytest.mark.slow), False])
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
