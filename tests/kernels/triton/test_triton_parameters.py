"""Parameters whose gradients exist: many in one launch, with the bits of the specification."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from elmo_compile.kernels import reference
from elmo_compile.kernels.triton import parameters
from kernels.triton.cases import bits
from kernels.updates import UPDATES, tensors, with_copies

TAKEN = [name for name in UPDATES if "rows" not in name]
FP8 = torch.float8_e4m3fn


def items_of(name: str, dtype: torch.dtype, shapes: list[tuple[int, int]]) -> list:
    """Weights, gradients and updates, each with a parameter number of its own."""
    torch.manual_seed(0)
    made = []
    for number, shape in enumerate(shapes):
        w = torch.randn(shape).mul(0.3).to(dtype)
        grad = torch.randn(shape).to(torch.bfloat16)
        update = dataclasses.replace(UPDATES[name](*shape), param_id=number, seed=2**32 - 1)
        made.append((w, grad, update))
    return made


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8, torch.float32], ids=str)
@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize(
    "shapes",
    [
        [(5, 7), (70, 31), (3, 1), (0, 3), (9, 33), (5, 511), (7, 513), (1, 1030)],
        [(8, 6), (70, 16), (40, 32), (4, 508), (7, 512), (1, 2048)],
    ],
    ids=["odd", "aligned"],
)
def test_three_launches_give_the_bits_of_each(
    shapes: list[tuple[int, int]],
    name: str,
    dtype: torch.dtype,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    items = items_of(name, dtype, shapes)
    launches = []
    launch = parameters._launch
    monkeypatch.setattr(parameters, "_launch", lambda *a: (launches.append(a), launch(*a)))
    mine = [
        (w.to(device, copy=True), g.to(device), with_copies(u, device), None) for w, g, u in items
    ]
    assert parameters.update_parameters(mine) == []
    assert len(launches) == 3  # rows by the element, rows with keys, few rows a block
    for (w, grad, update), (got, _, own, _) in zip(items, mine):
        truth = with_copies(update)
        reference.apply_update(w, grad.float(), truth)
        rooted = update.rule in ("adamw", "adagrad")
        for key, wanted in {"weight": w, **tensors(truth)}.items():
            found = {"weight": got, **tensors(own)}[key]
            if dtype == torch.float32 or rooted or device != "cpu":
                # a root, or a product contracted with a sum: rarely another grid step
                step = 1e-6 if found.dtype == torch.float32 else 2.0**-6
                step = 2.0**-2 if found.element_size() == 1 else step
                close = {"rtol": step, "atol": min(step, 2.0**-9)}
                torch.testing.assert_close(found.cpu().float(), wanted.float(), **close)
            else:
                assert torch.equal(bits(found), bits(wanted)), key


def test_unlike_parameters_take_a_launch_each_and_the_rest_is_left(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = []
    monkeypatch.setattr(parameters, "_launch", lambda *a: launches.append(a))
    items = [
        *items_of("sgd", torch.bfloat16, [(5, 7), (8, 8), (3, 9), (16, 9)]),
        *items_of("sgd", torch.float32, [(5, 7)]),
        *items_of("adamw", torch.bfloat16, [(5, 7)]),
        *items_of("kahan rows", torch.bfloat16, [(50, 7)]),
        *items_of("sgd", torch.float64, [(5, 7)]),
    ]
    rest = parameters.update_parameters(
        [(w.to(device), g.to(device), u, None) for w, g, u in items]
    )
    assert [len(items) for _, items, _ in launches] == [2, 2, 1, 1]  # wide loads, single elements
    assert [u.kahan_rows is not None or w.dtype == torch.float64 for w, _, u, _ in rest] == [
        True
    ] * 2


def test_bytes_of_e5m2_are_not_taken_for_e4m3(device: str) -> None:
    ((w, grad, update),) = items_of("sgd", torch.bfloat16, [(5, 7)])
    wide, narrow = w.to(device), w.to(device, torch.float8_e5m2)
    rest = parameters.update_parameters([(narrow, grad.to(device), update, None)])
    assert [item[0] is narrow for item in rest] == [True]
    rest = parameters.update_parameters([(wide, grad.to(device, torch.float8_e5m2), update, None)])
    assert [item[0] is wide for item in rest] == [True]


@pytest.mark.parametrize("name", ["sgd", "adagrad"])
def test_a_factor_on_the_gradient(name: str, device: str) -> None:
    """Clipping leaves the user's gradient as it is."""
    ((w, grad, update),) = items_of(name, torch.float32, [(5, 7)])
    mine = with_copies(update, device), w.to(device, copy=True), grad.to(device)
    factor = torch.tensor(0.25, dtype=torch.float64, device=device)
    parameters.update_parameters([(mine[1], mine[2], mine[0], factor)])
    truth = with_copies(update)
    reference.apply_update(w, grad.float() * 0.25, truth)
    torch.testing.assert_close(mine[1].cpu(), w)
    assert torch.equal(mine[2].cpu(), grad)


@pytest.mark.parametrize("name", ["sgd", "momentum", "adamw", "lion, bf16", "adagrad"])
def test_without_weight_decay_an_infinite_weight_stays(name: str, device: str) -> None:
    """Padded labels have a bias of minus infinity."""
    ((w, grad, update),) = items_of(name, torch.bfloat16, [(1, 40)])
    update = dataclasses.replace(update, weight_decay=0.0)
    w[0, 3] = -torch.inf
    mine = w.to(device, copy=True), grad.to(device), with_copies(update, device)
    assert parameters.update_parameters([(*mine, None)]) == []
    assert torch.equal(mine[0].isinf().cpu(), w.isinf())
    assert not mine[0].isnan().any()
