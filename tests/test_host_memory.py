"""Huge pages: asked for where it pays, and where the gradient of a step is made."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import elmo_compile
from elmo_compile import host_memory

SMAPS = Path("/proc/self/smaps")
WANTED = Path("/sys/kernel/mm/transparent_hugepage/enabled")

linux = pytest.mark.skipif(
    not (SMAPS.exists() and WANTED.exists()), reason="needs a Linux with huge pages"
)


def flags_at(address: int) -> set[str]:
    """The kernel's flags of the mapping that holds an address; "hg": huge pages were asked for."""
    inside = False
    for line in SMAPS.read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return set(line.split()[1:])
    raise AssertionError(f"nothing is mapped at {address:#x}")


@linux
@pytest.mark.parametrize("size", [host_memory.LARGE, 64 << 20, (64 << 20) + 12_345])
def test_large_tensors_ask(size: int) -> None:
    made = host_memory.empty((size,), torch.uint8)
    assert "hg" in flags_at(made.data_ptr() + made.nbytes // 2)
    assert made.shape == (size,)
    made.fill_(7)
    assert made.sum(dtype=torch.int64) == 7 * size


@linux
def test_advice_stays_within_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(
        host_memory, "_madvise", lambda: lambda first, length, _: asked.append((first, length))
    )
    for offset in (0, 1, 4095):
        host_memory._ask_for_huge_pages((1 << 40) + offset, 3 * 4096)
    page = host_memory.mmap.PAGESIZE
    for (first, length), offset in zip(asked, (0, 1, 4095), strict=True):
        assert first % page == 0
        assert length % page == 0
        assert first >= (1 << 40) + offset
        assert first + length <= (1 << 40) + offset + 3 * 4096


def test_small_ones_and_refused_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(
        host_memory, "_madvise", lambda: lambda first, length, _: asked.append(length) or -1
    )
    assert host_memory.empty((host_memory.LARGE - 1,), torch.uint8).nbytes == host_memory.LARGE - 1
    assert not asked
    assert host_memory.empty((4, host_memory.LARGE), torch.bfloat16).shape == (4, host_memory.LARGE)
    assert len(asked) == 1
    monkeypatch.setattr(host_memory, "_madvise", lambda: None)
    assert host_memory.empty((host_memory.LARGE,), torch.uint8).nbytes == host_memory.LARGE


@linux
@pytest.mark.parametrize("loss", ["bce", "ce", "hinge"])
def test_a_weight_gradient_lies_in_them(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(64, 40_000)

    def model(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        z = head(x)
        if loss == "ce":
            return torch.nn.functional.cross_entropy(z, y)
        targets = elmo_compile.multi_hot(y[:, None], z.shape[-1])
        if loss == "bce":
            return torch.nn.functional.binary_cross_entropy_with_logits(z, targets)
        return (1 - (2 * targets - 1) * z).relu().mean()

    step = torch.compile(model, backend="elmo", options={"lower": "eager", "strict": True})
    seen: list[set[str]] = []
    make = host_memory.empty

    def watched(*args: Any) -> torch.Tensor:
        made = make(*args)
        if made.numel() >= head.weight.numel():
            seen.append(flags_at(made.data_ptr() + made.nbytes // 2))
        return made

    monkeypatch.setattr(host_memory, "empty", watched)
    step(torch.randn(128, 64), torch.randint(40_000, (128,))).backward()
    assert head.weight.grad is not None
    assert seen
    assert all("hg" in flags for flags in seen)
