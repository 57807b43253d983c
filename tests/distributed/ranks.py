"""One process of a data-parallel run: train, then save the weights.

python ranks.py RANK WORLD FOLDER KIND DTYPE WRAP
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torch.nn.parallel import DistributedDataParallel
from training import EAGER, batch, net

import elmo_compile as elmo

STEPS, MICRO, ROWS = 3, 2, 4


def part(step: int, micro: int, rank: int, world: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A process's share of a micro-batch of ROWS rows."""
    inputs, labels = batch(10 * step + micro, ROWS)
    rows = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    return inputs[rows], labels[rows]


def main(rank: int, world: int, folder: str, kind: str, dtype: str, wrap: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=world
    )
    model = net(kind, seed=rank)  # what process 0 has is to count
    if dtype != "float32":
        elmo.convert_head(model, dtype=getattr(torch, dtype), name="head")
    elmo.distributed.ignore_heads(model)
    if wrap == "outside":
        run = DistributedDataParallel(torch.compile(model, backend="elmo", options=EAGER))
    else:
        run = torch.compile(DistributedDataParallel(model), backend="elmo", options=EAGER)
    optimizer = elmo.optim.SGD(
        model.parameters(), 0.5, momentum=0.9, update_at="step", max_norm=0.5, accumulate="stash"
    )
    for step in range(STEPS):
        for micro in range(MICRO):
            (run(*part(step, micro, rank, world)) / MICRO).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.fused_parameters() == [model.head.weight]
    torch.save(model.state_dict(), f"{folder}/weights{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
