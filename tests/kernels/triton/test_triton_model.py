"""A model trained through the backend on the Triton family: the ops hand it what it wants."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn.utils import clip_grad_norm_
from training import assert_same, batch, compiled, net

import elmo_compile as elmo
from elmo_compile import kernels

TORCH: dict[str, Any] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01),
}
OURS: dict[str, Any] = {
    "SGD": lambda p, **kw: elmo.optim.SGD(p, 0.1, momentum=0.9, **kw),
    "AdamW": lambda p, **kw: elmo.optim.AdamW(p, 0.01, **kw),
}


@pytest.mark.parametrize("max_norm", [None, 0.05])
@pytest.mark.parametrize("update_at", ["backward", "step"])
@pytest.mark.parametrize(("kind", "rule"), [("ce", "SGD"), ("bce", "AdamW")])
def test_training(
    kind: str, rule: str, update_at: str, max_norm: float | None, device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if update_at == "backward" and max_norm is not None:
        pytest.skip("clipping needs update_at='step'")
    monkeypatch.setitem(kernels._FAMILIES, "cpu", "triton")
    model = net(kind).to(device)
    twin = copy.deepcopy(model)
    more = {"max_norm": max_norm} if update_at == "step" else {}
    opt = OURS[rule](model.parameters(), update_at=update_at, **more)
    other = TORCH[rule](twin.parameters())
    step = compiled(model, compute_dtype=torch.float32)
    for i in range(2):
        inputs, labels = (t.to(device) for t in batch(i))
        loss, want = step(inputs, labels), twin(inputs, labels)
        loss.backward()
        want.backward()
        torch.testing.assert_close(loss.detach(), want.detach(), rtol=1e-5, atol=1e-6)
        if max_norm is not None:
            clip_grad_norm_(twin.parameters(), max_norm)
        for each in (opt, other):
            each.step()
            each.zero_grad()
    assert opt.fused_parameters()
    assert_same(model, twin, 2e-4 if rule == "AdamW" else 2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_accumulating_in_a_low_precision_head(
    dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two micro-batches store what one batch of both does, on the CPU's kernels as on these."""
    stored = []
    for family in ("aten", "triton"):
        monkeypatch.setitem(kernels._FAMILIES, "cpu", family)
        model = net("bce", reduction="sum")
        elmo.convert_head(model, dtype=dtype, name="head")
        model.to(device)
        opt = elmo.optim.SGD(
            model.parameters(), 0.05, update_at="step", accumulate="stash", rounding="kahan",
            compensation_dtype=torch.float8_e5m2,
        )  # fmt: skip
        step = compiled(model)
        for i in range(2):
            step(*(t.to(device) for t in batch(i))).backward()
        opt.step()
        assert opt.fused_parameters()
        stored.append(model.head.weight.detach().float().cpu())
    # The CPU rounds a chunk of dw to bf16, relative to the update; then each stores a neighbour.
    mine, other = stored
    moved = (mine - net("bce").head.weight.detach()).abs()
    step_size = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-3
    allowed = step_size * torch.maximum(mine.abs(), other.abs()).clamp_min(2.0**-6)
    assert ((mine - other).abs() <= allowed + 2.0**-8 * moved).all()
    assert float((mine != other).float().mean()) < 0.25


def test_one_gpu_run_matches_the_cpu(device: str) -> None:
    if device == "cpu":
        pytest.skip("compares the two devices")
    models = [net("bce"), net("bce").to(device)]
    for model in models:
        where = model.head.weight.device
        opt = elmo.optim.AdamW(model.parameters(), 0.01, rounding="kahan")
        step = compiled(model)
        for i in range(3):
            step(*(t.to(where) for t in batch(i))).backward()
            opt.step()
            opt.zero_grad()
    assert_same(models[0], models[1].cpu(), 2e-4)
