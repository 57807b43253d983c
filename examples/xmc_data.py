"""Extreme multi-label data for training: data folders, tf-idf, hashed words, splits, batches."""

from __future__ import annotations

import collections
import dataclasses
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from xmlrepo import DataError, Rows, read_lines, read_xmlrepo

from elmo_compile.metrics import SparseTargets, sparse_targets

TOKEN = re.compile(r"[a-z0-9+#]+")
"""What a word is, in the lowered text. Must stay as in data/debian-xmc/build.py."""


@dataclasses.dataclass(frozen=True)
class Part:
    """Points with features and labels, and the group (source package) each belongs to."""

    features: Rows
    labels: Rows
    groups: np.ndarray
    """int64 [N]; points of one group are not independent of each other."""

    def __len__(self) -> int:
        return len(self.groups)

    def take(self, rows: np.ndarray) -> Part:
        """The points at these positions."""
        return Part(self.features.take(rows), self.labels.take(rows), self.groups[rows])

    def targets(self) -> SparseTargets:
        """The labels as the metrics read them."""
        return sparse_targets(self.labels.start, self.labels.columns)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A training and a test part over the same features and labels; features are tf-idf."""

    train: Part
    test: Part
    idf: np.ndarray
    """float32 [F], inverse document frequency of each feature in the training part."""
    num_labels: int
    label_names: list[str]
    reference: dict[str, Any]
    """Published results to show beside a run's own (`reference.json`), or empty."""

    @property
    def num_features(self) -> int:
        """F."""
        return len(self.idf)

    def label_counts(self) -> np.ndarray:
        """int64 [L], training points of each label."""
        return np.bincount(self.train.labels.columns, minlength=self.num_labels)


class Batch(NamedTuple):
    """N points as a model reads them."""

    words: Tensor
    """int64 [W], features of all points, one after the other."""
    offsets: Tensor
    """int64 [N], where each point's features begin."""
    weights: Tensor
    """float32 [W], tf-idf."""
    labels: Tensor
    """int64 [M], labels of all points, one after the other."""
    label_offsets: Tensor
    """int64 [N + 1], where each point's labels begin, and the end."""


def load(folder: Path, limit: int | None = None) -> Dataset:
    """Read a data folder (see data/README.md).

    Args:
        folder: has `trn_xmlrepo.txt` and `tst_xmlrepo.txt`, plain or gzipped.
        limit: keep this many points of each part, the first ones; None for all.

    Raises:
        DataError: a file is missing or malformed.
    """
    (train, train_shape), (test, test_shape) = (
        _read_part(folder, part, limit) for part in ("trn", "tst")
    )
    if train_shape != test_shape:
        raise DataError(
            f"{folder}: the training part has {train_shape} features and labels, the test part "
            f"{test_shape}; they must be the same."
        )
    num_features, num_labels = train_shape
    idf = inverse_document_frequency(train.features, num_features)
    names = _optional_lines(folder / "labels.txt", num_labels) or [
        f"label {label}" for label in range(num_labels)
    ]
    reference = folder / "reference.json"
    return Dataset(
        train=dataclasses.replace(train, features=tfidf(train.features, idf)),
        test=dataclasses.replace(test, features=tfidf(test.features, idf)),
        idf=idf,
        num_labels=num_labels,
        label_names=names,
        reference=json.loads(reference.read_text()) if reference.exists() else {},
    )


def split(part: Part, fraction: float, seed: int) -> tuple[Part, Part]:
    """Two parts with no group in common, the second with about `fraction` of the groups."""
    groups = np.unique(part.groups)
    rng = np.random.default_rng(seed)
    held = rng.choice(groups, max(1, round(fraction * len(groups))), replace=False)
    second = np.isin(part.groups, held)
    return part.take(np.flatnonzero(~second)), part.take(np.flatnonzero(second))


def batches(part: Part, order: np.ndarray, size: int) -> Iterator[Batch]:
    """The points in `order`, `size` at a time; the last batch has what is left."""
    for first in range(0, len(order), size):
        yield collate(part, order[first : first + size])


def collate(part: Part, rows: np.ndarray) -> Batch:
    """The points at `rows` as one batch."""
    features, labels = part.features.take(rows), part.labels.take(rows)
    return Batch(
        words=torch.from_numpy(features.columns),
        offsets=torch.from_numpy(features.start[:-1]),
        weights=torch.from_numpy(features.values),
        labels=torch.from_numpy(labels.columns),
        label_offsets=torch.from_numpy(labels.start),
    )


def hash_text(text: str, idf: np.ndarray) -> Rows:
    """One row of tf-idf from a text, with the words hashed as debian-xmc's are.

    Raises:
        DataError: the text has no word in it.
    """
    words = TOKEN.findall(text.lower())
    if not words:
        raise DataError(f"no word [a-z0-9+#] in {text!r}; type a description in English.")
    counts = collections.Counter(zlib.crc32(word.encode()) % len(idf) for word in words)
    columns = np.array(sorted(counts), dtype=np.int64)
    values = np.array([counts[int(column)] for column in columns], dtype=np.float32)
    return tfidf(Rows(np.array([0, len(columns)]), columns, values), idf)


def inverse_document_frequency(counts: Rows, num_features: int) -> np.ndarray:
    """`ln((1 + N) / (1 + n_f)) + 1`, float32 [F], n_f the rows that have feature f."""
    rows_with = np.bincount(counts.columns, minlength=num_features)
    num_rows = len(counts.start) - 1
    return (np.log((1 + num_rows) / (1 + rows_with)) + 1).astype(np.float32)


def tfidf(counts: Rows, idf: np.ndarray) -> Rows:
    """`(1 + ln count) idf`, each row scaled to length 1; counts below 1 count as 1."""
    weight = (1 + np.log(np.maximum(counts.values, 1))) * idf[counts.columns]
    row = np.repeat(np.arange(len(counts.start) - 1), np.diff(counts.start))
    square = np.bincount(row, weights=weight.astype(np.float64) ** 2)
    length = np.sqrt(square)[row]
    return counts._replace(values=(weight / np.where(length > 0, length, 1)).astype(np.float32))


def _read_part(folder: Path, part: str, limit: int | None) -> tuple[Part, tuple[int, int]]:
    features, labels, shape = read_xmlrepo(folder / f"{part}_xmlrepo.txt", limit)
    num_points = len(labels.start) - 1
    lines = _optional_lines(folder / f"{part}_groups.txt", num_points if limit is None else None)
    groups = [int(line) for line in lines[:limit]] if lines else range(num_points)
    return Part(features, labels, np.array(groups, dtype=np.int64)), shape


def _optional_lines(path: Path, count: int | None) -> list[str]:
    """The lines of a file that may be missing (then none); DataError if not `count` of them."""
    if not path.exists() and not path.with_name(path.name + ".gz").exists():
        return []
    lines = read_lines(path)
    if count is not None and len(lines) != count:
        raise DataError(f"{path}: {len(lines)} lines, {count} are needed.")
    return lines


def log_odds(counts: np.ndarray, num_points: int) -> np.ndarray:
    """float32 [L], `ln(p / (1 - p))` of each label's share p of the points, kept inside (0, 1)."""
    share = np.clip(counts, 0.5, num_points - 0.5) / num_points
    return (np.log(share) - np.log1p(-share)).astype(np.float32)
