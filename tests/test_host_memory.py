"""Huge pages: asked for where it pays. Scratch: taken over by the next step."""

from __future__ import annotations

import mmap
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

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


class Owner:
    """Whoever uses scratch."""


def test_scratch_is_taken_over_once_nobody_uses_it() -> None:
    host_memory.forget_scratch()
    first, second = Owner(), Owner()
    shape = (1024, 2048)
    mine = host_memory.scratch(first, shape, torch.float32, "cpu")
    other = host_memory.scratch(second, shape, torch.bfloat16, "cpu")
    place = mine.data_ptr()
    assert other.data_ptr() != place
    del first, mine
    third = Owner()
    with torch.inference_mode():
        again = host_memory.scratch(third, (2048, 1024), torch.int32, "cpu").fill_(3)
    assert again.data_ptr() == place
    assert again.shape == (2048, 1024)
    del second, third, again, other
    fourth = Owner()
    host_memory.scratch(fourth, shape, torch.float32, "cpu").fill_(3)  # no inference tensor's
    del fourth
    large = Owner()
    host_memory.scratch(large, (host_memory.SCRATCH,), torch.uint8, "cpu")
    assert not host_memory._free  # more than is kept
    host_memory.forget_scratch()


def test_small_scratch_is_torch_s() -> None:
    host_memory.forget_scratch()
    owner = Owner()
    host_memory.scratch(owner, (16, 16), torch.float32, "cpu")
    del owner
    assert not host_memory._free


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_a_process_does_not_grow() -> None:
    """A block of 30 MiB was left behind at each step (float32, AdamW), for glibc to grow by."""
    rows, columns, outputs = 16, 256, 60_000
    model = torch.nn.Sequential(
        torch.nn.EmbeddingBag(100, columns), torch.nn.Linear(columns, outputs)
    )
    opt = elmo_compile.optim.AdamW(model.parameters(), lr=1e-3)
    options = {"chunk_size": 30_000}

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(model(x), elmo_compile.multi_hot(y, outputs))

    step = torch.compile(loss, backend="elmo", options=options)
    sizes = []
    for _ in range(10):
        step(torch.randint(100, (rows, 8)), torch.randint(outputs, (rows, 4))).backward()
        opt.step()
        opt.zero_grad()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        sizes.append(pages * mmap.PAGESIZE)
    assert sizes[-1] - sizes[3] < 40 << 20
