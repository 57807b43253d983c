"""elmo.multi_hot: label indices to 0/1 targets."""

from __future__ import annotations

import pytest
import torch

import elmo_compile as elmo
from elmo_compile.errors import InputError
from elmo_compile.testing.memory import peak_bytes


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_padded_indices(dtype: torch.dtype) -> None:
    indices = torch.tensor([[1, 3, -1], [-1, -1, -1], [4, 4, 0]], dtype=dtype)
    want = torch.tensor([[0, 1, 0, 1, 0.0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 1]])
    got = elmo.multi_hot(indices, 5)
    assert torch.equal(got, want)
    assert got.dtype == torch.float32
    assert got.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_flat_indices(dtype: torch.dtype) -> None:
    indices = torch.tensor([1, 3, 4, 4, 0], dtype=dtype)
    offsets = torch.tensor([0, 2, 2, 5], dtype=dtype)
    want = torch.tensor([[0, 1, 0, 1, 0.0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 1]])
    assert torch.equal(elmo.multi_hot(indices, 5, offsets=offsets), want)


def test_empty_batches() -> None:
    assert elmo.multi_hot(torch.zeros(0, 3, dtype=torch.int64), 5).shape == (0, 5)
    assert elmo.multi_hot(torch.zeros(2, 0, dtype=torch.int64), 5).sum() == 0
    empty = torch.zeros(0, dtype=torch.int64)
    got = elmo.multi_hot(empty, 5, offsets=torch.zeros(3, dtype=torch.int64))
    assert torch.equal(got, torch.zeros(2, 5))


def test_it_does_not_break_a_full_graph() -> None:
    torch._dynamo.reset()
    fn = torch.compile(lambda i: elmo.multi_hot(i, 7).sum(1), backend="aot_eager", fullgraph=True)
    assert fn(torch.tensor([[1, 2], [3, 3]])).tolist() == [2.0, 1.0]
    with pytest.raises(InputError, match="label 7"):
        fn(torch.tensor([[1, 7], [3, 3]]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[1, 5]], 5, None), "label 5 at row 0.*0 <= label < 5"),
        (([[1, 2], [0, -2]], 5, None), "label -2 at row 1"),
        (([1, 9], 5, [0, 1, 2]), "label 9 at row 1"),
        (([1, -1], 5, [0, 1, 2]), "label -1 at row 1"),
        (([1, 2], 5, [0, 1]), "offsets must rise from 0 to the number of labels, 2"),
        (([1, 2], 5, [0, 2, 1]), "offsets must rise"),
        (([1, 2], 5, []), "offsets"),
        (([1, 2], 5, None), r"\[N, P\] padded"),
        (([[1, 2]], 5, [0, 2]), r"\[M\] together with"),
        (([[1, 2]], 0, None), "num_classes must be a positive int, got 0"),
        (([[1, 2]], True, None), "num_classes"),
        (([[1, 2]], 5.0, None), "num_classes"),
        (([[1.0, 2.0]], 5, None), "int64, got torch.float32"),
        (([1, 2], 5, [0.0, 2.0]), "offsets must be int64"),
    ],
    ids=str,
)
def test_bad_arguments(arguments: tuple, message: str) -> None:
    indices, num_classes, offsets = arguments
    if offsets is not None:
        offsets = torch.tensor(offsets, dtype=None if offsets else torch.int64)
    with pytest.raises(InputError, match=message):
        elmo.multi_hot(torch.tensor(indices), num_classes, offsets=offsets)


@pytest.mark.parametrize("flat", [False, True])
def test_one_matrix_is_made_and_not_two(flat: bool) -> None:
    """For three million labels it has the size of the logits."""
    indices = torch.randint(0, 5000, (64, 3))
    given = {"offsets": torch.arange(0, 193, 3)} if flat else {}
    made = peak_bytes(elmo.multi_hot, indices.view(-1) if flat else indices, 5000, **given)
    assert made < 1.1 * 4 * 64 * 5000
