"""The models and batches of the tests on a CUDA device."""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import elmo_compile as elmo

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
CHUNK = 128 if "host_cuda" in sys.modules else 256  # Triton's interpreter takes a while for each
L, D, N = 2 * CHUNK + 8, 32, 10


def focal(z: Tensor, y: Tensor) -> Tensor:
    """A loss without kernels of its own."""
    p = torch.sigmoid(z)
    return -(y * (1 - p) ** 2 * F.logsigmoid(z) + (1 - y) * p**2 * F.logsigmoid(-z)).sum() / len(z)


class Net(nn.Module):
    """encoder -> head -> loss."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.encoder = nn.Linear(24, D)
        self.head = nn.Linear(D, L)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        z = self.head(torch.tanh(self.encoder(x)))
        if self.kind == "ce":
            return F.cross_entropy(z, labels[:, 0])
        if self.kind == "ce, smoothed":
            return F.cross_entropy(z, labels[:, 0], label_smoothing=0.1)
        if self.kind == "bce, dense":
            y = (torch.arange(L, device=z.device) % 7 == labels[:, :1] % 7).float()
            return F.binary_cross_entropy_with_logits(z, y, reduction="sum") / len(z)
        y = elmo.multi_hot(labels, L)
        if self.kind == "focal":
            return focal(z, y)
        return F.binary_cross_entropy_with_logits(z, y, reduction="sum") / len(z)


KINDS = ["bce", "bce, dense", "ce", "ce, smoothed", "focal"]
WITH_KERNELS = ["bce", "bce, dense", "ce"]


def net(kind: str) -> Net:
    """A Net with weights that depend on nothing, on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net(kind)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    """(inputs [N, 24], labels [N, 3]) on the CPU."""
    make = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, L, (N, 3), generator=make)
    return torch.randn(N, 24, generator=make), labels


def on_device(seed: int) -> tuple[Tensor, Tensor]:
    """`batch` on the device."""
    x, labels = batch(seed)
    return x.to("cuda"), labels.to("cuda")
