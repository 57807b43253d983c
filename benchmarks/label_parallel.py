"""A head step on one and on two processes (CPU, gloo): time, memory, what is sent.

    python benchmarks/label_parallel.py --json benchmarks/results/label_parallel.json

The same batch is trained by a whole head in one process, by a sharded head (`shard_head`) in one
and in two, and by a head that two processes have each (`ignore_heads`, update_at="step"). Processes
have one thread each; runs are interleaved, each in fresh processes. A step is forward, backward and
opt.step() of a linear head on given features. Memory is the peak of a process's resident memory
above what it had before the head was made.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import elmo_compile as elmo

CASES: dict[str, dict[str, Any]] = {
    "bce": {"rows": 128, "features": 768, "outputs": 670_091, "loss": "bce"},
    "ce": {"rows": 2048, "features": 768, "outputs": 131_072, "loss": "ce"},
    "small": {"rows": 16, "features": 32, "outputs": 20_000, "loss": "bce"},
}
CONTENDERS = {
    "whole head": ("whole", 1),
    "shard_head, 1 process": ("shard", 1),
    "shard_head, 2 processes": ("shard", 2),
    "ignore_heads, 2 processes": ("ignore", 2),
}


class Model(nn.Module):
    """A layer that gives the features a gradient, the head, its loss."""

    def __init__(self, case: dict[str, Any]) -> None:
        super().__init__()
        self.case = case
        self.scale = nn.Parameter(torch.ones(case["features"]))
        self.head = nn.Linear(case["features"], case["outputs"], bias=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = self.head(x * self.scale)
        if self.case["loss"] == "ce":
            return F.cross_entropy(z, y[:, 0])
        return F.binary_cross_entropy_with_logits(z, elmo.multi_hot(y, self.case["outputs"]))


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def one(rank: int, world: int, folder: str, how: str, case: dict[str, Any], steps: int) -> None:
    """One process: prints its row."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=world
    )
    torch.manual_seed(0)
    before = peak_bytes()
    with torch.device("meta"):
        model = Model(case)
    elmo.convert_head(model, torch.bfloat16)
    if how == "shard":
        elmo.distributed.shard_head(model, init_device_mesh("cpu", (world,)))
    model.to_empty(device="cpu")
    with torch.no_grad():
        model.scale.fill_(1.0)
        weight = model.head.weight
        (weight.to_local() if how == "shard" else weight).fill_(0.001)
    called: nn.Module = model
    if how == "ignore":
        called = DistributedDataParallel(elmo.distributed.ignore_heads(model))
    at = {"update_at": "step"} if how == "ignore" else {}
    opt = elmo.optim.SGD(model.parameters(), lr=0.1, **at)
    step = torch.compile(called, backend="elmo", options={"loss_value": "deferred"})
    make = torch.Generator().manual_seed(1)
    x = torch.randn(case["rows"], case["features"], generator=make).bfloat16().float()
    y = torch.randint(0, case["outputs"], (case["rows"], 5), generator=make)
    mine = slice(rank * case["rows"] // world, (rank + 1) * case["rows"] // world)
    x, y = x[mine], y[mine]
    wall, cpu = [], []
    for number in range(steps + 2):
        dist.barrier()
        started = time.perf_counter(), time.process_time()
        with torch.autocast("cpu", torch.bfloat16):
            loss = step(x, y)
        loss.backward()
        opt.step()
        opt.zero_grad()
        dist.barrier()
        if number >= 2:  # the first compile
            wall.append(time.perf_counter() - started[0])
            cpu.append(time.process_time() - started[1])
    assert elmo.is_fused(model.head.weight)
    row = {"wall": wall, "cpu": cpu, "memory": peak_bytes() - before, "rank": rank}
    print("ROW" + json.dumps(row), flush=True)
    dist.destroy_process_group()


def run(name: str, case: dict[str, Any], steps: int) -> list[dict[str, Any]]:
    """The rows of a contender's processes."""
    how, world = CONTENDERS[name]
    with tempfile.TemporaryDirectory() as folder:
        given = json.dumps([world, folder, how, case, steps])
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        running = [
            subprocess.Popen(
                [sys.executable, __file__, "--rank", str(rank), "--one", given],
                stdout=subprocess.PIPE, text=True, env=env,
            )
            for rank in range(world)
        ]  # fmt: skip
        outputs = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise SystemExit(f"{name} failed")
    return [json.loads(line[3:]) for o in outputs for line in o.splitlines() if line[:3] == "ROW"]


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", default=["bce", "ce"], choices=CASES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--one", type=json.loads)
    args = parser.parse_args()
    if args.one is not None:
        one(args.rank, *args.one)
        return
    rows: list[dict[str, Any]] = []
    for case in args.cases:
        for number in range(args.rounds):
            for name in CONTENDERS:
                for row in run(name, CASES[case], args.steps):
                    rows.append({"case": case, "contender": name, "round": number, **row})
    environment = {"torch": torch.__version__, "machine": platform.machine(), "threads": 1,
                   "cores": os.cpu_count(), "cases": {c: CASES[c] for c in args.cases}}  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1))
    table = Table("case", "contender", "s a step", "CPU-s a process", "MiB a process")
    for case in args.cases:
        for name in CONTENDERS:
            of = [r for r in rows if (r["case"], r["contender"]) == (case, name)]
            wall, cpu = (statistics.median(v for r in of for v in r[k]) for k in ("wall", "cpu"))
            memory = statistics.median(r["memory"] for r in of) / 2**20
            table.add_row(case, name, f"{wall:.3f}", f"{cpu:.3f}", f"{memory:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
