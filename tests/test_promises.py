"""Promise 6 end to end: what a low-precision head stores does not depend on how it was computed."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training import (
    EAGER,
    EXACT_LABELS,
    INDUCTOR,
    Saturated,
    batch,
    compiled,
    integers,
    net,
    owned,
    train,
)

import elmo_compile as elmo
from elmo_compile.errors import OptionError
from elmo_compile.numerics.rounding import stochastic_round

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
DTYPES = pytest.mark.parametrize("dtype", [BF16, FP8], ids=["bf16", "fp8"])


def stored(
    dtype: torch.dtype, chunk: int, *, fused: bool = True, steps: int = 3, **hyper: Any
) -> Tensor:
    """The head's weight after some steps."""
    model = Saturated(dtype)
    lower = hyper.pop("lower", "eager")
    options = {"min_outputs": 32, "lower": lower, "chunk_size": chunk}
    step, opt = owned(model, options, fused=fused, **{"lr": 2.0**-13 * 1.3, **hyper})
    for i in range(steps):
        step(*integers(i)).backward()
        opt.step()
        opt.zero_grad()
    assert elmo.is_fused(model.head.weight) == fused
    return model.head.weight.detach().float()


@DTYPES
def test_stored_weights_are_the_same_for_every_chunk_and_fused_or_not(dtype: torch.dtype) -> None:
    want = stored(dtype, EXACT_LABELS)
    assert not torch.equal(want, Saturated(dtype).head.weight.float())
    for chunk in (1, 7, 64, 1000):
        assert torch.equal(stored(dtype, chunk), want)
    for chunk in (64, 1000):
        assert torch.equal(stored(dtype, chunk, fused=False), want)
    assert torch.equal(stored(dtype, 50, lower="inductor"), want)
    threads = torch.get_num_threads()
    torch.set_num_threads(2 if threads == 1 else 1)
    assert torch.equal(stored(dtype, 64), want)
    torch.set_num_threads(threads)


@DTYPES
def test_momentum_and_decay_round_the_same_fused_or_not(dtype: torch.dtype) -> None:
    hyper = {"momentum": 0.5, "weight_decay": 0.25, "nesterov": True}
    want = stored(dtype, EXACT_LABELS, **hyper)
    assert torch.equal(stored(dtype, 33, **hyper), want)
    assert torch.equal(stored(dtype, 64, fused=False, **hyper), want)


@DTYPES
def test_the_first_step_is_the_specification(dtype: torch.dtype) -> None:
    model = Saturated(dtype)
    x, y = integers(0)
    w = model.head.weight.detach().float()
    grad = (torch.sigmoid((x @ w.t()).double()).float() - y).t() @ x
    assert torch.equal(grad, grad.round())
    want = stochastic_round(w - 2.0**-13 * 1.3 * grad, dtype, seed=7, param_id=0, step=0)
    assert torch.equal(stored(dtype, 64, steps=1, seed=7), want.float())
    assert not torch.equal(stored(dtype, 64, steps=1, seed=8), want.float())


@DTYPES
def test_real_data_differs_in_few_weights_by_one_grid_step(dtype: torch.dtype) -> None:
    make = torch.Generator().manual_seed(0)
    x = torch.randn(32, 64, generator=make)
    labels = torch.randint(0, 4000, (32,), generator=make)

    def run(chunk: int) -> Tensor:
        torch.manual_seed(1)
        model = nn.Linear(64, 4000)
        model = elmo.convert_head(model, dtype)
        step = torch.compile(
            lambda x, y: F.cross_entropy(model(x), y),
            backend="elmo",
            options={"min_outputs": 32, "lower": "eager", "chunk_size": chunk},
        )
        opt = elmo.optim.SGD(model.parameters(), 0.5)
        step(x, labels).backward()
        opt.step()
        return model.weight.detach()

    torch._dynamo.reset()
    a, b = run(4000), run(333)
    different = a.float() != b.float()
    assert different.float().mean() <= 1e-4
    kind = torch.int16 if dtype == BF16 else torch.int8
    steps = (a.view(kind).int() - b.view(kind).int()).abs()
    assert int(steps[different].max() if different.any() else 0) <= 1


