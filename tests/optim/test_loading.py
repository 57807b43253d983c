"""Saved optimizer states that do not fit are refused before anything is taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import elmo_compile as elmo
from elmo_compile.errors import OptionError

RULES: dict[str, Callable[..., Any]] = {
    "SGD": lambda p: elmo.optim.SGD(p, 0.1, momentum=0.9, fused=False),
    "AdamW": lambda p: elmo.optim.AdamW(p, 0.1, fused=False),
    "Lion": lambda p: elmo.optim.Lion(p, 0.1, fused=False),
    "Adagrad": lambda p: elmo.optim.Adagrad(p, 0.1, fused=False),
    "Kahan": lambda p: elmo.optim.SGD(p, 0.1, rounding="kahan", fused=False),
    "Kahan rows": lambda p: elmo.optim.Lion(p, 0.1, kahan_rows=80, fused=False),
    "8 bits": lambda p: elmo.optim.AdamW(p, 0.1, state_dtype="8bit", fused=False),
}


def stepped(make: Callable[..., Any], labels: int = 96) -> Any:
    """An optimizer with state."""
    head = nn.Linear(64, labels, dtype=torch.bfloat16)
    opt = make(head.parameters())
    for param in head.parameters():
        param.grad = torch.ones_like(param)
    opt.step()
    return opt


def state_of(opt: Any) -> list[Any]:
    return [dict(opt.state[p]) for group in opt.param_groups for p in group["params"]]


@pytest.mark.parametrize("labels", [64, 128])
@pytest.mark.parametrize("rule", RULES)
def test_a_state_for_other_labels_is_refused(rule: str, labels: int) -> None:
    saved, opt = stepped(RULES[rule], labels).state_dict(), stepped(RULES[rule])
    before = state_of(opt)
    with pytest.raises(OptionError, match="other labels"):
        opt.load_state_dict(saved)
    for was, now in zip(before, state_of(opt)):
        assert all(now[name] is value for name, value in was.items())


@pytest.mark.parametrize("rule", RULES)
def test_its_own_state_is_taken(rule: str) -> None:
    saved, opt = stepped(RULES[rule]).state_dict(), stepped(RULES[rule])
    opt.load_state_dict(saved)
    for held, number in zip(state_of(opt), range(2)):
        for name, value in saved["state"][number].items():
            assert torch.equal(torch.as_tensor(held[name]), torch.as_tensor(value)), name


@pytest.mark.parametrize("to", ["SGD", "AdamW", "Lion", "Adagrad"])
@pytest.mark.parametrize("of", ["SGD", "AdamW", "Lion", "Adagrad"])
def test_a_state_of_another_rule_is_refused(of: str, to: str) -> None:
    saved, opt = stepped(RULES[of]).state_dict(), stepped(RULES[to])
    if of == to:
        opt.load_state_dict(saved)
        return
    with pytest.raises(OptionError, match="another rule's"):
        opt.load_state_dict(saved)
