"""Each rule: torch's or the paper's, fused and not, at every storage; what its options mean."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training import EAGER, INDUCTOR, LABELS, assert_same, batch, compiled, net, train

import elmo_compile as elmo
from elmo_compile.errors import OptionError
from elmo_compile.optim.state import resolve_rows

SGD, AdamW, Lion, Adagrad = elmo.optim.SGD, elmo.optim.AdamW, elmo.optim.Lion, elmo.optim.Adagrad

RULES: dict[str, Any] = {
    "sgd": lambda params, **kw: SGD(params, 0.5, weight_decay=0.01, **kw),
    "momentum": lambda params, **kw: SGD(params, 0.1, momentum=0.9, **kw),
    "adamw": lambda params, **kw: AdamW(params, 0.01, **kw),
    "lion": lambda params, **kw: Lion(params, 0.001, weight_decay=0.1, **kw),
    "adagrad": lambda params, **kw: Adagrad(params, 0.1, weight_decay=0.01, **kw),
}
WAYS: dict[str, dict[str, Any]] = {
    "stochastic": {},
    "nearest": {"rounding": "nearest"},
    "kahan": {"rounding": "kahan"},
    "kahan rows": {"kahan_rows": [1, 5, 40]},
    "e5m2": {"rounding": "kahan", "compensation_dtype": torch.float8_e5m2},
}


class RowwiseAdagrad(torch.optim.Optimizer):
    """The rule as it is written down."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                squares = p.grad.square()
                mean = squares.mean(1, keepdim=True) if p.dim() == 2 else squares
                total = self.state[p].get("a", 0) + mean
                self.state[p]["a"] = total
                p -= group["lr"] * (p.grad / (total.sqrt() + 1e-10) + 0.01 * p)


class PlainLion(torch.optim.Optimizer):
    """The rule as it is written down."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].get("m", torch.zeros_like(p))
                p -= group["lr"] * ((0.9 * m + 0.1 * p.grad).sign() + 0.1 * p)
                self.state[p]["m"] = 0.99 * m + 0.01 * p.grad


TORCH: dict[str, Any] = {
    "sgd": lambda params: torch.optim.SGD(params, 0.5, weight_decay=0.01),
    "momentum": lambda params: torch.optim.SGD(params, 0.1, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, 0.01),
    "lion": lambda params: PlainLion(params, 0.001),
    "adagrad": lambda params: RowwiseAdagrad(params, 0.1),
}


@pytest.mark.parametrize("how", ["fused", "at step", "unfused", "inductor"])
@pytest.mark.parametrize("rule", RULES)
def test_float32_is_the_rule(rule: str, how: str) -> None:
    """Four steps of every parameter, the encoder's and the bias's too."""
    model = net("bce")
    twin = copy.deepcopy(model)
    hyper = {"at step": {"update_at": "step"}, "unfused": {"fused": False}}.get(how, {})
    opt = RULES[rule](model.parameters(), **hyper)
    train(compiled(model, INDUCTOR if how == "inductor" else EAGER), opt, 4)
    other = TORCH[rule](twin.parameters())
    for i in range(4):
        other.zero_grad()
        twin(*batch(i)).backward()
        other.step()
    # Adagrad and Adam divide by a gradient's own size: its rounding errors are not made smaller.
    assert_same(model, twin, 2e-4 if rule in ("adamw", "adagrad", "lion") else 2e-6)
    assert bool(opt.fused_parameters()) == (how != "unfused")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rule", RULES)
def test_fused_equals_unfused(rule: str, way: str, dtype: torch.dtype) -> None:
    """The same rule and the same random bits, on gradients that differ by one rounding to bf16."""
    stored = []
    for fused in (True, False):
        model = net("bce", seed=2)
        elmo.convert_head(model, dtype=dtype, name="head")
        groups = [{"params": model.head.parameters(), **WAYS[way]}]
        groups.append({"params": model.encoder.parameters()})
        opt = RULES[rule](groups, fused=fused, seed=4)
        train(compiled(model, compute_dtype=torch.float32), opt, 2)
        assert bool(opt.fused_parameters()) == fused
        stored.append((model.head.weight.detach(), opt.state[model.head.weight]))
    (a, state_a), (b, state_b) = stored
    differ = a.view(torch.uint8) != b.view(torch.uint8)
    # A sign (Lion), or a fresh second moment (Adam, Adagrad), is decided by a gradient's last bit.
    share = 0.02 if rule in ("lion", "adamw", "adagrad") else 0.01
    assert float(differ.float().mean()) <= share
    assert set(state_a) == set(state_b)
    for name, value in state_a.items():
        if isinstance(value, Tensor):
            assert value.dtype == state_b[name].dtype
            assert value.shape == state_b[name].shape


def test_adamw_moments_are_stored_bias_corrected() -> None:
    p = nn.Parameter(torch.ones(3, 4))
    q = nn.Parameter(torch.ones(3, 4))
    mine, theirs = AdamW([p], 0.1, fused=False), torch.optim.AdamW([q], 0.1)
    for _ in range(5):
        p.grad = q.grad = torch.randn(3, 4)
        mine.step()
        theirs.step()
    m = theirs.state[q]["exp_avg"] / (1 - 0.9**5)
    v = theirs.state[q]["exp_avg_sq"] / (1 - 0.999**5)
    torch.testing.assert_close(mine.state[p]["exp_avg"], m)
    torch.testing.assert_close(mine.state[p]["exp_avg_sq"], v)
    torch.testing.assert_close(p, q)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("wanted", "stored"),
    [
        (None, torch.bfloat16),
        (torch.float32, torch.float32),
        ("float32", torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_state_dtypes(wanted: Any, stored: torch.dtype, fused: bool) -> None:
    model = net("bce")
    elmo.convert_head(model, dtype=torch.float8_e4m3fn, name="head")
    opt = AdamW(model.parameters(), 0.01, state_dtype=wanted, fused=fused)
    train(compiled(model), opt, 2)
    state = opt.state[model.head.weight]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == stored
    encoder = opt.state[model.encoder.weight]["exp_avg"].dtype
    assert encoder == (torch.float32 if wanted is None else stored)


class Wide(nn.Module):
    """Large enough for block-wise state."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 128)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.head(x), y)


