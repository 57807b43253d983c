"""Tiles that `elmo-compile tune` found, on disk: one JSON file a kind of device, read once.

An entry holds for the head it was tuned for (`HeadKey`) and the very kernels, Triton and torch it
was tuned with; every other head, and an entry that cannot be right, has the table's tiles.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import json
import os
import re
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import triton

from elmo_compile.kernels.problem import HeadProblem
from elmo_compile.kernels.triton.candidates import FIELDS, OPTIONAL, HeadKey, objection
from elmo_compile.kernels.triton.configs import Tile, chip_of, is_assumed

Fields = Mapping[str, "Tile | None"]
"""Fields of `Tiles` to take in the place of the table's."""

NOT_KERNELS = ("tuned.py", "candidates.py", "offline.py")
"""Files of this folder that no kernel and no launch depends on."""

_by_device: dict[int, dict[HeadKey, Fields]] = {}
_lock = threading.Lock()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """What a run of the tuner found."""

    key: HeadKey
    tiles: Fields
    """The best of each field that was tuned, be it the table's own."""
    before_ms: float
    """A step with the table's tiles."""
    after_ms: float
    tuned_for: str
    """Loss, state and outputs, for whoever reads the file."""


def tuned_tiles(p: HeadProblem, chip: int) -> Fields:
    """The fields tuned for a call, none for most; its device's file is read at its first call."""
    x_ND = p.x_ND
    if x_ND.device.type != "cuda" or is_assumed() or p.fp8_features:
        return {}
    index = x_ND.device.index
    found = _by_device.get(index)
    if found is None:
        with _lock:
            if index not in _by_device:
                read_now: dict[HeadKey, Fields] = {}
                try:
                    read_now = _of_device(x_ND.device, chip)
                finally:  # a warning that is an error is one once
                    _by_device[index] = read_now
            found = _by_device[index]
    if not found:
        return {}
    N, D = x_ND.shape
    return found.get(HeadKey.of(N, D, p.w_LD.dtype, p.compute_dtype), {})


def forget() -> None:
    """Read the files again at the next call."""
    with _lock:
        _by_device.clear()


def enabled() -> bool:
    """Whether tuned tiles are used at all: not with ELMO_COMPILE_TUNED=0."""
    return os.environ.get("ELMO_COMPILE_TUNED", "1") != "0"


def folder() -> Path:
    """Where the files are: ELMO_COMPILE_CACHE_DIR, else `elmo_compile` in the user's cache."""
    if own := os.environ.get("ELMO_COMPILE_CACHE_DIR"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "elmo_compile"


def file_of(device: torch.device) -> Path:
    """The file of a kind of device: its name and capability."""
    properties = torch.cuda.get_device_properties(device)
    name = re.sub(r"[^a-z0-9]+", "-", properties.name.lower()).strip("-")
    return folder() / f"{name}-sm{properties.major}{properties.minor}.json"


@functools.cache
def versions() -> dict[str, str]:
    """What an entry holds for: a digest of the kernels' source, Triton's and torch's versions."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        if file.name not in NOT_KERNELS:
            digest.update(file.read_bytes())
    return {
        "kernels": digest.hexdigest()[:12],
        "triton": triton.__version__,
        "torch": str(torch.__version__),
    }


def read(path: Path, chip: int) -> tuple[dict[HeadKey, Fields], int]:
    """The entries of a file that hold here, and how many are of other versions.

    Warns of a file or an entry that cannot be used, and leaves it out.
    """
    found: dict[HeadKey, Fields] = {}
    others = 0
    for number, raw in enumerate(_raw_entries(path)):
        if raw.get("versions") != versions():
            others += 1
            continue
        try:
            key, tiles = _parsed(raw, chip)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            _warn(f"{path}: entry {number} cannot be used ({error})")
            continue
        found[key] = tiles
    return found, others


def save(device: torch.device, entry: Entry) -> Path:
    """Add an entry to its device's file, which is replaced whole or not at all.

    Of an entry of the same head and versions, fields that were not tuned now are kept.
    """
    path, properties = file_of(device), torch.cuda.get_device_properties(device)
    head = entry.key._asdict()
    before = read(path, chip_of(device)[0])[0].get(entry.key, {})
    tiles = {field: t and t._asdict() for field, t in {**before, **entry.tiles}.items()}
    kept = [
        raw
        for raw in _raw_entries(path)
        if raw.get("versions") != versions() or raw.get("head") != head
    ]
    new = {
        "head": head,
        "tiles": tiles,
        "before_ms": round(entry.before_ms, 4),
        "after_ms": round(entry.after_ms, 4),
        "tuned_for": entry.tuned_for,
        "date": datetime.date.today().isoformat(),
        "versions": versions(),
    }
    _replace(path, {"device": properties.name, "entries": [*kept, new]})
    forget()
    return path


def _of_device(device: torch.device, chip: int) -> dict[HeadKey, Fields]:
    if not enabled():
        return {}
    try:
        path = file_of(device)
    except RuntimeError:  # a user without a home folder
        return {}
    return read(path, chip)[0]


def _raw_entries(path: Path) -> list[dict[str, Any]]:
    """The entries as they are written; none, and a warning, for a file that is not one of these."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["entries"]
        if not (isinstance(entries, list) and all(isinstance(one, dict) for one in entries)):
            raise ValueError("no list of entries")
    except FileNotFoundError:
        return []
    except (OSError, KeyError, TypeError, ValueError) as error:
        _warn(f"{path} cannot be read ({type(error).__name__}: {error})")
        return []
    return entries


def _parsed(raw: Mapping[str, Any], chip: int) -> tuple[HeadKey, Fields]:
    """An entry's key and tiles. Raises what a wrong one leads to."""
    key = HeadKey(**raw["head"])
    _check_integers(key)
    known = key.operand_bytes in (2, 4) and key.weight_bytes in (1, 2, 4)
    if not known or key.rows < 16 or key.rows & (key.rows - 1) or key.features < 1:
        raise ValueError(f"no head: {key}")
    return key, dict(_parsed_tiles(raw["tiles"], key, chip))


def _parsed_tiles(
    raw: Mapping[str, Any], key: HeadKey, chip: int
) -> Iterator[tuple[str, Tile | None]]:
    for field, sizes in raw.items():
        if field not in FIELDS:
            raise ValueError(f"no tile is called {field!r}")
        if sizes is None:
            if field not in OPTIONAL:
                raise ValueError(f"{field} is null")
            yield field, None
            continue
        tile = Tile(**sizes)
        _check_integers(tile)
        if problem := objection(field, tile, key, chip):
            raise ValueError(f"{field}: {problem}")
        yield field, tile


def _check_integers(values: tuple[object, ...]) -> None:
    if not all(type(value) is int for value in values):
        raise TypeError(f"not integers: {values}")


def _replace(path: Path, content: object) -> None:
    """Write JSON beside a file, then take its place: a reader sees one of the two, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=1) + "\n")
        os.chmod(part, 0o644)  # a folder may be shared
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise


def _warn(problem: str) -> None:
    warnings.warn(
        f"{problem}; the built-in tiles are used in its place. Tune again, or delete it.",
        stacklevel=2,
    )
