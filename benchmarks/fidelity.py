"""What storage and rounding of a head cost under each optimizer: three data sets, paired seeds.

    python benchmarks/fidelity.py --data DIR            # three hours of one core, resumed
    python benchmarks/fidelity.py --data DIR --quick     # a minute, to see that it works
    python benchmarks/fidelity.py --report               # table and figure of what is there

The classifier of examples/train_xmc.py (hashed words -> EmbeddingBag -> head, summed BCE) is
trained with its head in float32, bf16 and fp8, under each rounding, by SGD, momentum and AdamW.
For each head the rate is chosen on a validation split with the first seed (Debian's on half of the
points); then three seeds are trained on everything and tested. Runs of one seed share initial
weights and data order. The encoder is float32 and trained alike everywhere.

DIR holds `bibtex_{train,test}.txt.gz` and `delicious_{train,test}.txt.gz` (XMLRepository format);
Debian's packages are in examples/data. Every finished run is a line of results/fidelity.jsonl and
is not repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from rich.progress import Progress  # noqa: E402
from xmc_data import (  # noqa: E402
    Dataset,
    Part,
    batches,
    inverse_document_frequency,
    load,
    split,
    tfidf,
)
from xmc_model import Settings, Trainer, rank, score  # noqa: E402
from xmlrepo import read_xmlrepo  # noqa: E402

import elmo_compile as elmo  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results" / "fidelity.jsonl"
FIGURE = ROOT / "docs" / "fidelity.png"
SEEDS = (0, 1, 2)

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "float32": ("float32", {}),
    "bf16 nearest": ("bfloat16", {"rounding": "nearest"}),
    "bf16 stochastic": ("bfloat16", {"rounding": "stochastic"}),
    "bf16 kahan": ("bfloat16", {"rounding": "kahan"}),
    "fp8 nearest": ("float8_e4m3fn", {"rounding": "nearest"}),
    "fp8 stochastic": ("float8_e4m3fn", {"rounding": "stochastic"}),
    "fp8 kahan": ("float8_e4m3fn", {"rounding": "kahan"}),
    "fp8 kahan 5 %": ("float8_e4m3fn", {"rounding": "stochastic", "kahan_rows": "counts"}),
}
"""Storage and the optimizer's options; the first is what the others are compared with."""

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (elmo.optim.SGD, {}),
    "momentum": (elmo.optim.SGD, {"momentum": 0.9}),
    "AdamW": (elmo.optim.AdamW, {"weight_decay": 0.0}),
}
"""Class and options."""
RATES: dict[str, tuple[float, ...]] = {
    "SGD": (0.25, 0.5, 1.0, 2.0),
    "momentum": (0.025, 0.05, 0.1, 0.2),
    "AdamW": (1e-3, 3e-3, 1e-2),
}
"""Tried on the validation split."""
DEBIAN_RATES = {
    **RATES,
    "SGD": (0.5, 1.0, 2.0, 4.0, 8.0, 16.0),
    "momentum": (0.05, 0.1, 0.2, 0.4, 0.8, 1.6),
}


@dataclasses.dataclass(frozen=True)
class Task:
    """A data set and how it is trained."""

    name: str
    dim: int
    epochs: int
    batch_size: int
    choose_every: int = 1
    """Rates are chosen on every n-th training point."""


TASKS = (
    Task("bibtex", 128, 10, 128),
    Task("delicious", 128, 10, 128),
    Task("debian", 128, 2, 256, 2),
)


@dataclasses.dataclass(frozen=True)
class Run:
    """One training."""

    task: str
    optimizer: str
    variant: str
    stage: str
    """`choose` (a rate, tested on the validation split) or `test`."""
    lr: float
    seed: int

    @property
    def key(self) -> str:
        """A name for the results file."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


class HeadTrainer(Trainer):
    """The trainer of train_xmc.py with the head's optimizer of a run."""

    def __init__(self, run: Run, settings: Settings, data: Dataset, *, total_steps: int) -> None:
        self.run, self.counts = run, torch.from_numpy(data.label_counts())
        super().__init__(settings, data, total_steps=total_steps)

    def head_optimizer(self) -> torch.optim.Optimizer:
        """Updates the head inside backward."""
        make, options = OPTIMIZERS[self.run.optimizer]
        own = dict(VARIANTS[self.run.variant][1])
        groups = [{"params": [self.model.head.weight]}, {"params": [self.model.head.bias]}]
        if "kahan_rows" in own:
            del own["kahan_rows"]
            groups[0]["kahan_rows"] = (0.05, self.counts)  # type: ignore[assignment]
        optimizer: torch.optim.Optimizer = make(
            groups, self.run.lr, seed=self.run.seed, **options, **own
        )
        return optimizer


