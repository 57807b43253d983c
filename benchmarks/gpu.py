"""The head step, a whole training step and cross entropy on a GPU, beside floors and peers.

    python benchmarks/gpu.py --out DIR                   # all parts: some 8 minutes on an H200
    python benchmarks/gpu.py --out DIR --parts tune      # tiles and chunks by time
    python benchmarks/gpu.py --out DIR --parts paper --paper CLONE
    python benchmarks/gpu.py --out DIR --dry             # tiny, also without a GPU: does it run?

Parts: `bce` (head step, N=128, D=768, L to 8.6 million), `step` (BERT-base and 2 812 281 labels),
`ce` (N=8192, D=4096, vocabularies of language models, with peers that are installed), `labels` (as
many as the card holds), `tune`, `paper` (the paper's own kernels, from a clone of its repository).
Floors are from ceilings measured in the same run: a copy, and a
bf16 product of random numbers. Times are CUDA events, medians; memory is the allocator's peak.
Raw rows go to DIR/gpu.json, the tables to DIR/gpu.md and the end of the output.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import platform
import subprocess
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_common import (
    FP8,
    MIB,
    NAMES,
    Bench,
    Head,
    Rows,
    fresh,
    kernel_step,
    model_step,
    timed,
    weight,
)
from torch import Tensor, nn

import elmo_compile as elmo


def ceilings(b: Bench) -> Rows:
    """Device-to-device copy, and a square bf16 product of random numbers."""
    n, m = b.size(1 << 32, 1 << 16), b.size(8192, 64)
    a, c = (torch.empty(n, dtype=torch.uint8, device=b.device) for _ in range(2))
    b.copy = 2 * n / b.time(lambda: c.copy_(a))
    x, y = (torch.randn(m, m, device=b.device).bfloat16() for _ in range(2))
    b.flops = 2 * m**3 / b.time(lambda: torch.mm(x, y))
    return [{"part": "ceilings", "TB/s": b.copy / 1e12, "bf16 TFLOP/s": b.flops / 1e12}]


def bce(b: Bench) -> Rows:
    """Fused head steps beside the floor: the larger of bytes and operations."""
    N, D = b.size(128, 8), b.size(768, 32)
    rows: Rows = []
    for L in [b.size(n, 1000) for n in (131_072, 670_091, 1_305_265, 2_812_281, 8_623_847)]:
        for dtype in (torch.bfloat16, FP8):
            with fresh():
                x = torch.randn(N, D, device=b.device).bfloat16()
                w = weight(L, D, dtype, b.device)
                labels = torch.randint(0, L, (N, 5), device=b.device)
                floor = max(2 * w.numel() * w.element_size() / b.copy, 6 * N * L * D / b.flops)
                row = {"part": "bce", "L": L, "dtype": NAMES[dtype]}
                kernels = kernel_step(b, x, w, labels)
                rows.append({**row, "contender": "kernels", **timed(b, kernels, floor)})
                whole = model_step(b, Head(w), x, labels)
                name = "torch.compile, backend elmo"
                rows.append({**row, "contender": name, **timed(b, whole, floor)})
                if dtype != FP8:
                    continue
                kernels = kernel_step(b, x, w, labels, fp8_features=True)
                name = "kernels, fp8 features"
                rows.append({**row, "contender": name, **timed(b, kernels, floor)})
        if b.dry:
            break
    return rows


class Classifier(nn.Module):
    """BERT-base with random weights, the first token's vector, and a head."""

    def __init__(self, b: Bench, outputs: int, dtype: torch.dtype) -> None:
        from transformers import BertConfig, BertModel

        super().__init__()
        tiny = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = BertConfig(**(tiny | {"intermediate_size": 64} if b.dry else {}))
        config._attn_implementation = "sdpa"
        with torch.device(b.device):
            self.encoder = BertModel(config, add_pooling_layer=False).bfloat16()
        w = torch.zeros(outputs, config.hidden_size, dtype=dtype, device=b.device)
        self.head = Head(w, bias=True)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Summed BCE of the labels, mean over rows."""
        return self.head(self.encoder(tokens).last_hidden_state[:, 0], labels)


def whole_step(b: Bench) -> Rows:
    """Peak memory and speed of training, as published for 2 812 281 labels."""
    N, T, L = b.size(128, 2), b.size(128, 8), b.size(2_812_281, 1000)
    rows: Rows = []
    for dtype in (FP8, torch.bfloat16):
        for mode in ("none", "activation budget 0.5", "layer checkpointing"):
            with fresh():
                rows.append(_train(b, N, T, L, dtype, mode))
        if b.dry:
            break
    return rows


def _train(b: Bench, N: int, T: int, L: int, dtype: torch.dtype, mode: str) -> dict[str, Any]:
    import torch._functorch.config as functorch

    model = Classifier(b, L, dtype)
    if mode == "layer checkpointing":
        model.encoder.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    encoder = elmo.optim.AdamW(
        model.encoder.parameters(), lr=1e-5, rounding="kahan", state_dtype=torch.bfloat16,
        fused=False,
    )  # fmt: skip
    head = elmo.optim.SGD(model.head.parameters(), lr=0.05)
    budget = 0.5 if mode.startswith("activation") else 1.0
    tokens = torch.randint(0, 30_000, (N, T), device=b.device)
    labels = torch.randint(0, L, (N, 5), device=b.device)
    with functorch.patch(activation_memory_budget=budget):
        step_fn = torch.compile(model, backend="elmo", options=b.options)

        def step() -> None:
            step_fn(tokens, labels).backward()
            for optimizer in (encoder, head):
                optimizer.step()
                optimizer.zero_grad()

        seconds = b.time(step)
        if not elmo.is_fused(model.head.head.weight) or not elmo.last_report().matches:
            raise RuntimeError(f"the head's update was not fused:\n{elmo.last_report()}")
        terms = {
            "encoder MiB": sum(p.numel() * p.element_size() for p in model.encoder.parameters()),
            "head MiB": sum(p.numel() * p.element_size() for p in model.head.parameters()),
        }
        between = b.allocated()
        allocated, reserved = b.peak(step)
    return {
        "part": "step", "L": L, "dtype": NAMES[dtype], "contender": mode, "ms": 1e3 * seconds,
        "samples/s": N / seconds, "peak GiB": allocated / 1024, "reserved GiB": reserved / 1024,
        **{name: value / MIB for name, value in terms.items()},
        "with optimizer state MiB": between,
    }  # fmt: skip


def most_labels(b: Bench) -> Rows:
    """One head of as many labels as fit: 100 million in fp8."""
    rows: Rows = []
    for L in [b.size(n, 2000) for n in (20_000_000, 100_000_000, 160_000_000)]:
        with fresh():
            x = torch.randn(b.size(128, 8), b.size(768, 32), device=b.device).bfloat16()
            w = torch.zeros(L, x.shape[1], dtype=FP8, device=b.device)
            labels = torch.randint(0, L, (x.shape[0], 5), device=b.device)
            step = kernel_step(b, x, w, labels)
            seconds = b.time(step)
            allocated, _ = b.peak(step)
            rows.append({"part": "labels", "L": L, "ms": 1e3 * seconds, "peak MiB": allocated})
    return rows[: 1 if b.dry else None]


def peers() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Losses of (x, w, classes) of installed packages; a package that is not there is left out."""
    found: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "eager": lambda x, w, y: F.cross_entropy(F.linear(x, w), y),
        "torch.compile": torch.compile(lambda x, w, y: F.cross_entropy(F.linear(x, w), y)),
    }
    if hasattr(F, "linear_cross_entropy"):
        found["F.linear_cross_entropy"] = lambda x, w, y: F.linear_cross_entropy(x, w, y)
    with contextlib.suppress(ImportError):
        liger = importlib.import_module("liger_kernel.transformers")
        loss = liger.LigerFusedLinearCrossEntropyLoss()
        found["Liger"] = lambda x, w, y: loss(w, x, y)
    with contextlib.suppress(ImportError):
        cce = importlib.import_module("cut_cross_entropy")
        found["cut-cross-entropy"] = lambda x, w, y: cce.linear_cross_entropy(x, w, y)
        found["cut-cross-entropy, exact"] = lambda x, w, y: cce.linear_cross_entropy(
            x, w, y, impl="cce_exact"
        )
    with contextlib.suppress(ImportError):
        quack = importlib.import_module("quack.linear_cross_entropy")
        found["quack"] = lambda x, w, y: quack.chunked_linear_cross_entropy(x, w, y)
    return found


