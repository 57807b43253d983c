"""Backwards of a fused head that are not the one that updates it: for the encoder alone, or again.

Uses private APIs: `torch._C._will_engine_execute_node` and
`torch._C._autograd._unsafe_set_version_counter` (tried on torch 2.11, 2.13 and 2.15).
"""

from __future__ import annotations

import torch
from torch import Tensor

from elmo_compile.errors import FusedUpdateError
from elmo_compile.ops.owners import Owner


def not_written(sink: Tensor) -> None:
    """Take back the version that an op's declared write counted, since nothing was written.

    Autograd refuses a second backward through what was written after it was saved. It is for the
    ticket to refuse one, and `autograd.grad(loss, encoder, retain_graph=True)` does not use it up
    (tried on torch 2.11, 2.13 and 2.15).
    """
    if not sink.is_inference() and sink._version > 0:
        torch._C._autograd._unsafe_set_version_counter((sink,), (sink._version - 1,))


def weight_is_wanted(owner: Owner) -> bool:
    """Whether this backward would have put a gradient into the weight's `.grad`.

    False for `autograd.grad(loss, encoder)` and `backward(inputs=[...])` without the weight. Uses
    the private query that torch's own multi-grad hooks use (tried on 2.11 to 2.13).
    """
    if owner.accumulate_node is None:  # The weight has changed since: the ticket will say so.
        return True
    try:
        return bool(torch._C._will_engine_execute_node(owner.accumulate_node))
    except RuntimeError as error:
        raise FusedUpdateError(
            f"the gradient of the head weight {owner.name} was asked for (torch.autograd.grad), "
            "but its update is fused and no gradient exists; construct the optimizer with "
            "fused=False"
        ) from error
