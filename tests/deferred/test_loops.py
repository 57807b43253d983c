"""The loss in the user's own loop: every level, metrics after the step, and what comes too late."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loop_net import OPTIONS, L, Net, batches, fresh
from torch import Tensor, nn

import elmo_compile as elmo
from elmo_compile.backend import elmo_backend
from elmo_compile.deferred import Deferred
from elmo_compile.testing.memory import PeakBytes


class Both(Net):
    """Loss and logits, as every Hugging Face model."""

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        z = super().forward(x)
        return {"loss": F.cross_entropy(z, y), "logits": z}


def train(model: Any, opt: Any, run: Any) -> tuple[list[float], list[list[int]]]:
    """The commonest loop there is; losses, and the argmax of each row read after the step."""
    losses, best = [], []
    for x, y in batches(5):
        opt.zero_grad()
        z = run(x)
        loss = F.cross_entropy(z, y)
        loss.backward()
        opt.step()
        losses.append(loss.item())
        best.append(z.argmax(-1).tolist())
    return losses, best


@pytest.mark.parametrize("deferred", ["auto", True])
@pytest.mark.parametrize("level", ["backend", "fused"])
def test_the_commonest_loop(level: str, deferred: Any) -> None:
    torch.manual_seed(0)
    plain = Net()
    model = fresh(copy.deepcopy(plain))
    opt_class: Any = elmo.optim.SGD if level == "fused" else torch.optim.SGD
    theirs = train(plain, torch.optim.SGD(plain.parameters(), lr=0.5), plain)
    run = torch.compile(model, backend="elmo", options={**OPTIONS, "deferred_logits": deferred})
    mine = train(model, opt_class(model.parameters(), lr=0.5), run)
    assert mine[0] == pytest.approx(theirs[0], rel=1e-5)
    assert mine[1] == theirs[1]
    for one, other in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    fused = [match.fused_update for match in elmo.reports()[-1].matches if match.loss != "linear"]
    assert fused == [level == "fused"]
    assert (model.head.weight.grad is None) == (level == "fused")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_with_a_converted_head(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = fresh(Net())
    elmo.convert_head(model, dtype=dtype)
    opt = elmo.optim.SGD(model.parameters(), lr=0.5)
    x, y = batches(1)[0]
    before = F.cross_entropy(model(x), y)
    run: Any = torch.compile(model, backend="elmo", options=OPTIONS)
    z = run(x)
    assert isinstance(z, Deferred)
    loss = F.cross_entropy(z, y)
    torch.testing.assert_close(loss, before, rtol=2e-2, atol=0)
    stored = model.head.weight.detach().clone()
    loss.backward()
    opt.step()
    assert model.head.weight.grad is None
    assert not torch.equal(stored.view(torch.uint8), model.head.weight.detach().view(torch.uint8))


def test_the_gradient_of_a_converted_head_through_the_values() -> None:
    torch.manual_seed(0)
    model = fresh(Net())
    elmo.convert_head(model, dtype=torch.float8_e4m3fn)
    x, _ = batches(1)[0]
    run: Any = torch.compile(model, backend="elmo", options=OPTIONS)
    run(x).materialize().exp().mean().backward()
    got = model.head.weight.grad.clone()
    model.zero_grad()
    model(x).exp().mean().backward()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, model.head.weight.grad)
    assert got.abs().max() > 0


def test_loss_and_logits_returned() -> None:
    torch.manual_seed(0)
    model = fresh(Both())
    opt = elmo.optim.SGD(model.parameters(), lr=0.5)
    x, y = batches(1)[0]
    expected = model(x, y)
    run: Any = torch.compile(model, backend="elmo", options=OPTIONS, fullgraph=True)
    got = run(x, y)
    (match,) = elmo.last_report().matches
    assert (match.loss, match.deferred, match.fused_update) == ("cross_entropy", True, True)
    torch.testing.assert_close(got["loss"], expected["loss"])
    torch.testing.assert_close(got["logits"] + 0, expected["logits"])
    best = expected["logits"].argmax(-1)
    got = run(x, y)
    got["loss"].backward()
    opt.step()
    assert torch.equal(got["logits"].argmax(-1), best)


def late(read: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    model = fresh(Both())
    opt = elmo.optim.SGD(model.parameters(), lr=0.5)
    run: Any = torch.compile(model, backend="elmo", options={**OPTIONS, **options})
    x, y = batches(1)[0]
    with torch.no_grad():
        expected = read(Net.forward(model, x))
    got = run(x, y)
    got["loss"].backward()
    opt.step()
    return read(got["logits"]), expected


READS = {
    "topk": lambda z: z.topk(5).indices,
    "cast_topk": lambda z: z.double().topk(2)[0],
    "slice": lambda z: z[2:5].argmax(-1),
    "view": lambda z: z.view(3, 4, L).argmax(-1),
    "max": lambda z: z.max(-1).values,
}


@pytest.mark.parametrize("name", list(READS))
def test_the_top_of_each_row_outlives_an_update(name: str) -> None:
    got, expected = late(READS[name], deferred_logits=True)
    torch.testing.assert_close(got, expected, check_dtype=False)


@pytest.mark.parametrize("budget", [None, "1MiB"])
def test_small_logits_outlive_an_update_whole(budget: str | None) -> None:
    got, expected = late(lambda z: z * 2, memory_budget=budget)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    "read",
    [lambda z: (z * 2).sum(), lambda z: z.topk(6), lambda z: z[0, 0].item(), lambda z: z.exp()],
)
def test_other_values_come_too_late(read: Any) -> None:
    with pytest.raises(elmo.StaleLogitsError, match=r"Read them before backward\(\)"):
        late(read, deferred_logits=True)


def test_small_and_large_logits_of_one_graph() -> None:
    """Which of the two is kept whole depends on its own size, not on the last call's."""
    torch.manual_seed(0)
    model = fresh(Net())
    opt = torch.optim.SGD(model.parameters(), lr=0.5)
    options = {**OPTIONS, "memory_budget": 4 * L * 8}
    run: Any = torch.compile(model, backend="elmo", options=options, dynamic=True)
    large, small = run(torch.randn(20, 5)), run(torch.randn(4, 5))
    small.logsumexp(-1).mean().backward()
    opt.step()
    assert large._state.values is None
    assert small._state.values is not None


