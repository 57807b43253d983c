"""From finished runs to conclusions: paired differences with intervals, a table, a figure.

Shapes: S seeds, N test points, G groups (source packages), B resamplings.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from rich.table import Table
from xmc_data import Dataset

from elmo_compile.metrics import hits, inverse_propensity, propensity_gains

METRICS = ("P@1", "P@3", "P@5", "PSP@5")
RESAMPLINGS = 2000
CONFIDENCE = 0.95
GROUPS_BY_FREQUENCY = 10
STAGES = {"trained": "encoder trained", "frozen": "encoder frozen"}


def summarise(
    records: list[dict[str, Any]], tops: Sequence[np.ndarray], data: Dataset, *, baseline: str
) -> dict[str, Any]:
    """Differences to the baseline with intervals; adds P@1 by label frequency to each record.

    Args:
        records: of all runs; each gets `deciles`, P@1 of ten equal groups of test points.
        tops: int [N, K] of each run, the labels ranked first.
        data: whose test part was ranked.
        baseline: the variant to compare with, of the same stage and seed.
    """
    parts = [per_point(top, data) for top in tops]
    decile_N = frequency_deciles(data)
    for record, part in zip(records, parts):
        p1_N = part["P@1"][0]
        record["deciles"] = [float(p1_N[decile_N == d].mean()) for d in range(GROUPS_BY_FREQUENCY)]
    by_run = {(r["stage"], r["variant"], r["seed"]): p for r, p in zip(records, parts)}
    differences = []
    for stage, variant in dict.fromkeys((r["stage"], r["variant"]) for r in records):
        if variant == baseline:
            continue
        seeds = sorted(s for st, v, s in by_run if (st, v) == (stage, variant))
        for metric in METRICS:
            gained_SN = np.stack(
                [
                    by_run[stage, variant, s][metric][0] - by_run[stage, baseline, s][metric][0]
                    for s in seeds
                ]
            )
            possible_N = by_run[stage, baseline, seeds[0]][metric][1]
            interval = paired_interval(gained_SN, possible_N, data.test.groups)
            differences.append({"stage": stage, "variant": variant, "metric": metric, **interval})
    return {"differences": differences, "confidence": CONFIDENCE, "resamplings": RESAMPLINGS}


def per_point(top: np.ndarray, data: Dataset) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What each test point gained and could have, float64 [N] each; a metric is a ratio of sums."""
    targets = data.test.targets()
    hits_NK = hits(top, targets).double()
    scores = {
        f"P@{k}": (hits_NK[:, :k].sum(1).numpy(), np.full(len(top), float(k))) for k in (1, 3, 5)
    }
    inverse_L = inverse_propensity(torch.from_numpy(data.label_counts()), len(data.train))
    gains = propensity_gains(top, targets, inverse_L, (5,))
    return scores | {"PSP@5": (gains.earned[:, 0].numpy(), gains.ideal[:, 0].numpy())}


def frequency_deciles(data: Dataset) -> np.ndarray:
    """int [N]: 0 for the tenth of test points with the rarest labels, 9 for the most frequent.

    A point's frequency is the geometric mean of its labels' training counts.
    """
    labels = data.test.labels
    log_count_M = np.log1p(data.label_counts())[labels.columns]
    row_M = np.repeat(np.arange(len(data.test)), np.diff(labels.start))
    count_N = np.maximum(np.diff(labels.start), 1)
    mean_N = np.bincount(row_M, weights=log_count_M, minlength=len(data.test)) / count_N
    place_N = np.empty(len(mean_N), dtype=np.int64)
    place_N[np.argsort(mean_N, kind="stable")] = np.arange(len(mean_N))
    return place_N * GROUPS_BY_FREQUENCY // len(mean_N)


def paired_interval(
    gained_SN: np.ndarray, possible_N: np.ndarray, group_N: np.ndarray
) -> dict[str, Any]:
    """The mean difference over seeds, its percentile interval, and each seed's difference.

    The interval is a bootstrap that draws whole groups with replacement, for points of one group
    are not independent; the same draws serve all seeds. It says how sure the difference is on
    other packages, for these seeds; the seeds' own spread is given beside it.
    """
    _, group_N = np.unique(group_N, return_inverse=True)
    gained_G = np.bincount(group_N, weights=gained_SN.mean(0))
    possible_G = np.bincount(group_N, weights=possible_N)
    rng = np.random.default_rng(0)
    chance_G = np.full(len(gained_G), 1 / len(gained_G))
    resampled = np.empty(RESAMPLINGS)
    for b in range(RESAMPLINGS):
        drawn_G = rng.multinomial(len(gained_G), chance_G)
        resampled[b] = drawn_G @ gained_G / (drawn_G @ possible_G)
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return {
        "difference": float(gained_G.sum() / possible_G.sum()),
        "low": float(low),
        "high": float(high),
        "by_seed": (gained_SN.sum(1) / possible_N.sum()).tolist(),
    }


