"""One head step (loss, dx, SGD on the head) on a CPU, side by side with what else can do it.

Contenders run in turn within each round, twice, of which the second is timed, and are compared in
CPU-seconds, as medians and as ratios to the floor: the three bare matrix products of a step, in the
same dtype, chunked, at their best layout, in the same run. Memory is the growth of peak resident
bytes during one step, each contender in a process of its own. `--quick` takes a few minutes on two
cores, the full run most of an hour.

    python benchmarks/head_step.py --quick --json benchmarks/results/head_step_quick.json

Shapes: N rows, D features, L outputs, C outputs of a chunk.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from head_step_contenders import DTYPES, Case, Inputs, contenders

from elmo_compile.host_memory import forget_scratch

SLOW_SECONDS = 40.0
"""A contender whose step takes longer is timed once, not in every round."""


FULL = [
    Case(loss=loss, rows=rows, outputs=outputs, dtype=dtype)
    for loss, rows, outputs in (
        ("bce", 128, 131_072),
        ("bce", 128, 670_091),
        ("ce", 2048, 131_072),
    )
    for dtype in DTYPES
]
QUICK = [
    Case(loss=loss, rows=rows, outputs=outputs, dtype=dtype)
    for loss, rows, outputs in (("bce", 128, 65_536), ("ce", 1024, 16_384))
    for dtype in DTYPES
]


def measure(case: Case, rounds: int, only: str | None, memory: bool) -> list[dict[str, Any]]:
    """One row a contender: CPU and wall seconds of each round, ratio to the floor, memory."""
    inputs = Inputs(case)
    steps = {
        name: build()
        for name, build in contenders(inputs).items()
        if only is None or name.startswith("floor") or only in name
    }
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    wall: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            if wall[name] and wall[name][0] > SLOW_SECONDS:
                continue
            step()  # as in training: memory that the step before has freed is at hand
            cpu_start, wall_start = time.process_time(), time.perf_counter()
            step()
            cpu[name].append(time.process_time() - cpu_start)
            wall[name].append(time.perf_counter() - wall_start)
    del steps
    median = {name: statistics.median(times) for name, times in cpu.items()}
    least = min(median[name] for name in median if name.startswith("floor"))
    weights = case.outputs * case.features
    return [
        {
            **dataclasses.asdict(case),
            "contender": name,
            "cpu_seconds": cpu[name],
            "wall_seconds": wall[name],
            "ratio": median[name] / least,
            "cpu_ns_per_weight": median[name] / weights * 1e9,
            "memory_mib": memory_of(case, name) if memory else None,
        }
        for name in cpu
    ]


def memory_of(case: Case, name: str) -> float | None:
    """MiB by which one step raises the peak of resident memory, in a fresh process."""
    command = [sys.executable, __file__, "--one", json.dumps([dataclasses.asdict(case), name])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return float(done.stdout.split()[-1]) if done.returncode == 0 else None


def run_one(spec: str) -> None:
    """In the fresh process: warm up (and compile), give freed memory back, then step once."""
    fields, name = json.loads(spec)
    step = contenders(Inputs(Case(**fields)))[name]()
    step()
    gc.collect()
    forget_scratch()
    ctypes.CDLL(None).malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is resident now
    step()
    print((_status("VmHWM") - before) / 1024)


def _status(field: str) -> int:
    """KiB of a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def environment() -> dict[str, Any]:
    """What a number depends on besides the code."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        "commit": git("rev-parse", "HEAD"),
        "modified": bool(git("status", "--porcelain", "elmo_compile", "benchmarks/*.py")),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line a contender of each case."""
    lines = [
        "| case | contender | ratio to floor | CPU-ns per weight | memory MiB |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        case = Case(**{f.name: row[f.name] for f in dataclasses.fields(Case)})
        memory = "" if row["memory_mib"] is None else f"{row['memory_mib']:.0f}"
        lines.append(
            f"| {case} | {row['contender']} | {row['ratio']:.2f} "
            f"| {row['cpu_ns_per_weight']:.2f} | {memory} |"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of the ratio to the floor, one panel a case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    by_case: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if not row["contender"].startswith("floor"):
            title = f"{row['loss']} {row['dtype']} L={row['outputs']}"
            by_case.setdefault(title, []).append(row)
    height = 0.32 * sum(len(group) + 2 for group in by_case.values())
    sizes = [len(group) for group in by_case.values()]
    figure, axes = plt.subplots(
        len(by_case), 1, figsize=(8, height), sharex=True, squeeze=False, height_ratios=sizes
    )
    for axis, (title, group) in zip(axes[:, 0], by_case.items()):
        colors = ["tab:blue" if "elmo" in row["contender"] else "tab:gray" for row in group]
        names, ratios = [row["contender"] for row in group], [row["ratio"] for row in group]
        axis.barh(names, ratios, color=colors)
        axis.axvline(1.0, color="black", linewidth=1)
        axis.set_title(title, fontsize=9, loc="left")
        axis.invert_yaxis()
    axes[-1, 0].set_xlabel("CPU-seconds of a head step / three bare products")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    """Parse the command line, measure, write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller heads")
    parser.add_argument("--cases", default="", help="only cases whose text contains this")
    parser.add_argument("--only", help="only contenders whose name contains this, and the floor")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--no-memory", action="store_true", help="skip the memory processes")
    parser.add_argument("--json", type=Path, help="raw rows; a table .md and a plot .png beside it")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.one:
        run_one(args.one)
        return
    rows: list[dict[str, Any]] = []
    for case in QUICK if args.quick else FULL:
        if args.cases in str(case):
            measured = measure(case, args.rounds, args.only, not args.no_memory)
            print(table(measured), flush=True)
            rows += measured
            if args.json:  # after each case: the next may be cut off
                write(args.json, rows)
            gc.collect()


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    """Raw rows with where they were measured, a table and a plot beside them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    report = {"environment": environment(), "rows": rows}
    file.write_text(json.dumps(report, indent=1) + "\n")
    file.with_suffix(".md").write_text(table(rows) + "\n")
    plot(rows, file.with_suffix(".png"))


if __name__ == "__main__":
    main()
