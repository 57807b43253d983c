"""The device's check of labels says what the host's says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import elmo_compile
from elmo_compile.errors import InputError
from elmo_compile.kernels.targets import check_targets
from elmo_compile.numerics.losses import BCE, CE, LossSpec
from elmo_compile.ops.call import labels_out_of_range

L = 50
CASES: list[tuple[str, list[Any], list[int] | None, bool]] = [
    ("classes", [0, 49, -100], None, False),
    ("classes", [0, 50, 1], None, True),
    ("classes", [0, -1, 1], None, True),
    ("padded", [[0, -1], [49, 3], [1, 1]], None, False),
    ("padded", [[0, -2], [49, 3], [1, 1]], None, True),
    ("padded", [[0, -1], [50, 3], [1, 1]], None, True),
    ("indices", [[0, 1], [49, 3], [1, 1]], None, False),
    ("indices", [[0, -1], [49, 3], [1, 1]], None, True),
    ("flat", [0, 49, 3], [0, 1, 3, 3], False),
    ("flat", [0, 49, -1], [0, 1, 3, 3], True),
    ("pairs", [0, -3, 2], [-50, 49, 0], False),
    ("pairs", [0, 3, 2], [0, 49, 0], True),
    ("pairs", [0, 1, 2], [0, -51, 0], True),
]


def _raises(spec: LossSpec, target: Tensor, aux: Tensor | None) -> bool:
    try:
        check_targets(spec, target, aux, 3, L)
    except InputError:
        return True
    return False


@pytest.mark.parametrize(("form", "target", "aux", "wrong"), CASES)
def test_agrees_with_the_hosts_check(
    form: Any, target: list[Any], aux: list[int] | None, wrong: bool
) -> None:
    spec = LossSpec(name=CE if form == "classes" else BCE, targets=form)
    target_t, aux_t = torch.tensor(target), None if aux is None else torch.tensor(aux)
    assert bool(labels_out_of_range(spec, target_t, aux_t, 3, L)) is wrong
    assert _raises(spec, target_t, aux_t) is wrong


ONE_HOT = {
    "soft targets": lambda z, y: F.cross_entropy(z, F.one_hot(y, L).float()),
    "smoothed": lambda z, y: F.cross_entropy(z, F.one_hot(y, L) * 0.9 + 0.1 / L),
    "squares": lambda z, y: F.mse_loss(z, F.one_hot(y, L).float()),
    "focal": lambda z, y: (
        F.one_hot(y, L) * (1 - z.softmax(-1)).square() * -z.log_softmax(-1)
    ).sum(),
    "several": lambda z, y: F.mse_loss(z, F.one_hot(y[:, None], L).sum(1).float()),
}


@pytest.mark.parametrize("loss", ONE_HOT.values(), ids=ONE_HOT)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("wrong", [-1, L])
def test_one_hot_takes_what_torch_takes(loss: Any, fused: bool, wrong: int) -> None:
    """The general mechanism compares numbers: one out of range would be a row of zeros."""
    torch.manual_seed(0)
    head = torch.nn.Linear(8, L)
    opt = (elmo_compile.optim if fused else torch.optim).SGD(head.parameters(), 0.5)
    torch._dynamo.reset()
    step = torch.compile(
        lambda x, y: loss(head(x), y),
        backend="elmo",
        options={"lower": "eager", "min_outputs": 32, "strict": True},
    )
    x, y = torch.randn(6, 8), torch.randint(0, L, (6,))
    step(x, y).backward()
    opt.step()
    opt.zero_grad()
    before = head.weight.clone()
    y[3] = wrong
    with pytest.raises(InputError, match=f"is {wrong}; accepted: 0 to {L - 1}"):
        step(x, y).backward()
    assert torch.equal(head.weight, before)
