"""Compiled artefacts on disk must not outlive the ops they call."""

from __future__ import annotations

from pathlib import Path

import pytest

from elmo_compile import lowering
from elmo_compile.config import Options


def test_the_key_depends_on_the_source_of_the_ops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tags = {lowering.cache_tag(Options())}
    (tmp_path / "op.py").write_text("formula = 2")
    monkeypatch.setattr(lowering.resources, "files", lambda _: tmp_path)
    for text in ("formula = 2", "formula = 200"):
        (tmp_path / "op.py").write_text(text)
        lowering.formulas.cache_clear()
        tags.add(lowering.cache_tag(Options()))
    lowering.formulas.cache_clear()
    assert len(tags) == 3
    assert lowering.cache_tag(Options(chunk_size=7)) not in tags
