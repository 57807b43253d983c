"""Cases of label_ranks.py in which processes do not do the same, or do what they should not."""

from __future__ import annotations

import copy
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
from torch.nn.parallel import DistributedDataParallel
from training import EAGER, LABELS, Net, batch, compiled, net

import elmo_compile as elmo
from elmo_compile.errors import ElmoError, FusedUpdateError, InputError, OptionError
from elmo_compile.heads.sharded import whole_of
from elmo_compile.ops.owners import owner_of

SECOND: dict[str, Any] = {"update_at": "step"}


def whole_state(run: Run) -> None:
    """Optimizer state of a whole head is taken by rows, and that of shards as a whole."""
    for name, hyper in (("SGD", {"momentum": 0.9}), ("AdamW", {}), ("Adagrad", {})):
        for how in ({}, SECOND, {"fused": False}):
            rule: Any = getattr(elmo.optim, name)
            model, twin = net("ce", seed=5), net("ce", seed=2)
            run.shard(model)
            opts = [rule(m.parameters(), 0.05, **hyper, **how) for m in (model, twin)]
            batches = [batch(seed, ROWS) for seed in range(4)]
            train(None, twin, opts[1], batches[:2])
            model.load_state_dict(twin.state_dict())
            opts[0].load_state_dict(copy.deepcopy(opts[1].state_dict()))
            train(run, model, opts[0], batches[2:])
            train(None, twin, opts[1], batches[2:])
            same(model, twin, rtol=1e-4, atol=1e-5)
            back = elmo.distributed.unshard_head(copy.deepcopy(model))
            third = rule(back.parameters(), 0.05, **hyper, **how)
            third.load_state_dict(opts[0].state_dict())
            train(None, back, third, batches[:1])
            train(None, twin, opts[1], batches[:1])
            same(back, twin, rtol=1e-4, atol=1e-5)


def changed(run: Run) -> None:
    """A weight that is written between forward and backward gives no gradient."""
    rows = run.own(batch(0, ROWS))
    for dtype in (torch.float32, BF16):
        for how in ("eager", "elmo"):
            model = net("ce")
            if dtype != torch.float32:
                elmo.convert_head(model, dtype)
            run.shard(model)
            step = model if how == "eager" else compiled(model)
            loss = step(*rows)
            with torch.no_grad():
                model.head.weight.mul_(3.0)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


def unlike(run: Run) -> None:
    """What differs between processes is an error in all of them, and none waits."""
    last, rows = run.world - 1, run.own(batch(0, ROWS))
    here = run.rank == last
    with pytest.raises((OptionError, InputError), match=r"haed|refused in process"):
        run.shard(net("ce"), name="haed" if here else "head")
    if run.world == 1:
        return
    for hyper in ({}, {"fused": False}):
        model = net("ce")
        run.shard(model)
        elmo_opt = elmo.optim.SGD(model.parameters(), 0.5, **hyper)
        step = compiled(model)
        model.encoder.requires_grad_(not here)
        with pytest.raises(InputError, match="must be the same"):
            step(*rows).backward()
        model.encoder.requires_grad_(True)
        elmo_opt.zero_grad()
        step(*rows).backward()
        elmo_opt.step()
    for hyper, spoil in STEPS:
        model = net("ce")
        run.shard(model)
        opt = elmo.optim.SGD(model.parameters(), 0.5, **hyper)
        step = compiled(model)
        step(*rows).backward()
        before = whole_of(model.head.weight).clone()
        if here:
            spoil(model, opt)
        with pytest.raises(FusedUpdateError):
            opt.step()
        assert torch.equal(whole_of(model.head.weight), before)
    model = net("ce")
    run.shard(model)
    opt = elmo.optim.SGD(model.parameters(), 0.5)
    step = compiled(model)
    step(*rows).backward()
    opt.step()
    owner = owner_of(model.head.weight)
    assert owner is not None
    owner.inconsistent = here
    with pytest.raises(ElmoError, match=r"inconsistent|refused in process"):
        step(*rows)
    owner.inconsistent = False
    loss = step(*rows)
    del owner
    if here:
        del opt  # and with it who would make the update
    with pytest.raises(ElmoError, match=r"deleted|refused in process"):
        loss.backward()
    with pytest.raises(ElmoError, match=r"owns|refused in process"):
        elmo.distributed.unshard_head(model)


def _write(model: Any, opt: Any) -> None:
    with torch.no_grad():
        model.head.weight.mul_(1.0)


def _another_rate(model: Any, opt: Any) -> None:
    opt.param_groups[0]["lr"] = 0.25


def _gradient(model: Any, opt: Any) -> None:
    model.head.weight.grad = torch.ones_like(model.head.weight)


STEPS: list[tuple[dict[str, Any], Callable[[Any, Any], None]]] = [
    (SECOND, _write),
    ({**SECOND, "max_norm": 1.0}, _write),
    ({}, _another_rate),
    ({}, _gradient),
    (SECOND, _gradient),
]


