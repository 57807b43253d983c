"""Cases of label_ranks.py about what is computed: bits, losses, gradients, steps."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from label_run import BF16, FP8, ROWS, Run, same, train
from torch.distributed.tensor import DTensor
from training import (
    EAGER,
    FEATURES,
    Net,
    Saturated,
    batch,
    compiled,
    integers,
    net,
)

import elmo_compile as elmo
from elmo_compile.heads.sharded import whole_of

# The bits


class Summed(Saturated):
    """Its loss over so many processes: a sharded head's gradient is their mean."""

    def __init__(self, dtype: torch.dtype, parts: int) -> None:
        super().__init__(dtype)
        self.parts = parts

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, y) / self.parts


EXACT: list[tuple[str, torch.dtype, dict[str, Any]]] = [
    ("SGD", BF16, {"momentum": 0.9}),
    ("SGD", FP8, {}),
    ("SGD", BF16, {"rounding": "kahan"}),
    ("AdamW", BF16, {}),
    ("AdamW", FP8, {"rounding": "kahan"}),
    ("Adagrad", BF16, {}),
]


def bits(run: Run) -> None:
    """Integer data and an exact gradient: the very weights and state of one process, for any
    number of processes, by each way of updating."""
    for name, dtype, hyper in EXACT:
        for how in ({}, {"update_at": "step"}, {"fused": False}):
            model, twin = Summed(dtype, 1), Summed(dtype, run.world)
            run.shard(model)
            rule: Any = getattr(elmo.optim, name)
            opts = [rule(m.parameters(), 2.0**-8, **hyper, **how) for m in (model, twin)]
            batches = [integers(seed) for seed in range(3)]
            train(run, model, opts[0], batches)
            train(None, twin, opts[1], batches)
            assert elmo.is_fused(model.head.weight) is ("fused" not in how)
            same(model, twin)
            for key, value in opts[1].state[twin.head.weight].items():
                held = opts[0].state[model.head.weight][key]
                held = whole_of(held) if isinstance(held, DTensor) else held
                assert torch.equal(held.float(), torch.as_tensor(value).float()), key


# Losses and gradients

OUTPUTS = 50
"""That two or four processes cannot share evenly."""


class Outputs(Net):
    """A Net with any loss of its logits."""

    def __init__(self, loss: Callable[..., Tensor], *, bias: bool = True) -> None:
        super().__init__(bias=bias)
        self.head = nn.Linear(FEATURES, OUTPUTS, bias=bias)
        self.loss = loss

    def forward(self, inputs: Tensor, *labels: Tensor) -> Tensor:
        return self.loss(self.head(torch.tanh(self.encoder(inputs))), *labels)


def _bce(z: Tensor, y: Tensor, **kwargs: Any) -> Tensor:
    return F.binary_cross_entropy_with_logits(z, y, **kwargs)


def _ignoring(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, ignore_index=3, reduction="sum") / 4


def _each(z: Tensor, y: Tensor) -> Tensor:
    weights = torch.linspace(0.5, 2.0, 48)[: len(y)]
    return (F.cross_entropy(z, y, reduction="none") * weights).sum()


def _once(z: Tensor, y: Tensor) -> Tensor:
    return _bce(z, elmo.multi_hot(y, OUTPUTS))


def _counted(z: Tensor, y: Tensor) -> Tensor:
    return _bce(z, F.one_hot(y, OUTPUTS).sum(1).float(), reduction="sum")


def _scattered(z: Tensor, y: Tensor) -> Tensor:
    return _bce(z, torch.zeros_like(z).scatter_(1, y, 1.0), reduction="none").sum(1).mean()


def _rows_apart(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.float(), y)


def _hinge(z: Tensor, y: Tensor) -> Tensor:
    return F.multi_margin_loss(z, y)


def _tempered(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z / 0.7, y, label_smoothing=0.1)


def _focal(z: Tensor, y: Tensor) -> Tensor:
    p = torch.sigmoid(z)
    return ((1 - y) * p.square() * F.softplus(z) + y * (1 - p).square() * F.softplus(-z)).mean()


def _best(z: Tensor, y: Tensor) -> Tensor:
    """The largest logits that are not the class's, ties and all."""
    others = z.scatter(1, y[:, None], -1e4)
    return (others.topk(3, 1).values.sum(1) - z.gather(1, y[:, None])[:, 0]).relu().mean()


