"""A run that is saved and resumed stores the very bits of one that was not interrupted."""

from __future__ import annotations

import copy
import functools
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training import EAGER, assert_same, batch, compiled, net, reference, train

import elmo_compile as elmo
from elmo_compile.errors import FusedUpdateError, OptionError
from elmo_compile.kernels.aten import stored as stored_weights

SGD, AdamW, Lion, Adagrad = elmo.optim.SGD, elmo.optim.AdamW, elmo.optim.Lion, elmo.optim.Adagrad

RUNS: dict[str, Any] = {
    "sgd": lambda p, **kw: SGD(p, 0.5, **kw),
    "momentum": lambda p, **kw: SGD(p, 0.1, momentum=0.9, **kw),
    "eco": lambda p, **kw: SGD(p, 0.1, momentum=0.9, eco=True, **kw),
    "adamw": lambda p, **kw: AdamW(p, 0.01, **kw),
    "adamw nearest": lambda p, **kw: AdamW(p, 0.01, rounding="nearest", **kw),
    "adamw kahan": lambda p, **kw: AdamW(p, 0.01, rounding="kahan", **kw),
    "adamw 8bit": lambda p, **kw: AdamW(p, 0.01, state_dtype="8bit", **kw),
    "adamw float32": lambda p, **kw: AdamW(p, 0.01, state_dtype="float32", **kw),
    "kahan rows": lambda p, **kw: SGD(p, 0.1, kahan_rows=[0, 3, 40], **kw),
    "e5m2": lambda p, **kw: SGD(
        p, 0.1, rounding="kahan", compensation_dtype=torch.float8_e5m2, **kw
    ),
    "lion": lambda p, **kw: Lion(p, 0.001, **kw),
    "adagrad": lambda p, **kw: Adagrad(p, 0.1, **kw),
}


LARGE = {**EAGER, "min_outputs": 70}
"""The head alone: the encoder has 64 outputs."""


class Large(nn.Module):
    """A head whose state may be kept in 8 bits."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.encoder = nn.Linear(5, 64)
        self.head = nn.Linear(64, 80)
        if dtype is not None:
            elmo.convert_head(self, dtype=dtype, name="head")

    def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.head(torch.tanh(self.encoder(inputs))), labels)


def through_a_file(value: Any) -> Any:
    """Saved and loaded as torch recommends."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def bits(t: Tensor) -> Tensor:
    return t.detach().contiguous().view(torch.uint8) if t.dim() else t


def assert_bits(model: nn.Module, twin: nn.Module, opt: Any, other: Any) -> None:
    """Weights and state agree bit for bit."""
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        assert torch.equal(bits(p), bits(q)), name
        mine, theirs = opt.state[p], other.state[q]
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            if isinstance(value, Tensor):
                assert value.dtype == theirs[key].dtype, (name, key)
                assert torch.equal(bits(value), bits(theirs[key])), (name, key)
            else:
                assert value == theirs[key], (name, key)


