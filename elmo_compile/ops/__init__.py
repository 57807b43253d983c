"""torch.library contracts of the head's ops. Importing a submodule registers its op."""

from __future__ import annotations


def load() -> None:
    """Register every op of this package with torch."""
    from elmo_compile.ops import (
        at_once,
        cut,
        fused,
        fused_program,
        head_loss,
        head_program,
        in_range,
        linear,
        multi_hot,
        scale,
    )

    del (
        at_once,
        cut,
        fused,
        fused_program,
        head_loss,
        head_program,
        in_range,
        linear,
        multi_hot,
        scale,
    )
