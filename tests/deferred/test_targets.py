"""`elmo.multi_hot` outside of a graph: its indices reach the loss; elsewhere it is its matrix."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import elmo_compile as elmo
from elmo_compile.deferred import Deferred
from elmo_compile.testing.memory import PeakBytes, allocated_peak

N, L = 64, 70_000
EAGER = {"lower": "eager", "deferred_logits": True}
"""Of the backend: logits are deferred however small."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(4, 8), nn.Linear(8, L)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.head(self.encoder(x).tanh())
        return z


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def labels() -> Tensor:
    """Ids with padding, repeats, and an empty row."""
    found = torch.randint(-1, L, (N, 5))
    found[1] = -1
    found[2, 1] = found[2, 0]
    return found


def flat(padded: Tensor) -> tuple[Tensor, Tensor]:
    """The same as labels and offsets."""
    kept = padded >= 0
    return padded[kept], F.pad(kept.sum(1).cumsum(0), (1, 0))


def matrix(padded: Tensor) -> Tensor:
    made = torch.zeros(N, L)
    for row, ids in zip(made, padded):
        row[ids[ids >= 0]] = 1.0
    return made


def made(y: Tensor) -> bool:
    assert isinstance(y, Deferred)
    return y._state.values is not None


def smoothed(z: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(z, y * 0.9 + 0.1 / L)


STREAMED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bce": F.binary_cross_entropy_with_logits,
    "module": nn.BCEWithLogitsLoss(reduction="sum"),
    "keywords": lambda z, y: F.binary_cross_entropy_with_logits(z, target=y, reduction="mean"),
    "cast": lambda z, y: F.binary_cross_entropy_with_logits(z.double(), y.double()),
    "to": lambda z, y: F.binary_cross_entropy_with_logits(z, y.to(z.dtype)),
    "rows": lambda z, y: F.binary_cross_entropy_with_logits(z[:9], y[:9]),
    "smoothed": smoothed,
    "positive weight": lambda z, y: F.binary_cross_entropy_with_logits(
        z, y, pos_weight=torch.tensor(3.0)
    ),
    "soft margin": lambda z, y: F.soft_margin_loss(z, 2 * y - 1),
    "mse": F.mse_loss,
}


def compare(use: Callable[[Tensor, Tensor], Tensor], y: Tensor, same: Tensor) -> Tensor:
    """A loss of deferred logits and `y`, and its gradient, beside those of `same` in eager."""
    model: Any = Net()
    x = torch.randn(N, 4)
    theirs = use(model(x), same)
    theirs.backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    z = torch.compile(model, backend="elmo", options=EAGER)(x)
    mine = use(z, y)
    mine.backward()
    torch.testing.assert_close(mine.detach() + 0, theirs.detach(), rtol=1e-5, atol=1e-7)
    for p, grad in zip(model.parameters(), expected):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-6 * float(grad.abs().max()))
    return z


@pytest.mark.parametrize(
    ("name", "form"), [*((name, "padded") for name in STREAMED), ("bce", "flat"), ("mse", "flat")]
)
def test_indices_reach_the_loss(name: str, form: str) -> None:
    padded = labels()
    if form == "padded":
        y = elmo.multi_hot(padded, L)
    else:
        ids, offsets = flat(padded)
        y = elmo.multi_hot(ids, L, offsets=offsets)
    z = compare(STREAMED[name], y, matrix(padded))
    assert not made(y)
    assert isinstance(z, Deferred)
    assert z._state.values is None


def test_the_kernels_get_the_indices() -> None:
    y = elmo.multi_hot(labels(), L)
    compare(F.binary_cross_entropy_with_logits, y, y.clone())
    graph = elmo.last_report().graph_after
    assert graph is not None
    assert not any("multi_hot" in str(node.target) for node in graph.graph.nodes)


def written(z: Tensor, y: Tensor) -> Tensor:
    y[:, 3] = 0.5
    return F.binary_cross_entropy_with_logits(z, y)


