"""DistributedDataParallel with `update_at="step"`: two processes train as one does."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from training import batch, net

import elmo_compile as elmo
from elmo_compile.errors import ElmoError, OptionError

sys.path.insert(0, str(Path(__file__).parent))

from processes import run
from ranks import MICRO, OVERFLOWS, ROWS, STEPS, Apart

SCRIPT = Path(__file__).with_name("ranks.py")


@pytest.mark.parametrize("how", ["refused", "biased"])
def test_what_would_let_processes_differ_is_refused(how: str, tmp_path: Path) -> None:
    """An ordinary gradient of an ignored head, which nobody reduces; unlike biases."""
    run(tmp_path, 2, "ce", "float32", "outside", how, script=SCRIPT)


@pytest.mark.parametrize("cases", ["dense+unlike", "unused+scaled+refused+join", "summed"])
def test_processes_that_do_not_do_the_same(cases: str, tmp_path: Path) -> None:
    """What each is about is said in uneven_ranks.py."""
    run(tmp_path, 2, cases, script=SCRIPT.with_name("uneven_ranks.py"))


def test_sharded_parameters(tmp_path: Path) -> None:
    """DTensors, as FSDP2 has them: sharded_ranks.py."""
    run(tmp_path, 2, script=SCRIPT.with_name("sharded_ranks.py"))


def trained(folder: Path, world: int, *case: str) -> list[dict[str, torch.Tensor]]:
    """The weights of every process after a run."""
    run(folder, world, *case, script=SCRIPT)
    return [torch.load(folder / f"weights{rank}.pt") for rank in range(world)]


def eager(kind: str) -> dict[str, torch.Tensor]:
    """The same training in one process, nothing fused."""
    model = net(kind, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), 0.5, momentum=0.9)
    for step in range(STEPS):
        optimizer.zero_grad()
        for micro in range(MICRO):
            (model(*batch(10 * step + micro, ROWS)) / MICRO).backward()
        clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    return copy.deepcopy(model.state_dict())


@pytest.mark.parametrize(
    ("world", "kind", "dtype", "wrap", "how"),
    [
        (1, "ce", "float32", "inside", "loss"),
        (2, "ce", "float32", "outside", "loss"),
        (2, "bce", "float32", "inside", "loss"),
        (2, "bce", "bfloat16", "outside", "loss"),
        (2, "ce", "float32", "inside", "logits"),
        (2, "bce", "float32", "outside", "logits"),
        (2, "ce", "float32", "outside", "bare"),
    ],
)
def test_two_processes_train_as_one(
    world: int, kind: str, dtype: str, wrap: str, how: str, tmp_path: Path
) -> None:
    weights = trained(tmp_path, world, kind, dtype, wrap, how)
    for other in weights[1:]:
        for name, value in other.items():
            assert torch.equal(value, weights[0][name]), name
    want = eager(kind)
    close = {"rtol": 1e-5, "atol": 2e-6} if dtype == "float32" else {"rtol": 2e-2, "atol": 4e-3}
    for name, value in weights[0].items():
        torch.testing.assert_close(value.float(), want[name], **close)


def test_all_processes_skip_a_step_in_which_one_overflows(tmp_path: Path) -> None:
    """With GradScaler, where the head's own loss overflows and the rest has finite gradients."""
    first, second = trained(tmp_path, 2, "ce", "float32", "outside", "scaled")
    model = net("ce", seed=0, bias=False)
    model.__class__ = Apart
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for step in range(STEPS):
        optimizer.zero_grad()
        torch.stack(model(*batch(10 * step, ROWS))).sum().backward()
        if step != OVERFLOWS:
            optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=1e-5, atol=2e-6)


def test_heads_to_ignore_are_named_as_ddp_names_them() -> None:
    model = net()
    assert elmo.distributed.ignore_heads(model) is model
    names = ["head.weight", "_orig_mod.head.weight"]
    assert model._ddp_params_and_buffers_to_ignore == names
    elmo.distributed.ignore_heads(model, names=["encoder"])
    names += ["encoder.weight", "_orig_mod.encoder.weight"]
    assert model._ddp_params_and_buffers_to_ignore == names


def test_what_cannot_be_ignored() -> None:
    with pytest.raises(OptionError, match=r"ignore_heads: no nn.Linear is called 'top'"):
        elmo.distributed.ignore_heads(net(), names=["top"])
    with pytest.raises(ElmoError, match=r"ignore_heads: the model has no nn\.Linear"):
        elmo.distributed.ignore_heads(nn.Embedding(3, 4))
