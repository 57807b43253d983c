"""What `lowering` starts ahead of Inductor leaves Inductor as it was."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch._inductor import cpu_vec_isa

from elmo_compile import backend, lowering


def probe() -> None:
    lowering.build_vector_probes.__wrapped__()
    for thread in threading.enumerate():
        if thread.name.startswith("elmo-vector-probe"):
            thread.join()


@pytest.mark.parametrize("works", [True, False])
def test_probes_write_nothing_to_what_inductor_asks(
    works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check_build(self: Any, code: str) -> bool:
        if not works:
            raise RuntimeError("no compiler")
        return True

    isas = cpu_vec_isa.supported_vec_isa_list
    picked = cpu_vec_isa.pick_vec_isa()
    before = [dict(vars(isa)) for isa in isas]
    monkeypatch.setattr(cpu_vec_isa.VecISA, "check_build", check_build)
    probe()
    assert [dict(vars(isa)) for isa in isas] == before
    assert cpu_vec_isa.pick_vec_isa() is picked


@pytest.mark.parametrize(("lower", "calls"), [("inductor", 1), ("eager", 0)])
def test_probes_are_built_for_inductor_alone(
    lower: str, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[bool] = []
    monkeypatch.setattr(backend, "build_vector_probes", lambda: called.append(True))
    model = torch.nn.Linear(3, 5)
    torch.compile(model, backend="elmo", options={"lower": lower})(torch.ones(2, 3))
    assert len(called) == calls