@DTYPES
def test_parameters_and_steps_have_bits_of_their_own(dtype: torch.dtype) -> None:
    model = Saturated(dtype)
    first = compiled(model)
    spare = nn.Parameter(torch.zeros(3))
    opt = elmo.optim.SGD([spare, *model.parameters()], 2.0**-13 * 1.3)
    first(*integers(0)).backward()
    opt.step()
    assert not torch.equal(model.head.weight.float(), stored(dtype, 16, steps=1))
    assert opt.param_groups[0]["param_ids"] == [0, 1]


@DTYPES
@pytest.mark.parametrize("fused", [True, False])
def test_a_resumed_run_continues_bit_for_bit(dtype: torch.dtype, fused: bool) -> None:
    model = elmo.convert_head(net("bce"), dtype)
    step, opt = owned(model, momentum=0.9, fused=fused)
    train(step, opt, 2)
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, buffer)
    train(step, opt, 2, start=2)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    twin = elmo.convert_head(net("bce", seed=5), dtype)
    twin.load_state_dict(saved["model"])
    # The seed is the saved one, whatever was asked for here.
    again, opt2 = owned(twin, momentum=0.9, fused=fused, seed=99)
    opt2.load_state_dict(saved["opt"])
    assert opt2.state[twin.head.weight]["momentum_buffer"].dtype == BF16
    train(again, opt2, 2, start=2)
    for name, value in model.state_dict().items():
        assert torch.equal(value.float(), twin.state_dict()[name].float()), name


def test_another_rounding_version_is_refused() -> None:
    _, opt = owned(net())
    state = copy.deepcopy(opt.state_dict())
    state["param_groups"][0]["rounding_version"] = 999
    with pytest.raises(OptionError, match="rounding_version"):
        opt.load_state_dict(state)
    with pytest.raises(OptionError, match="rounding_version"):
        opt.load_state_dict(torch.optim.SGD(net().parameters(), 0.1).state_dict())


@DTYPES
@pytest.mark.parametrize("fused", [True, False])
def test_small_updates_survive_on_average_with_stochastic_rounding_only(
    dtype: torch.dtype, fused: bool
) -> None:
    step_size = 2.0**-9 if dtype == FP8 else 2.0**-8  # of the grid just above 1 (bf16: 2^-7)

    class Constant(nn.Module):
        """cross entropy with all logits equal: every row gets the same tiny gradient."""

        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(64, 256, bias=False)
            with torch.no_grad():
                self.head.weight.fill_(1.0 if dtype == BF16 else 2.0**-6)
            elmo.convert_head(self, dtype, rounding="nearest")

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return F.binary_cross_entropy_with_logits(self.head(x), y, reduction="sum")

    x = torch.full((1, 64), 4.0)  # saturated: the gradient of a negative is exactly x
    for rounding in ("nearest", "stochastic"):
        model = Constant()
        with torch.no_grad():
            x = torch.full((1, 64), 4.0 if dtype == BF16 else 256.0)
        rate = 0.05 * step_size / float(x[0, 0])
        step, opt = owned(model, lr=rate, rounding=rounding, fused=fused)
        start = model.head.weight.detach().float()
        for _ in range(20):
            step(x, torch.zeros(1, 256)).backward()
            opt.step()
            opt.zero_grad()
        moved = float((start - model.head.weight.detach().float()).mean()) / step_size
        if rounding == "nearest":
            assert moved == 0
        else:
            assert moved == pytest.approx(1.0, abs=0.08)  # 16384 weights, 20 steps of 0.05


def test_lowerings_store_the_same() -> None:
    weights = []
    for options in (EAGER, INDUCTOR):
        model = elmo.convert_head(net("bce"), FP8)
        step, opt = owned(model, options)
        for i in range(2):
            step(*batch(i)).backward()
            opt.step()
            opt.zero_grad()
        weights.append(model.head.weight.detach().float())
    assert (weights[0] != weights[1]).float().mean() < 0.01


@pytest.mark.parametrize("kind", ["ce", "bce"])
@DTYPES
def test_fused_and_unfused_agree_on_real_data(dtype: torch.dtype, kind: str) -> None:
    weights = []
    for fused in (True, False):
        model = elmo.convert_head(net(kind), dtype)
        step, opt = owned(model, fused=fused)
        inputs, labels = batch(rows=7)  # a mean over 7 rows: the scale is no power of two
        step(inputs, labels).backward()
        opt.step()
        weights.append(model.head.weight.detach().float())
    assert torch.equal(*weights)