def written_through_a_view(z: Tensor, y: Tensor) -> Tensor:
    y[2:5].fill_(0.25)
    return F.binary_cross_entropy_with_logits(z, y)


def written_after_a_cast(z: Tensor, y: Tensor) -> Tensor:
    before = y.double()
    y.zero_()
    return F.binary_cross_entropy_with_logits(z.double(), before + y)


def in_another_graph(z: Tensor, y: Tensor) -> Tensor:
    compiled = torch.compile(lambda y: y * 2 - 1, backend="aot_eager", fullgraph=True)
    return F.soft_margin_loss(z, compiled(y))


def divided_by_rows(z: Tensor, y: Tensor) -> Tensor:
    share = y / y.sum(-1, keepdim=True).clamp(min=1)
    return F.kl_div(z.log_softmax(-1), share, reduction="batchmean")


@pytest.mark.parametrize(
    "use",
    [written, written_through_a_view, written_after_a_cast, in_another_graph, divided_by_rows,
     lambda z, y: (z * y).mean()],
)  # fmt: skip
def test_anything_else_has_the_matrix(use: Callable[[Tensor, Tensor], Tensor]) -> None:
    padded = labels()
    compare(use, elmo.multi_hot(padded, L), matrix(padded))


def test_one_loss_of_another_number_of_labels() -> None:
    """A program is of its number of labels: those of another give an error, as in torch."""
    model: Any = torch.compile(Net(), backend="elmo", options=EAGER)
    z = model(torch.randn(N, 4))
    F.binary_cross_entropy_with_logits(z, elmo.multi_hot(labels(), L))
    with pytest.raises(ValueError, match="size"):
        F.binary_cross_entropy_with_logits(z, elmo.multi_hot(labels(), L + 1))


def test_indices_may_change_afterwards() -> None:
    padded = labels()
    y, same = elmo.multi_hot(padded, L), matrix(padded)
    padded.fill_(0)
    assert torch.equal(y, same)


def test_it_is_the_matrix_to_python_and_numpy() -> None:
    padded = labels()
    same = matrix(padded)
    file = io.BytesIO()
    torch.save(elmo.multi_hot(padded, L), file)
    file.seek(0)
    assert torch.equal(torch.load(file), same)
    assert torch.equal(copy.deepcopy(elmo.multi_hot(padded, L)), same)
    assert (elmo.multi_hot(padded, L).numpy() == same.numpy()).all()
    y = elmo.multi_hot(padded, L)
    assert (y.shape, y.dtype, y.requires_grad) == (same.shape, same.dtype, False)
    assert y[3, padded[0, 0]].item() == same[3, padded[0, 0]].item()
    assert torch.equal(y.nonzero(), same.nonzero())


@pytest.mark.parametrize("backend", ["eager", "inductor", "elmo"])
def test_it_enters_a_compiled_function(backend: str) -> None:
    padded = labels()
    model = Net()
    x = torch.randn(N, 4)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(model(x), y)

    mine = torch.compile(loss, backend=backend, fullgraph=True)(x, elmo.multi_hot(padded, L))
    torch.testing.assert_close(mine, loss(x, matrix(padded)), rtol=1e-5, atol=1e-7)


def test_wrong_ids_raise_at_once() -> None:
    padded = labels()
    padded[3, 0] = L
    with pytest.raises(elmo.InputError, match=f"label {L} at row 3"):
        elmo.multi_hot(padded, L)


def test_a_list_is_no_tensor() -> None:
    with pytest.raises(elmo.InputError, match="indices must be a tensor, got list"):
        elmo.multi_hot([[1, 2]], L)  # type: ignore[arg-type]


