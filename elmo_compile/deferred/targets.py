"""`elmo.multi_hot`: 0/1 targets, deferred where they are large and made outside of a graph.

A loss outside the compiled function has its targets made there as well. As a matrix they are as
large as the logits that are deferred; as indices they enter the program of the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from elmo_compile.deferred.origin import FAKES, fake
from elmo_compile.deferred.state import Derived, State
from elmo_compile.deferred.step import Argument, Step
from elmo_compile.deferred.tensor import Deferred, keep_from_dynamo
from elmo_compile.ops.multi_hot import check_labels, check_multi_hot

LARGE = 4 * 2**20
"""Entries of a matrix that is not made before something needs it."""


def multi_hot(indices: Tensor, num_classes: int, *, offsets: Tensor | None = None) -> Tensor:
    """Targets of a multi-label loss: 1 where a label is given, else 0.

    `y[n, l] = 1 if l in indices[n] else 0`. The dense matrix is not built where the loss of a head
    consumes it: in a function compiled with backend="elmo", and of deferred logits. A large one
    that is made outside of compiled functions is built when something else needs its values.

    Args:
        indices: int64 [N, P], label ids padded with -1; or int64 [M] with `offsets`.
        num_classes: number of labels L.
        offsets: int64 [N + 1], row n's labels are `indices[offsets[n]:offsets[n + 1]]`.

    Returns:
        float32 [N, L]. A label given twice for a row counts once.

    Raises:
        InputError: wrong dtype or shape, an id below -1 or not below `num_classes` (on CUDA, where
            the host would wait for the ids, a matrix of such ids ends in a device assertion, and a
            head's update is not applied).
    """
    check_multi_hot(indices, num_classes, offsets)
    indices, offsets = indices.long(), None if offsets is None else offsets.long()
    num_rows = indices.shape[0] if offsets is None else offsets.shape[0] - 1
    if _eager(indices, offsets) and num_rows * num_classes >= LARGE:
        check_labels(indices, num_classes, offsets)
        keep_from_dynamo()
        return Deferred(Targets(indices, num_classes, offsets))
    y: Tensor = torch.ops.elmo.multi_hot(indices, num_classes, offsets)
    return y


def _eager(*tensors: Tensor | None) -> bool:
    """Whether these have values, and nothing is traced or transformed by torch.func (tried on
    torch 2.11, 2.13 and 2.15)."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    traced = any(mode.is_infra_mode() for mode in _get_current_dispatch_mode_stack())
    plain = all(tensor is None or type(tensor) is Tensor for tensor in tensors)
    return plain and not traced and torch._C._functorch.peek_interpreter_stack() is None


class Targets(State):
    """A matrix of 0 and 1, by the indices of the ones."""

    def __init__(self, indices: Tensor, num_classes: int, offsets: Tensor | None) -> None:
        self._indices = indices.clone()
        self._steps = [Step(torch.ops.elmo.multi_hot, (num_classes, offsets), {}).frozen()]
        with FAKES:
            super().__init__(
                self._steps[0](fake(indices), [fake(t) for t in self._steps[0].tensors])
            )

    made_easily = True

    @property
    def available(self) -> bool:
        return True

    def remake(self, steps: Sequence[Step]) -> Tensor:
        argument = self.argument(steps)
        made: Tensor = argument(argument.tensors)
        return made

    def _make(self) -> Tensor:
        return self.remake(())

    def argument(self, steps: Sequence[Step]) -> Argument:
        """What the steps make of them, for a program."""
        return Argument(self._indices, [*self._steps, *steps])

    def top(self) -> None:
        return None


def made_by_program(argument: Any) -> Any:
    """Deferred targets as what a program makes of their indices; anything else as it is."""
    if not isinstance(argument, Deferred) or _differentiated(argument):
        return argument
    if argument.untouched:
        root, steps = argument._state.recipe()
        if isinstance(root, Targets):
            return root.argument(steps)
    return argument


def _differentiated(targets: Deferred) -> bool:
    """Whether someone may want the derivative with respect to these."""
    if forward_ad._current_level >= 0 or targets.requires_grad:
        return True
    state = targets._state
    source = state.source if isinstance(state, Derived) else None
    return isinstance(source, Deferred) and _differentiated(source)
