"""The device's check of labels says what the host's says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from elmo_compile.errors import InputError
from elmo_compile.kernels.targets import check_targets
from elmo_compile.numerics.losses import BCE, CE, LossSpec
from elmo_compile.ops.call import labels_out_of_range

L = 50
CASES: list[tuple[str, list[Any], list[int] | None, bool]] = [
    ("classes", [0, 49, -100], None, False),
    ("classes", [0, 50, 1], None, True),
    ("classes", [0, -1, 1], None, True),
    ("padded", [[0, -1], [49, 3], [1, 1]], None, False),
    ("padded", [[0, -2], [49, 3], [1, 1]], None, True),
    ("padded", [[0, -1], [50, 3], [1, 1]], None, True),
    ("indices", [[0, 1], [49, 3], [1, 1]], None, False),
    ("indices", [[0, -1], [49, 3], [1, 1]], None, True),
    ("flat", [0, 49, 3], [0, 1, 3, 3], False),
    ("flat", [0, 49, -1], [0, 1, 3, 3], True),
    ("pairs", [0, -3, 2], [-50, 49, 0], False),
    ("pairs", [0, 3, 2], [0, 49, 0], True),
    ("pairs", [0, 1, 2], [0, -51, 0], True),
]


def _raises(spec: LossSpec, target: Tensor, aux: Tensor | None) -> bool:
    try:
        check_targets(spec, target, aux, 3, L)
    except InputError:
        return True
    return False


@pytest.mark.parametrize(("form", "target", "aux", "wrong"), CASES)
def test_agrees_with_the_hosts_check(
    form: Any, target: list[Any], aux: list[int] | None, wrong: bool
) -> None:
    spec = LossSpec(name=CE if form == "classes" else BCE, targets=form)
    target_t, aux_t = torch.tensor(target), None if aux is None else torch.tensor(aux)
    assert bool(labels_out_of_range(spec, target_t, aux_t, 3, L)) is wrong
    assert _raises(spec, target_t, aux_t) is wrong
