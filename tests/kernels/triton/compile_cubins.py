"""Compile every kernel of some head calls for one chip and print what they take, as JSON.

    python compile_cubins.py CHIP FORM STORED COMPUTE UPDATE ROWS FEATURES

A process of its own: the tests' process is bound to the interpreter.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))

from cubin_table import NARROW, STORED, calls, problem, update_named

from elmo_compile.kernels import triton as family
from elmo_compile.kernels.triton.offline import compile_call
from elmo_compile.kernels.triton.parameters import update_parameters

PRODUCTS = {80: r"\bmma\.sync", 89: r"\bmma\.sync", 90: r"wgmma\.mma_async", 100: r"tcgen05\.mma"}


def main(chip: str, form: str, stored: str, compute: str, update: str, *shape: str) -> None:
    rows, features = map(int, shape)
    p = problem(form, STORED[stored], NARROW[compute], rows=rows, features=features)

    def topk() -> None:
        family.topk(p.x_ND, p.w_LD, p.b_L, 5, p.chunk, p.compute_dtype)

    def parameters() -> None:
        grad = torch.empty_like(p.w_LD, dtype=torch.float32)
        assert update_parameters([(p.w_LD, grad, update_named(p, update), None)] * 2) == []

    others = (topk,) if update == "kahan rows" else (topk, parameters)
    cubins = [c for call in (*calls(p, update), *others) for c in compile_call(call, int(chip))]
    described = [
        {
            "name": c.name,
            "registers": c.registers,
            "spilled": c.spilled,
            "shared": c.shared,
            "tensor cores": bool(re.search(PRODUCTS[int(chip)], c.ptx)),
            "atomics": bool(re.search(r"\b(atom|red)\.", c.ptx)),
        }
        for c in cubins
    ]
    print(json.dumps(described))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
