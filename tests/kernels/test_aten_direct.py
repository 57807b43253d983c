"""Compiled pieces called without Dynamo: when, and with what result.

The pieces are tiny and compiled for real; what is compared is what Dynamo would have run.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from elmo_compile.kernels.aten import chunk_loss, compiled, direct

pytestmark = pytest.mark.filterwarnings("error:elmo_compile. Inductor could not:RuntimeWarning")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    compiled.reset()
    with torch.no_grad():
        yield
    compiled.reset()


@pytest.fixture
def by_dynamo(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each call of a piece that went by way of Dynamo."""
    calls: list[int] = []

    def counted(run: Any, args: Any) -> Any:
        calls.append(1)
        return direct.recorded(run, args)

    monkeypatch.setattr(compiled, "recorded", counted)
    return calls


def scaled_(w: Tensor, g: Tensor, c: Tensor | None, rate: float) -> None:
    """w <- w - rate g (+ c)"""
    w.sub_(g * rate)
    if c is not None:
        w.add_(c)


def ends(z: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    v = z if shift is None else z - shift
    return v.sum(0), v.amax(1)


def test_a_form_that_was_seen_is_not_shown_to_dynamo_again(by_dynamo: list[int]) -> None:
    run = compiled.piece(scaled_, True)
    for i in range(4):
        w, g = torch.ones(5, 7), torch.full((5, 7), float(i))
        run(w, g, None, 0.5 * i)
        assert torch.equal(w, torch.ones(5, 7) - 0.5 * i * i)
    assert len(by_dynamo) == 1


@pytest.mark.parametrize(
    "other",
    [
        (torch.ones(6, 7), torch.ones(6, 7), None),
        (torch.ones(5, 9)[:, :7], torch.ones(5, 7), None),
        (torch.ones(7, 5).t(), torch.ones(5, 7), None),
        (torch.ones(5, 7, dtype=torch.float64), torch.ones(5, 7), None),
        (torch.ones(5, 7), torch.ones(5, 7), torch.ones(5, 7)),
        (torch.ones(5, 7), torch.ones(5, 1), None),
    ],
    ids=["size", "stride", "transposed", "dtype", "optional", "broadcast"],
)
def test_another_form_is(other: tuple[Any, ...], by_dynamo: list[int]) -> None:
    run = compiled.piece(scaled_, True)
    for _ in range(2):
        run(torch.ones(5, 7), torch.ones(5, 7), None, 0.25)
    assert len(by_dynamo) == 1
    expected = other[0].clone()
    scaled_(expected, *other[1:], 0.25)
    run(*other, 0.25)
    assert len(by_dynamo) == 2
    assert torch.equal(other[0], expected)


@pytest.mark.parametrize("shift", [None, 2.0])
def test_results_are_the_functions_own(shift: float | None) -> None:
    run = compiled.piece(ends, True)
    for _ in range(3):
        z = torch.randn(6, 8)
        s = None if shift is None else torch.full((8,), shift)
        got = run(z, s)
        assert isinstance(got, tuple)
        for mine, theirs in zip(got, ends(z, s), strict=True):
            torch.testing.assert_close(mine, theirs)


def test_another_number_of_threads_is_another_form(by_dynamo: list[int]) -> None:
    run = compiled.piece(ends, True)
    threads = torch.get_num_threads()
    z = torch.randn(6, 8)
    try:
        for count in (threads, threads + 1, threads):
            torch.set_num_threads(count)
            run(z, None)
    finally:
        torch.set_num_threads(threads)
    assert len(by_dynamo) == 2


def test_what_was_compiled_for_arguments_that_share_memory_is_for_them_alone() -> None:
    """AOTAutograd compiles a function of the memory they have in common."""
    run = direct.by_inductor(lambda a, b: a.add_(b), {})
    base = torch.arange(8.0)
    result, known = direct.recorded(run, (base[:6], base[2:]))
    assert known is None
    a, b = torch.ones(6), torch.full((6,), 2.0)
    _, known = direct.recorded(run, (a, b))
    assert torch.equal(a, torch.full((6,), 3.0))
    assert result.shape == (6,)


def test_tensors_held_by_nothing() -> None:
    """Neither what is kept of a call nor a piece's memory of forms holds an argument."""
    import gc
    import weakref

    run = compiled.piece(ends, True)
    z = torch.randn(6, 8)
    held = weakref.ref(z)
    run(z, None)
    run(z, None)
    del z
    gc.collect()
    assert held() is None


def test_threads_at_once() -> None:
    run = compiled.piece(scaled_, True)
    wrong: list[int] = []

    def work(rows: int) -> None:
        with torch.no_grad():
            for i in range(50):
                w = torch.ones(rows + i % 3, 7)
                run(w, torch.ones_like(w), None, 0.5)
                if not bool((w == 0.5).all()):
                    wrong.append(rows)

    threads = [threading.Thread(target=work, args=(rows,)) for rows in (4, 9, 14)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_forms_are_forgotten_before_they_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_FORMS", 4)
    run = compiled.piece(ends, True)
    for rows in range(2, 12):
        run(torch.randn(rows, 8), None)
    assert len(run._known) <= 4  # type: ignore[attr-defined]


def test_a_graphs_numbers_are_constants_of_its_code(by_dynamo: list[int]) -> None:
    class Shifted(torch.nn.Module):
        def forward(self, z: Tensor, by: Any) -> Any:
            return (z + by,)

    run = compiled.graph_piece(torch.fx.symbolic_trace(Shifted()), True)
    z = torch.ones(4, 8)
    for by in (1.0, 2.5, 1.0, 3):
        (got,) = run(z, by)
        assert torch.equal(got, z + by)


def test_targets_are_written_under_deterministic_algorithms() -> None:
    """`put_` is refused there, though each place is written once."""
    z = torch.zeros(6, 8)[:, :5]
    torch.use_deterministic_algorithms(True)
    try:
        chunk_loss._put_(z, torch.tensor([0, 7, 29]), torch.ones(3))
    finally:
        torch.use_deterministic_algorithms(False)
    expected = torch.zeros(6, 5)
    expected.view(-1)[[0, 7, 29]] = 1.0
    assert torch.equal(z, expected)
