"""The head step, a whole training step and cross entropy on a GPU, beside floors and peers.

    python benchmarks/gpu.py --out DIR --parts bce       # needs nothing installed but torch, triton
    python benchmarks/gpu.py --out DIR --parts paper --paper CLONE
    python benchmarks/gpu.py --out DIR --dry             # tiny, also without a GPU: does it run?

On a lent machine: `benchmarks/on_gpu.sh`, which gives each part a process and a time limit.

Parts: `bce` (head step, N=128, D=768, L to 8.6 million), `step` (BERT-base and 2 812 281 labels),
`ce` (N=8192, D=4096, vocabularies of language models, with peers that are installed), `labels` (as
many as the card holds), `tune`, `paper` (the paper's own kernels, from a clone of its repository).
Floors are from ceilings measured in the same run: a copy, and a bf16 product of random numbers.
`ms` is the device's time (events, medians, contenders interleaved), `ms in a row` the clock's over
several steps, the host's work included; memory is the allocator's peak. Each row is added to
DIR/rows.jsonl as it is measured; the tables of all rows there go to DIR/gpu.md and the output.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a bare checkout too

import torch
import torch.nn.functional as F
from gpu_common import (
    FP8,
    NAMES,
    Bench,
    Contender,
    Head,
    Rows,
    Step,
    fresh,
    kernel_step,
    markdown,
    model_step,
    said,
    weight,
)
from torch import Tensor, nn
from whole_step import GRAPH, Run, Training, plain_loss, runs


def ceilings(b: Bench) -> None:
    """Device-to-device copy, and a square bf16 product of random numbers."""
    n, m = b.size(1 << 32, 1 << 16), b.size(8192, 64)
    a, c = (torch.empty(n, dtype=torch.uint8, device=b.device) for _ in range(2))
    b.copy = 2 * n / b.time(lambda: c.copy_(a)).device
    x, y = (torch.randn(m, m, device=b.device).bfloat16() for _ in range(2))
    b.flops = 2 * m**3 / b.time(lambda: torch.mm(x, y)).device
    b.emit(part="ceilings", **{"TB/s": b.copy / 1e12, "bf16 TFLOP/s": b.flops / 1e12})


def bce(b: Bench) -> None:
    """Fused head steps beside the floor (the larger of bytes and operations) and plain torch."""
    for L in [b.size(n, 1000) for n in (2_812_281, 8_623_847, 131_072, 670_091, 1_305_265)]:
        for dtype in (FP8, torch.bfloat16):
            with fresh():
                _bce(b, L, dtype)
        if b.dry:
            break


def _bce(b: Bench, L: int, dtype: torch.dtype) -> None:
    N, D = b.size(128, 8), b.size(768, 32)
    x = torch.randn(N, D, device=b.device).bfloat16()
    w = weight(L, D, dtype, b.device)
    labels = torch.randint(0, L, (N, 5), device=b.device)
    contenders = {
        "kernels": Contender(kernel_step(b, x, w, labels)),
        "kernels, with the loss": Contender(kernel_step(b, x, w, labels, value=True)),
        "torch.compile, backend elmo": Contender(model_step(b, Head(w), x, labels)),
    }
    if dtype == FP8:
        step = kernel_step(b, x, w, labels, fp8_features=True)
        contenders["kernels, fp8 features"] = Contender(step, products=2.5)
    elif L <= 3_000_000:  # above, a gradient and its logits would take the card
        contenders["eager"] = Contender(_plain_step(x, w, labels, plain_loss))
        inductor = torch.compile(plain_loss)
        contenders["torch.compile, inductor"] = Contender(_plain_step(x, w, labels, inductor))
    row = {"part": "bce", "L": L, "dtype": NAMES[dtype]}
    b.compare(row, contenders, moved=2 * w.numel() * w.element_size(), product=2 * N * L * D)


def _plain_step(x: Tensor, w: Tensor, labels: Tensor, loss: Any) -> Step:
    """A step with torch.optim.SGD."""
    x, w = x.clone().requires_grad_(), nn.Parameter(w)
    optimizer = torch.optim.SGD([w], lr=1e-6)

    def step() -> None:
        loss(F.linear(x, w), labels).backward()
        optimizer.step()
        x.grad = w.grad = None

    return step


def whole_step(b: Bench) -> None:
    """Peak memory and speed of training, as published for 2 812 281 labels."""
    wanted = runs(b.device)
    if b.dry:  # each mode once
        wanted = list({run.mode: run for run in wanted}.values())
    for run in wanted:
        row = {"part": "step", "L": b.size(2_812_281, 1000), **run.row}
        with fresh():
            try:
                b.emit(**row, **_train(b, run))
            except Exception as error:  # the other rows are worth having
                if b.dry:
                    raise
                b.emit(**row, failed=said(error))


def _train(b: Bench, run: Run) -> dict[str, Any]:
    import torch._functorch.config as functorch

    N, T, L = b.size(128, 2), b.size(128, 8), b.size(2_812_281, 1000)
    training = Training(run, (N, T, L), b.device, tiny=b.dry, options=b.options)
    with functorch.patch(activation_memory_budget=training.activation_budget):
        step = _captured(training.step) if run.mode == GRAPH else training.step
        times = b.time(step)
        training.check()
        between = b.allocated()
        allocated, reserved = b.peak(step)
    return {
        "ms": 1e3 * times.device, "ms in a row": 1e3 * times.whole,
        "samples/s": N / times.whole, "peak GiB": allocated / 1024, "reserved GiB": reserved / 1024,
        **training.terms(), "with optimizer state MiB": between,
    }  # fmt: skip


def _captured(step: Step) -> Step:
    """Replays of a step, after ordinary ones on a stream of their own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def most_labels(b: Bench) -> None:
    """One head of as many labels as fit: 100 million in fp8."""
    for L in [b.size(n, 2000) for n in (20_000_000, 100_000_000, 160_000_000)]:
        with fresh():
            _labels(b, L)
        if b.dry:
            break


