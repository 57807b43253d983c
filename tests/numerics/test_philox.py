"""The generator: published vectors, the counter's layout, and statistics with fixed seeds."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elmo_compile.errors import InputError, OptionError
from elmo_compile.numerics import philox
from elmo_compile.numerics.philox import (
    counter_words,
    element_words,
    half_mixed,
    mix32,
    mixed,
    philox4x32,
    row_keys,
    row_keys_from_words,
    row_keys_in_order,
    to_int32,
)

MASK = 2**32 - 1
ONES = MASK
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)
VECTORS = [  # Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, words
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (PI[:4], PI[4:], (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


def python_philox(counter, key):
    """Philox4x32-10 written from the paper, on Python's unbounded integers."""
    for i in range(10):
        k = [(key[j] + i * w) & MASK for j, w in enumerate((0x9E3779B9, 0xBB67AE85))]
        p, q = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = (q >> 32 ^ counter[1] ^ k[0], q & MASK, p >> 32 ^ counter[3] ^ k[1], p & MASK)
    return counter


def python_mix32(h):
    h ^= h >> 16
    h = h * 0x7FEB352D & MASK
    h ^= h >> 15
    h = h * 0x846CA68B & MASK
    return h ^ h >> 16


def unsigned(words):
    return [w & MASK for w in words.flatten().tolist()]


@pytest.mark.parametrize(("counter", "key", "words"), VECTORS)
def test_published_vectors(counter, key, words):
    assert philox4x32(counter, key) == words
    as_tensors = philox4x32([torch.tensor([c]) for c in counter], [torch.tensor(k) for k in key])
    assert tuple(w.item() for w in as_tensors) == words


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, MASK),
    param_id=st.integers(0, MASK),
    step=st.integers(0, 2**56 - 1),
    stream=st.integers(0, 255),
    rows=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=4),
)
def test_row_keys_follow_the_counter_layout(seed, param_id, step, stream, rows):
    got = row_keys(seed, param_id, step, stream, torch.tensor(rows))
    assert got.dtype == torch.int32
    expected = [
        python_philox(
            (row & MASK, row >> 32, step & MASK, stream << 24 | step >> 32), (seed, param_id)
        )[0]
        for row in rows
    ]
    assert unsigned(got) == expected


@settings(max_examples=50, deadline=None, derandomize=True)
@given(keys=st.lists(st.integers(0, MASK), min_size=1), ds=st.lists(st.integers(0, MASK)))
def test_element_words_are_the_unsigned_mixer(keys, ds):
    words = element_words(to_int32(torch.tensor(keys)), to_int32(torch.tensor(ds).long()))
    assert words.dtype == torch.int32
    assert words.shape == (len(keys), len(ds))
    assert unsigned(words) == [python_mix32(k ^ d) for k, d in itertools.product(keys, ds)]


def test_the_zero_word_is_a_fixed_point_and_the_mixer_is_one_to_one_on_a_row():
    assert mix32(torch.zeros(1, dtype=torch.int32)).item() == 0
    assert mix32(torch.arange(2**20, dtype=torch.int32)).unique().numel() == 2**20


def test_streams_are_the_published_numbers():
    streams = ("WEIGHT", "MOMENTUM", "SECOND_MOMENT", "COMPENSATION", "FEATURES", "CONVERSION")
    assert [getattr(philox, name) for name in streams] == [0, 1, 2, 3, 4, 5]
    assert philox.ROUNDING_VERSION == 1


def test_words_given_as_tensors_give_the_same_keys():
    rows = torch.tensor([0, 5, 2**40])
    words = counter_words(7, 8, 2**40 + 9, 3)
    as_tensors = tuple(torch.tensor(words))
    assert torch.equal(row_keys_from_words(as_tensors, rows), row_keys(7, 8, 2**40 + 9, 3, rows))


@pytest.mark.parametrize(
    ("name", "bits"), [("seed", 32), ("param_id", 32), ("step", 56), ("stream", 8)]
)
def test_counter_numbers_are_checked(name, bits):
    good = {"seed": 1, "param_id": 1, "step": 1, "stream": 1}
    counter_words(**good | {name: 2**bits - 1})
    for bad in (-1, 2**bits, 1.0, True, "1", None):
        with pytest.raises(OptionError, match=rf"{name}=.*2\*\*{bits}"):
            counter_words(**good | {name: bad})


def test_rows_must_be_int64():
    with pytest.raises(InputError, match="int64"):
        row_keys(0, 0, 0, 0, torch.arange(3, dtype=torch.int32))


# Statistics. 2^20 words each; fixed seeds, so a pass is a pass for ever.