def loops(run: Run) -> None:
    """GradScaler, zeroed gradients, inference mode, a penalty beside the loss."""
    for hyper in (SECOND, {"fused": False}):
        model, twin = net("ce"), net("ce")
        run.shard(model)
        opts = [elmo.optim.SGD(m.parameters(), 0.5, **hyper) for m in (model, twin)]
        scalers = [torch.amp.GradScaler("cpu", init_scale=16.0) for _ in opts]
        steps: list[Any] = [compiled(model)]
        steps.append(torch.compile(twin, backend="elmo", options=EAGER))
        for seed in range(3):
            rows = batch(seed, ROWS)
            for m, opt, scaler, step in zip((model, twin), opts, scalers, steps):
                given = run.own(rows) if m is model else rows
                scaler.scale(step(*given)).backward()
                if m is model:
                    run.mean_gradients(model)
                penalty = m.head.weight.sum() * 0.01
                whole = penalty.full_tensor() if isinstance(penalty, DTensor) else penalty
                scaler.scale(whole).backward()
                scaler.unscale_(opt)
                scaler.step(opt)
                scaler.update()
                opt.zero_grad(set_to_none=False)
        same(model, twin, rtol=1e-5, atol=1e-6)
    with torch.inference_mode():
        x = torch.zeros(2, 8)
        assert model.head(x).shape == (2, LABELS)
        assert elmo.topk(x, model.head.weight, 3, bias=model.head.bias).indices.shape == (2, 3)
        assert steps[0](*run.own(batch(0, ROWS))).isfinite()


def assigned(run: Run) -> None:
    """Parameters put in place of others are a sharded head's, and hold no more than their rows."""
    model, other = net("ce"), net("ce", seed=3)
    run.shard(model)
    model.load_state_dict(other.state_dict(), assign=True)
    local = model.head.weight.to_local()
    assert local.untyped_storage().nbytes() == local.numel() * 4
    opt = elmo.optim.SGD(model.parameters(), 0.5)
    train(run, model, opt, [batch(0, ROWS)])
    assert elmo.is_fused(model.head.weight)


def copied(run: Run) -> None:
    """A copy of a converted head has a float32 gradient too; the original keeps its own."""
    for dtype in (BF16, FP8):
        model = elmo.convert_head(net("ce"), dtype)
        run.shard(model)
        step = compiled(model)
        step(*run.own(batch(0, ROWS))).backward()
        held = model.head.weight.grad
        twin = copy.deepcopy(model)
        assert model.head.weight.grad is held
        assert twin.head.weight.grad is None
        compiled(twin)(*run.own(batch(0, ROWS))).backward()
        assert twin.head.weight.grad.dtype == torch.float32
        assert torch.equal(twin.head.weight.grad.to_local(), held.to_local())


def planned_apart(run: Run) -> None:
    """A loss that a process with no rows plans otherwise is an error in all, and none waits."""

    class Weighted(Net):
        def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
            z = self.head(torch.tanh(self.encoder(inputs)))
            weights = torch.linspace(0.5, 2.0, LABELS)
            return F.cross_entropy(z, labels, weights, label_smoothing=0.1, reduction="sum") / 12

    model = Weighted()
    run.shard(model)
    step = compiled(model)
    inputs, labels = run.own(batch(0, ROWS))
    if run.world > 1:
        few = 0 if run.rank == 0 else len(inputs)
        with pytest.raises(InputError, match="less than two rows"):
            step(inputs[:few], labels[:few]).backward()
        model.zero_grad()
    step(inputs, labels).backward()
    assert model.head.weight.grad is not None


def kept(run: Run) -> None:
    """What the user has of a head is not written to; what cannot be is refused."""
    model = net("ce", seed=run.rank)
    held = model.state_dict()
    before = {name: value.clone() for name, value in held.items()}
    run.shard(model)
    for name, value in held.items():
        assert torch.equal(value, before[name]), name
    with pytest.raises(ElmoError, match="sharded; shard_head keeps"):
        elmo.distributed.ignore_heads(model)
    with pytest.raises(InputError, match="both whole, or both DTensors"):
        elmo.topk(torch.zeros(1, 8), before["head.weight"], 2, bias=model.head.bias)
    wrapped = DistributedDataParallel(net("ce"))
    with pytest.raises(OptionError, match="DistributedDataParallel already"):
        run.shard(wrapped)
    tied = nn.Sequential(nn.Linear(4, LABELS), nn.Linear(4, LABELS - 1))
    tied[1].bias = tied[0].bias
    with pytest.raises(ElmoError, match="bias of 0 is tied"):
        run.shard(tied, name="0")
    head: Any = run.shard(nn.Linear(8, LABELS))
    alone = DistributedDataParallel(nn.Sequential(nn.Linear(5, 8)))
    logits: Tensor = head(alone(torch.zeros(2, 5)))
    assert logits.shape == (2, LABELS)


CASES = (whole_state, changed, unlike, loops, assigned, copied, planned_apart, kept)
