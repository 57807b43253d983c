"""A flag that kernels on a GPU set, read by the host without draining the stream.

In a CUDA graph the host reads nothing: what is added stays on the device (`captured`), and the rest
of the captured step obeys it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from elmo_compile.numerics.capture import capturing


class DeviceFlag:
    """Whether any of several device scalars was not zero.

    Each is copied to pinned memory when it is added: whoever asks waits for that copy only, while
    what was queued behind it goes on.
    """

    def __init__(self) -> None:
        self._on_host: list[tuple[Tensor, torch.cuda.Event]] = []
        self.captured: list[Tensor] = []
        """What was added while a CUDA graph was captured: int32 scalars of that graph."""

    def add(self, flag: Tensor) -> None:
        """Add an int32 scalar on a CUDA device, as it is at this point of the current stream."""
        if capturing(flag.device):
            self.captured.append(flag)
            return
        self.captured = []  # of a capture that was given up
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
        self._on_host, self.captured = [], []