def _labels(b: Bench, L: int) -> None:
    try:
        x = torch.randn(b.size(128, 8), b.size(768, 32), device=b.device).bfloat16()
        w = weight(L, x.shape[1], FP8, b.device)
        labels = torch.randint(0, L, (x.shape[0], 5), device=b.device)
        step = kernel_step(b, x, w, labels)
        times, (allocated, _) = b.time(step), b.peak(step)
    except torch.OutOfMemoryError as error:
        b.emit(part="labels", L=L, failed=said(error))
    else:
        b.emit(part="labels", L=L, **{"ms": 1e3 * times.device, "peak MiB": allocated})


def cross_entropy(b: Bench) -> None:
    """A softmax head beside peers."""
    importlib.import_module("gpu_cross_entropy").cross_entropy(b)


def tune(b: Bench) -> None:
    """Tiles and chunks, with the kernels' own package."""
    importlib.import_module("gpu_tune").tune(b)


def paper(b: Bench) -> None:
    """The paper's kernels."""
    importlib.import_module("gpu_paper").paper(b)


PARTS: dict[str, Callable[[Bench], None]] = {
    "bce": bce,
    "step": whole_step,
    "ce": cross_entropy,
    "labels": most_labels,
    "tune": tune,
    "paper": paper,
}


def environment(b: Bench) -> dict[str, Any]:
    """What a number depends on besides the code."""
    import triton

    device = platform.machine()
    if b.device == "cuda":
        device = torch.cuda.get_device_name(0)
    return {
        "device": device,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": os.environ.get("ELMO_COMMIT") or _commit(),
        "repeats": b.repeats,
    }


def _commit() -> str:
    """Of the checkout; nothing where that cannot be asked."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip()


def tables(rows: Rows) -> str:
    """One Markdown table a part, columns as its rows have them."""
    lines: list[str] = []
    for part in dict.fromkeys(row["part"] for row in rows):
        mine = [row for row in rows if row["part"] == part]
        lines += ["", f"**{part}**", "", *markdown(mine, without="part")]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the parts, keep what each gave even if a later one fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of rows.jsonl and gpu.md")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=[p for p in PARTS if p not in ("tune", "paper")],
    )
    parser.add_argument("--paper", type=Path, help="clone of the paper's repository")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument(
        "--dry", action="store_true", help="tiny sizes, on a CPU if there is no GPU"
    )
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.dry:
        raise SystemExit("no CUDA device here; --dry runs tiny sizes on the CPU")
    options.out.mkdir(parents=True, exist_ok=True)
    repeats = 2 if options.dry else options.repeats
    b = Bench(device, options.dry, repeats, options.out, options.paper)
    b.emit(part="environment", **environment(b))
    ceilings(b)
    failed = []
    for part in options.parts:
        started = time.perf_counter()
        try:
            PARTS[part](b)
        except (Exception, SystemExit) as error:  # the other parts are worth having
            traceback.print_exc()
            failed.append(part)
            b.emit(part=part, failed=said(error))
        finally:  # also where it is interrupted
            (options.out / "gpu.md").write_text(tables(b.kept()))
        print(f"{part}: {time.perf_counter() - started:.0f} s", flush=True)
    print(tables(b.kept()))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