@pytest.mark.parametrize("update_at", ["backward", "step"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("run", RUNS)
def test_resuming_continues_bit_for_bit(
    run: str, dtype: torch.dtype | None, update_at: str
) -> None:
    whole = Large(dtype)
    opt = RUNS[run](whole.parameters(), seed=7, update_at=update_at)
    train(compiled(whole, LARGE), opt, 2)
    saved = through_a_file({"model": whole.state_dict(), "opt": opt.state_dict()})
    train(compiled(whole, LARGE), opt, 2, start=2)
    assert opt.fused_parameters() == [whole.head.weight]

    resumed = Large(dtype)
    train(compiled(resumed, LARGE), RUNS[run](resumed.parameters(), update_at=update_at), 1)
    other = RUNS[run](resumed.parameters(), update_at=update_at)
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["opt"])
    train(compiled(resumed, LARGE), other, 2, start=2)
    assert_bits(whole, resumed, opt, other)


@pytest.mark.parametrize("run", ["momentum", "adamw kahan", "kahan rows", "adamw 8bit"])
def test_distributed_checkpoint(run: str, tmp_path: Path) -> None:
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    whole = Large(torch.bfloat16)
    opt = RUNS[run](whole.parameters(), seed=7)
    train(compiled(whole, LARGE), opt, 2)
    dcp.save({"model": whole.state_dict(), "opt": opt.state_dict()}, checkpoint_id=tmp_path)
    train(compiled(whole, LARGE), opt, 1, start=2)

    resumed = Large(torch.bfloat16)
    other = RUNS[run](resumed.parameters())
    train(compiled(resumed, LARGE), other, 1)  # dcp loads into state that exists
    state = {"model": resumed.state_dict(), "opt": other.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path)
    resumed.load_state_dict(state["model"])
    other.load_state_dict(state["opt"])
    train(compiled(resumed, LARGE), other, 1, start=2)
    assert_bits(whole, resumed, opt, other)


@pytest.mark.parametrize("full", [False, True])
def test_distributed_state_dict_helpers(full: bool) -> None:
    """`get_optimizer_state_dict` names parameters, and makes the state of a fresh optimizer."""
    helpers = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    how = helpers.StateDictOptions(full_state_dict=full, cpu_offload=full)
    whole = Large(torch.bfloat16)
    rule = functools.partial(AdamW, lr=0.01, seed=7, rounding="kahan", state_dtype=torch.bfloat16)
    opt = rule(whole.parameters())
    train(compiled(whole, LARGE), opt, 2)
    model_state, opt_state = copy.deepcopy(helpers.get_state_dict(whole, opt, options=how))
    assert "head.weight" in opt_state["state"]
    train(compiled(whole, LARGE), opt, 1, start=2)
    resumed = Large(torch.bfloat16)
    other = rule(resumed.parameters())
    helpers.set_state_dict(
        resumed, other, model_state_dict=model_state, optim_state_dict=opt_state, options=how
    )
    assert other.param_groups[0]["state_dtype"] == torch.bfloat16
    train(compiled(resumed, LARGE), other, 1, start=2)
    assert_bits(whole, resumed, opt, other)


def test_weights_in_safetensors(tmp_path: Path) -> None:
    torch_io = pytest.importorskip("safetensors.torch")
    whole = Large(torch.float8_e4m3fn)
    train(compiled(whole, LARGE), SGD(whole.parameters(), 0.1), 1)
    torch_io.save_file(whole.state_dict(), tmp_path / "weights.safetensors")
    other = Large(torch.float8_e4m3fn)
    other.load_state_dict(torch_io.load_file(tmp_path / "weights.safetensors"))
    for p, q in zip(whole.parameters(), other.parameters()):
        assert torch.equal(bits(p), bits(q))


def test_other_rounding_bits_are_refused_before_anything_changes() -> None:
    model = net()
    opt = AdamW(model.parameters(), 0.01)
    train(compiled(model), opt, 1)
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][0]["rounding_version"] = 999
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(OptionError, match="rounding_version=999"):
        opt.load_state_dict(saved)
    after = opt.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert torch.equal(after["state"][2]["exp_avg"], before["state"][2]["exp_avg"])


