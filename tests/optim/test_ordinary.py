"""Updates of parameters that have a gradient: torch's rule, and the rounding of narrow ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import elmo_compile as elmo
from elmo_compile.errors import OptionError
from elmo_compile.kernels.aten import chunk_update
from elmo_compile.numerics.philox import MOMENTUM
from elmo_compile.numerics.rounding import round_nearest, stochastic_round


def stepped(make: type, values: list[Tensor], grads: list[list[Tensor]], **hyper: object) -> list:
    """The parameters after a step for each list of gradients."""
    params = [nn.Parameter(value.clone()) for value in values]
    opt = make(params, lr=0.1, **hyper)
    for step in grads:
        for param, grad in zip(params, step):
            param.grad = grad.clone()
        opt.step()
    return [param.detach() for param in params]


def fused_off(params: list, **kwargs: object) -> elmo.optim.SGD:
    return elmo.optim.SGD(params, fused=False, **kwargs)


@pytest.mark.parametrize(
    "hyper",
    [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}],
    ids=str,
)
def test_every_shape_equals_torch(hyper: dict) -> None:
    torch.manual_seed(0)
    values = [
        torch.randn(()),
        torch.randn(7),
        torch.randn(5, 3),
        torch.randn(3, 5).t(),
        torch.randn(2, 3, 4),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(4, 3, dtype=torch.float64),
        torch.randn(4, 3, dtype=torch.complex64),
        torch.randn(0, 3),
        torch.randn(3, 0),
    ]
    grads = [[torch.randn_like(value) for value in values] for _ in range(3)]
    got = stepped(fused_off, values, grads, **hyper)
    want = stepped(torch.optim.SGD, values, grads, **hyper)
    for mine, theirs in zip(got, want):
        torch.testing.assert_close(mine, theirs)
        assert mine.stride() == theirs.stride()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_narrow_weights_are_rounded_once(
    dtype: torch.dtype, rounding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk_update, "_BLOCK", 20)  # several blocks
    torch.manual_seed(0)
    for shape in [(9,), (6, 8), (2, 3, 8)]:
        w = torch.randn(shape).to(dtype)
        g1, g2 = torch.randn(shape), torch.randn(shape)
        param = nn.Parameter(w.clone())
        param.grad_dtype = torch.float32
        spare = nn.Parameter(torch.zeros(1))
        opt = fused_off([spare, param], lr=0.1, momentum=0.5, rounding=rounding, seed=3)
        bits = {"seed": 3, "param_id": 1}
        m = torch.zeros(shape)
        for step, grad in enumerate((g1, g2)):
            param.grad = grad
            opt.step()
            m = 0.5 * m + grad
            v = w.float() - 0.1 * m
            w = (
                stochastic_round(v, dtype, **bits, step=step)
                if rounding == "stochastic"
                else round_nearest(v, dtype)
            )
            m = stochastic_round(m, torch.bfloat16, **bits, stream=MOMENTUM, step=step).float()
            assert torch.equal(param.detach().float(), w.float())
            assert torch.equal(opt.state[param]["momentum_buffer"].float(), m)


def test_sparse_gradients_that_cannot_be_honoured() -> None:
    embed = nn.Embedding(5, 3, sparse=True)
    for hyper in ({"momentum": 0.5}, {"weight_decay": 0.5}):
        opt = fused_off(embed.parameters(), lr=0.1, **hyper)
        before = embed.weight.detach().clone()
        embed(torch.tensor([1, 1])).sum().backward()
        with pytest.raises(OptionError, match="sparse gradient"):
            opt.step()
        assert torch.equal(embed.weight, before)


def test_parameters_without_a_gradient_are_left_alone() -> None:
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    opt = fused_off([used, unused], lr=0.1, weight_decay=0.5)
    used.grad = torch.zeros(2)
    opt.step()
    assert torch.equal(unused, torch.ones(2))
    assert torch.equal(used, torch.full((2,), 0.95))
    assert "step" not in opt.state[unused]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rule", ["SGD", "AdamW", "Lion", "Adagrad"])
def test_without_weight_decay_infinite_parameters_stay(rule: str, dtype: torch.dtype) -> None:
    """Padded labels have a bias of minus infinity."""
    before = torch.tensor([0.0, -torch.inf], dtype=dtype)
    bias = nn.Parameter(before.clone())
    opt = getattr(elmo.optim, rule)([bias], 0.1, weight_decay=0.0, fused=False)
    for _ in range(2):
        bias.grad = torch.zeros_like(bias)
        opt.step()
    assert torch.equal(bias.detach(), before)
