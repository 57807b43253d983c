"""`elmo::in_range`: numbers of outputs, once they are known to be such.

`F.one_hot` refuses others; what is left of it in chunks compares numbers, and would take one that
is out of range for a row without a positive.
"""

from __future__ import annotations

import torch
from torch import Tensor

from elmo_compile.errors import InputError


@torch.library.custom_op(
    "elmo::in_range", mutates_args=(), schema="(Tensor numbers, int end) -> Tensor"
)
def in_range(numbers: Tensor, end: int) -> Tensor:
    """A copy of integers of any shape, all in [0, end)."""
    check_numbers(numbers, 0, end)
    return numbers.clone()


@in_range.register_fake
def _(numbers: Tensor, end: int) -> Tensor:
    return torch.empty_like(numbers)


def check_numbers(numbers: Tensor, lowest: int, end: int) -> None:
    """Raise InputError (on a GPU: stop the program) where a label is out of range."""
    wrong = ((numbers < lowest) | (numbers >= end)).any()
    if numbers.device.type != "cpu":
        torch._assert_async(~wrong, "elmo_compile: a label is out of range")
    elif bool(wrong):
        worst = int(numbers.min()) if int(numbers.min()) < lowest else int(numbers.max())
        raise InputError(f"a label or output number is {worst}; accepted: {lowest} to {end - 1}")
