"""What `elmo-compile tune` prints, and keeps."""

from __future__ import annotations

import os
import time
from collections import Counter
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from elmo_compile.bench import Case
from elmo_compile.errors import OptionError
from elmo_compile.tune.head import State
from elmo_compile.tune.run import Result, candidates_of, key_of, tune
from elmo_compile.tune.search import Listed, Trial

if TYPE_CHECKING:
    from elmo_compile.kernels.triton.configs import Tile


_PRODUCTS = {
    "logits": "logits and their gradient, rows of the batch x outputs",
    "logits_narrow": "logits, gradient and loss value, rows of the batch x outputs",
    "features": "gradient of the features, rows of the batch x features",
    "weights": "gradient of the weight or its update, outputs x features",
    "shared": "features and weights in one pass, rows of the batch x features",
    "shared_with_state": "features and weights in one pass, rows of the batch x features",
}


def show_candidates(case: Case, state: State, chip: int | None = None) -> None:
    """Print every tile of a case, and why some are not timed; nothing is compiled."""
    from elmo_compile.kernels.triton.configs import CHIPS

    if chip is not None and chip not in CHIPS:
        raise OptionError(f"--chip {chip} is not known; accepted: {', '.join(map(str, CHIPS))}.")
    listed = candidates_of(case, state, chip)
    console = Console(width=120)
    of = "this GPU" if chip is None else f"sm_{chip}"
    console.print(Text(f"Tiles for {of}: {key_of(case).described()}"))
    table = Table()
    for name in ("field", "rows x columns x inner step", ""):
        table.add_column(name, no_wrap=True)
    for field, candidates in listed.items():
        for at, candidate in enumerate(candidates):
            note = f"left out: {candidate.dropped}" if candidate.dropped else ""
            note = note or ("" if at else "the table's")
            table.add_row("" if at else field, described(candidate.tile), note)
        table.add_section()
    console.print(table)
    for field in listed:
        console.print(Text(f"{field}: {_PRODUCTS[field]}"))
    counts = Counter(c.dropped is None for candidates in listed.values() for c in candidates)
    console.print(Text(f"{counts[True]} to time, {counts[False]} left out"))


def tune_and_save(case: Case, state: State, listed: Listed | None = None) -> None:
    """Tune with a line for each tile as it is timed, print what was kept, and write it down."""
    from elmo_compile.kernels.triton.tuned import Entry, enabled, save

    _require_a_folder()
    console = Console(width=100)
    console.print(Text("Every tile is compiled before it is timed: expect minutes."))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("preparing the head", total=None)
        begun = time.perf_counter()

        def told(trial: Trial) -> None:
            nonlocal begun
            name = f"{trial.field} {described(trial.tile)}"
            if trial.seconds is None and trial.failed is None:
                begun = time.perf_counter()
                progress.update(task, description=name, completed=trial.number - 1, total=trial.of)
                return
            found = trial.failed or f"{1e3 * (trial.seconds or 0):.4g} ms"
            took = time.perf_counter() - begun
            line = f"{trial.number}/{trial.of} {name}: {found} ({took:.0f} s with its compilation)"
            progress.console.print(Text(line))
            progress.update(task, completed=trial.number)

        result = tune(case, state=state, told=told, listed=listed)
    _show(result, console)
    path = save(
        torch.device(case.device),
        Entry(
            key=result.key,
            tiles={field: kept.tile for field, kept in result.kept.items()},
            before_ms=1e3 * result.before,
            after_ms=1e3 * result.after,
            tuned_for=result.tuned_for,
        ),
    )
    console.print(Text(f"written to {path}"))
    if not enabled():
        console.print(Text("ELMO_COMPILE_TUNED=0 is set: it will not be used"))


def _require_a_folder() -> None:
    """Before minutes are spent on what could not be kept."""
    from elmo_compile.kernels.triton.tuned import folder

    try:
        folder().mkdir(parents=True, exist_ok=True)
        writable = os.access(folder(), os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise OptionError(f"{folder()} cannot be written; set ELMO_COMPILE_CACHE_DIR to a folder.")


def _show(result: Result, console: Console) -> None:
    table = Table(title=f"Tiles kept for {result.tuned_for}", title_justify="left")
    for name in ("field", "the table's", "kept", "faster"):
        table.add_column(name)
    for field, kept in result.kept.items():
        own = result.table[field]
        cells = ("the same", "")
        if kept.tile != own:
            faster = f"{100 * (1 - kept.seconds / kept.table_seconds):.0f} %"
            cells = (described(kept.tile), faster)
        table.add_row(field, described(own), *cells)
    console.print(table)
    before, after = 1e3 * result.before, 1e3 * result.after
    console.print(Text(f"a step takes {after:.4g} ms instead of {before:.4g} ms"))


def described(tile: Tile | None) -> str:
    """A tile as one reads it."""
    if tile is None:
        return "no such pass"
    rows, columns, inner, warps, stages = tile
    return f"{rows} x {columns} x {inner}, {warps} warps, {stages} stages"
