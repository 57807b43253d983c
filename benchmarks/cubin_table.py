"""Registers, local memory and shared memory of every Triton kernel, compiled without a GPU.

    python benchmarks/cubin_table.py [--chips 80 89 90 100] [--compute bf16 fp16 fp32]

Each line is one kernel as a call of the head would launch it (batch 128, 768 features).
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch

from elmo_compile.kernels import triton as family
from elmo_compile.kernels.problem import HeadProblem
from elmo_compile.kernels.triton.configs import CHIPS
from elmo_compile.kernels.triton.offline import compile_call
from elmo_compile.numerics.losses import BCE, CE, LossSpec, Positives
from elmo_compile.numerics.update import Update

NARROW = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
STORED = {"fp8": torch.float8_e4m3fn, **NARROW}
CHUNK = 65536


def problem(
    form: str,
    weight: torch.dtype,
    compute: torch.dtype,
    *,
    rows: int = 128,
    features: int = 768,
    outputs: int = 2 * CHUNK,
    bias: bool = True,
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chips", type=int, nargs="+", default=CHIPS, choices=CHIPS)
    parser.add_argument("--compute", nargs="+", default=["bf16"], choices=sorted(NARROW))
    parser.add_argument("--forms", nargs="+", default=["classes", "pairs"])
    parser.add_argument("--update", default="adamw kahan")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--features", type=int, default=768)
    arguments = parser.parse_args()
    print("| chip | weight | product | targets | kernel | registers | spilled | shared KiB |")
    print("|---|---|---|---|---|---|---|---|")
    for chip, compute, form in itertools.product(
        arguments.chips, arguments.compute, arguments.forms
    ):
        for stored in dict.fromkeys((compute, "fp8") if compute == "bf16" else (compute,)):
            p = problem(
                form,
                STORED[stored],
                NARROW[compute],
                rows=arguments.rows,
                features=arguments.features,
            )
            for call in calls(p, arguments.update):
                for cubin in compile_call(call, chip):
                    print(
                        f"| {chip} | {stored} | {compute} | {form} | {cubin.name.strip('_')} | "
                        f"{cubin.registers} | {cubin.spilled} | {cubin.shared / 1024:.1f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
