"""`update_at="step"` makes its second pass with the bias that the forward had."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training import EAGER, LABELS, assert_same, batch, compiled, net

import elmo_compile as elmo

STEP = {"update_at": "step"}


class Corrected(nn.Module):
    """Sampled softmax: log-q of the batch is added to its logits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(5, LABELS, bias=False)

    def forward(self, inputs: Tensor, labels: Tensor, logq: Tensor) -> Tensor:
        return F.cross_entropy(self.head(inputs) + logq, labels)


def corrections(count: int) -> list[Tensor]:
    make = torch.Generator().manual_seed(3)
    return [2 * torch.randn(LABELS, generator=make) for _ in range(count)]


@pytest.mark.parametrize("max_norm", [None, 0.05])
def test_micro_batches_with_biases_of_their_own(max_norm: float | None) -> None:
    model = Corrected()
    twin = copy.deepcopy(model)
    step = compiled(model, EAGER)
    own = elmo.optim.SGD(model.parameters(), 0.5, accumulate="stash", max_norm=max_norm, **STEP)
    theirs = torch.optim.SGD(twin.parameters(), 0.5)
    first, second = corrections(2)
    for loss_of, opt in ((step, own), (twin, theirs)):
        for i, logq in enumerate((first, second, first)):
            loss_of(*batch(i), logq).backward()
        if opt is theirs and max_norm is not None:
            torch.nn.utils.clip_grad_norm_(twin.parameters(), max_norm)
        opt.step()
    assert own.fused_parameters()
    assert_same(model, twin)


def test_a_bias_buffer_may_be_refilled_before_the_step() -> None:
    model = Corrected()
    twin = copy.deepcopy(model)
    step = compiled(model, EAGER)
    own = elmo.optim.SGD(model.parameters(), 0.5, **STEP)
    theirs = torch.optim.SGD(twin.parameters(), 0.5)
    first, second = corrections(2)
    for loss_of, opt in ((step, own), (twin, theirs)):
        logq = first.clone()
        loss_of(*batch(0), logq).backward()
        logq.copy_(second)
        opt.step()
    assert_same(model, twin)


@pytest.mark.parametrize("kind", ["ce", "bce"])
def test_another_optimizer_may_step_the_bias_first(kind: str) -> None:
    model = net(kind)
    twin = copy.deepcopy(model)
    step = compiled(model, EAGER)

    def optimizers(of: Any, rule: Any, **how: Any) -> list[torch.optim.Optimizer]:
        rest = [of.head.weight, *of.encoder.parameters()]
        return [torch.optim.SGD([of.head.bias], 20.0), rule(rest, 0.5, **how)]

    for loss_of, opts in (
        (step, optimizers(model, elmo.optim.SGD, **STEP)),
        (twin, optimizers(twin, torch.optim.SGD)),
    ):
        for i in range(2):
            loss_of(*batch(i)).backward()
            for opt in opts:
                opt.step()
                opt.zero_grad()
    assert_same(model, twin)