def differences_table(report: dict[str, Any]) -> Table:
    """Each variant's difference to float32 in percentage points, its interval, its seeds."""
    table = Table(
        "encoder",
        "head",
        "metric",
        "difference",
        f"{100 * report['confidence']:.0f} % interval",
        "single seeds",
        title="difference to the float32 head, percentage points",
        caption="interval: test packages resampled by source package; seeds: least..greatest",
    )
    before = None
    for d in report["differences"]:
        run = (d["stage"], d["variant"])
        if before not in (None, run):
            table.add_section()
        table.add_row(
            *(run if run != before else ("", "")),
            d["metric"],
            f"{100 * d['difference']:+.2f}",
            f"{100 * d['low']:+.2f} .. {100 * d['high']:+.2f}",
            f"{100 * min(d['by_seed']):+.2f} .. {100 * max(d['by_seed']):+.2f}",
        )
        before = run
    return table


def draw(report: dict[str, Any], path: Path) -> None:
    """One row for each stage: loss, P@1 and PSP@5 over epochs, P@1 by frequency; then memory."""
    runs = report["runs"]
    stages = [stage for stage in STAGES if any(run["stage"] == stage for run in runs)]
    variants = list(dict.fromkeys(run["variant"] for run in runs))
    colours = dict(zip(variants, plt.get_cmap("tab10").colors))
    figure, axes = plt.subplots(
        len(stages), 5, figsize=(22, 4.2 * len(stages)), squeeze=False, layout="constrained"
    )
    for row, stage in zip(axes, stages):
        for variant in variants:
            chosen = [r for r in runs if (r["stage"], r["variant"]) == (stage, variant)]
            for axis, metric in zip(row, ("loss", "P@1", "PSP@5")):
                scale = 1 if metric == "loss" else 100
                values = [[scale * epoch[metric] for epoch in r["history"]] for r in chosen]
                epochs = np.arange(1, len(values[0]) + 1)
                band(axis, epochs, np.array(values), variant, colours[variant])
                axis.set(xlabel="epoch", title=f"{metric}, {STAGES[stage]}", xticks=epochs)
            by_decile = difference_by_decile(runs, chosen, variants[0])
            band(row[3], np.arange(1, 11), by_decile, variant, colours[variant])
        row[0].set_ylabel("training loss of the epoch")
        row[1].set_ylabel("percent")
        row[3].set(
            title=f"P@1 minus float32's, {STAGES[stage]}",
            xlabel="tenth of test points, rarest labels first",
            ylabel="percentage points",
            xticks=range(1, 11),
        )
        memory_bars(row[4], [r for r in runs if r["stage"] == stage], variants, colours)
    axes[0][0].legend(fontsize=8)
    seeds = len({run["seed"] for run in runs})
    s = report["setting"]
    figure.suptitle(
        f"Lines: mean of {seeds} seed(s); shaded: from the least to the greatest. D={s['dim']}, "
        f"head lr {s['head_lr']:g}, encoder lr {s['encoder_lr']:g}, {s['backend']} backend."
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def band(axis: Any, x: np.ndarray, values_SX: np.ndarray, label: str, colour: Any) -> None:
    """The mean over seeds as a line, their range as a shade."""
    axis.plot(x, values_SX.mean(0), label=label, color=colour, marker=".")
    axis.fill_between(x, values_SX.min(0), values_SX.max(0), color=colour, alpha=0.15, lw=0)
    axis.grid(alpha=0.3)


def difference_by_decile(
    runs: list[dict[str, Any]], chosen: list[dict[str, Any]], baseline: str
) -> np.ndarray:
    """[S, 10] percentage points: each run's P@1 minus that of the baseline with its seed."""
    base = {(r["stage"], r["seed"]): r["deciles"] for r in runs if r["variant"] == baseline}
    return np.array([100 * np.subtract(r["deciles"], base[r["stage"], r["seed"]]) for r in chosen])


def memory_bars(
    axis: Any, runs: list[dict[str, Any]], variants: list[str], colours: dict[str, Any]
) -> None:
    """Bytes of the head's weight as bars, the process's peak as text."""
    for place, variant in enumerate(variants):
        mine = [run for run in runs if run["variant"] == variant]
        head = mine[0]["head_bytes"] / 2**20
        peaks = [run["peak_memory_bytes"] / 2**20 for run in mine]
        axis.barh(place, head, color=colours[variant])
        text = f" {head:.1f} (process: {np.mean(peaks):.0f})"
        axis.text(head, place, text, va="center", fontsize=8)
    axis.set(title="head weight, MiB (and peak of the process)", xlabel="MiB")
    axis.set_yticks(range(len(variants)), variants)
    axis.invert_yaxis()
    axis.margins(x=0.6)
