"""Registers, spills and shared memory of every Triton kernel, compiled without a GPU.

    python benchmarks/cubin_table.py                  # compile all cases: results/cubins.json, .md
    python benchmarks/cubin_table.py --case 90 pairs fp8 bf16 sgd 128 768    # one, printed as JSON

`tests/kernels/triton/test_triton_cubins.py` compiles again and compares with the committed table.
A case is one head call's kernels as it launches them: chip, targets, stored, compute, update, N, D.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from rich.progress import track

from elmo_compile.kernels import triton as family
from elmo_compile.kernels.problem import HeadProblem
from elmo_compile.kernels.triton.configs import CHIPS
from elmo_compile.kernels.triton.offline import Cubin, compile_call
from elmo_compile.kernels.triton.parameters import update_parameters
from elmo_compile.kernels.triton.records import records
from elmo_compile.kernels.triton.row_blocks import fits_row_blocks
from elmo_compile.numerics.losses import BCE, CE, LossSpec, Positives
from elmo_compile.numerics.update import Update

RESULTS = Path(__file__).resolve().parent / "results" / "cubins.json"
NARROW = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
STORED = {"fp8": torch.float8_e4m3fn, **NARROW}
CHUNK = 65536
TENSOR_CORES = {
    80: r"\bmma\.sync",
    89: r"\bmma\.sync",
    90: r"wgmma\.mma_async",
    100: r"tcgen05\.mma",
    120: r"\bmma\.sync",
}
"""How a product on the matrix units is written in PTX."""
SHARED_PER_PROCESSOR = {80: 167_936, 89: 102_400, 90: 233_472, 100: 233_472, 120: 102_400}
REGISTERS_PER_PROCESSOR = 65_536


class Case(NamedTuple):
    """One head call; `update` as `update_named` reads it."""

    chip: int
    targets: str
    stored: str
    compute: str
    update: str
    rows: int = 128
    features: int = 768

    @property
    def name(self) -> str:
        """Its key in the table."""
        return " ".join(map(str, self)).replace(" fp8 bf16 ", " fp8/bf16 ")


QUICK = (
    Case(90, "pairs", "fp8", "bf16", "sgd"),
    Case(90, "classes", "bf16", "bf16", "adamw kahan"),
    Case(80, "pairs", "fp8", "bf16", "adamw kahan"),
    Case(89, "pairs", "fp8", "bf16", "sgd"),
    Case(100, "classes", "fp8", "bf16", "sgd"),
    Case(120, "pairs", "fp8", "bf16", "adamw kahan"),
    Case(90, "pairs", "fp8", "fp8", "sgd"),
)
"""Compiled by the default test run."""
CASES = (
    *QUICK,
    *(Case(chip, "pairs", "fp8", "bf16", "kahan rows") for chip in CHIPS),
    *(Case(chip, "classes", "bf16", "bf16", "adamw float32", 2048, 1024) for chip in CHIPS),
    *(Case(chip, "dense", "fp16", "fp16", "sgd") for chip in CHIPS),
    *(Case(chip, "values", "bf16", "bf16", "sgd") for chip in CHIPS),
    *(Case(chip, "pairs", "fp32", "fp32", "momentum float32") for chip in CHIPS),
    *(Case(chip, "classes", "fp8", "fp8", "momentum") for chip in CHIPS),
    # Nothing a multiple of anything: masks everywhere; and a batch smaller than a tile.
    *(Case(chip, "pairs", "fp8", "bf16", "sgd", 37, 301) for chip in CHIPS),
    Case(90, "pairs", "fp8", "bf16", "sgd", 128, 300),
)


def problem(
    form: str,
    weight: torch.dtype,
    compute: torch.dtype,
    *,
    rows: int = 128,
    features: int = 768,
    outputs: int = 2 * CHUNK,
    bias: bool = True,
    fp8_features: bool = False,
) -> HeadProblem:
    """A head call on meta tensors; `form` is classes, dense, pairs or values."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    pairs = 5 * rows
    target = {
        "classes": lambda: empty(rows, dtype=torch.int64),
        "dense": lambda: empty(rows, outputs),
        "pairs": lambda: Positives(
            empty(pairs, dtype=torch.int64), empty(pairs, dtype=torch.int64), None
        ),
        "values": lambda: Positives(
            empty(pairs, dtype=torch.int64), empty(pairs, dtype=torch.int64), empty(pairs)
        ),
    }[form]()
    targets = "pairs" if form == "values" else form
    return HeadProblem(
        x_ND=empty(rows, features, dtype=compute),
        w_LD=empty(outputs, features, dtype=weight),
        b_L=empty(outputs) if bias else None,
        target=target,
        loss=LossSpec(name=CE if form == "classes" else BCE, targets=targets),
        chunk=CHUNK,
        compute_dtype=compute,
        fp8_features=fp8_features,
    )


