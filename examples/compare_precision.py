"""What a head's storage and rounding cost: six heads, paired seeds, an interval and a figure.

    python examples/compare_precision.py            # an hour of CPU; may be interrupted
    python examples/compare_precision.py --quick    # a minute, to see that it works

The same classifier is trained with a float32 head and with bf16 and fp8 ones, rounded to nearest,
stochastically, and as published fp8 kernels do it (paper_rounding.py). Runs of one seed share
initial weights and data order. A small head learning rate makes updates smaller than the grid's
steps, which is where rounding matters. Encoder rate and epochs are chosen on a validation split
with the float32 head. An encoder that trains makes up for a head that is stuck, so everything is
repeated with the encoder frozen as the float32 run left it and the head trained anew.

Each finished run is kept in --out and not repeated; results.json and comparison.png land there.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compare_report import differences_table, draw, summarise
from paper_rounding import PaperSGD
from rich.console import Console
from rich.progress import Progress
from xmc_data import Dataset, batches, load, split
from xmc_model import (
    KS,
    Settings,
    Trainer,
    data_order,
    peak_memory_bytes,
    rank,
    score,
    steps_per_epoch,
)
from xmc_options import DATA, positive

VARIANTS = {
    "float32": ("float32", "nearest"),
    "bf16 nearest": ("bfloat16", "nearest"),
    "bf16 stochastic": ("bfloat16", "stochastic"),
    "fp8 nearest": ("float8_e4m3fn", "nearest"),
    "fp8 paper": ("float8_e4m3fn", "stochastic"),
    "fp8 stochastic": ("float8_e4m3fn", "stochastic"),
}
"""Storage and rounding of each head; the first is what the others are compared with."""

CHOICES = {"epochs": (2, 3, 4), "encoder_lr": (0.05, 0.1)}
"""Tried on the validation split, with a float32 head and the first seed."""
VALIDATION_SHARE = 0.1
VALIDATION_SEED = 20240607


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One training: what `Settings` do not say, and they."""

    stage: str
    """`choose` (tested on the validation split), `trained` or `frozen` (the encoder)."""
    variant: str
    settings: Settings
    limit: int | None
    """Points of each part, None for all."""

    def path(self, out: Path, suffix: str) -> Path:
        """Where this run's results are kept."""
        s = self.settings
        name = (
            f"{self.stage}-{self.variant}-d{s.dim}-e{s.epochs}-b{s.batch_size}-h{s.head_lr:g}"
            f"-c{s.encoder_lr:g}-{s.backend}-n{self.limit}-s{s.seed}"
        )
        return out / "cache" / (name.replace(" ", "_") + suffix)


class ComparedTrainer(Trainer):
    """The trainer of train_xmc.py; one variant has the paper's optimizer for its head."""

    def __init__(self, run: Run, data: Dataset, *, total_steps: int) -> None:
        self.run = run
        super().__init__(run.settings, data, total_steps=total_steps)

    def head_optimizer(self) -> torch.optim.Optimizer:
        """For `fp8 paper` the gradient is materialised, so that only the rounding differs."""
        if self.run.variant != "fp8 paper":
            return super().head_optimizer()
        s = self.settings
        return PaperSGD(self.model.head.parameters(), lr=s.head_lr, seed=s.seed)


