"""elmo.topk: the largest logits of each row, without the logits."""

from __future__ import annotations

import pytest
import torch

import elmo_compile as elmo
from elmo_compile.errors import InputError, OptionError


@pytest.fixture(params=[3, 8192], ids=["chunks of 3", "one chunk"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Outputs scored at once."""
    import sys

    monkeypatch.setattr(sys.modules["elmo_compile.topk"], "CHUNK", request.param)
    return int(request.param)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("k", [1, 2, 5, 20])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_values_and_indices(k: int, bias: bool, dtype: torch.dtype) -> None:
    make = torch.Generator().manual_seed(k)
    # Small integers: products and sums are exact in every dtype, and ties are many.
    x = torch.randint(-2, 3, (2, 3, 4), generator=make).float().requires_grad_()
    w = torch.randint(-2, 3, (20, 4), generator=make).to(dtype)
    b = torch.randint(-2, 3, (20,), generator=make).float() if bias else None
    z = x.detach() @ w.float().t() + (0 if b is None else b)
    order = z.sort(dim=-1, descending=True, stable=True)
    got = elmo.topk(x, w, k, bias=b)
    assert torch.equal(got.values, order.values[..., :k])
    assert torch.equal(got.indices, order.indices[..., :k])
    assert got.values.dtype == torch.float32
    assert got.indices.dtype == torch.int64
    assert not got.values.requires_grad
    values, indices = got
    assert values is got.values
    assert indices is got.indices


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("width", [0, 1, 4, 30])
def test_excluded_outputs(width: int) -> None:
    make = torch.Generator().manual_seed(width)
    x = torch.randint(-2, 3, (2, 3, 4), generator=make).float()
    w = torch.randint(-2, 3, (20, 4), generator=make).float()
    exclude = torch.randint(-1, 20, (2, 3, width), generator=make)  # with repetitions
    z, k = x @ w.t(), 5
    got = elmo.topk(x, w, k, exclude=exclude)
    for at in [(i, j) for i in range(2) for j in range(3)]:
        allowed = [label for label in range(20) if label not in exclude[at].tolist()]
        best = sorted(allowed, key=lambda label: (-z[at][label].item(), label))[:k]
        left = k - len(best)
        assert got.indices[at].tolist() == best + [-1] * left
        assert got.values[at].tolist() == [*z[at][best].tolist(), *[float("-inf")] * left]


@pytest.mark.parametrize(
    ("exclude", "message"),
    [
        (torch.zeros(2, 3), "exclude is torch.float32"),
        (torch.zeros(3, 3, dtype=torch.int64), r"accepted: int64 \[2, S\]"),
        (torch.tensor([[0], [20]]), "exclude has 20; accepted: -1 to 19"),
        (torch.tensor([[0], [-2]]), "exclude has -2"),
    ],
)
def test_what_cannot_be_excluded(exclude: torch.Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        elmo.topk(torch.ones(2, 4), torch.ones(20, 4), 3, exclude=exclude)
    with pytest.raises(OptionError, match="k=21"):
        elmo.topk(torch.ones(2, 4), torch.ones(20, 4), 21, exclude=exclude)


@pytest.mark.usefixtures("chunk")
def test_ties_zeros_and_infinities() -> None:
    w = torch.tensor([[0.0], [-0.0], [1.0], [1.0], [float("inf")], [-float("inf")], [1.0], [-1.0]])
    got = elmo.topk(torch.ones(1, 1), w, 8)
    assert got.indices.tolist() == [[4, 2, 3, 6, 0, 1, 7, 5]]
    assert got.values[0, 0] == float("inf")


@pytest.mark.usefixtures("chunk")
def test_nan_ranks_first_as_in_torch() -> None:
    w = torch.tensor([[1.0], [float("nan")], [3.0], [-float("nan")], [2.0]])
    got = elmo.topk(torch.ones(1, 1), w, 3)
    assert got.indices.tolist() == [[1, 3, 2]]
    assert got.values.isnan().tolist() == [[True, True, False]]


def test_one_row_and_no_rows() -> None:
    w = torch.randn(10, 4)
    assert elmo.topk(torch.randn(4), w, 3).indices.shape == (3,)
    assert elmo.topk(torch.randn(0, 4), w, 3).values.shape == (0, 3)


def test_features_of_other_dtypes() -> None:
    w = torch.randint(-2, 3, (10, 4)).float()
    x = torch.randint(-2, 3, (3, 4)).float()
    want = elmo.topk(x, w, 4)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        got = elmo.topk(x.to(dtype), w, 4)
        assert torch.equal(got.indices, want.indices)
        assert torch.equal(got.values, want.values)
    assert torch.equal(elmo.topk(x, w.t().contiguous().t(), 4).indices, want.indices)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(2, 5), torch.zeros(9, 4), 1), InputError, r"\(2, 5\) do not fit"),
        ((torch.zeros(2, 4), torch.zeros(4), 1), InputError, "do not fit"),
        ((torch.tensor(1.0), torch.zeros(9, 4), 1), InputError, "do not fit"),
        ((torch.zeros(2, 4).long(), torch.zeros(9, 4), 1), InputError, "floating point"),
        ((torch.zeros(2, 4), torch.zeros(9, 4).long(), 1), InputError, "weight"),
        ((torch.zeros(2, 4), torch.zeros(9, 4), 0), OptionError, "from 1 to 9"),
        ((torch.zeros(2, 4), torch.zeros(9, 4), 10), OptionError, "from 1 to 9"),
        ((torch.zeros(2, 4), torch.zeros(9, 4), True), OptionError, "from 1 to 9"),
        ((torch.zeros(2, 4), torch.zeros(9, 4), 1.0), OptionError, "from 1 to 9"),
        ((torch.zeros(2, 4), torch.zeros(9, 4), 1, torch.zeros(8)), InputError, r"bias \(8,\)"),
        ((torch.zeros(2, 4), torch.zeros(9, 4), 1, torch.zeros(9).long()), InputError, "bias"),
    ],
)
def test_bad_arguments(arguments: tuple, error: type, message: str) -> None:
    x, w, k, *bias = arguments
    with pytest.raises(error, match=message):
        elmo.topk(x, w, k, bias=bias[0] if bias else None)
