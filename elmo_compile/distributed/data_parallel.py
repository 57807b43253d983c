"""DistributedDataParallel for everything but the heads, which gather features instead.

DDP reduces the gradients of the parameters it was given: for a head that is a tensor of L x D. With
`update_at="step"` a head's gradient follows from N x D features and targets, so these are gathered,
and every process makes the same update with the same random bits.
Private names of torch: `DDP._set_params_and_buffers_to_ignore_for_model` (2.11 to 2.15).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from elmo_compile.errors import ElmoError
from elmo_compile.heads.convert import find_head
from elmo_compile.ops.data_parallel import refuse_gradient
from elmo_compile.ops.dtensors import is_sharded

_Model = TypeVar("_Model", bound=nn.Module)


def ignore_heads(
    model: _Model, *, names: Sequence[str] | None = None, process_group: Any = None
) -> _Model:
    """Keep the weights of a model's heads out of DistributedDataParallel, before wrapping it.

    To be used with an optimizer of this package with `update_at="step"`. The weights are made equal
    to those of process 0, as DDP does for what it manages. Biases stay with DDP. A backward that
    gives such a weight an ordinary gradient, which nobody would reduce, raises FusedUpdateError.

    `opt.step()` is collective: every process must call it as often, also for a batch that does not
    use the head there (with DDP's find_unused_parameters=True). Under `join()` that is not so; it
    is refused unless throw_on_early_termination=True.

    Args:
        model: what `DistributedDataParallel` is then called with.
        names: of the heads (nn.Linear); None: the one with the most outputs.
        process_group: what `DistributedDataParallel` is given; None: the default one.

    Returns:
        `model`.

    Raises:
        OptionError: no such layer.
        ElmoError: it is not clear which layer is meant.
    """
    chosen = [find_head(model, name, who="ignore_heads") for name in names or (None,)]
    for path, head in chosen:
        if is_sharded(head.weight):
            raise ElmoError(
                f"ignore_heads: {path or 'the head'} is sharded; shard_head keeps it out of "
                "DistributedDataParallel already"
            )
        ignore_parameters(model, [f"{path}.weight" if path else "weight"])
        if dist.is_available() and dist.is_initialized():
            with torch.no_grad():
                stored = head.weight.detach()
                raw = stored.view(torch.uint8) if stored.element_size() == 1 else stored
                first = 0 if process_group is None else dist.get_global_rank(process_group, 0)
                dist.broadcast(raw, src=first, group=process_group)
                torch.autograd.graph.increment_version(head.weight)
        refuse_gradient(head.weight, process_group)
    return model


def ignore_parameters(model: nn.Module, names: Sequence[str]) -> None:
    """Let a DistributedDataParallel around `model` leave these parameters alone."""
    ignored = list(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    for name in names:
        ignored += [name, f"_orig_mod.{name}"]  # the second: as a compiled model names it
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)  # type: ignore[no-untyped-call]