def _weighted(z: Tensor, y: Tensor) -> Tensor:
    weights = torch.linspace(0.5, 2.0, OUTPUTS, dtype=z.dtype)
    return F.cross_entropy(z, y, weights, reduction="sum") / 8


LOSSES: dict[str, tuple[Callable[..., Tensor], str]] = {
    "cross_entropy": (F.cross_entropy, "class"),
    "ignoring": (_ignoring, "class"),
    "each": (_each, "class"),
    "rows apart": (_rows_apart, "class"),
    "multi_hot": (_once, "labels"),
    "counted": (_counted, "labels"),
    "scattered": (_scattered, "labels"),
    "dense": (_bce, "dense"),
    "hinge": (_hinge, "class"),
    "tempered": (_tempered, "class"),
    "focal": (_focal, "dense"),
    "best": (_best, "class"),
    "weighted": (_weighted, "class"),
}


def labels_of(kind: str, rows: int, seed: int) -> Tensor:
    make = torch.Generator().manual_seed(seed)
    if kind == "class":
        return torch.randint(0, OUTPUTS, (rows,), generator=make)
    if kind == "labels":
        return torch.randint(0, OUTPUTS, (rows, 4), generator=make)
    return torch.rand(rows, OUTPUTS, generator=make)


def uneven(run: Run, rows: int) -> list[int]:
    """So many rows of each process; one has none, where there are several."""
    shares = [1 + 2 * rank for rank in range(run.world)]
    if run.world > 1:
        shares[0] = 0
    shares[-1] = rows - sum(shares[:-1])
    return shares


def losses(run: Run) -> None:
    """Loss and gradients are eager's of the whole head, with as many rows as each has."""
    for name, (loss, kind) in LOSSES.items():
        for bias in (True, False):
            torch.manual_seed(1)
            model = Outputs(loss, bias=bias)
            twin = copy.deepcopy(model).double()
            run.shard(model)
            step = compiled(model)
            for rows in (ROWS, 17):
                shares = [len(part) for part in torch.arange(rows).chunk(run.world)]
                if name in ("multi_hot", "focal", "tempered"):
                    shares = uneven(run, rows)
                inputs, _ = batch(rows, rows)
                labels = labels_of(kind, rows, rows)
                own = [t.split(shares)[run.rank] for t in (inputs, labels)]
                model.zero_grad()
                twin.zero_grad()
                found = step(*own)
                found.backward()
                parts = [t.split(shares) for t in (inputs.double(), labels)]
                wanted = [
                    twin(x, y.double() if kind == "dense" else y) for x, y in zip(*parts) if len(x)
                ]
                torch.stack(wanted).sum().div(run.world).backward()
                if shares[run.rank]:
                    mine = sum(1 for count in shares[: run.rank] if count)
                    torch.testing.assert_close(
                        found.double(), wanted[mine].double(), rtol=1e-5, atol=1e-6
                    )
                run.mean_gradients(model)
                for (key, p), q in zip(model.named_parameters(), twin.parameters()):
                    grad = whole_of(p.grad) if isinstance(p, DTensor) else p.grad
                    tell = functools.partial("{} {}: {}".format, name, key)
                    torch.testing.assert_close(
                        grad.double(), q.grad, rtol=2e-5, atol=2e-6, msg=tell
                    )
            assert elmo.last_report().matches, name


def _end_alike(run: Run, make: Callable[[], Any], dtype: Any) -> None:
    """Some steps of a model's head stored in `dtype`, updated in each way, end where those of one
    process do."""
    ways: list[dict[str, Any]] = [
        {"momentum": 0.9},
        {"update_at": "step", "max_norm": 0.05},
        {"fused": False},
    ]
    for hyper in ways:
        models = [make(), make()]
        if dtype is not None:
            models = [elmo.convert_head(model, dtype) for model in models]
        run.shard(models[0])
        opts = [elmo.optim.SGD(m.parameters(), 0.5, rounding="nearest", **hyper) for m in models]
        batches = [batch(seed, ROWS) for seed in range(3)]
        found = train(run, models[0], opts[0], batches)
        wanted = train(None, models[1], opts[1], batches)
        assert elmo.is_fused(models[0].head.weight) is ("fused" not in hyper)
        assert found == pytest.approx(wanted, rel=2e-3)
        tight = dtype is None
        same(*models, rtol=1e-4 if tight else 0.0, atol=2e-6 if tight else 0.07)


