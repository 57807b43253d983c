"""Tuned tiles on disk: what is read back, by whom, and what a file that is wrong leads to."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from elmo_compile.kernels.triton import configs, tuned
from elmo_compile.kernels.triton.candidates import HeadKey
from elmo_compile.kernels.triton.configs import Tile

CUDA = torch.device("cuda", 0)
BF16, FP8, FP32 = torch.bfloat16, torch.float8_e4m3fn, torch.float32
LOGITS = Tile(64, 128, 64, 4, 3)
TILES = {"logits": LOGITS, "shared": None}


@pytest.fixture(autouse=True)
def _an_h200(monkeypatch, tmp_path):
    """A device by its name alone, and a folder of its own."""
    properties = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    monkeypatch.setenv("ELMO_COMPILE_CACHE_DIR", str(tmp_path / "tuned"))
    monkeypatch.delenv("ELMO_COMPILE_TUNED", raising=False)
    tuned.forget()
    yield
    tuned.forget()


def call(
    rows: int = 100,
    features: int = 768,
    weight: torch.dtype = FP8,
    compute: torch.dtype = BF16,
    device: torch.device = CUDA,
    fp8_features: bool = False,
) -> Any:
    """What `tuned_tiles` looks at of a call."""
    return SimpleNamespace(
        x_ND=SimpleNamespace(device=device, shape=(rows, features)),
        w_LD=SimpleNamespace(dtype=weight),
        compute_dtype=compute,
        fp8_features=fp8_features,
    )


def saved(tiles=None, key=None) -> Any:
    return tuned.save(
        CUDA,
        tuned.Entry(
            key=key or HeadKey.of(128, 768, FP8, BF16),
            tiles=TILES if tiles is None else tiles,
            before_ms=2.0,
            after_ms=1.5,
            tuned_for="ce",
        ),
    )


def edited(change) -> None:
    """Change the one entry on disk."""
    path = tuned.file_of(CUDA)
    content = json.loads(path.read_text())
    change(content["entries"][0])
    path.write_text(json.dumps(content))
    tuned.forget()


def test_what_is_saved_is_found_by_heads_like_it_and_by_no_others():
    path = saved()
    assert path.name == "nvidia-h200-sm90.json"
    assert tuned.tuned_tiles(call(), 90) == TILES
    assert tuned.tuned_tiles(call(rows=65), 90) == TILES
    for other in (
        call(rows=64),
        call(rows=129),
        call(features=512),
        call(weight=BF16),
        call(compute=FP32),
        call(fp8_features=True),
        call(device=torch.device("cpu")),
    ):
        assert tuned.tuned_tiles(other, 90) == {}
    with configs.assume_chip(90):
        assert tuned.tuned_tiles(call(), 90) == {}


def test_the_file_can_be_read_by_people():
    (entry,) = json.loads(saved().read_text())["entries"]
    assert entry["head"] == {
        "operand_bytes": 2, "weight_bytes": 1, "rows": 128, "features": 768,
    }  # fmt: skip
    assert entry["tiles"] == {"logits": LOGITS._asdict(), "shared": None}
    assert (entry["before_ms"], entry["after_ms"], entry["tuned_for"]) == (2.0, 1.5, "ce")
    assert set(entry["versions"]) == {"kernels", "triton", "torch"}
    assert len(entry["date"]) == 10


def test_a_call_takes_override_then_tuned_then_table():
    saved()
    table = configs.from_table(90, BF16)
    assert configs.tiles_for(90, BF16) is table
    found = configs.tiles_for(90, BF16, tuned.tuned_tiles(call(), 90))
    assert found == dataclasses.replace(table, logits=LOGITS, shared=None)
    with configs.override_tiles(logits=table.logits):
        found = configs.tiles_for(90, BF16, tuned.tuned_tiles(call(), 90))
    assert found == dataclasses.replace(table, shared=None)


def test_every_thread_sees_them_and_the_file_is_read_once(monkeypatch):
    saved()
    read, reads = tuned.read, []
    monkeypatch.setattr(tuned, "read", lambda *given: (reads.append(1), read(*given))[1])
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: tuned.tuned_tiles(call(), 90), range(64)))
    assert found == [TILES] * 64
    assert len(reads) == 1


def test_no_file_is_no_warning(recwarn):
    assert tuned.tuned_tiles(call(), 90) == {}
    assert not recwarn.list


def test_reading_can_be_turned_off(monkeypatch):
    saved()
    monkeypatch.setenv("ELMO_COMPILE_TUNED", "0")
    assert tuned.tuned_tiles(call(), 90) == {}


@pytest.mark.parametrize("which", ["kernels", "triton", "torch"])
def test_entries_of_other_versions_are_kept_and_not_used(which, recwarn):
    saved()
    edited(lambda entry: entry["versions"].update({which: "other"}))
    assert tuned.tuned_tiles(call(), 90) == {}
    assert tuned.read(tuned.file_of(CUDA), 90) == ({}, 1)
    saved({"weights": LOGITS})
    assert tuned.tuned_tiles(call(), 90) == {"weights": LOGITS}
    assert len(json.loads(tuned.file_of(CUDA).read_text())["entries"]) == 2
    assert not recwarn.list


def test_a_change_of_any_kernel_is_another_version(monkeypatch, tmp_path):
    monkeypatch.setattr(tuned, "__file__", str(tmp_path / "tuned.py"))
    digests = []
    for name in ("product.py", "configs.py", "tuned.py"):
        (tmp_path / name).write_text(f"# {name}")
        digests.append(tuned.versions.__wrapped__()["kernels"])
    assert len(set(digests)) == 2
    assert digests[1] == digests[2]  # the file that reads the cache is no kernel


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"entries": 3}', '{"entries": [1]}', "\udcff"]
)
def test_a_corrupt_file_is_told_once_by_name_and_replaced_when_saving(text):
    path = tuned.file_of(CUDA)
    path.parent.mkdir()
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.warns(UserWarning, match=path.name) as told:
        found = [tuned.tuned_tiles(call(), 90) for _ in range(2)]
    assert found == [{}, {}]
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved()
    assert tuned.tuned_tiles(call(), 90) == TILES


def test_a_file_that_cannot_be_opened_is_told():
    tuned.file_of(CUDA).mkdir(parents=True)
    with pytest.warns(UserWarning, match="cannot be read"):
        assert tuned.tuned_tiles(call(), 90) == {}


def change_tile(**sizes: Any) -> Any:
    return lambda entry: entry["tiles"]["logits"].update(sizes)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (change_tile(rows=100), "a side of 100"),
        (change_tile(rows=-128), "a side of -128"),
        (change_tile(columns=0), "a side of 0"),
        (change_tile(inner=64.0), "not integers"),
        (change_tile(warps=True), "not integers"),
        (change_tile(warps="4"), "not integers"),
        (change_tile(warps=32), "32 warps"),
        (change_tile(stages=0), "0 stages"),
        (change_tile(stages=8, inner=256), "shared memory"),
        (change_tile(warps=1), "accumulators"),
        (change_tile(depth=1), "depth"),
        (lambda entry: entry["tiles"]["logits"].pop("inner"), "inner"),
        (lambda entry: entry["tiles"].update(weights=[256, 64, 64, 8, 3]), "mapping"),
        (
            lambda entry: entry["tiles"].update(weights=Tile(256, 64, 64, 8, 3)._asdict()),
            "256 outputs",
        ),
        (
            lambda entry: entry["tiles"].update(shared=Tile(64, 64, 64, 8, 3)._asdict()),
            "do not hold a batch",
        ),
        (lambda entry: entry["tiles"].update(logits=None), "logits is null"),
        (lambda entry: entry["tiles"].update(chunk=3), "no tile is called 'chunk'"),
        (lambda entry: entry.update(tiles=[]), "items"),
        (lambda entry: entry.pop("tiles"), "tiles"),
        (lambda entry: entry["head"].update(rows=100), "no head"),
        (lambda entry: entry["head"].update(operand_bytes=8), "no head"),
        (lambda entry: entry["head"].update(features=[]), "not integers"),
        (lambda entry: entry.pop("head"), "head"),
    ],
)
def test_an_entry_that_cannot_be_right_is_told_and_left_out(change, said):
    saved()
    good = HeadKey.of(8, 32, BF16, BF16)
    edited(change)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved({"logits": LOGITS}, key=good)
    with pytest.warns(UserWarning, match="entry 0 cannot be used") as told:
        assert tuned.tuned_tiles(call(), 90) == {}
    assert said in str(told[0].message)
    assert len(told) == 1
    assert tuned.tuned_tiles(call(8, 32, BF16), 90) == {"logits": LOGITS}


def test_a_head_tuned_again_keeps_the_fields_that_were_not():
    saved()
    saved({"shared": Tile(128, 64, 64, 8, 2), "weights": LOGITS})
    assert tuned.tuned_tiles(call(), 90) == {
        "logits": LOGITS, "shared": Tile(128, 64, 64, 8, 2), "weights": LOGITS,
    }  # fmt: skip
    saved({"logits": LOGITS}, key=HeadKey.of(8, 32, BF16, BF16))
    assert len(tuned.read(tuned.file_of(CUDA), 90)[0]) == 2


def test_writing_that_fails_leaves_the_file_as_it_was(monkeypatch):
    path = saved()
    before = path.read_bytes()

    def full(*given):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        saved({"weights": LOGITS})
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_where_files_are(monkeypatch, tmp_path):
    assert tuned.folder() == tmp_path / "tuned"
    monkeypatch.delenv("ELMO_COMPILE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert tuned.folder() == tmp_path / "x" / "elmo_compile"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuned.folder() == tmp_path / ".cache" / "elmo_compile"
