"""Fake tensors and exported programs: shapes flow through where values do not exist."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import elmo_compile as elmo
from elmo_compile.deferred import Deferred

N, L = 4, 300
OPTIONS = {"lower": "eager", "min_outputs": 64}


class Net(nn.Module):
    def __init__(self, *, loss: bool = True) -> None:
        super().__init__()
        self.loss, self.encoder, self.head = loss, nn.Linear(8, 16), nn.Linear(16, L)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z: Tensor = self.head(self.encoder(x))
        if not self.loss:
            return z
        return F.binary_cross_entropy_with_logits(z, elmo.multi_hot(y, L))


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(N, 8), torch.randint(0, L, (N, 3))


def test_a_compiled_step_under_fake_tensors() -> None:
    torch._dynamo.reset()
    with FakeTensorMode():
        step: Any = torch.compile(Net(), backend="elmo", options=OPTIONS)
        loss = step(*batch())
        assert loss.shape == ()
        loss.backward()


def test_deferred_logits_under_fake_tensors() -> None:
    torch._dynamo.reset()
    with FakeTensorMode():
        x, y = batch()
        step: Any = torch.compile(Net(loss=False), backend="elmo", options=OPTIONS)
        z = step(x, y)
        assert isinstance(z, Deferred)
        assert F.cross_entropy(z, y[:, 0]).shape == ()
        assert (z * 2).exp().shape == (N, L)


def test_a_converted_model_is_exported() -> None:
    torch.manual_seed(0)
    model = Net()
    elmo.convert_head(model, dtype=torch.float8_e4m3fn)
    given = batch()
    exported = torch.export.export(model, given)
    torch.testing.assert_close(exported.module()(*given), model(*given))


def test_deferred_logits_are_gathered(tmp_path: Any) -> None:
    """Collectives see the values."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model: Any = Net(loss=False)
    x, y = batch()
    step: Any = torch.compile(model, backend="elmo", options=OPTIONS)
    expected = model(x, y).detach()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parts = [torch.empty(N, L)]
        dist.all_gather(parts, step(x, y).detach())
        torch.testing.assert_close(parts[0], expected)
        whole = step(x, y).detach()
        dist.all_reduce(whole)
        torch.testing.assert_close(whole + 0, expected)
    finally:
        dist.destroy_process_group()
