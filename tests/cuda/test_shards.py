"""A sharded head on a CUDA device: a process that is alone in its group trains as without one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import PRETENDED
from steps import BF16, CHUNK, FP8, D, L, net, on_device
from torch.distributed.device_mesh import init_device_mesh
from training import compiled

import elmo_compile as elmo


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The mesh of this process alone."""
    folder = tmp_path_factory.mktemp("group")
    os.environ.setdefault("LOCAL_RANK", "0")
    dist.init_process_group(
        "gloo" if PRETENDED else "nccl", init_method=f"file://{folder}/group", rank=0, world_size=1
    )
    yield init_device_mesh("cuda", (1,))
    dist.destroy_process_group()


SLOW = pytest.mark.slow
HOW = {
    "backward": {},
    "step": {"update_at": "step", "max_norm": 0.1},
    "gradient": {"fused": False},
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    "dtype", [pytest.param(None, marks=SLOW), pytest.param(BF16, marks=SLOW), FP8], ids=str
)
@pytest.mark.parametrize("kind", ["bce", "ce", "focal"])
def test_training(kind: str, dtype: Any, how: str, mesh: Any) -> None:
    found = []
    for sharded in (True, False):
        model = net(kind).to("cuda")
        if dtype is not None:
            elmo.convert_head(model, dtype)
        if sharded:
            elmo.distributed.shard_head(model, mesh)
        # The very gradient: no product formed at once, which a sharded head's is not.
        options = {"min_outputs": CHUNK, "chunk_size": CHUNK, "lower": "eager"}
        options["loss_value"] = "exact"
        step = compiled(model, options)
        opt = elmo.optim.AdamW(model.parameters(), 1e-2, **HOW[how])
        losses = []
        for seed in range(2):
            loss = step(*on_device(seed))
            loss.backward()
            opt.step()
            opt.zero_grad()
            losses.append(loss.detach())
        assert elmo.is_fused(model.head.weight) is (how != "gradient")
        weight = model.head.weight.detach()
        weight = weight.to_local() if sharded else weight
        found.append((weight.float().cpu(), torch.stack(losses).cpu()))
    (weight, losses), (whole, wanted) = found
    torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=0.0)
    if how == "gradient":
        scale = whole.abs().max()
        assert (weight - whole).abs().max() <= (0.02 if dtype is None else 0.13) * scale
    else:
        assert torch.equal(weight, whole)


def test_topk(mesh: Any) -> None:
    model = net("bce").to("cuda")
    x = torch.randn(5, D, generator=torch.Generator().manual_seed(0)).to("cuda")
    wanted = elmo.topk(x, model.head.weight, 7, bias=model.head.bias)
    elmo.distributed.shard_head(model, mesh)
    found = elmo.topk(x, model.head.weight, 7, bias=model.head.bias)
    assert torch.equal(found.indices, wanted.indices)
    assert torch.equal(found.values, wanted.values)
    assert int(found.indices.max()) < L


def test_bad_labels_leave_the_weight_alone(mesh: Any) -> None:
    model = net("bce").to("cuda")
    elmo.distributed.shard_head(model, mesh)
    step = compiled(model, {"min_outputs": CHUNK, "chunk_size": CHUNK, "lower": "eager"})
    opt = elmo.optim.SGD(model.parameters(), 0.1)
    x, labels = on_device(0)
    before = model.head.weight.detach().to_local().clone()
    x[0, 0] = float("nan")
    step(x, labels).backward()
    with pytest.raises(elmo.InputError):
        opt.step()
    assert torch.equal(model.head.weight.detach().to_local(), before)
