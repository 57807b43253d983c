"""What the cases of label_ranks.py share: the processes of a run, steps, comparisons."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from training import (
    compiled,
)

import elmo_compile as elmo
from elmo_compile.heads.sharded import whole_of

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
ROWS = 12
"""Of all processes."""

Batch = tuple[Tensor, ...]


class Run:
    """The processes of a run, and this one's place."""

    def __init__(self, rank: int, world: int, folder: Path) -> None:
        self.rank, self.world, self.folder = rank, world, folder
        self.mesh = init_device_mesh("cpu", (world,))

    def shard(self, model: Any, **given: Any) -> Any:
        return elmo.distributed.shard_head(model, self.mesh, **given)

    def own(self, rows: Batch) -> Batch:
        """This process's share of a batch of all rows."""
        count = len(rows[0])
        mine = slice(self.rank * count // self.world, (self.rank + 1) * count // self.world)
        return tuple(t[mine] for t in rows)

    def mean_gradients(self, module: nn.Module) -> None:
        """What DistributedDataParallel would do."""
        for param in module.parameters():
            if not isinstance(param, DTensor) and param.grad is not None:
                dist.all_reduce(param.grad)
                param.grad /= self.world

    def mean(self, t: Tensor) -> Tensor:
        total = t.detach().clone()
        dist.all_reduce(total)
        return total / self.world


def train(
    run: Run | None, model: nn.Module, opt: Any, batches: list[Batch], options: Any = None
) -> list[float]:
    """Steps; the losses of all rows. Without a run, of one process."""
    step, losses = compiled(model, options), []
    for rows in batches:
        opt.zero_grad()
        loss = step(*(rows if run is None else run.own(rows)))
        loss.backward()
        if run is not None:
            run.mean_gradients(model)
        opt.step()
        losses.append(float(loss.detach() if run is None else run.mean(loss)))
    return losses


def same(model: nn.Module, twin: nn.Module, **tolerance: float) -> None:
    """Every parameter of a model, all rows of its head, is its twin's."""
    wanted = dict(twin.named_parameters())
    for name, param in model.named_parameters():
        found = whole_of(param) if isinstance(param, DTensor) else param.detach()
        if not tolerance:
            assert found.dtype == wanted[name].dtype
            assert torch.equal(found.float(), wanted[name].detach().float()), name
            continue
        torch.testing.assert_close(
            found.float(), wanted[name].detach().float(), **tolerance, msg=lambda m, n=name: n + m
        )
