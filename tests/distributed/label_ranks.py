"""One process of a run with a sharded head: what it does is what one process with all rows does.

python label_ranks.py RANK WORLD FOLDER CASE+CASE+...
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import label_faults
import label_heads
import label_training
from label_run import Run

CASES: dict[str, Callable[[Run], None]] = {
    case.__name__: case for case in (*label_training.CASES, *label_heads.CASES, *label_faults.CASES)
}


def main(rank: int, world: int, folder: str, cases: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    run = Run(rank, world, Path(folder))
    for case in cases.split("+"):
        CASES[case](run)
        print(f"{case}: as one process", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
