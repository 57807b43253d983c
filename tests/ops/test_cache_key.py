"""Compiled artefacts on disk must not outlive the ops they call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._inductor import compile_fx

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


def test_a_backward_compiled_late_has_the_key_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """AOTAutograd compiles a backward when it first runs, outside the backend's call."""
    tags, compile_inner = [], compile_fx.compile_fx_inner

    def recording(*args: Any, **kwargs: Any) -> Any:
        settings: Any = torch.compiler.config
        tags.append(settings.cache_key_tag)
        return compile_inner(*args, **kwargs)

    monkeypatch.setattr(compile_fx, "compile_fx_inner", recording)
    torch.compiler.reset()
    options = {"min_outputs": 64}
    step = torch.compile(
        lambda x, w, y: F.cross_entropy(x.sin() @ w.t(), y), backend="elmo", options=options
    )
    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(301, 8, requires_grad=True)
    with torch._inductor.config.patch(force_disable_caches=True):
        step(x, w, torch.arange(4)).backward()
    assert tags == [lowering.cache_tag(Options(min_outputs=64))] * 2
