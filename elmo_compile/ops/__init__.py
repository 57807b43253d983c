"""torch.library contracts of the head's ops. Importing a submodule registers its op."""

from __future__ import annotations

import importlib

_OPS = (
    "at_once",
    "cut",
    "fused",
    "fused_program",
    "head_loss",
    "head_program",
    "in_range",
    "linear",
    "multi_hot",
    "rounded",
    "scale",
    "sharded_linear",
)


def load() -> None:
    """Register every op of this package with torch."""
    for name in _OPS:
        importlib.import_module(f"{__name__}.{name}")