def training(run: Run) -> None:
    """Losses with kernels of their own."""
    for kind in ("ce", "bce"):
        for dtype in (None, BF16, FP8):
            _end_alike(run, functools.partial(net, kind, seed=3), dtype)


def programs(run: Run) -> None:
    """Losses without."""
    for loss in (_hinge, _tempered):
        for dtype in (None, FP8):
            _end_alike(run, functools.partial(_outputs, loss), dtype)


def _outputs(loss: Callable[..., Tensor]) -> Outputs:
    torch.manual_seed(4)
    return Outputs(loss)


def accumulated(run: Run) -> None:
    """Micro-batches, stashed, and a penalty, then one step; and a step that is skipped."""
    for loss in (F.cross_entropy, _hinge):
        model, twin = models = [_outputs(loss), _outputs(loss)]
        run.shard(model)
        hyper: dict[str, Any] = {"update_at": "step", "accumulate": "stash", "nonfinite": "skip"}
        hyper["max_norm"] = 0.05
        opts = [elmo.optim.SGD(m.parameters(), 0.5, **hyper) for m in models]
        step = compiled(model)
        other = torch.compile(twin, backend="elmo", options=EAGER)
        for rows in (batch(0, ROWS), batch(1, ROWS)):
            (step(*run.own(rows)) / 2).backward()
            (other(*rows) / 2).backward()
        run.mean_gradients(model)
        (model.head.weight.square().sum() * 0.01).full_tensor().backward()
        (twin.head.weight.square().sum() * 0.01).backward()
        for opt in opts:
            opt.step()
        same(model, twin, rtol=1e-5, atol=1e-6)
        before = whole_of(model.head.weight).clone()
        opts[0].zero_grad()
        scale = float("inf") if run.rank == run.world - 1 else 1.0
        (step(*run.own(batch(2, ROWS))) * scale).backward()
        run.mean_gradients(model)
        opts[0].step()
        assert opts[0].skipped_steps == 1
        assert torch.equal(whole_of(model.head.weight), before)


def unread(run: Run) -> None:
    """A binary loss may be left to the backward; else it is computed by all in the forward."""
    model, twin = net("bce"), net("bce")
    run.shard(model)
    opts = [elmo.optim.SGD(m.parameters(), 0.5) for m in (model, twin)]
    step = compiled(model, {**EAGER, "loss_value": "deferred"})
    for seed in range(2):
        rows = batch(seed, ROWS)
        opts[0].zero_grad()
        loss = step(*run.own(rows))
        assert bool(loss.isnan())
        loss.backward()
        run.mean_gradients(model)
        opts[0].step()
        (wanted,) = train(None, twin, opts[1], [rows])
        assert float(run.mean(loss)) == pytest.approx(wanted, rel=1e-5)
    same(model, twin, rtol=1e-5, atol=1e-6)
    again = compiled(model)
    if run.rank == 0:  # alone: explaining is no collective
        assert elmo.explain(model, *run.own(rows), options=EAGER).matches
    assert not bool(again(*run.own(rows)).isnan())


def left_alone(run: Run) -> None:
    """A head with a loss of no kernels of its own, or whose weight the graph reads, works as it is
    and says why."""

    def ranked(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z.sort(1).values, y)

    class Penalized(Net):
        def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
            penalty = self.head.weight.square().mean()
            whole = penalty.full_tensor() if isinstance(penalty, DTensor) else penalty
            return super().forward(inputs, labels) + 0.1 * whole

    rows = batch(0, ROWS)
    for make, reason in ((lambda: Outputs(ranked), "sort"), (Penalized, "reads the weight")):
        torch.manual_seed(0)
        model: Any = make()
        twin = copy.deepcopy(model)
        run.shard(model)
        loss = compiled(model)(*run.own(rows))
        refusals = elmo.last_report().refusals
        assert any(reason in refusal.reason for refusal in refusals), refusals
        loss.backward()
        run.mean_gradients(model)
        twin(*rows).backward()
        grad = whole_of(model.head.weight.grad)
        torch.testing.assert_close(grad, twin.head.weight.grad, rtol=1e-5, atol=1e-6)


CASES = (bits, losses, training, programs, accumulated, unread, left_alone)