@pytest.mark.parametrize("how", [{}, {"update_at": "step"}, {"fused": False}], ids=str)
def test_8bit_state_is_torchao_s_and_trains_alike(how: dict) -> None:
    pytest.importorskip("torchao.optim")
    torch.manual_seed(0)
    model = Wide()
    twin = copy.deepcopy(model)
    x, y = torch.randn(32, 64), torch.randint(0, 128, (32,))
    opt = AdamW(model.parameters(), 1e-3, state_dtype="8bit", **how)
    other = torch.optim.AdamW(twin.parameters(), 1e-3)
    for run, each in ((compiled(model), opt), (twin, other)):
        for _ in range(10):
            each.zero_grad()
            run(x, y).backward()
            each.step()
    state = opt.state[model.head.weight]
    assert state["exp_avg"].dtype == torch.uint8
    assert state["exp_avg"].shape == model.head.weight.shape
    assert state["exp_avg_scale"].shape == (128,)  # 64 elements a block
    assert opt.state[model.head.bias]["exp_avg"].dtype == torch.float32
    start = Wide().head.weight.detach()
    moved = (twin.head.weight.detach() - start).abs().mean()
    apart = (model.head.weight.detach() - twin.head.weight.detach()).abs().mean()
    assert float(apart) < 0.05 * float(moved)
    from torchao.optim.quant_utils import create_dynamic_map, dequant_with_qmap

    table = torch.tensor(create_dynamic_map(signed=True))
    values = dequant_with_qmap(state["exp_avg"], table, state["exp_avg_scale"])
    torch.testing.assert_close(values, other.state[twin.head.weight]["exp_avg"] / (1 - 0.9**10),
                               rtol=0.1, atol=float(values.abs().max()) * 0.02)  # fmt: skip


def test_sparse_gradients_touch_their_rows_alone() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for make in (Adagrad, SGD):
            dense = nn.EmbeddingBag(50, 6, mode="sum").to(dtype)
            sparse = copy.deepcopy(dense)
            sparse.sparse = True
            before = sparse.weight.detach().clone()
            words, offsets = torch.tensor([3, 7, 7, 3, 49]), torch.tensor([0, 3])
            for bag in (dense, sparse):
                opt = make(bag.parameters(), 0.1, fused=False)
                for _ in range(3):
                    opt.zero_grad()
                    bag(words, offsets).square().sum().backward()
                    opt.step()
            rows = [3, 7, 49]
            rest = [i for i in range(50) if i not in rows]
            assert torch.equal(sparse.weight[rest], before[rest])
            torch.testing.assert_close(sparse.weight[rows], dense.weight[rows])


@pytest.mark.parametrize(
    ("given", "rows"),
    [
        (3, [0, 1, 2]),
        (100, list(range(20))),
        (0.1, [0, 1]),
        ([7, 3, 3], [3, 7]),
        (torch.tensor([19]), [19]),
        (torch.arange(20).flip(0), list(range(20))),  # row numbers: a permutation
        (torch.tensor([1] * 10 + [9] + [1] * 9), [10]),  # counts
        ((0.15, torch.arange(20)), [17, 18, 19]),
        ((2, [0.5] * 19 + [0.1]), [0, 1]),
        ([0.0] * 18 + [2.0, 1.0], [18]),
    ],
    ids=str,
)
def test_rows_to_compensate(given: Any, rows: list[int]) -> None:
    found = resolve_rows(given, 20)
    assert found.dtype == torch.int64
    assert found.tolist() == rows


@pytest.mark.parametrize(
    "given", [0, 0.0, 1.5, True, "5", [20], [-1], [[1, 2]], (0.1, [1, 2]), (2.0, list(range(20)))],
    ids=str,
)  # fmt: skip
def test_rows_that_cannot_be_meant(given: Any) -> None:
    with pytest.raises(OptionError, match="kahan_rows"):
        resolve_rows(given, 20)


