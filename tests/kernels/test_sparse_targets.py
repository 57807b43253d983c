"""Every spelling of sparse targets gives the same sorted pairs; labels out of range are refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from elmo_compile.errors import InputError
from elmo_compile.kernels.targets import check_targets, positives_of
from elmo_compile.numerics.losses import BCE, CE, LossSpec

N, L = 4, 9
ROWS = [[3, 8, 3], [], [0, 3], [8]]
"""Labels of each row: one repeat, one row without any."""


def spelled(form: str) -> tuple[Tensor, Tensor | None]:
    flat = torch.tensor([label for row in ROWS for label in row])
    if form == "padded":
        padded = [row + [-1] * (3 - len(row)) for row in ROWS]
        return torch.tensor(padded), None
    if form == "flat":
        return flat, torch.tensor([0, 3, 3, 5, 6])
    rows = torch.tensor([n for n, row in enumerate(ROWS) for _ in row])
    order = torch.tensor([5, 2, 0, 4, 1, 3])
    if form == "pairs":
        return rows[order], flat[order]
    return rows[order] - N, flat[order] - L


def spec_of(form: str, duplicates: str = "once") -> LossSpec:
    targets = "pairs" if form == "negative pairs" else form
    return LossSpec(name=BCE, targets=targets, duplicates=duplicates)  # type: ignore[arg-type]


@pytest.mark.parametrize("duplicates", ["once", "count"])
@pytest.mark.parametrize("form", ["padded", "flat", "pairs", "negative pairs"])
def test_forms_agree(form: str, duplicates: str) -> None:
    target, aux = spelled(form)
    spec = spec_of(form, duplicates)
    check_targets(spec, target, aux, N, L)
    rows, cols, values = positives_of(spec, target, aux, N, L)
    kept = cols < L
    pairs = list(zip(cols[kept].tolist(), rows[kept].tolist()))
    assert pairs == [(0, 2), (3, 0), (3, 2), (8, 0), (8, 3)]
    assert bool((cols.diff() >= 0).all())
    assert bool(((rows >= 0) & (rows < N)).all())
    if duplicates == "count":
        assert values is not None
        assert values[kept].tolist() == [1, 2, 1, 1, 1]
        assert values.dtype == torch.float32
    else:
        assert values is None


def test_scatter_indices_have_no_padding() -> None:
    spec = LossSpec(name=BCE, targets="indices")
    rows, cols, _ = positives_of(spec, torch.tensor([[1, 1], [0, 8]]), None, 2, L)
    assert cols.tolist() == [0, 1, 8, L]
    assert rows[:3].tolist() == [1, 0, 1]
    with pytest.raises(InputError, match="label -1 at row 1"):
        check_targets(spec, torch.tensor([[1, 1], [0, -1]]), None, 2, L)


def test_no_labels_at_all() -> None:
    spec = LossSpec(name=BCE, targets="padded", duplicates="count")
    target = torch.full((N, 2), -1)
    check_targets(spec, target, None, N, L)
    assert positives_of(spec, target, None, N, L).cols_M.tolist() == [L] * (2 * N)
    empty = positives_of(spec, target[:, :0], None, N, L)
    assert empty.cols_M.numel() == 0


def test_labels_above_float32_integers() -> None:
    num = 40_000_000
    spec = LossSpec(name=BCE, targets="padded")
    target = torch.tensor([[16_777_217, 16_777_216], [39_999_999, -1]])
    rows, cols, _ = positives_of(spec, target, None, 2, num)
    assert cols.tolist() == [16_777_216, 16_777_217, 39_999_999, num]
    assert rows[:3].tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("spec", "target", "aux", "message"),
    [
        (spec_of("padded"), [[1, 2], [3, 9], [0, 0], [0, 0]], None, "label 9 at row 1.*0 <= label"),
        (spec_of("padded"), [[1, -2], [3, 4], [0, 0], [0, 0]], None, "label -2 at row 0.*-1"),
        (spec_of("flat"), [1, 2, 9], [0, 1, 1, 2, 3], "label 9 at row 3"),
        (spec_of("flat"), [1, 2, 3], [0, 1, 1, 2], "offsets have 4 entries for 4 rows"),
        (spec_of("flat"), [1, 2, 3], [0, 2, 1, 2, 3], "must rise"),
        (spec_of("pairs"), [0, 1], [3, 9], "label 9 at row 1.*-9 <= label"),
        (spec_of("pairs"), [0, 4], [3, 8], "row 4 at entry 1.*-4 <= row"),
        (LossSpec(name=CE, targets="classes"), [1, 2, -100, 9], None, "label 9 at row 3.*-100"),
    ],
)
def test_out_of_range_is_refused(
    spec: LossSpec, target: list[int], aux: list[int] | None, message: str
) -> None:
    aux_tensor = None if aux is None else torch.tensor(aux)
    with pytest.raises(InputError, match=message):
        check_targets(spec, torch.tensor(target), aux_tensor, N, L)
