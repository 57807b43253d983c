"""The search: one field of `Tiles` after the other, the best of one kept for the next."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from elmo_compile.kernels.triton.configs import Tile

BETTER = 0.02
"""The share of its time by which a tile must beat the table's to replace it."""

Fields = Mapping[str, "Tile | None"]
Listed = Mapping[str, "list[Tile | None]"]
"""What to time for each field of `Tiles`, the table's tile first."""
Measure = Callable[[str, Fields], float]
"""Seconds of the step that shows a field, with these fields changed. Raises what it raises."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """One tile: with neither seconds nor failure, what is about to be timed."""

    field: str
    tile: Tile | None
    number: int
    of: int
    seconds: float | None = None
    failed: str | None = None


Told = Callable[[Trial], None]


class Kept(NamedTuple):
    """What was chosen for a field, and what it gained."""

    tile: Tile | None
    seconds: float
    table_seconds: float
    """Of the table's tile; infinite if that did not run."""


def search(listed: Listed, measure: Measure, told: Told) -> dict[str, Kept]:
    """The fastest of each field; the first unless another is faster by more than noise.

    Fields with one tile are left out. Until it is chosen itself, there is no pass that dx and the
    update share: the products it would replace are timed first. `told` hears of every trial twice,
    before and after.
    """
    best: dict[str, Tile | None] = {"shared": None, "shared_with_state": None}
    kept: dict[str, Kept] = {}
    fields = {field: tiles for field, tiles in listed.items() if len(tiles) > 1}
    numbers, of = itertools.count(1), sum(map(len, fields.values()))
    for field, tiles in fields.items():
        seconds: dict[Tile | None, float] = {}
        for tile in tiles:
            trial = Trial(field=field, tile=tile, number=next(numbers), of=of)
            told(trial)
            try:
                seconds[tile] = measure(field, {**best, field: tile})
            except Exception as error:  # it does not fit the chip, or is wrong: a result
                told(dataclasses.replace(trial, failed=said(error)))
                continue
            told(dataclasses.replace(trial, seconds=seconds[tile]))
        own, fastest = tiles[0], min(seconds, key=lambda t: seconds[t], default=tiles[0])
        if fastest != own and own in seconds:
            # The clock may have risen meanwhile: the table's once more.
            again = measure(field, {**best, field: own})
            seconds[own] = min(seconds[own], again)
        before = seconds.setdefault(own, float("inf"))
        best[field] = fastest if seconds[fastest] < (1 - BETTER) * before else own
        kept[field] = Kept(best[field], seconds[best[field]], before)
    return kept


def said(error: BaseException) -> str:
    """An error on one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