def test_kahan_rows_are_those_of_the_largest_weight() -> None:
    model = net().to(torch.bfloat16)
    counts = torch.zeros(LABELS)
    counts[[4, 30]] = 7
    opt = SGD(model.parameters(), 0.1, kahan_rows=(2, counts), fused=False)
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e-3)
    opt.step()
    state = opt.state[model.head.weight]
    assert state["kahan_rows"].tolist() == [4, 30]
    assert state["compensation"].shape == (2, 8)
    assert "compensation" not in opt.state[model.encoder.weight]
    assert "compensation" not in opt.state[model.head.bias]


def test_compensation_is_for_narrow_parameters() -> None:
    model = net()
    opt = AdamW(model.parameters(), 0.1, rounding="kahan")
    train(compiled(model), opt, 1)
    assert all("compensation" not in opt.state[p] for p in model.parameters())


def test_step_each_scales_the_rate_of_rules_that_ignore_the_gradient_s_size() -> None:
    with pytest.raises(OptionError, match="micro_batches"):
        AdamW(net().parameters(), 0.1, accumulate="step_each")
    p = nn.Parameter(torch.zeros(2, 2))
    opt = AdamW([p], 0.1, accumulate="step_each", micro_batches=4, weight_decay=0.0, fused=False)
    p.grad = torch.ones(2, 2)
    opt.step()
    torch.testing.assert_close(p.detach(), torch.full((2, 2), -0.025))
    model = net()
    step = compiled(model)
    opt = SGD(model.parameters(), 0.5, accumulate="step_each")
    for i in range(3):
        (step(*batch(i)) / 3).backward()
    opt.step()
    assert opt.state[model.head.weight]["step"] == 3
    assert opt.state[model.encoder.weight]["step"] == 1


def test_materialize_leaves_an_ordinary_gradient() -> None:
    model = net()
    twin = copy.deepcopy(model)
    step, opt = compiled(model), SGD(model.parameters(), 0.5, accumulate="materialize")
    other = torch.optim.SGD(twin.parameters(), 0.5)
    for i in range(3):
        step(*batch(i)).backward()
        twin(*batch(i)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
    opt.step()
    other.step()
    assert_same(model, twin)
    assert not elmo.is_fused(model.head.weight)


def test_counters_tell_what_rounding_did() -> None:
    shares = {}
    for rounding in ("nearest", "stochastic"):
        model = net("bce", reduction="sum")
        with torch.no_grad():
            model.head.weight[:12] = 0
        elmo.convert_head(model, dtype=torch.float8_e4m3fn, name="head")
        opt = SGD(model.parameters(), 3e-4, rounding=rounding)
        assert opt.counters() == {}
        train(compiled(model), opt, 3)
        (found,) = opt.counters().values()
        report = elmo.last_report()
        assert found in report.updates.values()
        assert f"3 updates in this process; of a sample unchanged {found['unchanged']:.1%}" in str(
            report
        )
        assert found["updates"] == 3
        assert found["saturated"] == 0
        assert 0.2 < found["zero"] < 0.3
        shares[rounding] = found["unchanged"]
    assert shares["nearest"] >= 0.95
    assert shares["stochastic"] < shares["nearest"] - 0.02
    with torch.no_grad():
        model.head.weight.copy_(torch.full_like(model.head.weight, 448.0, dtype=torch.float32))
    opt = SGD(model.parameters(), 1e-4)
    train(compiled(model), opt, 1)
    assert next(iter(opt.counters().values()))["saturated"] > 0.5


@pytest.mark.parametrize("change", ["dtype", "no longer", "from now on"])
def test_state_follows_when_it_is_stored_in_8_bits_no_longer_or_newly(change: str) -> None:
    pytest.importorskip("torchao.optim")
    torch.manual_seed(0)
    model = nn.Linear(64, 128)
    twin = copy.deepcopy(model)
    first = None if change == "from now on" else "8bit"
    grads = torch.randn(2, 128, 64)
    opt = AdamW([model.weight], 1e-3, state_dtype=first, fused=False)
    want = AdamW([twin.weight], 1e-3, state_dtype="8bit", fused=False)
    for number, grad in enumerate(grads):
        if number:
            opt.param_groups[0]["state_dtype"] = "8bit" if first is None else None
            if change == "dtype":
                opt.param_groups[0]["state_dtype"] = "8bit"
                model.double()
        for one, by in ((model, opt), (twin, want)):
            one.weight.grad = grad.to(one.weight.dtype)
            by.step()
    torch.testing.assert_close(model.weight.float(), twin.weight, rtol=0, atol=1e-5)
    assert ("exp_avg_scale" in opt.state[model.weight]) == (first is None)


def test_betas_that_change_are_told_of_once() -> None:
    params = [nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(2, 2))]
    opt = AdamW(params, 1e-3, fused=False)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 1e-3, total_steps=10)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(3):
            for param in params:
                param.grad = torch.ones_like(param)
            opt.step()
            schedule.step()
    assert ["cycle_momentum=False" in str(one.message) for one in told] == [True]
    loaded = AdamW(params, 1e-3, fused=False)
    loaded.load_state_dict(opt.state_dict())
    loaded.step()
