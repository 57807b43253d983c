"""The XMLRepository parser, tf-idf and hashing, on the carried data and on broken files."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import numpy as np
import pytest
import xmc_data
import xmlrepo
from xmlrepo import DataError

DEBIAN = Path(xmc_data.__file__).parent / "data" / "debian-xmc"


@pytest.fixture(scope="module")
def debian() -> xmc_data.Dataset:
    return xmc_data.load(DEBIAN)


def test_the_carried_data_is_what_its_readme_says(debian: xmc_data.Dataset) -> None:
    assert (len(debian.train), len(debian.test)) == (45_722, 10_329)
    assert (debian.num_features, debian.num_labels) == (65_536, 21_551)
    counts = debian.label_counts()
    assert debian.label_names[:2] == ["libc6", "libstdc++6"]
    assert counts[:2].tolist() == [17_558, 6_005]
    assert counts.min() == 2
    assert len(np.unique(debian.train.groups)) == 24_712
    assert len(np.unique(debian.test.groups)) == 6_191


def test_rows_of_tfidf_have_length_one(debian: xmc_data.Dataset) -> None:
    start, _, values = debian.test.features
    lengths = np.sqrt(np.add.reduceat(values.astype(np.float64) ** 2, start[:-1]))
    np.testing.assert_allclose(lengths, 1, atol=1e-6)


def test_typed_text_is_hashed_as_the_carried_data_is(debian: xmc_data.Dataset) -> None:
    """The first test point is 3dchess; its words are public in Debian's index."""
    words = xmc_data.hash_text("3dchess: Play CHESS across 3 boards!", debian.idf).columns
    assert set(words) <= set(debian.test.features.columns[: debian.test.features.start[1]])


def test_reading_a_limit_is_the_beginning_of_reading_all(debian: xmc_data.Dataset) -> None:
    few = xmc_data.load(DEBIAN, limit=50)
    assert len(few.train) == 50
    np.testing.assert_array_equal(
        few.train.labels.columns, debian.train.labels.columns[: few.train.labels.start[-1]]
    )


def test_tfidf_by_hand() -> None:
    counts = xmlrepo.Rows(
        np.array([0, 2, 3, 3]), np.array([0, 1, 0]), np.array([1, 3, 2], dtype=np.float32)
    )
    idf = xmc_data.inverse_document_frequency(counts, 3)
    np.testing.assert_allclose(idf, np.log(4 / (1 + np.array([2, 1, 0]))) + 1, rtol=1e-6)
    first = np.array([idf[0], (1 + math.log(3)) * idf[1]])
    np.testing.assert_allclose(
        xmc_data.tfidf(counts, idf).values, [*(first / np.hypot(*first)), 1], rtol=1e-6
    )


def test_taking_rows_keeps_their_order() -> None:
    rows = xmlrepo.Rows(np.array([0, 1, 1, 3]), np.array([5, 6, 7]), np.ones(3, np.float32))
    taken = rows.take(np.array([2, 1, 0, 2]))
    assert taken.start.tolist() == [0, 2, 2, 3, 5]
    assert taken.columns.tolist() == [6, 7, 5, 6, 7]


def test_the_last_batch_has_what_is_left(small_data: Path) -> None:
    part = xmc_data.load(small_data).test
    sizes = [len(b.offsets) for b in xmc_data.batches(part, np.arange(len(part)), 16)]
    assert sizes == [16, 16, 8]


def test_a_split_has_no_group_in_common(small_data: Path) -> None:
    part = xmc_data.load(small_data).train
    first, second = xmc_data.split(part, 0.1, seed=1)
    assert len(first) + len(second) == len(part)
    assert len(second) == 20
    assert not np.intersect1d(first.groups, second.groups).size


def test_points_without_labels_or_features(tmp_path: Path) -> None:
    path = tmp_path / "points.txt"
    path.write_text("4 9 5\n1,4 0:1 8:2.5\n 3:1\n2 \n0\n")
    features, labels, shape = xmlrepo.read_xmlrepo(path)
    assert shape == (9, 5)
    assert labels.start.tolist() == [0, 2, 2, 3, 4]
    assert labels.columns.tolist() == [1, 4, 2, 0]
    assert features.start.tolist() == [0, 2, 3, 3, 3]
    assert features.values.tolist() == [1, 2.5, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("3 9\n", "line 1: the header must be three integers"),
        ("2 9 5\n1 0:1\n", "says 2 points, 1 lines follow"),
        ("2 9 5\n1 0:1\n5 0:1\n", "line 3: ids must be integers from 0 to 4"),
        ("2 9 5\n1 0:1\n-1 0:1\n", "line 3: ids"),
        ("1 9 5\n1 9:1\n", "line 2: ids must be integers from 0 to 8"),
        ("1 9 5\n1.5 2:1\n", "line 2: ids"),
        ("1 9 5\n1 2\n", "line 2: 1 numbers where 0 belong"),
        ("1 9 5\n1 2:\n", "line 2: 1 numbers where 2 belong"),
        ("1 9 5\n1 2:x\n", "line 2: not a number"),
        ("1 9 5\n1,,2 2:1\n", "line 2: 2 numbers where 3 belong"),
        ("1 9 5\n1 2:nan\n", "line 2: a value is not finite"),
    ],
)
def test_a_broken_file_is_refused_by_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "points.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as error:
        xmlrepo.read_xmlrepo(path)
    assert str(path) in str(error.value)


def test_a_missing_and_a_cut_off_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        xmlrepo.read_xmlrepo(tmp_path / "none.txt")
    whole = gzip.compress(b"1 9 5\n1 2:1\n")
    (tmp_path / "cut.txt.gz").write_bytes(whole[:-9])
    with pytest.raises(DataError, match="cannot be read"):
        xmlrepo.read_xmlrepo(tmp_path / "cut.txt")


def test_a_text_without_words_is_refused() -> None:
    with pytest.raises(DataError, match="no word"):
        xmc_data.hash_text("---", np.ones(8, np.float32))
