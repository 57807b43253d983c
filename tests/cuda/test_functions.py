"""What is called by itself, on a CUDA device."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import elmo_compile as elmo
from elmo_compile.ops.device_flag import DeviceFlag

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


def test_multi_hot(no_host_reads):
    indices = torch.tensor([[0, 3, 3], [2, -1, -1]])
    flat, offsets = torch.tensor([4, 1, 1]), torch.tensor([0, 1, 3])
    given = [t.to("cuda") for t in (indices, flat, offsets)]
    with no_host_reads():
        padded = elmo.multi_hot(given[0], 5)
        ragged = elmo.multi_hot(given[1], 5, offsets=given[2])
    assert padded.is_cuda
    assert torch.equal(padded.cpu(), elmo.multi_hot(indices, 5))
    assert torch.equal(ragged.cpu(), elmo.multi_hot(flat, 5, offsets=offsets))


@pytest.mark.parametrize("dtype", [torch.float32, BF16, FP8], ids=["float32", "bf16", "fp8"])
def test_topk(dtype, no_host_reads):
    make = torch.Generator().manual_seed(0)
    x = torch.randn(5, 32, generator=make).bfloat16().float()
    w = torch.randn(300, 32, generator=make).to(dtype)
    b = torch.randn(300, generator=make)
    given = [t.to("cuda") for t in (x, w, b)]
    with no_host_reads():
        found = elmo.topk(given[0], given[1], 4, bias=given[2])
    want = (x @ w.float().t() + b).topk(4)
    assert torch.equal(found.indices.cpu(), want.indices)
    assert torch.allclose(
        found.values.cpu(), want.values, rtol=1e-2 if dtype != torch.float32 else 1e-5
    )


def test_topk_of_a_weight_that_is_not_contiguous():
    make = torch.Generator().manual_seed(0)
    x, w = torch.randn(5, 32, generator=make), torch.randn(32, 300, generator=make)
    found = elmo.topk(x.to("cuda"), w.to("cuda").t(), 4)
    assert torch.equal(found.indices.cpu(), (x @ w).topk(4).indices)


@pytest.mark.parametrize("dtype", [BF16, FP8], ids=["bf16", "fp8"])
def test_stochastic_round(dtype):
    x = torch.randn(40, 33, generator=torch.Generator().manual_seed(0))
    key = {"seed": 3, "param_id": 2, "step": 7}
    got = elmo.stochastic_round(x.to("cuda"), dtype, **key)
    assert torch.equal(
        got.cpu().view(torch.uint8), elmo.stochastic_round(x, dtype, **key).view(torch.uint8)
    )


def test_heads_are_converted_where_they_are():
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 300))
    twin = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 300))
    twin.load_state_dict(model.state_dict())
    elmo.convert_head(model.to("cuda"), FP8, name="1")
    elmo.convert_head(twin, FP8, name="1")
    assert torch.equal(model[1].weight.cpu().view(torch.uint8), twin[1].weight.view(torch.uint8))
    elmo.dequantize_head(model)
    assert model[1].weight.is_cuda
    assert model[1].weight.dtype == torch.float32


def test_explain_says_what_a_gpu_would_need():
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 20_000)).to("cuda")

    def step(x, y):
        return nn.functional.cross_entropy(model(x), y)

    before = [p.detach().clone() for p in model.parameters()]
    report = elmo.explain(
        step, torch.ones(4, 8, device="cuda"), torch.zeros(4, dtype=torch.int64, device="cuda")
    )
    (match,) = report.matches
    assert match.num_outputs == 20_000
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_clipping_does_not_change_how_products_are_made(precision, monkeypatch):
    """Not for a moment: another thread's products would change with it."""
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = precision
    try:
        weight = nn.Parameter(torch.ones(300, 16, device="cuda"))
        step = torch.compile(
            lambda x, y: nn.functional.cross_entropy(x @ weight.t(), y),
            backend="elmo", options={"min_outputs": 256, "lower": "eager"},
        )  # fmt: skip
        opt = elmo.optim.SGD([weight], 0.1, update_at="step", max_norm=1.0)
        labels = torch.zeros(4, dtype=torch.int64, device="cuda")
        with monkeypatch.context() as patched:
            patched.setattr(type(settings), "__setattr__", refuse)
            step(torch.ones(4, 16, device="cuda"), labels).backward()
            opt.step()
        assert elmo.is_fused(weight)
        assert settings.fp32_precision == precision
    finally:
        settings.fp32_precision = before


def refuse(*args):
    raise AssertionError(f"a process-wide setting was changed: {args[1:]}")


def test_a_flag_is_read_without_waiting_for_what_follows(no_host_reads):
    flag = DeviceFlag()
    zero, one = (torch.tensor(v, dtype=torch.int32).to("cuda") for v in (0, 1))
    with no_host_reads():
        assert not flag.is_set()
        flag.add(zero)
        assert not flag.is_set()
        flag.add(one)
        flag.add(zero)
        assert flag.is_set()
        flag.clear()
        assert not flag.is_set()


def test_ids_of_a_dense_multi_hot_are_asserted_on_the_device(monkeypatch, no_host_reads):
    asserted = []
    monkeypatch.setattr(torch, "_assert_async", lambda right, message: asserted.append(right))
    good, bad = (torch.tensor([[0, -1], [v, 2]]).to("cuda") for v in (4, 5))
    with no_host_reads():
        for ids in (good, bad):
            elmo.multi_hot(ids, 5)
    assert [bool(right) for right in asserted] == [True, False]
