"""A whole training step: BERT-base, 128 texts of 128 tokens, 2 812 281 labels, as published.

    python benchmarks/whole_step.py --json benchmarks/results/whole_step_cpu.json

Every mode runs in a process of its own: two steps to compile and to warm up, one that is timed and
whose peak of resident memory is read, one whose allocations are counted. `gpu.py --parts step` runs
the same modes on a GPU. The paper's figures are those of its GPU's allocator.

Shapes: N texts, T tokens of each, L labels.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a bare checkout too

import torch
import torch.nn.functional as F
from gpu_common import FP8, MIB, NAMES, Head, Step, markdown, weight
from peak_memory import allocated_now, resident_peak
from torch import Tensor, nn

import elmo_compile as elmo
from elmo_compile.testing.memory import allocated_peak

PLAIN = "torch.compile, inductor, torch.optim"
GRAPH = "whole step in a CUDA graph"
NONE, BUDGET, CHECKPOINTS = "none", "activation budget 0.5", "layer checkpointing"


@dataclasses.dataclass(frozen=True)
class Run:
    """One mode.

    Args:
        dtype: of the head's weight.
        mode: what is done about activations, or `PLAIN`, or `GRAPH`.
    """

    dtype: torch.dtype
    mode: str

    @property
    def plain(self) -> bool:
        """Whether this package has no part in it."""
        return self.mode == PLAIN

    @property
    def row(self) -> dict[str, str]:
        """What names it in a table."""
        return {"dtype": NAMES[self.dtype], "contender": self.mode}


def runs(device: str) -> list[Run]:
    """The modes that a device has, the most wanted first."""
    found = [Run(FP8, NONE), Run(torch.bfloat16, NONE)]
    found += [Run(FP8, GRAPH)] if device == "cuda" else []
    found += [Run(dtype, mode) for dtype in (FP8, torch.bfloat16) for mode in (BUDGET, CHECKPOINTS)]
    return [*found, Run(torch.bfloat16, PLAIN)]


def plain_loss(z: Tensor, labels: Tensor) -> Tensor:
    """Summed BCE of label lists [N, P], mean over rows, without this package."""
    y = torch.zeros_like(z).scatter_(1, labels, 1.0)
    return F.binary_cross_entropy_with_logits(z, y, reduction="sum") / z.shape[0]


class Classifier(nn.Module):
    """BERT-base with random weights, the first token's vector, and a head.

    On a CPU, attention has no dropout: torch's fused attention has none there, and without it the
    probabilities of all layers are kept.

    Args:
        plain: the head and its loss are torch's.
        tiny: two layers of 32 features.
    """

    def __init__(
        self, outputs: int, dtype: torch.dtype, device: str, *, plain: bool, tiny: bool
    ) -> None:
        from transformers import BertConfig, BertModel

        super().__init__()
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                 "intermediate_size": 64} if tiny else {}  # fmt: skip
        dropout = {"attention_probs_dropout_prob": 0.0} if device == "cpu" else {}
        config = BertConfig(**sizes, **dropout)
        config._attn_implementation = "sdpa"
        with torch.device(device):
            self.encoder = BertModel(config, add_pooling_layer=False).bfloat16()
        self.head = Head(weight(outputs, config.hidden_size, dtype, device), bias=True)
        self.plain = plain

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Summed BCE of the labels, mean over rows."""
        x = self.encoder(tokens).last_hidden_state[:, 0]
        if self.plain:
            head = self.head.head
            return plain_loss(F.linear(x, head.weight, head.bias.to(x.dtype)), labels)
        return self.head(x, labels)


