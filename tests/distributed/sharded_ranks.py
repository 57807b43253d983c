"""One of two processes with DTensor parameters: the bits are those of whole tensors.

python sharded_ranks.py RANK WORLD FOLDER
"""

from __future__ import annotations

import copy
import datetime
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import elmo_compile as elmo
from elmo_compile.errors import OptionError

BY_ROWS, BY_COLUMNS = (Shard(0),), (Shard(1),)
SHAPES = ((13, 32), (13,), (5, 3, 8))
BF16, FLOAT = torch.bfloat16, torch.float32
CASES: list[tuple[str, torch.dtype, Any, dict[str, Any]]] = [
    ("SGD", BF16, BY_ROWS, {"momentum": 0.9, "max_norm": 0.1}),
    ("SGD", BF16, BY_ROWS, {"momentum": 0.9, "rounding": "kahan"}),
    ("SGD", BF16, (Replicate(),), {}),
    ("AdamW", BF16, BY_ROWS, {"eco": True}),
    ("AdamW", FLOAT, BY_ROWS, {"state_dtype": BF16}),
    ("Adagrad", BF16, BY_ROWS, {"max_norm": 0.1}),
    ("Lion", FLOAT, BY_COLUMNS, {}),
]


def tensors(seed: int, dtype: torch.dtype, count: int) -> list[Tensor]:
    make = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=make).to(dtype) for shape in SHAPES[:count]]


def same_bits(mesh: Any, name: str, dtype: torch.dtype, places: Any, hyper: dict[str, Any]) -> None:
    """Steps of shards and of whole tensors, with a checkpoint between."""
    count = 2 if name == "Adagrad" else len(SHAPES)
    rule: Any = getattr(elmo.optim, name)

    def placed(t: Tensor) -> DTensor:
        return distribute_tensor(t, mesh, places)

    if places == BY_COLUMNS:
        count = 1
    whole = [nn.Parameter(t) for t in tensors(0, dtype, count)]
    shards = [nn.Parameter(placed(t)) for t in tensors(0, dtype, count)]
    opt, other = (rule(params, 0.1, fused=False, **hyper) for params in (whole, shards))
    for step in range(3):
        for p, q, grad in zip(whole, shards, tensors(step + 1, dtype, count)):
            p.grad, q.grad = grad, placed(grad)
        if step == 2:
            saved = copy.deepcopy(other.state_dict())
            other = rule(shards, 0.1, fused=False, **hyper)
            other.load_state_dict(saved)
        opt.step()
        other.step()
        for p, q in zip(whole, shards):
            assert torch.equal(q.full_tensor(), p), (name, dtype, p.shape)
            for key, value in opt.state[p].items():
                held = other.state[q][key]
                assert torch.equal(held.full_tensor() if key != "step" else held, value), key


def skipped(mesh: Any, rank: int) -> None:
    """What is not finite in one shard skips the step in all processes."""
    params = [nn.Parameter(distribute_tensor(t, mesh, BY_ROWS)) for t in tensors(0, FLOAT, 2)]
    opt = elmo.optim.SGD(params, 0.1, fused=False, nonfinite="skip")
    before = [p.full_tensor().clone() for p in params]
    for p in params:
        p.grad = distribute_tensor(torch.ones(p.shape), mesh, BY_ROWS)
    if rank == 1:
        params[0].grad.to_local()[0, 0] = float("nan")
    opt.step()
    assert opt.skipped_steps == 1
    for p, was in zip(params, before):
        assert torch.equal(p.full_tensor(), was)
        p.grad = torch.ones_like(p)
    opt.step()
    assert opt.skipped_steps == 1
    assert not torch.equal(params[0].full_tensor(), before[0])


def refused(mesh: Any) -> None:
    """What shards cannot give the bits of is an error of the constructor."""
    rows, columns = (
        nn.Parameter(distribute_tensor(torch.zeros(8, 64, dtype=BF16), mesh, places))
        for places in (BY_ROWS, BY_COLUMNS)
    )
    for name, param, hyper, message in (
        ("SGD", rows, {"state_dtype": "8bit"}, "8bit.*DTensor"),
        ("SGD", rows, {"kahan_rows": 2}, "kahan_rows.*DTensor"),
        ("SGD", rows, {"capturable": True}, "capturable=True.*DTensor"),
        ("SGD", columns, {}, r"stochastic rounding.*DTensor.*Shard\(0\)"),
        ("Adagrad", columns, {}, r"Adagrad.*DTensor.*Shard\(0\)"),
    ):
        with pytest.raises(OptionError, match=message):
            getattr(elmo.optim, name)([param], 0.1, **hyper)


def main(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    mesh = init_device_mesh("cpu", (world,))
    for case in CASES:
        same_bits(mesh, *case)
    skipped(mesh, rank)
    refused(mesh)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