@pytest.mark.parametrize("run", ["sgd", "adamw kahan", "kahan rows"])
def test_chunks_do_not_enter_the_stored_bits(run: str) -> None:
    """Labels that repeat and power-of-two features: gradients are exact in every chunking."""

    class Exact(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 48, bias=False)
            nn.init.zeros_(self.head.weight)
            elmo.convert_head(self, dtype=torch.float8_e4m3fn, name="head")

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            z = self.head(x)
            return nn.functional.binary_cross_entropy_with_logits(z, y, reduction="sum")

    stored = []
    x, y = torch.randint(-2, 3, (6, 8)).float(), torch.randint(0, 2, (6, 48)).float()
    for chunk in (1, 7, 16, 48):
        model = Exact()
        opt = RUNS[run](model.parameters(), seed=3)
        step = compiled(model, {**EAGER, "chunk_size": chunk})
        step(x, y).backward()
        opt.step()
        assert opt.fused_parameters()
        stored.append(bits(model.head.weight).clone())
    for other in stored[1:]:
        assert torch.equal(other, stored[0])


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("update_at", ["backward", "step"])
def test_a_crash_in_an_update_is_seen_and_can_be_undone(
    update_at: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = net("bce")
    want = reference(model, 2)
    opt = SGD(model.parameters(), 0.5, update_at=update_at)
    step = compiled(model)
    train(step, opt, 1)
    saved = through_a_file({"model": model.state_dict(), "opt": opt.state_dict()})
    real, calls = stored_weights.StoredWeight.step, []

    def die(self: Any, *args: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise error
        real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(stored_weights.StoredWeight, "step", die)
        with pytest.raises(type(error)):
            train(step, opt, 1, start=1)
    for use in (lambda: step(*batch(1)), opt.step, opt.state_dict):
        with pytest.raises(FusedUpdateError, match=r"inconsistent.*checkpoint"):
            use()
    with torch.no_grad(), pytest.raises(FusedUpdateError, match="inconsistent"):
        step(*batch(1))  # nor does it evaluate as if nothing had happened
    model.load_state_dict(saved["model"])
    opt.load_state_dict(saved["opt"])
    opt.zero_grad()
    train(step, opt, 1, start=1)
    assert_same(model, want)


@pytest.mark.parametrize("update_at", ["backward", "step"])
def test_a_hook_that_raises_after_the_head(update_at: str) -> None:
    """The head's backward is done, the encoder's is not: no further update before it is settled."""
    model = net("bce")
    want = reference(model, 2)
    opt = SGD(model.parameters(), 0.5, update_at=update_at)
    step = compiled(model)
    train(step, opt, 1)
    saved = through_a_file({"model": model.state_dict(), "opt": opt.state_dict()})

    def fail(grad: Tensor) -> None:
        raise RuntimeError("from a hook")

    handle = model.encoder.weight.register_hook(fail)
    with pytest.raises(RuntimeError, match="from a hook"):
        step(*batch(1)).backward()
    handle.remove()
    with pytest.raises(FusedUpdateError, match=r"before opt\.step\(\)"):
        step(*batch(1)).backward()
    model.load_state_dict(saved["model"])
    opt.load_state_dict(saved["opt"])
    opt.zero_grad()
    train(step, opt, 1, start=1)
    assert_same(model, want)


@pytest.mark.gpu
@pytest.mark.parametrize("run", RUNS)
def test_a_run_moves_between_cpu_and_cuda(run: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model = Large(torch.bfloat16)
    opt = RUNS[run](model.parameters())
    train(compiled(model, LARGE), opt, 2)
    model.cuda()
    step = compiled(model, LARGE)
    for i in range(2):
        step(*(t.cuda() for t in batch(i))).backward()
        opt.step()
        opt.zero_grad()
    saved = through_a_file({"model": model.state_dict(), "opt": opt.state_dict()})
    assert all(v.device.type == "cuda" for v in opt.state[model.head.weight].values()
               if isinstance(v, Tensor))  # fmt: skip
    back = Large(torch.bfloat16)
    other = RUNS[run](back.parameters())
    back.load_state_dict(saved["model"])
    other.load_state_dict(saved["opt"])
    train(compiled(back, LARGE), other, 1)
    assert torch.isfinite(back.head.weight.float()).all()


def test_a_loaded_state_is_no_other_optimizer_s_state() -> None:
    """torch.optim shares the tensors of a state dict that nobody copied."""
    model, twin = nn.Linear(4, 6), nn.Linear(4, 6)
    opt = elmo.optim.AdamW(model.parameters(), 0.1, fused=False)
    other = elmo.optim.AdamW(twin.parameters(), 0.1, fused=False)
    model(torch.ones(2, 4)).sum().backward()
    opt.step()
    other.load_state_dict(opt.state_dict())
    before = opt.state[model.weight]["exp_avg"].clone()
    assert torch.equal(other.state[twin.weight]["exp_avg"], before)
    twin(3 * torch.ones(2, 4)).sum().backward()
    other.step()
    assert torch.equal(opt.state[model.weight]["exp_avg"], before)
    assert not torch.equal(other.state[twin.weight]["exp_avg"], before)


def test_hooks_may_change_what_is_loaded() -> None:
    params = [nn.Parameter(torch.zeros(4))]
    opt = SGD(params, 0.1, momentum=0.9, fused=False)
    params[0].grad = torch.ones(4)
    opt.step()

    def doubled(_: Any, saved: dict[str, Any]) -> dict[str, Any]:
        state = {**saved["state"][0], "momentum_buffer": torch.full((4,), 2.0)}
        return {**saved, "state": {0: state}}

    def counted(optimizer: Any) -> None:
        optimizer.state[params[0]]["step"] += 5

    opt.register_load_state_dict_pre_hook(doubled)
    opt.register_load_state_dict_post_hook(counted)
    opt.load_state_dict(opt.state_dict())
    assert opt.state[params[0]]["momentum_buffer"].tolist() == [2.0] * 4
    assert int(opt.state[params[0]]["step"]) == 6