BASE = {"seed": 11, "param_id": 3, "step": 5, "stream": 0, "row": 0, "column": 0}
OTHERS = {
    "next step": {"step": 6},
    "step past 2^32": {"step": 5 + 2**32},
    "next row": {"row": 1},
    "row past 2^32": {"row": 2**32},
    "next column": {"column": 1},
    "momentum": {"stream": 1},
    "conversion": {"stream": 5},
    "next parameter": {"param_id": 4},
    "next seed": {"seed": 12},
    "seed and parameter exchanged": {"seed": 3, "param_id": 11},
}


def words(*, seed, param_id, step, stream, row, column, rows=1024, columns=1024):
    keys = row_keys(seed, param_id, step, stream, torch.arange(row, row + rows))
    return element_words(keys, torch.arange(column, column + columns, dtype=torch.int32))


def uniform(w, bits):
    """The low bits as a number with mean 0 and variance 1."""
    u = (w & (2**bits - 1)).double()
    return (u - (2**bits - 1) / 2) / math.sqrt((4.0**bits - 1) / 12)


@pytest.mark.parametrize("change", list(OTHERS))
def test_words_do_not_correlate(change):
    a, b = words(**BASE), words(**BASE | OTHERS[change])
    for bits in (16, 20, 21):
        correlation = (uniform(a, bits) * uniform(b, bits)).mean().item()
        assert abs(correlation) < 5 / math.sqrt(a.numel()), bits
    assert (a == b).double().mean().item() < 1e-5


@pytest.mark.parametrize("where", [{}, {"row": 2**33 + 7}, {"step": 10**9}, {"column": 10**6}])
@pytest.mark.parametrize("low", [0, 8, 12, 24])
def test_every_byte_is_uniform(where, low):
    counts = torch.bincount((words(**BASE | where) >> low & 255).flatten(), minlength=256).double()
    expected = counts.sum() / 256
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert abs(chi_square - 255) < 5 * math.sqrt(2 * 255)


def test_each_row_column_and_step_is_centred():
    """Means along every axis: what a weight sees over its columns, over rows, and over steps."""
    whole = words(**BASE)
    over_steps = torch.stack(
        [words(**BASE | {"step": t}, rows=32, columns=32) for t in range(1024)]
    )
    for bits in (16, 20, 21):
        u, s = uniform(whole, bits), uniform(over_steps, bits)
        for mean in (u.mean(0), u.mean(1), s.mean(0)):
            assert mean.abs().max().item() < 6 / math.sqrt(1024)  # the worst of 1024
        lag = (s[1:] * s[:-1]).mean().item()
        assert abs(lag) < 5 / math.sqrt(s[1:].numel())


def test_pairs_of_neighbours_are_uniform():
    """Top four bits of each element and its right and lower neighbours, as cells of a table."""
    top = words(**BASE) >> 28 & 15
    for first, second in ((top[:, :-1], top[:, 1:]), (top[:-1], top[1:])):
        counts = torch.bincount((first * 16 + second).flatten(), minlength=256).double()
        expected = counts.sum() / 256
        chi_square = ((counts - expected) ** 2 / expected).sum().item()
        assert abs(chi_square - 255) < 5 * math.sqrt(2 * 255)


def test_arrays_of_unsigned_words_give_the_same_keys():
    """As the CPU kernels make them."""
    first = np.arange(2**33 - 3, 2**33 + 4, dtype=np.uint64)
    words = counter_words(2**32 - 1, 7, 2**40 + 9, 3)
    counter = (first & 0xFFFFFFFF, first >> 32, words.step_lo, words.stream_step_hi)
    found = philox4x32(counter, (words.seed, words.param_id))[0]
    expected = row_keys(2**32 - 1, 7, 2**40 + 9, 3, torch.from_numpy(first.astype(np.int64)))
    assert found.dtype == np.uint64
    assert torch.equal(to_int32(torch.from_numpy(found.astype(np.int64))), expected)


def test_the_mixer_can_be_begun_on_key_and_column_apart():
    keys = torch.tensor([0, -1, 2**31 - 1, -(2**31), 123456789], dtype=torch.int32)
    columns = torch.tensor([0, 4, 65532, 65536, 2**31 - 4, -4], dtype=torch.int32)
    for j in range(4):
        apart = mixed(half_mixed(keys)[:, None] ^ (half_mixed(columns) ^ j))
        assert torch.equal(apart, element_words(keys, columns ^ j))


@pytest.mark.parametrize(
    ("first", "rows"), [(0, 0), (0, 1), (5, 16384), (2**32 - 3, 20_000), (2**40 + 1, 40_001)]
)
def test_keys_of_rows_in_order(first: int, rows: int) -> None:
    words = counter_words(2**32 - 1, 7, 2**40 + 9, 3)
    got = row_keys_in_order(words, first, first + rows)
    assert torch.equal(got, row_keys_from_words(words, torch.arange(first, first + rows)))
