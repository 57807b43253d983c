"""A flag that kernels on a GPU set, read by the host without draining the stream."""

from __future__ import annotations

import torch
from torch import Tensor


class DeviceFlag:
    """Whether any of several device scalars was not zero.

    Each is copied to pinned memory when it is added: whoever asks waits for that copy only, while
    what was queued behind it goes on.
    """

    def __init__(self) -> None:
        self._on_host: list[tuple[Tensor, torch.cuda.Event]] = []

    def add(self, flag: Tensor) -> None:
        """Add an int32 scalar on a CUDA device, as it is at this point of the current stream."""
        on_host = torch.empty((), dtype=torch.int32, device="cpu", pin_memory=True)
        on_host.copy_(flag, non_blocking=True)
        stream = torch.cuda.current_stream(flag.device)
        self._on_host.append((on_host, stream.record_event()))

    def is_set(self) -> bool:
        """Whether one was not zero."""
        for _, event in self._on_host:
            event.synchronize()
        return any(bool(on_host) for on_host, _ in self._on_host)

    def clear(self) -> None:
        """Forget them."""
        self._on_host = []
