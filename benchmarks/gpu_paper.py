"""The kernels of the ELMO paper on the same head step, from a checkout of its repository.

Nothing of it is kept here: `--paper DIR` names a clone of https://github.com/xmc-aalto/elmo, whose
layer is given weights of its own form (equal parts, one parameter each) and called as it trains.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import torch
from gpu_common import FP8, Bench, Contender, Step, fresh, kernel_step, said, weight
from torch import Tensor, nn

PARTS = 8
"""Chunks of its Amazon-3M configuration."""


def layer(x: Tensor, L: int) -> Any:
    """Its fp8 layer with L outputs, a multiple of 16 in each part."""
    from xmc_classifiers.chunked_fp8xmc_clf import Fp8XMCBCEChunkedLayer

    config = SimpleNamespace(
        environment=SimpleNamespace(device=str(x.device)),
        training=SimpleNamespace(xmc=SimpleNamespace(simulated_fp8=False)),
        model=SimpleNamespace(xmc=SimpleNamespace(num_chunks=PARTS, input_features=x.shape[1])),
        data=SimpleNamespace(num_labels=16 * PARTS, batch_size=x.shape[0]),
    )
    made: Any = Fp8XMCBCEChunkedLayer(config)  # small: its own would pass through host memory
    made.num_labels, made.num_labels_i = L, L // PARTS
    parts = [weight(L // PARTS, x.shape[1], FP8, str(x.device)) for _ in range(PARTS)]
    made.xfc_weight = nn.ParameterList(nn.Parameter(p, requires_grad=False) for p in parts)
    return made


def its_step(x: Tensor, labels: Tensor, L: int) -> Step:
    """One of its training steps of the head: dx and the update, the loss value skipped."""
    head = layer(x, L)
    rows = torch.arange(x.shape[0], device=x.device).repeat_interleave(labels.shape[1])
    pairs = torch.stack((rows, labels.reshape(-1)), 1)

    def step() -> None:
        head.xfc_forward_backward(x, pairs, [1e-6])

    return step


def paper(b: Bench) -> None:
    """Its step beside ours, interleaved: N=128, D=768, fp8."""
    if b.paper is None:
        raise SystemExit("the part 'paper' needs --paper DIR, a clone of its repository")
    sys.path.insert(0, str(b.paper / "src"))
    for L in [b.size(n, 2048) // 128 * 128 for n in (2_812_281, 131_072, 670_091, 1_305_265)]:
        with fresh():
            _compare(b, L)


def _compare(b: Bench, L: int) -> None:
    N, D = b.size(128, 16), b.size(768, 64)
    x = torch.randn(N, D, device=b.device).bfloat16()
    w = weight(L, D, FP8, b.device)
    labels = torch.randint(0, L, (N, 5), device=b.device)
    row = {"part": "paper", "L": L, "dtype": "fp8"}
    contenders = {
        "elmo_compile": Contender(kernel_step(b, x, w, labels)),
        "elmo_compile, fp8 features": Contender(
            kernel_step(b, x, w, labels, fp8_features=True), products=2.5
        ),
    }
    theirs = "the paper's kernels"
    try:
        contenders[theirs] = Contender(its_step(x, labels, L))
    except Exception as error:  # ours are worth having
        b.emit(**row, contender=theirs, failed=said(error))
    found = b.compare(row, contenders, moved=2 * L * D, product=2 * N * L * D)
    for name in set(found) - {theirs}:
        if theirs in found:
            b.emit(**row, contender=name, **{"times as fast": found[theirs] / found[name]})
