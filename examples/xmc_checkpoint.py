"""Checkpoints that are whole or not there, and a Ctrl-C that waits for the end of a step."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch

FORMAT = 1
"""Raised when an older checkpoint can no longer be read."""


class CheckpointError(Exception):
    """A checkpoint is missing, unreadable, or of another run; the message says what to do."""


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Write `folder/checkpoint.pt`; a crash meanwhile leaves the one before.

    Raises:
        CheckpointError: the folder cannot be written to.
    """
    path = folder / "checkpoint.pt"
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({"format": FORMAT, **state}, unfinished)
        os.replace(unfinished, path)
    except OSError as error:
        raise CheckpointError(f"{path} could not be written: {error}.") from error
    finally:
        unfinished.unlink(missing_ok=True)


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """What `save_checkpoint` wrote, tensors on the CPU; runs no code from the file.

    Raises:
        CheckpointError: there is none, or it is not one of these.
    """
    path = folder / "checkpoint.pt"
    if not path.exists():
        raise CheckpointError(
            f"{path}: no such checkpoint. Train first, or name the folder that the training "
            "was given with --out."
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises several kinds for a damaged file
        raise CheckpointError(f"{path} is not a readable checkpoint: {error}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of train_xmc.py, format {FORMAT}.")
    return state


class StopRequest:
    """While entered, the first Ctrl-C only sets `requested`; a second one interrupts as usual."""

    def __init__(self) -> None:
        self.requested = False
        self._before: Any = None

    def __enter__(self) -> StopRequest:
        self._before = signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
