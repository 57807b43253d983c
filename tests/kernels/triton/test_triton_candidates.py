"""Which tiles are worth timing: each rule where it keeps and where it drops."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from elmo_compile.kernels.triton.candidates import (
    FIELDS,
    OPTIONAL,
    HeadKey,
    candidates,
    objection,
    shared_bytes,
)
from elmo_compile.kernels.triton.configs import CHIPS, SHARED_LIMIT, Tile

CUBINS = Path(__file__).resolve().parents[3] / "benchmarks" / "results" / "cubins.json"
BF16, FP8, FP32 = torch.bfloat16, torch.float8_e4m3fn, torch.float32
KEY = HeadKey.of(128, 768, BF16, BF16)
TILE = Tile(128, 128, 64, 8, 3)


def timed(field: str, key: HeadKey, chip: int) -> list[Tile | None]:
    return [c.tile for c in candidates(field, key, chip) if c.dropped is None]


def test_a_key_holds_the_batches_that_run_alike():
    assert HeadKey.of(128, 768, FP8, BF16) == (2, 1, 128, 768)
    assert HeadKey.of(65, 768, FP8, BF16) == HeadKey.of(128, 768, FP8, torch.float16)
    assert HeadKey.of(1, 7, FP32, FP32) == (4, 4, 16, 7)
    assert HeadKey.of(129, 7, FP32, FP32).rows == 256


@pytest.mark.parametrize(
    ("field", "tile", "chip", "reason"),
    [
        ("logits", TILE, 90, None),
        ("logits", TILE._replace(stages=7), 90, None),
        ("logits", TILE._replace(stages=8), 90, "262144 bytes of shared memory"),
        ("logits", TILE._replace(stages=4), 120, None),  # mma.sync: one buffer less
        ("logits", TILE._replace(stages=5), 120, "131072 bytes of shared memory"),
        ("logits", TILE._replace(warps=4), 90, None),
        ("logits_narrow", TILE._replace(warps=4), 90, "256 accumulators"),
        ("features", Tile(128, 256, 32, 8, 3), 90, None),
        ("features", Tile(128, 256, 32, 4, 3), 90, "256 accumulators"),
        ("weights", Tile(128, 64, 64, 8, 3), 90, None),
        ("weights", Tile(256, 64, 64, 8, 3), 90, "256 outputs: the gradient's rows are padded"),
        ("shared", Tile(128, 64, 128, 8, 2), 90, None),
        ("shared", Tile(128, 32, 256, 8, 2), 90, "256 outputs"),
        ("shared", Tile(64, 64, 64, 8, 2), 90, "64 rows do not hold a batch of 128"),
        ("shared", Tile(128, 128, 64, 4, 2), 90, None),
        ("shared", Tile(128, 128, 128, 4, 2), 90, "256 accumulators"),
        ("logits", TILE._replace(inner=48), 90, "a side of 48"),
        ("logits", TILE._replace(rows=8), 90, "a side of 8"),
        ("logits", TILE._replace(inner=-64), 90, "a side of -64"),
        ("logits", TILE._replace(warps=3), 90, "3 warps"),
        ("logits", TILE._replace(stages=0), 90, "0 stages"),
    ],
)
def test_what_speaks_against_a_tile(field, tile, chip, reason):
    found = objection(field, tile, KEY, chip)
    assert found is None if reason is None else reason in (found or "")


def test_rows_that_begin_anywhere_take_no_shared_pass_and_no_buffers():
    odd = HeadKey.of(128, 301, BF16, BF16)
    assert "not a multiple of 16" in objection("shared", Tile(128, 64, 64, 8, 2), odd, 90)
    small = HeadKey.of(64, 301, BF16, BF16)
    assert objection("shared", Tile(128, 64, 64, 8, 2), small, 90) is None
    assert shared_bytes("logits", TILE, odd, 90) == 0  # loaded element by element


def test_sides_along_a_small_batch_are_cut_and_duplicates_left_out():
    key = HeadKey.of(10, 64, FP8, BF16)
    for field in FIELDS:
        every = candidates(field, key, 90)
        kept = timed(field, key, 90)
        assert len(set(kept)) == len(kept) < len(every)
        for tile in kept[1:]:
            if tile is not None:
                assert (tile.inner if field == "weights" else tile.rows) == 16
                assert (tile.inner if field.startswith("logits") else tile.columns) <= 64
    assert any(c.dropped and "the same as another" in c.dropped for c in every)


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("dtypes", [(BF16, BF16), (FP8, BF16), (FP32, FP32)], ids=str)
@pytest.mark.parametrize("rows", [16, 128, 4096])
def test_the_tables_own_tile_is_first_and_what_is_timed_fits(chip, dtypes, rows):
    key = HeadKey.of(rows, 768, *dtypes)
    for field in FIELDS:
        own, *others = timed(field, key, chip)
        assert own == getattr(key.table(chip), field)
        assert own is None or field in OPTIONAL or objection(field, own, key, chip) is None
        for tile in others:
            assert tile is None or objection(field, tile, key, chip) is None
        if field in OPTIONAL:
            # Where no tile holds the batch there is nothing to choose.
            assert (len(others) == 0) == (rows > 128)
            assert (None in (own, *others)) or rows > 128
        else:
            assert len(others) >= 5


KERNELS = {
    "features_kernel": "features",
    "dw_kernel": "weights",
    "keys_kernel": "logits_narrow",
    "bce_rows_kernel": "logits_narrow",
    "ce_rows_kernel": "logits",
}
STORED = {"fp8": FP8, "bf16": BF16, "fp16": torch.float16, "fp32": FP32}


def test_no_compiled_kernel_takes_less_than_the_arithmetic_says():
    """Else a tile that fits might be left out."""
    close = held = 0
    for case, rows in json.loads(CUBINS.read_text())["cases"].items():
        chip, _, types, *_, n, d = case.replace("fp8 fp8", "fp8/fp8").split()
        stored, _, operands = types.partition("/")
        if not operands:
            operands = stored
        if operands == "fp8":
            continue  # products of fp8 with fp8 are not tuned
        key = HeadKey.of(int(n), int(d), STORED[stored], STORED[operands])
        for row in rows:
            field = KERNELS.get(row["kernel"])
            if row["kernel"] == "features_update_kernel":
                shared_with_state = any(s in case for s in ("adamw", "momentum", "kahan"))
                field = "shared_with_state" if shared_with_state else "shared"
            if field is None:
                continue
            tile = getattr(key.table(int(chip)), field)
            least = shared_bytes(field, tile, key, int(chip))
            assert least <= row["shared"] <= SHARED_LIMIT[int(chip)], (case, row)
            held += 1
            close += least >= 0.75 * row["shared"]
    assert held > 100
    assert close > 0.6 * held  # and it is not a bound that never bites