def cross_entropy(b: Bench) -> Rows:
    """A softmax head with a real gradient and with a fused update, beside peers."""
    N, D = b.size(8192, 16), b.size(4096, 32)
    rows: Rows = []
    for L in [b.size(n, 1000) for n in (128_256, 256_000)]:
        with fresh():
            x = torch.randn(N, D, device=b.device).bfloat16()
            w = weight(L, D, torch.bfloat16, b.device)
            y = torch.randint(0, L, (N,), device=b.device)
            truth = _truth(x, w, y)
            floor = 6 * N * L * D / b.flops
            row = {"part": "ce", "L": L}
            for name, loss in {"elmo, real gradient": _ours(b), **peers()}.items():
                made = _compare(b, loss, x, w.detach(), y, truth, floor)
                rows.append({**row, "contender": name, **made})
            fused = model_step(b, Head(w.clone()), x, y)
            rows.append({**row, "contender": "elmo, fused update", **timed(b, fused, floor)})
        if b.dry:
            break
    return rows


def _truth(x: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """dx and dw in float64, a block of rows at a time."""
    N, dx, wide = x.shape[0], [], w.double()
    dw = torch.zeros_like(wide)
    for start in range(0, N, 512):
        x_R, y_R = x[start : start + 512].double(), y[start : start + 512]
        g = (x_R @ wide.t()).softmax(1)
        g[torch.arange(len(y_R), device=x.device), y_R] -= 1
        g /= N
        dx.append(g @ wide)
        dw.addmm_(g.t(), x_R)
    return torch.cat(dx).float(), dw.float()


def _error(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want).norm() / want.norm())


