"""What the command does around a search."""

from __future__ import annotations

import pytest

from elmo_compile import bench
from elmo_compile.errors import OptionError
from elmo_compile.tune import command


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_timed(monkeypatch, tmp_path):
    (tmp_path / "taken").write_text("a file")
    monkeypatch.setenv("ELMO_COMPILE_CACHE_DIR", str(tmp_path / "taken"))
    monkeypatch.setattr(command, "tune", None)
    with pytest.raises(OptionError, match="set ELMO_COMPILE_CACHE_DIR"):
        command.tune_and_save(bench.Case(rows=1, features=1, outputs=1), "none")


def test_tiles_as_one_reads_them():
    assert command.described((128, 64, 32, 8, 3)) == "128 x 64 x 32, 8 warps, 3 stages"
    assert command.described(None) == "no such pass"