def test_never_new_weights() -> None:
    """A write by hand is an update like any other."""
    torch.manual_seed(0)
    model = fresh(Net())
    run: Any = torch.compile(model, backend="elmo", options=OPTIONS)
    z = run(batches(1)[0][0])
    with torch.no_grad():
        model.head.weight.zero_()
    for read in (
        lambda: z.exp(),
        lambda: F.cross_entropy(z, batches(1)[0][1]),
        lambda: z.argmax(-1),
    ):
        with pytest.raises(elmo.StaleLogitsError):
            read()


def test_a_dense_use_of_a_fused_head_is_not_lost() -> None:
    """Both a fused loss and a use of the values: an error, not a wrong update."""
    torch.manual_seed(0)
    model = fresh(Net())
    opt = elmo.optim.SGD(model.parameters(), lr=0.5)
    run: Any = torch.compile(model, backend="elmo", options=OPTIONS)
    x, y = batches(1)[0]
    z = run(x)
    loss = F.cross_entropy(z, y) + z.pow(2).mean()

    def step() -> None:
        loss.backward()
        opt.step()

    with pytest.raises((RuntimeError, elmo.FusedUpdateError)):
        step()


def test_a_loss_of_one_s_own_updates_by_its_gradient() -> None:
    """Nothing is fused where the loss is made of the values; `step()` applies the gradient."""
    torch.manual_seed(0)
    plain = Net()
    model = fresh(copy.deepcopy(plain))
    x, y = batches(1)[0]
    for net, opt_class in ((plain, torch.optim.SGD), (model, elmo.optim.SGD)):
        opt = opt_class(net.parameters(), lr=0.5)  # type: ignore[operator]
        run: Any = torch.compile(net, backend="elmo", options=OPTIONS) if net is model else net
        z = run(x)
        (z.logsumexp(-1) - z.gather(1, y[:, None])[:, 0]).mean().backward()
        opt.step()
    for one, other in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_logits_never_exist() -> None:
    """Forward, loss, backward, update and accuracy: 49 MiB of logits, and not half of that live."""
    rows, columns, outputs = 128, 32, 100_000
    torch.manual_seed(0)
    model: Any = fresh(nn.Linear(columns, outputs, bias=False))
    opt = elmo.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(rows, columns), torch.randint(0, outputs, (rows,))
    mode = PeakBytes()
    options = {"lower": "eager", "memory_budget": "8MiB", "deferred_logits": True}

    def compile_counted(fn: Any) -> Any:
        """Dynamo runs nothing compiled under a dispatch mode: it is entered inside."""

        def backend(gm: Any, inputs: Any) -> Any:
            run = elmo_backend(gm, inputs, options=options)

            def counted(*args: Any) -> Any:
                with mode:
                    return run(*args)

            return counted

        return torch.compile(fn, backend=backend)

    z = compile_counted(model)(x)
    z._state.origin._compile = compile_counted
    loss = F.cross_entropy(z, y)
    with mode:
        loss.backward()
        opt.step()
        correct = (z.argmax(-1) == y).sum()
    assert 0 <= int(correct) <= rows
    assert z._state.values is None
    assert mode.peak < rows * outputs * 4 / 2