class Training:
    """A model, its optimizers and a batch of one mode.

    Args:
        options: of the backend.
    """

    def __init__(
        self, run: Run, sizes: tuple[int, int, int], device: str, *, tiny: bool,
        options: dict[str, Any],
    ) -> None:  # fmt: skip
        N, T, L = sizes
        self.run = run
        self.model = Classifier(L, run.dtype, device, plain=run.plain, tiny=tiny)
        if run.mode == CHECKPOINTS:
            self.model.encoder.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.train()
        self._optimizers = self._made_optimizers()
        tokens = torch.randint(0, 30_000, (N, T), device=device)
        labels = torch.randint(0, L, (N, 5), device=device)
        how: dict[str, Any] = {} if run.plain else {"backend": "elmo", "options": options}
        compiled = torch.compile(self.model, **how)

        def step() -> None:
            compiled(tokens, labels).backward()
            for optimizer in self._optimizers:
                optimizer.step()
                optimizer.zero_grad()

        self.step: Step = step

    def _made_optimizers(self) -> list[torch.optim.Optimizer]:
        encoder, head = self.model.encoder.parameters(), self.model.head.parameters()
        if self.run.plain:
            return [torch.optim.AdamW(encoder, lr=1e-5), torch.optim.SGD(head, lr=0.05)]
        capturable = self.run.mode == GRAPH
        return [
            elmo.optim.AdamW(
                encoder, lr=1e-5, rounding="kahan", state_dtype=torch.bfloat16, fused=False,
                capturable=capturable,
            ),
            elmo.optim.SGD(head, lr=0.05, capturable=capturable),
        ]  # fmt: skip

    @property
    def activation_budget(self) -> float:
        """For `torch._functorch.config.activation_memory_budget`."""
        return 0.5 if self.run.mode == BUDGET else 1.0

    def check(self) -> None:
        """Raise RuntimeError unless the head's update was fused, where it is to be."""
        fused = elmo.is_fused(self.model.head.head.weight) and elmo.last_report().matches
        if not self.run.plain and not fused:
            raise RuntimeError(f"the head's update was not fused:\n{elmo.last_report()}")

    def terms(self) -> dict[str, float]:
        """MiB of the weights."""
        parts = {"encoder MiB": self.model.encoder, "head MiB": self.model.head}
        return {
            name: sum(p.numel() * p.element_size() for p in part.parameters()) / MIB
            for name, part in parts.items()
        }


def on_cpu(run: Run, sizes: tuple[int, int, int], *, tiny: bool) -> dict[str, Any]:
    """One mode, in this process: seconds, and GiB at the peak of a step."""
    import torch._functorch.config as functorch

    torch.manual_seed(0)
    training = Training(run, sizes, "cpu", tiny=tiny, options={"min_outputs": 64} if tiny else {})
    with functorch.patch(activation_memory_budget=training.activation_budget):
        training.step()
        training.step()
        training.check()
        start = time.perf_counter()
        resident = resident_peak(training.step)
        seconds = time.perf_counter() - start
        between = allocated_now()
        allocated = between + allocated_peak(training.step)
    gib = 1024 * MIB
    return {
        **run.row, "L": sizes[2], "peak GiB": allocated / gib, "resident GiB": resident / gib,
        "seconds": seconds, "samples/s": sizes[0] / seconds, **training.terms(),
        "with optimizer state MiB": between / MIB,
    }  # fmt: skip


def environment() -> dict[str, Any]:
    """What the numbers depend on besides the code."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        "commit": subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip(),
    }


def main() -> None:
    """Parse the command line, measure each mode in a process, write what was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs=3, default=(128, 128, 2_812_281), metavar="NTL")
    parser.add_argument("--tiny", action="store_true", help="an encoder of two small layers")
    parser.add_argument("--only", help="only modes whose dtype and name contain this")
    parser.add_argument("--json", type=Path, help="raw rows, and a table .md beside them")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    modes = runs("cpu")
    if args.one is not None:
        print(json.dumps(on_cpu(modes[args.one], tuple(args.sizes), tiny=args.tiny)))
        return
    rows = []
    for i, run in enumerate(modes):
        if (args.only or "") not in " ".join(run.row.values()):
            continue
        command = [sys.executable, __file__, "--one", str(i), "--sizes", *map(str, args.sizes)]
        done = subprocess.run(
            [*command, *(["--tiny"] if args.tiny else [])], capture_output=True, text=True
        )
        if done.returncode != 0:
            raise SystemExit(f"{run.row}:\n{done.stderr}")
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    if args.json:
        report = {"environment": environment(), "rows": rows}
        args.json.write_text(json.dumps(report, indent=1) + "\n")
        args.json.with_suffix(".md").write_text("\n".join(markdown(rows)) + "\n")


if __name__ == "__main__":
    main()
