"""The recommender of recommender.py on several devices: its head's rows are spread over them.

    torchrun --standalone --nproc-per-node 2 examples/several_devices.py

Each process has rows of its own in every batch, and 1/W of the head's weight, which nobody has
whole. The encoder is copied to each (DistributedDataParallel). On GPUs, if there are any.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from recommender import BATCH, GENRES, ITEMS, Recommender, parse, sessions_of
from rich.console import Console
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import elmo_compile as elmo


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, then recommend for sessions that were not trained on."""
    options = parse(arguments, __doc__)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    console = Console(quiet=rank > 0)

    model = Recommender().to(device)
    elmo.convert_head(model, dtype=torch.bfloat16)
    elmo.distributed.shard_head(model, init_device_mesh(device.type, (world,)))
    console.print(model.head, markup=False, highlight=False)
    body = [*model.embedding.parameters(), *model.norm.parameters()]
    optimizers = [
        elmo.optim.SGD(model.head.parameters(), lr=options.head_lr),
        torch.optim.Adam(body, lr=1e-2),
    ]
    compiled = torch.compile(DistributedDataParallel(model), backend="elmo")

    torch.manual_seed(rank)  # from here on every process draws rows of its own
    for number in range(options.steps):
        genres = torch.randint(0, GENRES, (BATCH // world,))
        loss = compiled(*(t.to(device) for t in sessions_of(genres)))
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if number % 20 == 0 or number + 1 == options.steps:
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            console.print(f"step {number:4d}  loss {float(mean) / world:.3f}", highlight=False)

    genres = torch.arange(GENRES).repeat_interleave(10).tensor_split(world)[rank]
    with torch.no_grad():
        features = model.encode(sessions_of(genres)[0].to(device))
        best = elmo.topk(features, model.head.weight, 10, bias=model.head.bias)
    same = (best.indices.cpu() // (ITEMS // GENRES) == genres[:, None]).double()
    hits = torch.tensor([same.sum(), same.numel()], device=device)
    dist.all_reduce(hits)
    console.print(f"of the genre: {100 * hits[0] / hits[1]:.1f} % of the first 10", highlight=False)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
