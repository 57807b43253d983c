"""torch.library contracts of the head's ops. Importing a submodule registers its op."""

from __future__ import annotations


def load() -> None:
    """Register every op of this package with torch."""
    from elmo_compile.ops import fused, head_loss, linear, multi_hot

    del fused, head_loss, linear, multi_hot
