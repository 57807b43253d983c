"""Whether a CUDA graph is being captured: what a step does then is recorded, not done."""

from __future__ import annotations

import torch


def capturing(device: torch.device) -> bool:
    """Whether what is now queued for a device becomes part of a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
