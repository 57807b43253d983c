"""What `torch.set_default_dtype` says enters no number of a model that names its dtypes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import elmo_compile as elmo

OPTIONS = {"lower": "eager", "min_outputs": 64}
FP8 = torch.float8_e4m3fn


@pytest.fixture(params=[torch.float64, torch.bfloat16, torch.float16], ids=str)
def default(request: pytest.FixtureRequest) -> Iterator[Callable[[bool], None]]:
    """Call it with True to set another default dtype, with False to set the usual one."""
    yield lambda on: torch.set_default_dtype(request.param if on else torch.float32)
    torch.set_default_dtype(torch.float32)


def cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y[:, 0])


def multi_label(z: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(z, elmo.multi_hot(y, z.shape[1]).to(z.dtype))


def by_a_program(z: Tensor, y: Tensor) -> Tensor:
    return F.soft_margin_loss(z, 2 * elmo.multi_hot(y, z.shape[1]).to(z.dtype) - 1)


def trained(loss: Any, dtype: torch.dtype, make: Callable[..., Any]) -> list[Tensor]:
    """The parameters after two steps, and what is left of gradients."""
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32)

    head = nn.Linear(64, 96, dtype=torch.float32)
    with torch.no_grad():
        head.weight.copy_(numbers(96, 64) / 8)
        head.bias.copy_(numbers(96) / 8)
    x, y = numbers(8, 64), torch.randint(96, (8, 3), generator=generator)
    if dtype != torch.float32:
        elmo.convert_head(head, dtype)
    opt = make(head.parameters())
    step = torch.compile(lambda x, y: loss(head(x), y), backend="elmo", options=OPTIONS)
    for _ in range(2):
        step(x, y).backward()
        opt.step()
    return [t.detach().float() for p in head.parameters() for t in (p, p.grad) if t is not None]


MAKERS: dict[str, Callable[..., Any]] = {
    "adamw, 8 bits": lambda p: elmo.optim.AdamW(p, 0.01, state_dtype="8bit"),
    "momentum, at step": lambda p: elmo.optim.SGD(
        p, 0.1, momentum=0.9, update_at="step", max_norm=0.1
    ),
    "not fused": lambda p: elmo.optim.SGD(p, 0.1, fused=False),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8], ids=str)
@pytest.mark.parametrize("loss", [cross_entropy, multi_label, by_a_program])
def test_steps_are_the_same(
    loss: Any, dtype: torch.dtype, make: Callable[..., Any], default: Callable[[bool], None]
) -> None:
    expected = trained(loss, dtype, make)
    default(True)
    found = trained(loss, dtype, make)
    default(False)
    assert len(found) == len(expected)
    for got, wanted in zip(found, expected):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8, torch.float8_e5m2], ids=str)
def test_stochastic_rounding_is_the_same(
    dtype: torch.dtype, default: Callable[[bool], None]
) -> None:
    x = torch.linspace(-3, 3, 64, dtype=torch.float32)
    expected = elmo.stochastic_round(x, dtype, seed=1)
    default(True)
    assert torch.equal(elmo.stochastic_round(x, dtype, seed=1).float(), expected.float())
