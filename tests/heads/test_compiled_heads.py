"""Converted heads under torch.compile: a float32 gradient, or a sentence, never zeros."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training import EAGER, INDUCTOR, LABELS, batch, compiled, net, owned, train, updates

import elmo_compile as elmo

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=["bf16", "fp8"]
)
LOWERINGS = pytest.mark.parametrize("options", [EAGER, INDUCTOR], ids=["eager", "inductor"])


def exact_gradient(model: nn.Module) -> torch.Tensor:
    """The head's gradient with the stored weights as float64."""
    twin = elmo.dequantize_head(copy.deepcopy(model), torch.float64).double()
    inputs, labels = batch()
    twin(inputs.double(), labels).backward()
    return twin.head.weight.grad


@DTYPES
@LOWERINGS
@pytest.mark.parametrize("kind", ["ce", "bce"])
def test_an_unfused_head_gets_a_float32_gradient(
    dtype: torch.dtype, options: dict, kind: str
) -> None:
    model = elmo.convert_head(net(kind), dtype)
    want = exact_gradient(model)
    step = compiled(model, options)
    for times in (1, 2):
        step(*batch()).backward()
        got = model.head.weight.grad
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), times * want, rtol=0.02, atol=2e-3 * times)
    assert len(elmo.last_report().matches) == 1


class Logits(nn.Module):
    """Returns its logits, so that the head cannot be rewritten."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.encoder = nn.Linear(5, 8)
        self.head = nn.Linear(8, LABELS)
        elmo.convert_head(self, dtype)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.encoder(inputs)))


@DTYPES
@LOWERINGS
def test_a_head_that_stays_gets_a_float32_gradient(dtype: torch.dtype, options: dict) -> None:
    torch.manual_seed(0)
    model = Logits(dtype)
    inputs, labels = batch()
    F.cross_entropy(model(inputs), labels).backward()
    want = [p.grad for p in model.parameters()]
    model.zero_grad()
    step = compiled(model, options, deferred_logits=False)
    F.cross_entropy(step(inputs), labels).backward()
    assert elmo.last_report().refusals
    for param, grad in zip(model.parameters(), want):
        torch.testing.assert_close(param.grad, grad)
    with torch.no_grad():
        torch.testing.assert_close(step(inputs), model(inputs))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_other_backends_say_what_is_wrong(backend: str) -> None:
    model = Logits(torch.float8_e4m3fn)
    torch._dynamo.reset()
    step = torch.compile(model, backend=backend)
    inputs, labels = batch()
    with torch.no_grad():
        torch.testing.assert_close(step(inputs), model(inputs))
    with pytest.raises(Exception, match='backend="elmo"'):
        F.cross_entropy(step(inputs), labels).backward()
    assert model.head.weight.grad is None


@DTYPES
@LOWERINGS
@pytest.mark.parametrize("fused", [True, False])
def test_training(dtype: torch.dtype, options: dict, fused: bool) -> None:
    model = elmo.convert_head(net("bce"), dtype)
    step, opt = owned(model, options, lr=2.0, momentum=0.5, fused=fused)
    losses = [train(step, opt, 1)[0] for _ in range(25)]
    assert losses[-1] < 0.6 * losses[0]
    assert model.head.weight.dtype == dtype
    assert updates(opt, model.head.weight) == 25
    assert opt.state[model.head.weight]["momentum_buffer"].dtype == torch.bfloat16
    assert elmo.is_fused(model.head.weight) == fused


def test_eager_training_without_the_backend() -> None:
    model = elmo.convert_head(net("bce"), torch.float8_e4m3fn)
    opt = elmo.optim.SGD(model.parameters(), 2.0, fused=False)
    losses = [train(model, opt, 1)[0] for _ in range(25)]
    assert losses[-1] < 0.6 * losses[0]


def test_an_ordinary_optimizer_cannot_take_fp8() -> None:
    model = elmo.convert_head(net(), torch.float8_e4m3fn)
    step = compiled(model)
    before = model.head.weight.detach().clone()
    step(*batch()).backward()
    with pytest.raises(RuntimeError):
        torch.optim.SGD([model.head.weight], 0.1).step()
    assert torch.equal(model.head.weight.float(), before.float())


class Penalised(nn.Module):
    """Reads the head's weight twice in one graph."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.inner = net()
        if dtype is not None:
            elmo.convert_head(self.inner, dtype)

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.inner(inputs, labels) + 0.1 * self.inner.head.weight.float().square().sum()


@LOWERINGS
def test_a_second_reader_in_the_graph_of_a_plain_head(options: dict) -> None:
    model = Penalised(None)
    twin = copy.deepcopy(model)
    step, _opt = owned(model, options)
    step(*batch()).backward()
    twin(*batch()).backward()
    torch.testing.assert_close(model.inner.head.weight.grad, twin.inner.head.weight.grad)


@DTYPES
def test_a_second_reader_of_a_converted_head_is_refused(dtype: torch.dtype) -> None:
    model = Penalised(dtype)
    step = compiled(model)
    with pytest.raises(elmo.ElmoError, match=r"the weight of a converted.*read by"):
        step(*batch())
    with torch.no_grad():
        step(*batch())


@DTYPES
@pytest.mark.parametrize("first", ["eager", "compiled"])
def test_gradients_that_exist_do_not_break_the_graph(dtype: torch.dtype, first: str) -> None:
    """Accumulated over batches of other sizes, each of which is compiled: no graph break."""
    torch._dynamo.reset()
    model = net("ce")
    elmo.convert_head(model, dtype=dtype)
    twin = copy.deepcopy(model)
    step = torch.compile(model, backend="elmo", options=EAGER, fullgraph=True)
    for number, rows in enumerate((6, 9, 11)):
        inputs, labels = batch(number, rows)
        run = model if number == 0 and first == "eager" else step
        run(inputs, labels).backward()
        twin(inputs, labels).backward()
    assert elmo.last_report().matches
    grad = model.head.weight.grad
    assert grad.dtype == torch.float32
    torch.testing.assert_close(grad, twin.head.weight.grad, rtol=2e-2, atol=2e-3)
    for ours, theirs in zip(model.encoder.parameters(), twin.encoder.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=5e-2, atol=5e-3)


def test_a_compilation_that_fails_gives_gradients_back() -> None:
    model = net("ce")
    elmo.convert_head(model, dtype=torch.bfloat16)
    model(*batch()).backward()
    grad = model.head.weight.grad

    def broken(gm: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> None:
        assert model.head.weight.grad is None
        raise ValueError("no")

    with pytest.raises(Exception, match="no"):
        torch.compile(model, backend=broken)(*batch())
    assert model.head.weight.grad is grad
