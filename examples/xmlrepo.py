"""The XMLRepository text format: `N F L`, then one line `l1,l2 f:v f:v` a point.

It is the format of the Extreme Classification Repository's bag-of-words data sets. Everything read
is held in compressed rows (`Rows`); N points, M entries in all, F features, L labels.
"""

from __future__ import annotations

import gzip
import warnings
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np


class DataError(Exception):
    """A data file is missing or is not what its format says; the message names file and line."""


class Rows(NamedTuple):
    """Sparse rows: row i has `columns[start[i]:start[i + 1]]` with the same slice of `values`."""

    start: np.ndarray
    """int64 [N + 1]."""
    columns: np.ndarray
    """int64 [M]."""
    values: np.ndarray
    """float32 [M]."""

    def take(self, rows: np.ndarray) -> Rows:
        """The rows at these positions, in their order."""
        counts = np.diff(self.start)[rows]
        start = np.concatenate([[0], np.cumsum(counts)])
        entries = np.arange(start[-1]) + np.repeat(self.start[rows] - start[:-1], counts)
        return Rows(start, self.columns[entries], self.values[entries])


def read_xmlrepo(path: Path, limit: int | None = None) -> tuple[Rows, Rows, tuple[int, int]]:
    """Features, labels and (F, L) of an XMLRepository file: `N F L`, then `l1,l2 f:v f:v`.

    A point may have no labels (the line begins with a space) or no features. Lines are read in
    bulk; only if that fails is each looked at, to say which one is wrong.

    Raises:
        DataError: the file cannot be read, or is not in this format.
    """
    header, *lines = read_lines(path)
    try:
        num_points, num_features, num_labels = (int(field) for field in header.split())
    except ValueError:
        raise DataError(
            f"{path}, line 1: the header must be three integers, points features labels; "
            f"it is {header[:60]!r}."
        ) from None
    if len(lines) != num_points:
        raise DataError(f"{path}: the header says {num_points} points, {len(lines)} lines follow.")
    fields = [line.partition(" ")[::2] for line in lines[:limit]]
    shape = (num_features, num_labels)
    try:
        labels = _labels([left for left, _ in fields], num_labels)
        features = _features([right for _, right in fields], num_features)
    except ValueError as error:
        raise _first_bad_line(path, fields, shape) or DataError(f"{path}: {error}") from None
    return features, labels, shape


def _labels(fields: list[str], num_labels: int) -> Rows:
    counts = [field.count(",") + 1 if field else 0 for field in fields]
    columns = _numbers(",".join(filter(None, fields)).replace(",", " "), sum(counts))
    return Rows(_starts(counts), _ids(columns, num_labels), np.ones(len(columns), np.float32))


def _features(fields: list[str], num_features: int) -> Rows:
    counts = [field.count(":") for field in fields]
    pairs = _numbers(" ".join(fields).replace(":", " "), 2 * sum(counts)).reshape(-1, 2)
    if not np.isfinite(pairs).all():
        raise ValueError("a value is not finite")
    columns, values = np.ascontiguousarray(pairs.T)
    return Rows(_starts(counts), _ids(columns, num_features), values.astype(np.float32))


def _numbers(text: str, count: int) -> np.ndarray:
    """`count` numbers parted by spaces, as float64; ValueError if there is anything else."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        try:
            numbers = np.fromstring(text, sep=" ") if text.strip() else np.empty(0)
        except (DeprecationWarning, ValueError) as error:  # a warning before numpy 2.4
            raise ValueError("not a number") from error
    if len(numbers) != count:
        raise ValueError(f"{len(numbers)} numbers where {count} belong")
    return numbers


def _ids(numbers: np.ndarray, below: int) -> np.ndarray:
    ids = numbers.astype(np.int64)
    if len(ids) and not (ids.min() >= 0 and ids.max() < below and np.array_equal(ids, numbers)):
        raise ValueError(f"ids must be integers from 0 to {below - 1}")
    return ids


def _starts(counts: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)


def _first_bad_line(
    path: Path, fields: list[tuple[str, str]], shape: tuple[int, int]
) -> DataError | None:
    for number, (left, right) in enumerate(fields, start=2):
        try:
            _labels([left], shape[1])
            _features([right], shape[0])
        except ValueError as error:
            return DataError(
                f"{path}, line {number}: {error}; a line is `l1,l2 f:v f:v` with labels below "
                f"{shape[1]} and features below {shape[0]}, this one begins "
                f"{f'{left} {right}'[:60]!r}."
            )
    return None


def read_lines(path: Path) -> list[str]:
    """Lines of `path`, or of `path.gz` where only that exists."""
    packed = path.with_name(path.name + ".gz")
    source = path if path.exists() or not packed.exists() else packed
    try:
        raw = source.read_bytes()
        text = (gzip.decompress(raw) if source.suffix == ".gz" else raw).decode("utf-8")
    except FileNotFoundError:
        raise DataError(f"{path} (or {packed.name}): no such file.") from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{source}: cannot be read as text: {error}.") from error
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    if not lines:
        raise DataError(f"{source}: the file is empty.")
    return lines
