"""Train a classifier of 21 551 labels whose head is stored in fp8, and ask it things.

    python examples/train_xmc.py                                  # trains, about 4 CPU-minutes
    python examples/train_xmc.py predict "a library for reading PNG files"

From the description of a Debian package it learns which packages that one depends on. The head
(one row a label) is compiled by the "elmo" backend: its logits, its weight's gradient and a float32
copy of its weight never exist. `train --head-dtype float32 --backend eager` is ordinary PyTorch.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from xmc_checkpoint import CheckpointError, StopRequest, load_checkpoint, save_checkpoint
from xmc_data import DataError, Dataset, Part, Rows, batches, hash_text, load
from xmc_model import (
    KS,
    Settings,
    TextClassifier,
    Trainer,
    data_order,
    peak_memory_bytes,
    rank,
    score,
    steps_per_epoch,
)
from xmc_options import parse, settings_of

import elmo_compile as elmo
from elmo_compile.errors import ElmoError

COLUMNS = ("P@1", "P@3", "P@5", "PSP@1", "PSP@3", "PSP@5")


@dataclasses.dataclass
class Position:
    """How far a run has come: what a checkpoint needs beside weights and optimizers."""

    epoch: int = 0
    step: int = 0
    """Steps taken in this epoch."""
    loss_sum: float = 0.0
    """Sum over the points of this epoch, and how many they are."""
    points: int = 0
    cpu_seconds: float = 0.0
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)
    """Loss and test scores of each finished epoch."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run `train` (also when no command is given) or `predict`."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    if not argv or argv[0] not in ("train", "predict", "-h", "--help"):
        argv.insert(0, "train")
    console = Console()
    try:
        options = parse(argv, __doc__)
        torch.set_num_threads(options.threads or 1)  # small products: more threads mostly wait
        (train if options.command == "train" else predict)(options, console)
    except (DataError, CheckpointError, ElmoError) as error:
        Console(stderr=True).print(f"[bold red]error:[/] {error}", highlight=False)
        sys.exit(1)


def train(options: argparse.Namespace, console: Console) -> None:
    """Train to the end, or on from a checkpoint; save after each epoch and at Ctrl-C."""
    settings = settings_of(options)
    data = load(options.data, options.limit)
    steps = steps_per_epoch(settings, len(data.train))
    console.print(
        f"{len(data.train)} points, {len(data.label_names)} labels; the head's weight is "
        f"{settings.head_dtype}; scores after each epoch are of {len(data.test)} other points",
        highlight=False,
    )
    trainer = Trainer(settings, data, total_steps=settings.epochs * steps)
    position = Position()
    if options.resume:
        saved = load_checkpoint(options.out)
        trainer.load_state_dict(saved["trainer"])
        position = Position(**saved["position"])
        done = f"epoch {position.epoch + 1}, step {position.step}"
        console.print(f"resuming {options.out} at {done}", highlight=False)
    with StopRequest() as stop:
        ranking = run_epochs(trainer, data, position, options, stop, console)
    if stop.requested:
        console.print(f"stopped and saved: go on with --resume --out {options.out}")
        return
    if ranking is None:
        ranking = rank(trainer.model, data.test, max(KS))
    if options.predictions:
        np.savez_compressed(options.predictions, indices=ranking[0], probabilities=ranking[1])
    result = {"loss": mean_loss(position), **score(ranking[0], data.test, data)}
    console.print(results_table(result, settings, data))
    console.print(costs_table(trainer.model, position))


def run_epochs(
    trainer: Trainer,
    data: Dataset,
    position: Position,
    options: argparse.Namespace,
    stop: StopRequest,
    console: Console,
) -> tuple[np.ndarray, np.ndarray] | None:
    """All epochs from `position` on; the ranking of the test points after the last full one."""
    settings, ranking = trainer.settings, None
    steps = steps_per_epoch(settings, len(data.train))
    left = options.max_steps if options.max_steps is not None else settings.epochs * steps
    while position.epoch < settings.epochs and left > 0 and not stop.requested:
        left -= run_epoch(trainer, data, position, left, stop, console)
        if position.step == steps:
            ranking = rank(trainer.model, data.test, max(KS))
            scores = score(ranking[0], data.test, data)
            position.history.append({"loss": mean_loss(position), **scores})
            position.epoch, position.step = position.epoch + 1, 0
            console.print(epoch_line(position), highlight=False)
        save(trainer, data, position, options)
    return ranking


