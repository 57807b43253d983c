"""Seconds of a step on a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Step = Callable[[], Any]
REPEATS = 15
AHEAD = 20_000_000
"""Cycles the device waits before a timed step, some 10 ms: the host gets ahead of it."""


def median_seconds(step: Step, device: str, repeats: int = REPEATS) -> float:
    """The median of several steps by the device's clock, after it is warm."""
    warm_up(step, device)
    return statistics.median(device_seconds(step, device) for _ in range(repeats))


def device_seconds(step: Step, device: str) -> float:
    """One step: of the device, which was kept busy before it; of the host's clock on a CPU."""
    if torch.device(device).type == "cpu":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    event: Any = torch.cuda.Event
    first, last = event(enable_timing=True), event(enable_timing=True)
    torch.cuda._sleep(AHEAD)  # type: ignore[no-untyped-call]
    first.record()
    step()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3


def warm_up(step: Step, device: str, seconds: float = 0.1) -> None:
    """Twice at least, and for some time: a card that waited has lowered its clock."""
    start, steps = time.perf_counter(), 0
    while steps < 2 or time.perf_counter() - start < seconds:
        step()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        steps += 1
