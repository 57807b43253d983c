"""A model in training, by ordinary steps or replays of a CUDA graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from steps import BF16, FP8, batch, net, on_device
from torch import Tensor, nn
from training import compiled

import elmo_compile as elmo
from elmo_compile.errors import FusedUpdateError

WARM, LAST = 2, 4
"""The first and the last batch of replays; those before are ordinary steps."""

Hyper = dict[str, Any]

CASES: dict[str, tuple[str, Any, Callable[..., Any], Hyper]] = {
    "sgd": ("bce", BF16, elmo.optim.SGD, {"lr": 0.1}),
    "momentum, decay": (
        "ce",
        FP8,
        elmo.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    ),
    "adamw": ("bce", FP8, elmo.optim.AdamW, {"lr": 1e-2}),
    "adamw, float32": ("ce", None, elmo.optim.AdamW, {"lr": 1e-2}),
    "adamw, kahan": ("bce", BF16, elmo.optim.AdamW, {"lr": 1e-3, "rounding": "kahan"}),
    "adamw, eco": ("bce, dense", BF16, elmo.optim.AdamW, {"lr": 1e-2, "eco": True}),
    "lion, some kahan": ("bce", FP8, elmo.optim.Lion, {"lr": 1e-3, "kahan_rows": 40}),
    "adagrad": ("ce", BF16, elmo.optim.Adagrad, {"lr": 0.1}),
    "adamw, 8 bits": ("bce", BF16, elmo.optim.AdamW, {"lr": 1e-2, "state_dtype": "8bit"}),
    "clipped at the step": (
        "bce",
        BF16,
        elmo.optim.AdamW,
        {"lr": 1e-2, "update_at": "step", "max_norm": 0.05, "nonfinite": "skip"},
    ),
    "not fused": ("bce", BF16, elmo.optim.AdamW, {"lr": 1e-2, "fused": False, "max_norm": 0.05}),
}


def model_of(kind: str, dtype: Any) -> nn.Module:
    """A Net on the device, its head stored in a narrow type if one is named."""
    model = net(kind)
    return (model if dtype is None else elmo.convert_head(model, dtype)).to("cuda")


@contextlib.contextmanager
def side_stream() -> Iterator[None]:
    """Where ordinary steps must run before a capture, as torch asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


class Run:
    """A model in training: `ordinary` steps, then `capture` and `replay`."""

    def __init__(self, case: str, options: Hyper, **hyper: Any) -> None:
        kind, dtype, optimizer, given = CASES[case]
        self.model = model_of(kind, dtype)
        self.step = compiled(self.model, options)
        self.opt = optimizer(self.model.parameters(), **{**given, **hyper})

    def ordinary(self, seed: int) -> float:
        loss = self.step(*on_device(seed))
        loss.backward()
        self.opt.step()
        self.opt.zero_grad()
        return loss.item()

    def warm(self) -> None:
        with side_stream():
            for seed in range(WARM):
                self.ordinary(seed)

    def capture(self) -> None:
        self.given = on_device(WARM)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = self.step(*self.given)
            self.loss.backward()
            self.opt.step()

    def replay(self, seed: int) -> float:
        for static, fresh in zip(self.given, batch(seed)):
            static.copy_(fresh)
        self.graph.replay()
        return self.loss.item()

    def bits(self) -> dict[str, Tensor]:
        """Weights and state."""
        found = {f"weight {i}": p.detach() for i, p in enumerate(self.model.parameters())}
        for i, held in enumerate(self.opt.state.values()):
            found |= {f"{name} {i}": t for name, t in held.items() if isinstance(t, Tensor)}
        return {name: t.cpu().clone().reshape(-1).view(torch.uint8) for name, t in found.items()}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(got[name], value), name


def refused(match: str) -> Any:
    """What is refused says how."""
    return pytest.raises(FusedUpdateError, match=match)