def read(task: str, folder: Path | None, limit: int | None) -> Dataset:
    """A data set with tf-idf features."""
    if task == "debian":
        return load(ROOT / "examples" / "data" / "debian-xmc", limit)
    if folder is None:
        raise SystemExit(f"{task} needs --data, the folder with {task}_train.txt.gz")
    parts = []
    for part in ("train", "test"):
        features, labels, shape = read_xmlrepo(folder / f"{task}_{part}.txt.gz", limit)
        parts.append(Part(features, labels, np.arange(len(labels.start) - 1)))
    idf = inverse_document_frequency(parts[0].features, shape[0])
    train, test = (dataclasses.replace(p, features=tfidf(p.features, idf)) for p in parts)
    return Dataset(train, test, idf, shape[1], [str(i) for i in range(shape[1])], {})


def train(run: Run, task: Task, data: Dataset) -> dict[str, Any]:
    """Train and test once."""
    torch.manual_seed(run.seed)
    settings = Settings(
        head_dtype=VARIANTS[run.variant][0],  # type: ignore[arg-type]
        epochs=task.epochs,
        batch_size=task.batch_size,
        dim=task.dim,
        seed=run.seed,
    )
    per_epoch = -(-len(data.train) // task.batch_size)
    torch._dynamo.reset()
    trainer = HeadTrainer(run, settings, data, total_steps=per_epoch * task.epochs)
    started, loss = time.process_time(), 0.0
    for epoch in range(task.epochs):
        order = np.random.default_rng([run.seed, epoch]).permutation(len(data.train))
        losses = [trainer.step(b) for b in batches(data.train, order, task.batch_size)]
        loss = float(np.mean(losses))
    labels, _ = rank(trainer.model, data.test, 5)
    found = score(labels, data.test, data)
    counters = trainer.optimizers[0].counters()  # type: ignore[attr-defined]
    return {
        **dataclasses.asdict(run),
        "loss": loss,
        **{name: value for name, value in found.items() if name.startswith("P@")},
        "cpu_seconds": time.process_time() - started,
        **{k: v for k, v in next(iter(counters.values()), {}).items() if v == v},
    }


def rates_of(task: str, optimizer: str) -> tuple[float, ...]:
    """The rates that are tried."""
    return (DEBIAN_RATES if task == "debian" else RATES)[optimizer]


def chosen_rate(task: str, optimizer: str, variant: str, done: dict[str, Any]) -> float:
    """The rate with the best P@1 on the validation split, of those that are done."""
    tried = {}
    for lr in rates_of(task, optimizer):
        key = Run(task, optimizer, variant, "choose", lr, 0).key
        if key in done:
            tried[lr] = done[key]["P@1"]
    return max(tried, key=lambda lr: tried[lr])


def finished() -> dict[str, dict[str, Any]]:
    """Results so far, by `Run.key`."""
    if not RESULTS.exists():
        return {}
    names = [field.name for field in dataclasses.fields(Run)]
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    return {Run(**{name: row[name] for name in names}).key: row for row in rows}


def run_all(options: argparse.Namespace) -> None:
    """Everything that is missing."""
    done = finished()
    RESULTS.parent.mkdir(exist_ok=True)
    with Progress() as progress:
        for task in TASKS:
            if task.name not in options.tasks:
                continue
            data = read(task.name, options.data, 512 if options.quick else None)
            fit, held = split(data.train, 0.15, seed=20240607)
            fit = fit.take(np.arange(0, len(fit), task.choose_every))
            validation = dataclasses.replace(data, train=fit, test=held)
            pairs = list(itertools.product(options.optimizers, VARIANTS))
            bar = progress.add_task(task.name, total=len(pairs) * (6 + len(SEEDS)))
            for optimizer, variant in pairs:
                stages = [("choose", lr, 0) for lr in rates_of(task.name, optimizer)]
                for stage, lr, seed in stages + [("test", -1.0, seed) for seed in SEEDS]:
                    if stage == "test":
                        lr = chosen_rate(task.name, optimizer, variant, done)
                    run = Run(task.name, optimizer, variant, stage, lr, seed)
                    if run.key not in done:
                        row = train(run, task, validation if stage == "choose" else data)
                        done[run.key] = row
                        if not options.quick:
                            with RESULTS.open("a") as file:
                                file.write(json.dumps(row) + "\n")
                    progress.advance(bar)
                if options.quick:
                    print(task.name, optimizer, variant, done[run.key]["P@1"])


def rows_of(
    done: dict[str, dict[str, Any]],
) -> Iterator[tuple[str, str, str, list[dict[str, Any]]]]:
    """(task, optimizer, variant, test runs by seed) of what is complete."""
    for task, optimizer, variant in itertools.product(
        [t.name for t in TASKS], OPTIMIZERS, VARIANTS
    ):
        found = [
            row
            for row in done.values()
            if (row["task"], row["optimizer"], row["variant"], row["stage"])
            == (task, optimizer, variant, "test")
            and row["lr"] == chosen_rate(task, optimizer, variant, done)
        ]
        if len(found) >= len(SEEDS):
            yield task, optimizer, variant, sorted(found, key=lambda row: row["seed"])


@dataclasses.dataclass(frozen=True)
class Compared:
    """One head on one data set under one optimizer, beside float32 with the same seeds."""

    task: str
    optimizer: str
    variant: str
    rows: list[dict[str, Any]]
    base: list[dict[str, Any]]

    @property
    def same_rate(self) -> bool:
        """Whether validation chose the rate that it chose for float32."""
        return bool(self.rows[0]["lr"] == self.base[0]["lr"])

    def differences(self, name: str) -> list[float]:
        """Percentage points (`loss`: percent) for each seed."""
        pairs = zip(self.rows, self.base)
        if name == "loss":
            return [100 * (row[name] / other[name] - 1) for row, other in pairs]
        return [100 * (row[name] - other[name]) for row, other in pairs]


def report() -> None:
    """Print the table of differences, write the long one and draw the figure."""
    base: dict[tuple[str, str], list[dict[str, Any]]] = {}
    found = []
    for task, optimizer, variant, rows in rows_of(finished()):
        base.setdefault((task, optimizer), rows)  # float32 comes first
        found.append(Compared(task, optimizer, variant, rows, base[task, optimizer]))
    RESULTS.with_suffix(".md").write_text("\n".join(_long_table(found)) + "\n")
    print("\n".join(_short_table(found)))
    _draw(found)


def _long_table(found: list[Compared]) -> Iterator[str]:
    yield "| data | optimizer | head | rate | P@1 | P@3 | P@5 | loss | P@1 - float32 |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for c in found:
        cells = [
            _spread([100 * row[name] for row in c.rows], "{:.2f}") for name in ("P@1", "P@3", "P@5")
        ]
        cells.append(_spread([row["loss"] for row in c.rows], "{:.3f}"))
        cells.append("" if c.variant == "float32" else _spread(c.differences("P@1"), "{:+.2f}"))
        start = f"| {c.task} | {c.optimizer} | {c.variant} | {c.rows[0]['lr']:g} | "
        yield start + " | ".join(cells) + " |"


def _short_table(found: list[Compared]) -> Iterator[str]:
    """A row a head, a column a data set and optimizer: P@1, or its difference to float32.

    A star: validation chose another rate than for float32.
    """
    columns = list(dict.fromkeys((c.task, c.optimizer) for c in found))
    yield "| P@1 | " + " | ".join(f"{task}, {optimizer}" for task, optimizer in columns) + " |"
    yield "|---" * (1 + len(columns)) + "|"
    for variant in VARIANTS:
        cells = []
        for column in columns:
            match = [c for c in found if (c.task, c.optimizer, c.variant) == (*column, variant)]
            if not match:
                cells.append("")
            elif variant == "float32":
                cells.append(_spread([100 * row["P@1"] for row in match[0].rows], "{:.2f}"))
            else:
                other = "" if match[0].same_rate else " *"
                cells.append(_spread(match[0].differences("P@1"), "{:+.2f}") + other)
        yield f"| {variant} | " + " | ".join(cells) + " |"


def _spread(values: list[float], form: str) -> str:
    """Mean and standard deviation over seeds."""
    return f"{form.format(statistics.mean(values))} ± {statistics.stdev(values):.2f}"


def _draw(found: list[Compared]) -> None:
    import matplotlib.pyplot as plt

    names = {"P@1": "P@1 - float32, points", "loss": "training loss, % over float32"}
    variants = [variant for variant in VARIANTS if variant != "float32"]
    figure, axes = plt.subplots(
        len(names), len(OPTIMIZERS), figsize=(12, 7), sharex=True, sharey="row", squeeze=False
    )
    for column, optimizer in enumerate(OPTIMIZERS):
        for row, name in enumerate(names):
            axis = axes[row][column]
            for offset, task in enumerate(t.name for t in TASKS):
                mine = [c for c in found if (c.task, c.optimizer) == (task, optimizer)]
                mine = [c for c in mine if c.variant != "float32"]
                at = [variants.index(c.variant) + 0.15 * (offset - 1) for c in mine]
                for kept, fill in ((True, None), (False, "none")):
                    shown = [(x, c) for x, c in zip(at, mine) if c.same_rate == kept]
                    if name == "loss" and not kept:
                        continue  # another rate is another loss
                    seeds = [c.differences(name) for _, c in shown]
                    axis.errorbar(
                        [x for x, _ in shown],
                        [statistics.mean(s) for s in seeds],
                        [statistics.stdev(s) for s in seeds],
                        fmt="o",
                        color=f"C{offset}",
                        markerfacecolor=fill,
                        capsize=3,
                        label=task if kept else None,
                    )
            axis.axhline(0, color="grey", linewidth=0.8)
        axes[0][column].set_title(optimizer)
        axes[-1][column].set_xticks(range(len(variants)), variants, rotation=60, ha="right")
    for row, label in enumerate(names.values()):
        axes[row][0].set_ylabel(label)
    axes[-1][0].legend(title="3 paired seeds; hollow: other rate")
    figure.tight_layout()
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, dpi=110)
    plt.close(figure)


def main() -> None:
    """Run what is missing, then report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, help="folder of bibtex and delicious")
    parser.add_argument("--tasks", nargs="+", default=[t.name for t in TASKS])
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS))
    parser.add_argument("--quick", action="store_true", help="512 points a part; nothing is kept")
    parser.add_argument("--report", action="store_true", help="only report")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not options.report:
        run_all(options)
    if not options.quick:
        report()


if __name__ == "__main__":
    main()