def main(arguments: Sequence[str] | None = None) -> None:
    """Choose the setting, do the runs that are missing, and report on all of them."""
    options = parse(arguments)
    console = Console()
    setting = choose_setting(options, console)
    runs = [
        Run(
            stage=stage,
            variant=variant,
            limit=options.limit,
            settings=dataclasses.replace(
                setting, seed=seed, head_dtype=VARIANTS[variant][0], rounding=VARIANTS[variant][1]
            ),
        )
        for stage, variant, seed in itertools.product(
            options.stages, options.variants, range(options.seeds)
        )
    ]
    records = do_runs(runs, options, console)
    data = load(options.data, options.limit)
    tops = [np.load(run.path(options.out, ".npy")) for run in runs]
    summary = summarise(records, tops, data, baseline=next(iter(VARIANTS)))
    report = {"setting": dataclasses.asdict(setting), "runs": records, **summary}
    (options.out / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(report, options.out / "comparison.png")
    console.print(differences_table(report))
    console.print(f"wrote {options.out / 'results.json'} and comparison.png", highlight=False)


def choose_setting(options: argparse.Namespace, console: Console) -> Settings:
    """The setting of all runs; what the command line leaves open, by validation score."""
    given = {name: [getattr(options, name)] for name in CHOICES if getattr(options, name)}
    common = Settings(
        head_dtype="float32",
        rounding="nearest",
        backend=options.backend,
        dim=options.dim,
        head_lr=options.head_lr,
    )
    candidates = [
        dataclasses.replace(common, **dict(zip(CHOICES, values)))
        for values in itertools.product(*(given.get(name, CHOICES[name]) for name in CHOICES))
    ]
    if len(candidates) == 1:
        return candidates[0]
    runs = [
        Run(stage="choose", variant="float32", settings=settings, limit=options.limit)
        for settings in candidates
    ]
    records = do_runs(runs, options, console)
    quality = [sum(record["history"][-1][f"P@{k}"] for k in KS) for record in records]
    for run, record in zip(runs, records):
        scores = "  ".join(f"P@{k} {100 * record['history'][-1][f'P@{k}']:.2f}" for k in KS)
        s = run.settings
        console.print(f"validation: epochs {s.epochs}, encoder lr {s.encoder_lr:g}: {scores}")
    return candidates[int(np.argmax(quality))]


def do_runs(
    runs: Sequence[Run], options: argparse.Namespace, console: Console
) -> list[dict[str, Any]]:
    """The record of each run, from the cache where it is there; each in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("runs", total=len(runs))
        for run in runs:
            bar.update(task, description=f"{run.stage}: {run.variant}, seed {run.settings.seed}")
            if not run.path(options.out, ".json").exists():
                work = (run, options.data, options.out, options.threads)
                if options.quick:
                    train_one(*work)
                else:
                    process = spawn.Process(target=train_one, args=work)
                    process.start()
                    process.join()
                    if process.exitcode != 0:
                        sys.exit(f"{run.path(options.out, '')}: exit code {process.exitcode}")
            bar.advance(task)
    return [json.loads(run.path(options.out, ".json").read_text()) for run in runs]


def train_one(run: Run, data_folder: Path, out: Path, threads: int) -> None:
    """Train one head; keep its history, its ranking of the test points and what it took."""
    torch.compiler.reset()
    torch.set_num_threads(threads)
    begun = time.process_time()
    data = load(data_folder, run.limit)
    if run.stage == "choose":
        kept, held = split(data.train, VALIDATION_SHARE, VALIDATION_SEED)
        data = dataclasses.replace(data, train=kept, test=held)
    settings = run.settings
    if run.stage == "frozen":
        run = dataclasses.replace(run, settings=dataclasses.replace(settings, encoder_lr=0.0))
    steps = steps_per_epoch(settings, len(data.train))
    trainer = ComparedTrainer(run, data, total_steps=settings.epochs * steps)
    if run.stage == "frozen":
        trainer.model.encoder.load_state_dict(encoder_of(settings, run.limit, out))
    history = []
    for epoch in range(settings.epochs):
        loss_sum = 0.0
        order = data_order(settings, epoch, len(data.train))
        for batch in batches(data.train, order, settings.batch_size):
            loss_sum += trainer.step(batch) * len(batch.offsets)
        top, _ = rank(trainer.model, data.test, max(KS))
        history.append({"loss": loss_sum / len(data.train), **score(top, data.test, data)})
    run = dataclasses.replace(run, settings=settings)
    run.path(out, "").parent.mkdir(parents=True, exist_ok=True)
    if run.stage == "trained" and run.variant == "float32":
        torch.save(trainer.model.encoder.state_dict(), run.path(out, ".pt"))
    np.save(run.path(out, ".npy"), top.astype(np.int32))
    record = {
        "stage": run.stage,
        "variant": run.variant,
        "seed": settings.seed,
        "history": history,
        "head_bytes": trainer.model.head.weight.nbytes,
        "peak_memory_bytes": peak_memory_bytes(),
        "cpu_seconds": time.process_time() - begun,
    }
    unfinished = run.path(out, f".json.{os.getpid()}")
    unfinished.write_text(json.dumps(record))
    unfinished.replace(run.path(out, ".json"))


def encoder_of(settings: Settings, limit: int | None, out: Path) -> dict[str, torch.Tensor]:
    """The encoder as the float32 run of this seed left it."""
    dtype, rounding = VARIANTS["float32"]
    settings = dataclasses.replace(settings, head_dtype=dtype, rounding=rounding)
    run = Run(stage="trained", variant="float32", settings=settings, limit=limit)
    return torch.load(run.path(out, ".pt"), weights_only=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--variants", type=names_of(VARIANTS), default=list(VARIANTS), metavar="A,B",
        help=f"of: {', '.join(VARIANTS)}; float32 is always done")  # fmt: skip
    add("--stages", type=names_of(("trained", "frozen")), default=["trained", "frozen"],
        metavar="A,B", help="of: trained, frozen; trained is always done")  # fmt: skip
    add("--seeds", type=positive, default=3, metavar="N", help="paired seeds, 0 to N-1 (default 3)")
    add("--dim", type=positive, default=128, metavar="D", help="features (default 128)")
    add("--head-lr", type=float, default=0.25, metavar="RATE", help="of SGD (default 0.25)")
    add("--encoder-lr", type=float, metavar="RATE", help="default: chosen on a validation split")
    add("--epochs", type=positive, metavar="N", help="default: chosen on a validation split")
    add("--backend", choices=("elmo", "inductor", "eager"), default="elmo")
    add("--data", type=Path, default=DATA, metavar="DIR", help="see examples/data/README.md")
    add("--out", type=Path, default=Path("runs/compare_precision"), metavar="DIR")
    add("--threads", type=positive, default=os.cpu_count(), metavar="N", help="default: all cores")
    add("--quick", action="store_true", help="512 points, 1 seed, 1 epoch, 16 features")
    options = parser.parse_args(arguments)
    options.limit = None
    if options.quick:
        options.limit, options.seeds, options.epochs, options.dim = 512, 1, 1, 16
        options.encoder_lr = CHOICES["encoder_lr"][0]
    return options


def names_of(known: Sequence[str] | dict[str, Any]):
    """A parser of comma-separated names of `known`; the first is always among them."""

    def parse_names(text: str) -> list[str]:
        given = [name.strip() for name in text.split(",")]
        if unknown := [name for name in given if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(known)}")
        return [name for i, name in enumerate(known) if i == 0 or name in given]

    return parse_names


if __name__ == "__main__":
    main()
