"""What an optimizer says when a step has fused no head's update: the reason, where one is known."""

from __future__ import annotations

from collections.abc import Sequence

from elmo_compile.ops.owners import Owner
from elmo_compile.ops.unfused import any_frozen_head, reason

_NAMED = 4
"""Weights that are named."""

_UNKNOWN = (
    'no graph compiled with backend="elmo" had one of its weights as a head: the model is not '
    "compiled, Dynamo skipped the function (as it does where nn.RNN, nn.GRU or nn.LSTM is called), "
    "or no head was found (see elmo_compile.explain(model, ...) and elmo_compile.last_report())"
)


def nothing_fused(optimizer: str, owners: Sequence[Owner]) -> str:
    """The warning; empty where none of these is a head and the head that was found is frozen.

    Args:
        optimizer: its class.
        owners: of the weights that it could have fused.
    """
    known = {owner.name: reason(owner.param) for owner in owners if reason(owner.param)}
    if not known and any_frozen_head():
        return ""
    told = [f"{name}: {why}" for name, why in list(known.items())[:_NAMED]]
    if len(known) > _NAMED:
        told.append(f"{len(known) - _NAMED} more")
    return (
        f"elmo_compile.optim.{optimizer} is used, but no head's update was fused: "
        f"{'; '.join(told) or _UNKNOWN}. Pass fused=False to silence this"
    )
