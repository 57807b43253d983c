"""What reports say of an optimizer's state is what it then keeps, byte by byte."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from training import EAGER, LABELS, batch, compiled, net

import elmo_compile as elmo

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda params: elmo.optim.SGD(params, 0.1),
    "momentum": lambda params: elmo.optim.SGD(params, 0.1, momentum=0.9),
    "momentum, bfloat16": lambda params: elmo.optim.SGD(
        params, 0.1, momentum=0.9, state_dtype=BF16
    ),
    "adamw": lambda params: elmo.optim.AdamW(params, 0.1),
    "adamw, float32": lambda params: elmo.optim.AdamW(params, 0.1, state_dtype=torch.float32),
    "adamw, 8bit": lambda params: elmo.optim.AdamW(params, 0.1, state_dtype="8bit"),
    "adamw, kahan": lambda params: elmo.optim.AdamW(params, 0.1, rounding="kahan"),
    "adamw, some rows": lambda params: elmo.optim.AdamW(params, 0.1, kahan_rows=5),
    "lion": lambda params: elmo.optim.Lion(params, 0.1),
    "adagrad": lambda params: elmo.optim.Adagrad(params, 0.1),
}


CASES = [(name, BF16) for name in OPTIMIZERS]
CASES += [("adamw", FP8), ("adamw", torch.float32), ("adamw, kahan", torch.float32)]
OPTIONS = {**EAGER, "min_outputs": LABELS}


def wide(dtype: torch.dtype) -> Any:
    """A head of which 8-bit state is kept in 8 bits."""
    model = net()
    model.encoder, model.head = torch.nn.Linear(5, 32), torch.nn.Linear(32, 10 * LABELS)
    return model if dtype == torch.float32 else elmo.convert_head(model, dtype, name="head")


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_state_is_told_before_it_is_made(name: str, dtype: torch.dtype) -> None:
    if "8bit" in name:
        pytest.importorskip("torchao")
    model = wide(dtype)
    step = compiled(model, OPTIONS)
    (bare,) = elmo.explain(step, *batch(), options=OPTIONS).memory
    opt = OPTIMIZERS[name](model.parameters())
    report = elmo.explain(step, *batch(), options=OPTIONS)
    assert not opt.state
    step = compiled(model, OPTIONS)
    step(*batch()).backward()
    assert elmo.is_fused(model.head.weight)
    held = {k: v for k, v in opt.state[model.head.weight].items() if k != "step"}
    size = sum(tensor.nbytes for tensor in held.values())
    for (memory,) in (report.memory, elmo.last_report().memory):
        assert memory.bytes_before - bare.bytes_before == size
        for terms in (memory.before, memory.after):
            told = {t.name: t for t in terms if t.name.partition(" ")[0] in held}
            assert sum(t.bytes for t in told.values()) == size
            assert all(not t.temporary and not t.moments for t in told.values())
            if "8bit" in name:
                assert {"exp_avg (8bit)", "exp_avg_sq (8bit)"} == told.keys()
                continue
            stored = {k: str(v.dtype).removeprefix("torch.") for k, v in held.items()}
            assert {f"{key} ({dtype})" for key, dtype in stored.items()} == told.keys()
            assert all(name in str(report) for name in told)


def test_a_head_that_is_not_fused_has_no_state_in_its_report() -> None:
    model = net()
    opt = elmo.optim.AdamW(model.parameters(), 0.1, fused=False)
    (memory,) = elmo.explain(compiled(model), *batch(), options=EAGER).memory
    assert not any("exp_avg" in term.name for term in (*memory.before, *memory.after))
    assert not opt.fused_parameters()
