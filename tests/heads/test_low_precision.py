"""Converted heads: eager arithmetic, casts and state dicts, what conversion refuses."""

from __future__ import annotations

import copy
import io
import logging
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training import LABELS, Tied, batch, compiled, net

import elmo_compile as elmo
from elmo_compile.errors import ElmoError, OptionError
from elmo_compile.heads import LowPrecisionLinear

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
DTYPES = pytest.mark.parametrize("dtype", [BF16, FP8], ids=["bf16", "fp8"])


@DTYPES
@pytest.mark.parametrize("features", [torch.float32, torch.float64, BF16], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_eager_values_and_gradients(dtype: torch.dtype, features: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    head = elmo.convert_head(nn.Linear(8, 50, bias=bias), dtype)
    x = torch.randn(3, 4, 8, dtype=features, requires_grad=True)
    upstream = torch.randn(3, 4, 50, dtype=features)
    x64 = x.detach().double().requires_grad_()
    w64 = head.weight.detach().double().requires_grad_()
    b64 = None if head.bias is None else head.bias.detach().double().requires_grad_()
    head(x).backward(upstream)
    F.linear(x64, w64, b64).backward(upstream.double())
    eps = 4 * torch.finfo(features).eps if features != torch.float64 else 1e-6
    torch.testing.assert_close(head(x).double(), F.linear(x64, w64, b64), rtol=eps, atol=10 * eps)
    assert head(x).dtype == features
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=eps, atol=40 * eps)
    assert head.weight.grad.dtype == torch.float32
    torch.testing.assert_close(head.weight.grad.double(), w64.grad, rtol=eps, atol=40 * eps)
    if bias:
        torch.testing.assert_close(head.bias.grad.double(), b64.grad, rtol=eps, atol=40 * eps)
    once = head.weight.grad.clone()
    head(x).backward(upstream)
    torch.testing.assert_close(head.weight.grad, 2 * once)


@DTYPES
def test_casts_and_moves_keep_the_storage(dtype: torch.dtype) -> None:
    model = elmo.convert_head(net(), dtype)
    weight, stored = model.head.weight, model.head.weight.detach().clone()
    for cast in (
        lambda: model.half(),
        lambda: model.bfloat16(),
        lambda: model.double(),
        lambda: model.float(),
        lambda: model.to(torch.bfloat16),
        lambda: model.to("cpu", torch.float32),
        lambda: model.cpu(),
        lambda: model.share_memory(),
    ):
        cast()
        assert model.head.weight is weight
        assert model.head.weight.dtype == dtype
        assert model.head.bias.dtype == torch.float32
        assert torch.equal(model.head.weight.float(), stored.float())
    assert model.encoder.weight.dtype == torch.float32
    assert model.head.weight.is_shared()
    model.to("meta")
    assert model.head.weight.is_meta
    model.to_empty(device="cpu")
    assert model.head.weight.dtype == dtype


@DTYPES
def test_state_dicts(dtype: torch.dtype) -> None:
    model = elmo.convert_head(net(), dtype)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    assert state["head.weight"].dtype == dtype
    other = elmo.convert_head(net(seed=4), dtype)
    other.load_state_dict(state)
    assert torch.equal(other.head.weight.float(), model.head.weight.float())
    plain = net(seed=4)
    plain.load_state_dict(state)
    assert torch.equal(plain.head.weight, model.head.weight.float())
    buffer = io.BytesIO()
    torch.save(model, buffer)  # plain pickle cannot read fp8 tensors back
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert twin.head.storage_dtype == dtype
        assert torch.equal(twin.head.weight.float(), model.head.weight.float())
        twin(*batch()).backward()
        assert twin.head.weight.grad.dtype == torch.float32
    other.load_state_dict(copy.deepcopy(state), assign=True)
    other(*batch()).backward()
    assert other.head.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("given", [torch.float32, torch.float64, BF16], ids=str)
def test_loading_wider_weights_saturates(given: torch.dtype) -> None:
    head = elmo.convert_head(nn.Linear(4, 3), FP8)
    wide = torch.tensor([[1e6, -1e6, 500.0, float("nan")]] * 3, dtype=given)
    head.load_state_dict({"weight": wide, "bias": torch.zeros(3)})
    assert head.weight[0, :3].float().tolist() == [448.0, -448.0, 448.0]
    assert head.weight[0, 3].float().isnan()
    assert head.weight.dtype == FP8


def test_assigning_a_wider_weight_is_named() -> None:
    model = elmo.convert_head(net(), FP8)
    model.load_state_dict(net().state_dict(), assign=True)
    with pytest.raises(ElmoError, match="assign=True"):
        model(*batch())


def test_conversion_finds_the_head_and_reports_what_it_lost(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = net()
    with torch.no_grad():
        model.head.weight.fill_(2.0**-12)
    with caplog.at_level(logging.WARNING, "elmo_compile"):
        assert elmo.convert_head(model, FP8) is model
    assert isinstance(model.head, LowPrecisionLinear)
    assert type(model.encoder) is nn.Linear
    assert "became zero" in caplog.text
    assert "head" in caplog.text
    assert 0.6 < model.head.rounded_to_zero < 1  # stochastic: 1 - 2^-12 / 2^-9 = 7/8 expected
    assert model.head.weight.float().mean().item() == pytest.approx(2.0**-12, rel=0.4)
    assert "float8_e4m3fn" in repr(model)
    near = net()
    elmo.convert_head(near, BF16, rounding="nearest")
    assert torch.equal(near.head.weight, net().head.weight.bfloat16())
    assert near.head.rounded_to_zero == 0
    zero = elmo.convert_head(net(), FP8, init="zeros")
    assert not zero.head.weight.float().any()
    assert torch.equal(zero.head.bias, net().head.bias)
    named = elmo.convert_head(net(), BF16, name="encoder")
    assert named.encoder.weight.dtype == BF16
    lone = elmo.convert_head(nn.Linear(4, 9), BF16)
    assert isinstance(lone, LowPrecisionLinear)


def test_conversion_does_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from elmo_compile.heads import convert

    whole = elmo.convert_head(net(), FP8, seed=3).head.weight
    monkeypatch.setattr(convert, "_BLOCK", 24)
    parts = elmo.convert_head(net(), FP8, seed=3).head.weight
    assert torch.equal(whole.float(), parts.float())
    other = elmo.convert_head(net(), FP8, seed=4).head.weight
    assert not torch.equal(whole.float(), other.float())


def test_conversion_refuses() -> None:
    def refused(match: str, model: nn.Module, error: type = ElmoError, **kwargs: object) -> None:
        with pytest.raises(error, match=match):
            elmo.convert_head(model, **{"dtype": FP8, **kwargs})

    refused("accepted", net(), OptionError, dtype=torch.float16)
    refused("rounding", net(), OptionError, rounding="up")
    refused("init", net(), OptionError, init="ones")
    refused("there are", net(), OptionError, name="top")
    refused("no nn.Linear", nn.ReLU())
    refused("equally many", nn.ModuleList([nn.Linear(2, 9), nn.Linear(3, 9)]))
    refused("tied", Tied())
    by_table = nn.ModuleDict({"item": nn.Embedding(20_000, 4), "mlp": nn.Linear(4, 8)})
    refused("'mlp', has 8 outputs, the embedding 'item' 20000 rows", by_table)
    refused("'item' is an embedding", by_table, OptionError, name="item")
    assert elmo.convert_head(by_table, FP8, name="mlp")["mlp"].weight.dtype == FP8
    refused("converted already", elmo.convert_head(net(), FP8))
    parametrised = net()
    nn.utils.parametrizations.weight_norm(parametrised.head)
    refused("parametrisations", parametrised)
    hooked = net()
    hooked.head.register_forward_hook(lambda *_: None)
    refused("hooks", hooked)
    hooked = net()
    hooked.head.weight.register_post_accumulate_grad_hook(lambda _: None)
    refused("hooks", hooked)
    late = net()
    opt = elmo.optim.SGD(late.parameters(), 0.1)
    refused("before", late)
    del opt


@DTYPES
def test_dequantising(dtype: torch.dtype) -> None:
    model = elmo.convert_head(net(), dtype)
    stored = model.head.weight.detach().float()
    model.head.bias.requires_grad_(False)
    assert elmo.dequantize_head(model) is model
    assert type(model.head) is nn.Linear
    assert torch.equal(model.head.weight, stored)
    assert model.head.weight.requires_grad
    assert not model.head.bias.requires_grad
    with pytest.raises(ElmoError, match="no converted head"):
        elmo.dequantize_head(model)
    with pytest.raises(ElmoError, match="encoder"):
        elmo.dequantize_head(elmo.convert_head(net(), dtype), name="encoder")
    lone = elmo.dequantize_head(elmo.convert_head(nn.Linear(4, 9), dtype), torch.float64)
    assert lone.weight.dtype == torch.float64


def test_excluded_heads_stay_as_they_are() -> None:
    model, other = net(seed=1), net(seed=2)
    assert elmo.exclude(model.head) is model.head
    step = compiled(lambda module, *args: module(*args))
    for module in (model, other, copy.deepcopy(model)):
        twin = copy.deepcopy(module)
        step(module, *batch()).backward()
        twin(*batch()).backward()
        torch.testing.assert_close(module.head.weight.grad, twin.head.weight.grad)
    report = elmo.explain(model, *batch(), options={"min_outputs": 32})
    assert not report.matches
    assert [refusal.code for refusal in report.refusals] == ["excluded"]
    assert "training.py" in report.refusals[0].source
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not elmo.explain(copied, *batch(), options={"min_outputs": 32}).matches
    assert len(elmo.explain(other, *batch(), options={"min_outputs": 32}).matches) == 1
    opt = elmo.optim.SGD(model.parameters(), 0.1)
    step(model, *batch()).backward()
    assert model.head.weight.grad is not None
    assert not elmo.is_fused(model.head.weight)
    elmo.convert_head(whole := elmo.exclude(net()), FP8)
    report = elmo.explain(whole, *batch(), options={"min_outputs": 32})
    assert not report.matches
    del opt
    assert LABELS == 48


def test_a_head_without_values_is_converted_and_loaded() -> None:
    """Models are built on the meta device, then filled from a checkpoint."""
    source = elmo.convert_head(nn.Linear(16, 96), torch.float8_e4m3fn)
    with torch.device("meta"):
        model = nn.Linear(16, 96)
    model = elmo.convert_head(model, torch.float8_e4m3fn).to_empty(device="cpu")
    model.load_state_dict(source.state_dict())
    assert model.weight.dtype == torch.float8_e4m3fn
    x = torch.randn(3, 16)
    assert torch.equal(model(x), source(x))


class Halving(torch.optim.Optimizer):
    """Someone's own, which knows fp8."""

    def __init__(self, params: object) -> None:
        super().__init__(params, {})  # type: ignore[arg-type]

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        """Halve all that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    weight.copy_((weight.float() / 2).to(weight.dtype))


@pytest.mark.parametrize("rule", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
@pytest.mark.parametrize("copied", [False, True], ids=["converted", "unpickled"])
def test_torch_optim_is_refused_before_it_changes_anything(
    rule: type[torch.optim.Optimizer], copied: bool
) -> None:
    model = elmo.convert_head(net(), dtype=torch.float8_e4m3fn)
    if copied:
        torch.save(model, buffer := io.BytesIO())
        buffer.seek(0)
        model = torch.load(buffer, weights_only=False)
    opt = rule(model.parameters(), lr=0.1)  # type: ignore[call-arg]
    opt.step()  # no gradients: nothing to do
    model(*batch()).backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ElmoError, match=rf"torch.optim.{rule.__name__} .* nothing was changed"):
        opt.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value.view(torch.uint8), before[name].view(torch.uint8)), name


def test_other_optimizers_may_know_fp8() -> None:
    model = elmo.convert_head(net(), dtype=torch.float8_e4m3fn)
    model(*batch()).backward()
    head = next(module for module in model.modules() if isinstance(module, LowPrecisionLinear))
    before = head.weight.detach().float()
    Halving(model.parameters()).step()
    assert torch.equal(head.weight.detach().float(), (before / 2).to(head.weight.dtype).float())


@pytest.mark.parametrize("update_at", ["backward", "step"])
def test_training_on_after_dequantising_is_an_error(update_at: str) -> None:
    model = elmo.convert_head(net(), dtype=torch.bfloat16)
    opt = elmo.optim.SGD(model.parameters(), lr=0.5, update_at=update_at)
    for number in range(2):
        compiled(model)(*batch(number)).backward()
        opt.step()
        opt.zero_grad()
    elmo.dequantize_head(model)
    x, labels = batch(2)
    assert model(x, labels).isfinite()  # as for an export
    before = {name: value.clone() for name, value in model.state_dict().items()}
    compiled(model)(x, labels).backward()
    with pytest.raises(ElmoError, match=r"was replaced: .* dequantize_head"):
        opt.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_dequantising_does_not_lose_hooks() -> None:
    model = elmo.convert_head(net(), dtype=torch.bfloat16)
    handle = model.head.register_forward_hook(lambda *_: None)
    with pytest.raises(ElmoError, match="dequantize_head: head has hooks"):
        elmo.dequantize_head(model)
    assert isinstance(model.head, LowPrecisionLinear)
    handle.remove()
    assert type(elmo.dequantize_head(model).head) is nn.Linear