def update_named(p: HeadProblem, name: str) -> Update:
    """`sgd`, `momentum`, `adamw`, `adamw kahan`, `kahan rows` or `adagrad` of a meta weight.

    Moments are bf16; a name that ends in `float32` has them in float32.
    """
    state = torch.float32 if name.endswith("float32") else torch.bfloat16
    moment = partial(torch.empty_like, p.w_LD, dtype=state)
    compensation = torch.empty_like(p.w_LD, dtype=torch.bfloat16)
    rule = name.removesuffix(" float32")
    if rule == "momentum":
        return Update(lr=0.1, beta1=0.9, state=(moment(),), weight_decay=0.01, nesterov=True)
    if rule.startswith("adamw"):
        return Update(
            rule="adamw", lr=0.1, beta1=0.9, beta2=0.999, eps=1e-8, state=(moment(), moment()),
            compensation=compensation if rule.endswith("kahan") else None,
        )  # fmt: skip
    if rule == "kahan rows":
        rows = torch.arange(0, p.w_LD.shape[0], 20, device="meta")
        return Update(lr=0.1, compensation=compensation[: len(rows)], kahan_rows=rows)
    if rule == "adagrad":
        sums = torch.empty(p.w_LD.shape[0], device="meta")
        return Update(rule="adagrad", lr=0.1, eps=1e-10, state=(sums,))
    assert rule == "sgd"
    return Update(lr=0.1)


def calls(p: HeadProblem, update: str = "sgd") -> Iterator[Callable[[], object]]:
    """The three entry points, all outputs asked for."""
    N = p.x_ND.shape[0]
    row_N = torch.empty(N, device="meta")
    guard = torch.zeros(1, dtype=torch.int32, device="meta")
    yield partial(family.forward, p)
    yield partial(family.backward, p, row_N, row_N, need_dx=True, need_dw=True, need_db=True)
    yield partial(
        family.backward_update, p, row_N, row_N, update_named(p, update),
        need_dx=True, need_db=True, need_value=True, guard=guard,
    )  # fmt: skip


def compile_case(case: Case) -> list[dict[str, Any]]:
    """What each kernel of a case takes, in the order of its launches."""
    p = problem(
        case.targets,
        STORED[case.stored],
        NARROW.get(case.compute, torch.bfloat16),
        fp8_features=case.compute == "fp8",
        rows=case.rows,
        features=case.features,
    )

    def topk() -> None:
        family.topk(p.x_ND, p.w_LD, p.b_L, 5, p.chunk, p.compute_dtype)

    def row_blocks() -> None:
        family.loss_and_gradients(p, torch.empty(case.rows, device="meta"), 64)

    def parameters() -> None:
        grad = torch.empty_like(p.w_LD, dtype=torch.float32)
        assert update_parameters([(p.w_LD, grad, update_named(p, case.update), None)] * 2) == []

    def numbers_on_device() -> None:
        lr = torch.empty((), dtype=torch.float64, device="meta")
        step = torch.empty((), dtype=torch.int64, device="meta")
        update = update_named(p, case.update)
        records([dataclasses.replace(update, lr=lr, step=step)], lr.device)

    def scaled() -> None:
        dw = torch.empty_like(p.w_LD, dtype=None if case.stored != "fp8" else torch.float32)
        family.scale_(dw, torch.empty((), device="meta"))

    # Partly compensated parameters take launches of their own, one by one.
    others: tuple[Callable[[], None], ...]
    others = (topk, numbers_on_device, scaled)
    others = others if case.update == "kahan rows" else (*others, parameters)
    if fits_row_blocks(p, 64, True):
        others = (*others, row_blocks)
    every = (*calls(p, case.update), *others)
    cubins = [cubin for call in every for cubin in compile_call(call, case.chip)]
    return [described(cubin, case.chip) for cubin in cubins]


def described(cubin: Cubin, chip: int) -> dict[str, Any]:
    """One kernel as a row."""
    threads = 32 * cubin.warps
    blocks = min(
        REGISTERS_PER_PROCESSOR // (threads * max(1, cubin.registers)),
        SHARED_PER_PROCESSOR[chip] // (cubin.shared + 1024),
    )
    return {
        "kernel": cubin.name.strip("_"),
        "registers": cubin.registers,
        "spilled": cubin.spilled,
        "shared": cubin.shared,
        "warps": cubin.warps,
        "blocks": blocks,
        "instructions": cubin.instructions,
        "loop": cubin.loop,
        "tensor_cores": bool(re.search(TENSOR_CORES[chip], cubin.ptx)),
        "atomics": bool(re.search(r"\b(atom|red)\.", cubin.ptx)),
        "serialized": cubin.serialized,
    }


def write_table() -> None:
    """Compile every case and write the JSON and a Markdown table of it."""
    table = {case.name: compile_case(case) for case in track(CASES, "compiling")}
    cases = ",\n".join(f" {json.dumps(name)}: {json.dumps(rows)}" for name, rows in table.items())
    version = json.dumps(triton.__version__)
    RESULTS.write_text(f'{{"triton": {version}, "cases": {{\n{cases}\n}}}}\n')
    lines = [
        f"Triton {triton.__version__}. A case: chip, targets, stored, compute, update, N, D.",
        "Shared memory in KiB; blocks: how many a multiprocessor holds at once; instructions: all,",
        "and those of the largest innermost loop.",
        "",
        "| case | kernel | registers | spilled | shared | warps | blocks | instructions | loop |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, rows in table.items():
        lines += [
            f"| {name} | {r['kernel']} | {r['registers']} | {r['spilled']} | "
            f"{r['shared'] / 1024:.1f} | {r['warps']} | {r['blocks']} | "
            f"{r['instructions']} | {r['loop']} |"
            for r in rows
        ]
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Write the table, or print one case."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", nargs=7, metavar="FIELD", help="compile this one and print it")
    given = parser.parse_args().case
    torch.set_num_threads(1)
    if given is None:
        write_table()
    else:
        chip, *words, rows, features = given
        print(json.dumps(compile_case(Case(int(chip), *words, int(rows), int(features)))))


if __name__ == "__main__":
    main()
