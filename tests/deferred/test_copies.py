"""What is made of deferred tensors that are themselves made of deferred logits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from small_net import N, assert_alike, outcome
from torch import Tensor

from elmo_compile.deferred import Deferred

WRITES: dict[str, Callable[[Tensor], object]] = {
    "itself": lambda z: z.mul_(2),
    "rows": lambda z: z[1:].mul_(2),
    "data": lambda z: z.data.mul_(2),
    "copied": lambda z: z.copy_(z * 2),
    "in another graph": lambda z: torch.compile(lambda z: z.mul_(2), backend="aot_eager")(z),
}
MADE: dict[str, Callable[[Tensor], Tensor]] = {
    "with itself": lambda a: a + a,
    "chosen": lambda a: torch.where(a > 0.1, a, 0.0),
    "views": lambda a: a[1:] * a[:-1],
    "of what was made of it": lambda a: (a + a) * a.exp(),
}


@pytest.mark.parametrize("made", list(MADE))
@pytest.mark.parametrize("write", list(WRITES))
@pytest.mark.parametrize("read", [False, True])
def test_of_a_copy_from_before_a_write(write: str, made: str, read: bool) -> None:
    """Not of what was written: read in two places, a copy is made of the logits again."""

    def use(z: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            copy = z.square()
            if read:
                z.sum()
            WRITES[write](z)
            return MADE[made](copy)

    assert_alike(outcome(use, compiled=True)[0], outcome(use, compiled=False)[0])


@pytest.mark.parametrize("operation", [F.logsigmoid, torch.sigmoid, F.softplus, torch.square])
def test_values_have_the_strides_that_were_told(operation: Callable[[Tensor], Tensor]) -> None:
    """Of a transposed tensor torch's fake `logsigmoid` has other strides than its kernel."""

    def use(z: Tensor, y: Tensor) -> Tensor:
        made = operation(z.t())
        if type(made) is Deferred:
            assert made.materialize().stride() == made.stride()
        sum_ = torch.compile(lambda made: made.sum(0), backend="aot_eager")
        found: Tensor = sum_(made)
        assert found.shape == (N,)
        return found

    assert_alike(outcome(use, compiled=True)[0], outcome(use, compiled=False)[0])


def test_log_sum_exp_of_a_mask_is_of_its_numbers() -> None:
    def use(z: Tensor, y: Tensor) -> Tensor:
        return (z > 0).logsumexp(-1)

    found, _, z = outcome(use, compiled=True)
    assert_alike(found, outcome(use, compiled=False)[0])
    assert type(z) is Deferred
    assert z._state.values is None