@pytest.mark.parametrize("update_at", ["backward", "step"])
def test_a_whole_step_never_has_the_matrix(update_at: str) -> None:
    """Logits and targets would be 92 MiB each; eager holds both, and gradients of the first."""
    rows, columns, outputs = 64, 16, 360_000
    matrix_bytes = rows * outputs * 4
    model: Any = nn.Linear(columns, outputs)
    opt = elmo.optim.SGD(model.parameters(), lr=0.1, update_at=update_at)
    run = torch.compile(model, backend="elmo", options={"memory_budget": "16MiB"})
    x, ids = torch.randn(rows, columns), torch.randint(0, outputs, (rows, 3))

    def step(model: Any, opt: Any) -> None:
        loss = F.binary_cross_entropy_with_logits(model(x), elmo.multi_hot(ids, outputs))
        loss.backward()
        opt.step()
        opt.zero_grad()

    step(run, opt)
    assert allocated_peak(step, run, opt) < matrix_bytes / 2
    plain = nn.Linear(columns, outputs)
    eager = allocated_peak(step, plain, torch.optim.SGD(plain.parameters(), lr=0.1))
    assert eager > 2 * matrix_bytes


def test_gradients_of_targets_are_not_lost() -> None:
    """Soft labels that are trained: their loss takes the matrix."""
    padded, x = labels(), torch.randn(N, 4)
    y, same = nn.Parameter(elmo.multi_hot(padded, L)), nn.Parameter(matrix(padded))
    model: Any = Net()
    run = torch.compile(model, backend="elmo", options=EAGER)
    for z, target in ((run(x), y), (model(x), same)):
        F.binary_cross_entropy_with_logits(z, target * 0.9).backward()
    assert y.grad is not None
    torch.testing.assert_close(y.grad, same.grad)


def test_a_view_from_a_compiled_function_is_a_view() -> None:
    padded = labels()
    y, same = elmo.multi_hot(padded, L), matrix(padded)
    view = torch.compile(lambda y: y.view(-1), backend="aot_eager")
    for target in (y, same):
        view(target).fill_(0.5)
    z = torch.compile(Net(), backend="elmo", options=EAGER)(torch.randn(N, 4))
    expected = F.mse_loss(z.materialize(), same)
    torch.testing.assert_close(F.mse_loss(z, y) + 0, expected + 0)


def test_python_functions_of_each_value() -> None:
    y, same = elmo.multi_hot(labels(), L)[:1], torch.zeros(1, L)
    assert y.apply_(lambda v: 0.0) is y
    assert torch.equal(y, same)
    y.map_(torch.ones(1, L), lambda mine, other: mine + other)
    assert torch.equal(y, same + 1)


def test_one_value_is_an_ordinary_number() -> None:
    padded = labels()
    y = elmo.multi_hot(padded, L)
    row = int((padded[:, 0] >= 0).nonzero()[0])
    assert torch.tensor([y[row, padded[row, 0]], y[1, 5]]).tolist() == [1.0, 0.0]


def test_threads_make_targets() -> None:
    failed: list[BaseException] = []

    def prepare(seed: int) -> None:
        try:
            for _ in range(30):
                y = elmo.multi_hot(torch.randint(-1, L, (N, 5)), L) * 2
                assert y[:2].shape == (2, L)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=prepare, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_tracing_sees_the_operation() -> None:
    padded, others = labels(), labels()
    traced = make_fx(lambda ids: elmo.multi_hot(ids, L) * 2)(padded)
    assert torch.equal(traced(others), 2 * matrix(others))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert elmo.multi_hot(padded, L).shape == (N, L)


def test_a_chain_keeps_one_matrix() -> None:
    """Each step's result would be one more: 17 MiB."""
    padded = labels()

    def chain() -> Tensor:
        y = elmo.multi_hot(padded, L)
        for number in (0.9, 0.8, 0.7, 0.6):
            y = y * number + 0.1
        y.sum()
        return y

    kept: list[Tensor] = []
    before = allocated_peak(lambda: kept.append(torch.zeros(N, L)))
    assert allocated_peak(lambda: kept.append(chain())) < 4 * before
    mode = PeakBytes()
    with mode:
        kept.append(chain())
    assert mode.live < 2.5 * before