@pytest.mark.parametrize("optimizer", [elmo.optim.SGD, torch.optim.SGD])
@pytest.mark.parametrize("form", ["plain", "sequence", "outside"])
def test_the_loss_pass_keeps_the_top(
    form: str, optimizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and logits of one graph: no product of its own for what is kept."""

    class Sequence(Both):
        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            z = Net.forward(self, x.view(3, 4, 5))
            return {"loss": F.cross_entropy(z.float().view(-1, L), y), "logits": z}

    def never(*args: Any) -> Any:
        raise AssertionError("a pass of its own")

    torch.manual_seed(0)
    model = fresh({"plain": Both, "sequence": Sequence, "outside": Net}[form]())
    opt = optimizer(model.parameters(), lr=0.5)
    options = {**OPTIONS, "deferred_logits": True}
    run: Any = torch.compile(model, backend="elmo", options=options)
    monkeypatch.setattr("elmo_compile.deferred.origin.Origin.top", never)
    for x, y in batches(3):
        with torch.no_grad():
            expected = model(x) if form == "outside" else model(x, y)["logits"]
        if form == "outside":
            z = run(x)
            got = {"loss": F.cross_entropy(z, y), "logits": z}
        else:
            got = run(x, y)
        got["loss"].backward()
        opt.step()
        opt.zero_grad()
        assert got["logits"].shape == expected.shape
        assert torch.equal(got["logits"].argmax(-1), expected.argmax(-1))
        torch.testing.assert_close(got["logits"].topk(5), expected.topk(5))


@pytest.mark.parametrize("update_at", ["backward", "step"])
def test_a_loss_and_a_penalty_of_the_same_logits(update_at: str) -> None:
    """A fused loss and a use of the values: exact at the step, else refused by name."""
    torch.manual_seed(0)
    model = Net()
    twin = copy.deepcopy(model)
    opt = elmo.optim.SGD(model.parameters(), lr=0.5, update_at=update_at)
    theirs = torch.optim.SGD(twin.parameters(), lr=0.5)
    run = torch.compile(model, backend="elmo", options=OPTIONS)
    ((x, y),) = batches(1)

    def loss(z: Tensor) -> Tensor:
        return F.cross_entropy(z, y) + 0.1 * z.logsumexp(-1).square().mean()

    if update_at == "backward":
        with pytest.raises(elmo.errors.FusedUpdateError, match="update_at='step'"):
            loss(run(x)).backward()
        return
    loss(run(x)).backward()
    loss(twin(x)).backward()
    opt.step()
    theirs.step()
    for mine, other in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(mine, other)