def run_epoch(
    trainer: Trainer,
    data: Dataset,
    position: Position,
    most: int,
    stop: StopRequest,
    console: Console,
) -> int:
    """Up to `most` steps of the epoch at `position`, under a progress bar; how many were taken."""
    settings, begun = trainer.settings, time.process_time()
    if position.step == 0:
        position.loss_sum, position.points = 0.0, 0
    order = data_order(settings, position.epoch, len(data.train))
    order = order[position.step * settings.batch_size :]
    order = order[: most * settings.batch_size]
    name = f"epoch {position.epoch + 1}/{settings.epochs}"
    total, taken = steps_per_epoch(settings, len(data.train)), 0
    with progress_bar(console) as bar:
        task = bar.add_task(name, total=total, completed=position.step, loss=float("nan"))
        for batch in batches(data.train, order, settings.batch_size):
            loss = trainer.step(batch)
            if position.epoch == position.step == 0:
                say_what_was_compiled(settings, time.process_time() - begun, console)
            position.step, taken = position.step + 1, taken + 1
            position.loss_sum += loss * len(batch.offsets)
            position.points += len(batch.offsets)
            bar.update(task, advance=1, loss=mean_loss(position))
            if stop.requested:
                break
    position.cpu_seconds += time.process_time() - begun
    return taken


def say_what_was_compiled(settings: Settings, cpu_seconds: float, console: Console) -> None:
    """After the first step: what the backend did to the head, and how long it took."""
    if settings.backend == "elmo":
        for match in elmo.last_report().matches:
            console.print(
                f"compiled in {cpu_seconds:.0f} s: {match}", markup=False, highlight=False
            )


def predict(options: argparse.Namespace, console: Console) -> None:
    """Print the best labels of a typed text, by name, with their probabilities."""
    saved = load_checkpoint(options.checkpoint)
    settings, idf = Settings(**saved["settings"]), saved["idf"]
    model = TextClassifier(len(idf), settings.dim, torch.zeros(len(saved["label_names"])))
    if settings.head_dtype != "float32":
        elmo.convert_head(model, dtype=getattr(torch, settings.head_dtype), name="head")
    model.load_state_dict(saved["trainer"]["model"])
    row = hash_text(options.text, idf.numpy())
    no_labels = Rows(np.zeros(2, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
    ranked, probabilities = rank(model, Part(row, no_labels, np.zeros(1, np.int64)), options.top)
    table = Table("probability", "depends on")
    for label, probability in zip(ranked[0], probabilities[0]):
        table.add_row(f"{probability:.3f}", saved["label_names"][label])
    console.print(f"“{options.text}”", table, sep="\n", markup=False, highlight=False)


def save(trainer: Trainer, data: Dataset, position: Position, options: argparse.Namespace) -> None:
    """Write all that `train --resume` and `predict` need, replacing the checkpoint at once."""
    save_checkpoint(
        options.out,
        {
            "settings": dataclasses.asdict(trainer.settings),
            "data": {"data": str(options.data), "limit": options.limit},
            "position": dataclasses.asdict(position),
            "trainer": trainer.state_dict(),
            "idf": torch.from_numpy(data.idf),
            "label_names": data.label_names,
        },
    )


def mean_loss(position: Position) -> float:
    """Mean training loss of the epoch's points so far."""
    return position.loss_sum / max(1, position.points)


def progress_bar(console: Console) -> Progress:
    """A bar with steps, the epoch's mean loss and the time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def epoch_line(position: Position) -> str:
    scores = position.history[-1]
    shown = "  ".join(f"{name} {100 * scores[name]:.2f}" for name in COLUMNS)
    return f"epoch {position.epoch}  loss {scores['loss']:.3f}  {shown}"


def results_table(result: dict[str, float], settings: Settings, data: Dataset) -> Table:
    """This run's test scores beside those published with the data."""
    table = Table("", *COLUMNS, title="test scores, percent", caption=data.reference.get("source"))
    head = settings.head_dtype
    if head != "float32":
        head += f", {settings.rounding}"
    for name, scores in [
        (f"this run: {head} head, {settings.backend}", result),
        *((row["name"], row["scores"]) for row in data.reference.get("rows", [])),
    ]:
        table.add_row(name, *(f"{100 * scores[column]:.2f}" for column in COLUMNS))
    return table


def costs_table(model: TextClassifier, position: Position) -> Table:
    """Bytes of the head and of the process, and processor time."""
    weight, bias = model.head.weight, model.head.bias
    table = Table("this run", "", show_header=False)
    for name, value in (
        ("head weight", f"{weight.nbytes / 2**20:.1f} MiB ({weight.element_size()} B a weight)"),
        ("head weight in float32 would be", f"{4 * weight.numel() / 2**20:.1f} MiB"),
        ("head bias (float32)", f"{bias.nbytes / 2**20:.2f} MiB"),
        ("encoder weight (float32)", f"{model.encoder.weight.nbytes / 2**20:.1f} MiB"),
        ("peak memory of the process", f"{peak_memory_bytes() / 2**20:.0f} MiB"),
        ("CPU time of all training steps", f"{position.cpu_seconds / 60:.1f} min"),
        ("CPU time of this process", f"{time.process_time() / 60:.1f} min"),
    ):
        table.add_row(name, value)
    return table


if __name__ == "__main__":
    main()