def _ours(b: Bench) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A loss of (x, w, classes) through the backend alone."""

    def loss(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, w), y)

    return torch.compile(loss, backend="elmo", options=b.options)


def _compare(
    b: Bench, loss: Any, x: Tensor, w: Tensor, y: Tensor, truth: tuple[Tensor, Tensor], floor: float
) -> dict[str, Any]:
    """Time, memory above the weights (the gradient included) and errors of one contender."""
    x, w = x.clone().requires_grad_(), w.requires_grad_()

    def step() -> None:
        x.grad = w.grad = None
        loss(x, w, y).backward()

    try:
        step()
        assert x.grad is not None
        assert w.grad is not None
        errors = {"error dx": _error(x.grad, truth[0]), "error dw": _error(w.grad, truth[1])}
        seconds = b.time(step)
        x.grad = w.grad = None
        before = b.allocated()
        allocated, reserved = b.peak(step)
    except Exception as error:  # a peer that does not run here is a row that says so
        return {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"}
    return {
        "ms": 1e3 * seconds, "floor ms": 1e3 * floor, "ratio": seconds / floor,
        "above MiB": allocated - before, "reserved MiB": reserved, **errors,
    }  # fmt: skip


def tune(b: Bench) -> Rows:
    """Tiles and chunks, with the kernels' own package."""
    return importlib.import_module("gpu_tune").tune(b)


def paper(b: Bench) -> Rows:
    """The paper's kernels."""
    return importlib.import_module("gpu_paper").paper(b)


PARTS: dict[str, Callable[[Bench], Rows]] = {
    "bce": bce,
    "ce": cross_entropy,
    "step": whole_step,
    "labels": most_labels,
    "tune": tune,
    "paper": paper,
}


def environment(b: Bench) -> dict[str, Any]:
    """What a number depends on besides the code."""
    import triton

    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    device = platform.machine()
    if b.device == "cuda":
        device = torch.cuda.get_device_name(0)
    return {
        "device": device,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": done.stdout.strip(),
        "repeats": b.repeats,
    }


def tables(rows: Rows) -> str:
    """One Markdown table a part, columns as its rows have them."""
    lines: list[str] = []
    for part in dict.fromkeys(row["part"] for row in rows):
        mine = [row for row in rows if row["part"] == part]
        names = [n for n in dict.fromkeys(n for row in mine for n in row) if n != "part"]
        lines += ["", f"**{part}**", "", f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
        for row in mine:
            cells = (row.get(name, "") for name in names)
            shown = (f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells)
            lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the parts, keep what each gave even if a later one fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of gpu.json and gpu.md")
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
    repeats = 2 if options.dry else options.repeats
    b = Bench(device, options.dry, repeats, options.paper)
    options.out.mkdir(parents=True, exist_ok=True)
    rows, failed = ceilings(b), []
    for part in options.parts:
        started = time.perf_counter()
        try:
            rows += PARTS[part](b)
        except Exception:  # the other parts are worth having
            traceback.print_exc()
            failed.append(part)
        print(f"{part}: {time.perf_counter() - started:.0f} s", flush=True)
        report = {"environment": environment(b), "failed": failed, "rows": rows}
        (options.out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
        (options.out / "gpu.md").write_text(tables(rows))
    print(tables(rows))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
