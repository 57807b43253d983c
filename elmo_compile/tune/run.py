"""What is tuned for a head, in which order, and what comes of it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from elmo_compile import bench
from elmo_compile.errors import OptionError
from elmo_compile.numerics.losses import BCE
from elmo_compile.tune.clock import Step, median_seconds
from elmo_compile.tune.head import State, TunedHead
from elmo_compile.tune.search import Kept, Listed, Told, search

if TYPE_CHECKING:
    from elmo_compile.kernels.triton.candidates import Candidate, HeadKey
    from elmo_compile.kernels.triton.configs import Tile


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """The tiles kept, those of the table, and seconds of a step with either."""

    key: HeadKey
    table: dict[str, Tile | None]
    kept: dict[str, Kept]
    before: float
    after: float
    tuned_for: str


def candidates_of(
    case: bench.Case, state: State, chip: int | None = None
) -> dict[str, list[Candidate]]:
    """What could be tried for each field a case's step uses, in the order of the search.

    Args:
        chip: 90 for sm_90; None: the case's device.
    """
    from elmo_compile.kernels.triton.candidates import candidates
    from elmo_compile.kernels.triton.configs import chip_of

    chip = chip_of(torch.device(case.device))[0] if chip is None else chip
    shared = "shared" if state == "none" else "shared_with_state"
    products = ("features", "weights", shared)
    # BCE's step makes the loss too, as training does; a step without has another tile.
    bce = ("logits_narrow", *products, "logits")
    fields = bce if case.loss == BCE else ("logits", *products)
    return {field: candidates(field, key_of(case), chip) for field in fields}


def key_of(case: bench.Case) -> HeadKey:
    """What the case's tiles are kept under."""
    from elmo_compile.kernels.triton.candidates import HeadKey

    compute = bench.head_shape(case).compute_dtype
    return HeadKey.of(case.rows, case.features, case.dtype, compute)


def tune(
    case: bench.Case,
    *,
    state: State = "none",
    told: Told = lambda trial: None,
    listed: Listed | None = None,
    timer: Callable[[Step], float] | None = None,
) -> Result:
    """The fastest tiles of a head; nothing is written.

    Args:
        case: the head; of its outputs, whole chunks are used.
        told: is called before and after each tile.
        listed: what to time; None: the candidates that are not dropped.
        timer: seconds of a step; None: of the device.

    Raises:
        OptionError: no chunk fits the budget, or the head does not fit the device.
    """
    from elmo_compile.kernels.triton.configs import Tiles, chip_of

    if listed is None:
        found = candidates_of(case, state)
        listed = {field: [c.tile for c in of if not c.dropped] for field, of in found.items()}
    device, key = torch.device(case.device), key_of(case)
    timer = timer or (lambda step: median_seconds(step, case.device))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        tiles = key.table(chip_of(device)[0])
        table = {field.name: getattr(tiles, field.name) for field in dataclasses.fields(Tiles)}
        head = TunedHead(case, state, table)
        kept = search(listed, lambda field, fields: head.measure(field, fields, timer), told)
        head.set_back(kept, told)
        tiles_kept = {field: one.tile for field, one in kept.items()}
        before, after = (head.measure("weights", fields, timer) for fields in ({}, tiles_kept))
    return Result(
        key=key,
        table={field: table[field] for field in kept},
        kept=kept,
        before=before,
        after=after,
        tuned_for=f"{case.loss}, state {state}, {head.outputs} outputs by {head.chunk}",
    )


def summary() -> str:
    """How many entries the devices of this machine have, and where."""
    from elmo_compile.kernels.triton import tuned
    from elmo_compile.kernels.triton.configs import chip_of

    if not tuned.enabled():
        return "not used: ELMO_COMPILE_TUNED=0"
    found = {}
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.device("cuda", index)
        try:
            entries, others = tuned.read(tuned.file_of(device), chip_of(device)[0])
        except OptionError:
            continue  # too old for the kernels
        more = f" and {others} of other versions" if others else ""
        name = torch.cuda.get_device_properties(device).name
        found[name] = f"{len(entries)} heads{more} for {name}"
    return f"{'; '.join(found.values()) or 'no device'}; kept in {tuned.folder()}"
