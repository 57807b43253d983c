"""One process of a run with a sharded head: what it does is what one process with all rows does.

python label_ranks.py RANK WORLD FOLDER CASE+CASE+...
"""

from __future__ import annotations

import copy
import datetime
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from training import (
    EAGER,
    LABELS,
    Net,
    Saturated,
    batch,
    compiled,
    integers,
    net,
)

import elmo_compile as elmo
from elmo_compile.backend import elmo_backend
from elmo_compile.errors import ElmoError, FusedUpdateError, InputError, OptionError
from elmo_compile.heads.sharded import ShardedLinear, whole_of
from elmo_compile.testing.memory import PeakBytes

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
ROWS = 12
"""Of all processes."""

Make = Callable[[], nn.Module]
Batch = tuple[Tensor, ...]


class Run:
    """The processes of a run, and this one's place."""

    def __init__(self, rank: int, world: int, folder: Path) -> None:
        self.rank, self.world, self.folder = rank, world, folder
        self.mesh = init_device_mesh("cpu", (world,))

    def shard(self, model: Any, **given: Any) -> Any:
        return elmo.distributed.shard_head(model, self.mesh, **given)

    def own(self, rows: Batch) -> Batch:
        """This process's share of a batch of all rows."""
        count = len(rows[0])
        mine = slice(self.rank * count // self.world, (self.rank + 1) * count // self.world)
        return tuple(t[mine] for t in rows)

    def mean_gradients(self, module: nn.Module) -> None:
        """What DistributedDataParallel would do."""
        for param in module.parameters():
            if not isinstance(param, DTensor) and param.grad is not None:
                dist.all_reduce(param.grad)
                param.grad /= self.world

    def mean(self, t: Tensor) -> Tensor:
        total = t.detach().clone()
        dist.all_reduce(total)
        return total / self.world


def train(
    run: Run | None, model: nn.Module, opt: Any, batches: list[Batch], options: Any = None
) -> list[float]:
    """Steps; the losses of all rows. Without a run, of one process."""
    step, losses = compiled(model, options), []
    for rows in batches:
        opt.zero_grad()
        loss = step(*(rows if run is None else run.own(rows)))
        loss.backward()
        if run is not None:
            run.mean_gradients(model)
        opt.step()
        losses.append(float(loss.detach() if run is None else run.mean(loss)))
    return losses


def same(model: nn.Module, twin: nn.Module, **tolerance: float) -> None:
    """Every parameter of a model, all rows of its head, is its twin's."""
    wanted = dict(twin.named_parameters())
    for name, param in model.named_parameters():
        found = whole_of(param) if isinstance(param, DTensor) else param.detach()
        if not tolerance:
            assert found.dtype == wanted[name].dtype
            assert torch.equal(found.float(), wanted[name].detach().float()), name
            continue
        torch.testing.assert_close(
            found.float(), wanted[name].detach().float(), **tolerance, msg=lambda m, n=name: n + m
        )


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


class Outputs(Net):
    """A Net with any loss of its logits."""

    def __init__(self, loss: Callable[..., Tensor], *, bias: bool = True) -> None:
        super().__init__(bias=bias)
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
    return _bce(z, elmo.multi_hot(y, LABELS))


def _counted(z: Tensor, y: Tensor) -> Tensor:
    return _bce(z, F.one_hot(y, LABELS).sum(1).float(), reduction="sum")


def _scattered(z: Tensor, y: Tensor) -> Tensor:
    return _bce(z, torch.zeros_like(z).scatter_(1, y, 1.0), reduction="none").sum(1).mean()


def _rows_apart(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.float(), y)


LOSSES: dict[str, tuple[Callable[..., Tensor], str]] = {
    "cross_entropy": (F.cross_entropy, "class"),
    "ignoring": (_ignoring, "class"),
    "each": (_each, "class"),
    "rows apart": (_rows_apart, "class"),
    "multi_hot": (_once, "labels"),
    "counted": (_counted, "labels"),
    "scattered": (_scattered, "labels"),
    "dense": (_bce, "dense"),
}


def labels_of(kind: str, rows: int, seed: int) -> Tensor:
    make = torch.Generator().manual_seed(seed)
    if kind == "class":
        return torch.randint(0, LABELS, (rows,), generator=make)
    if kind == "labels":
        return torch.randint(0, LABELS, (rows, 4), generator=make)
    return torch.rand(rows, LABELS, generator=make)


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
                if name == "multi_hot":
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


def training(run: Run) -> None:
    """Some steps on real data, fused in every way, end where those of one process do."""
    for kind in ("ce", "bce"):
        for dtype in (None, BF16, FP8):
            for hyper in (
                {"momentum": 0.9},
                {"update_at": "step", "max_norm": 0.05},
                {"fused": False},
            ):
                models = [net(kind, seed=3) for _ in range(2)]
                for model in models:
                    if dtype is not None:
                        elmo.convert_head(model, dtype)
                run.shard(models[0])
                opts = [
                    elmo.optim.SGD(m.parameters(), 0.5, rounding="nearest", **hyper) for m in models
                ]
                batches = [batch(seed, ROWS) for seed in range(3)]
                found = train(run, models[0], opts[0], batches)
                wanted = train(None, models[1], opts[1], batches)
                assert found == pytest.approx(wanted, rel=2e-3)
                tight = dtype is None
                same(*models, rtol=1e-4 if tight else 0.0, atol=2e-6 if tight else 0.07)


def accumulated(run: Run) -> None:
    """Micro-batches, stashed, then one step; and a GradScaler whose step is skipped."""
    model, twin = net("ce"), net("ce")
    run.shard(model)
    hyper: dict[str, Any] = {"update_at": "step", "accumulate": "stash", "nonfinite": "skip"}
    opts = [elmo.optim.SGD(m.parameters(), 0.5, **hyper) for m in (model, twin)]
    steps = [compiled(model), None]
    steps[1] = torch.compile(twin, backend="elmo", options=EAGER)
    for rows in (batch(0, ROWS), batch(1, ROWS)):
        (steps[0](*run.own(rows)) / 2).backward()
        (steps[1](*rows) / 2).backward()
    run.mean_gradients(model)
    for opt in opts:
        opt.step()
    same(model, twin, rtol=1e-5, atol=1e-6)
    before = whole_of(model.head.weight).clone()
    opts[0].zero_grad()
    scale = float("inf") if run.rank == run.world - 1 else 1.0
    (steps[0](*run.own(batch(2, ROWS))) * scale).backward()
    run.mean_gradients(model)
    opts[0].step()
    assert opts[0].skipped_steps == 1
    assert torch.equal(whole_of(model.head.weight), before)


# Around a model


def wrapped(run: Run) -> None:
    """In DistributedDataParallel, compiled outside or inside, the update in backward()."""
    for outside in (True, False):
        model, twin = net("bce", seed=run.rank if outside else 0), net("bce")
        run.shard(model)
        opt = elmo.optim.SGD(model.parameters(), 0.5, momentum=0.9)
        other = elmo.optim.SGD(twin.parameters(), 0.5, momentum=0.9)
        torch._dynamo.reset()
        if outside:
            step = torch.compile(DistributedDataParallel(model), backend="elmo", options=EAGER)
        else:
            step = DistributedDataParallel(torch.compile(model, backend="elmo", options=EAGER))
        for seed in range(2):
            opt.zero_grad()
            step(*run.own(batch(seed, ROWS))).backward()
            opt.step()
        assert elmo.is_fused(model.head.weight)
        train(None, twin, other, [batch(seed, ROWS) for seed in range(2)])
        same(model, twin, rtol=1e-5, atol=1e-6)


def other_backends(run: Run) -> None:
    """Eagerly, by Inductor, inside a checkpoint, under autocast: the same gradients."""
    rows = batch(0, ROWS)
    for how in ("eager", "aot_eager", "inductor", "elmo with inductor", "checkpoint", "autocast"):
        model, twin = net("ce"), net("ce")
        run.shard(model)
        torch._dynamo.reset()
        step: Any = model
        if how in ("aot_eager", "inductor"):
            step = torch.compile(model, backend=how)
        elif how == "elmo with inductor":
            step = torch.compile(model, backend="elmo", options={"min_outputs": 32})
        elif how == "autocast":
            step = torch.compile(model, backend="elmo", options=EAGER)
        elif how == "checkpoint":

            def run_again(*given: Tensor, model: Any = model) -> Any:
                return torch.utils.checkpoint.checkpoint(model, *given, use_reentrant=False)

            step = torch.compile(run_again, backend="elmo", options=EAGER)
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            loss = step(*run.own(rows))
        loss.backward()
        run.mean_gradients(model)
        twin(*rows).backward()
        tolerance = 2e-2 if how == "autocast" else 1e-5
        for p, q in zip(model.parameters(), twin.parameters()):
            grad = whole_of(p.grad) if isinstance(p, DTensor) else p.grad
            assert p.grad.dtype == torch.float32
            torch.testing.assert_close(grad, q.grad, rtol=tolerance, atol=tolerance)


def top(run: Run) -> None:
    """The largest logits of all outputs for each process's rows."""
    make = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, BF16, FP8):
        head = nn.Linear(8, LABELS)
        with torch.no_grad():
            head.weight.copy_(torch.randint(-2, 3, head.weight.shape, generator=make))
            head.bias.copy_(torch.randint(-1, 2, head.bias.shape, generator=make))
        model = nn.Sequential(head)
        if dtype != torch.float32:
            elmo.convert_head(model, dtype, rounding="nearest")
        x = torch.randint(-3, 4, (9, 8), generator=make).float()
        wanted = elmo.topk(x, model[0].weight, 20, bias=model[0].bias)
        run.shard(model)
        own = x.chunk(run.world)[run.rank] if run.rank < len(x.chunk(run.world)) else x[:0]
        found = elmo.topk(own, model[0].weight, 20, bias=model[0].bias)
        first = sum(len(part) for part in x.chunk(run.world)[: run.rank])
        mine = slice(first, first + len(own))
        assert torch.equal(found.values, wanted.values[mine])
        assert torch.equal(found.indices, wanted.indices[mine])
    with pytest.raises(OptionError if run.rank == 0 else ElmoError, match=r"k=0|process 0"):
        elmo.topk(own, model[0].weight, 0 if run.rank == 0 else 5, bias=model[0].bias)


def memory(run: Run) -> None:
    """A step holds neither logits nor a weight gradient, of its own outputs either."""
    features, labels, rows = 16, 1 << 16, 64
    own = labels // run.world
    for update_at in ("backward", "step"):
        head = run.shard(nn.Linear(features, labels))
        opt = elmo.optim.SGD(head.parameters(), 0.1, update_at=update_at)
        mode = PeakBytes()

        def counted(gm: Any, inputs: Any, mode: PeakBytes = mode) -> Any:
            """Dynamo runs no compiled code under a dispatch mode: it is entered inside."""
            compiled_graph = elmo_backend(
                gm, inputs, options={"lower": "eager", "chunk_size": 1024}
            )

            def run_counted(*given: Any) -> Any:
                with mode:
                    return compiled_graph(*given)

            return run_counted

        def loss_of(x: Tensor, y: Tensor, head: Any = head) -> Tensor:
            return F.cross_entropy(head(x), y)

        torch._dynamo.reset()
        step = torch.compile(loss_of, backend=counted, fullgraph=True)
        x, y = torch.randn(rows // run.world, features), torch.arange(rows // run.world)
        for _ in range(2):
            loss = step(x, y)
            with mode:
                loss.backward()
                opt.step()
            opt.zero_grad()
        assert elmo.is_fused(head.weight)
        assert 0 < mode.peak < rows * own * 4 / 2
        match = elmo.last_report().matches[0]
        assert match.num_outputs == labels
        assert any(f"this one has {own}" in note for note in match.notes)


# Weights that come and go


def saved(run: Run) -> None:
    """A checkpoint in the middle, of model and optimizer, continues bit for bit."""
    batches = [batch(seed, ROWS) for seed in range(4)]

    def fresh() -> tuple[Any, Any]:
        model = elmo.convert_head(net("ce", seed=run.rank), BF16)
        run.shard(model)
        return model, elmo.optim.AdamW(model.parameters(), 0.01)

    model, opt = fresh()
    train(run, model, opt, batches[:2])
    path = run.folder / f"saved{run.rank}.pt"
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, path)
    train(run, model, opt, batches[2:])
    again, other = fresh()
    kept = torch.load(path, weights_only=False)
    again.load_state_dict(kept["model"])
    other.load_state_dict(kept["opt"])
    train(run, again, other, batches[2:])
    same(again, elmo.distributed.unshard_head(copy.deepcopy(model)))


def placed(run: Run) -> None:
    """Values are process 0's; they come back whole, are loaded whole, copied, cast, moved."""
    model, first = net("ce", seed=run.rank), net("ce", seed=0)
    run.shard(model)
    assert isinstance(model.head, ShardedLinear)
    assert isinstance(model.head.weight, DTensor)
    assert tuple(model.head.weight.shape) == (LABELS, 8)
    assert torch.equal(model.head.weight.full_tensor(), first.head.weight)
    twin = copy.deepcopy(model)
    assert torch.equal(whole_of(twin.head.weight), first.head.weight)
    twin.to("cpu").double()
    assert twin.head.weight.dtype == torch.float64
    twin.float()
    other = net("ce", seed=7)
    twin.load_state_dict(other.state_dict())
    assert torch.equal(whole_of(twin.head.bias), other.head.bias)
    back = elmo.distributed.unshard_head(twin)
    assert type(back.head) is nn.Linear
    assert torch.equal(back.head.weight, other.head.weight)
    for dtype in (BF16, FP8):
        narrow = elmo.convert_head(net("ce"), dtype)
        raw = narrow.head.weight.detach().clone()
        run.shard(narrow)
        narrow.half()
        assert narrow.head.weight.dtype == dtype
        narrow.load_state_dict({**narrow.state_dict(), "head.weight": raw.float() * 2})
        elmo.distributed.unshard_head(narrow)
        assert narrow.head.storage_dtype == dtype
        assert torch.equal(narrow.head.weight.float(), raw.float() * 2)
    with torch.device("meta"):
        empty = nn.Linear(8, LABELS)
    empty = run.shard(empty)
    assert empty.weight.is_meta
    empty.to_empty(device="cpu")
    empty.load_state_dict(other.head.state_dict())
    assert torch.equal(whole_of(empty.weight), other.head.weight)


def _whole_step(step: Any, opt: Any, *rows: Tensor) -> None:
    step(*rows).backward()
    opt.step()


def refused(run: Run) -> None:
    """Bad input of one process is an error of all before anything changes, and may be mended."""
    last = run.world - 1
    for hyper in ({}, {"update_at": "step"}, {"fused": False}):
        model = net("ce")
        run.shard(model)
        opt = elmo.optim.SGD(model.parameters(), 0.5, **hyper)
        step = compiled(model)
        before = whole_of(model.head.weight).clone()
        inputs, labels = run.own(batch(0, ROWS))
        wrong = labels.clone()
        wrong[0] = LABELS if run.rank == last else 0
        told = f"label {LABELS}" if run.rank == last else f"refused in process {last}"
        with pytest.raises(InputError, match=told):
            step(inputs, wrong)
        bad = inputs.clone()
        bad[0, 0] = float("nan") if run.rank == last else 0.0
        opt.zero_grad()
        if "fused" not in hyper:
            with pytest.raises(InputError, match="features"):
                _whole_step(step, opt, bad, labels)
        assert torch.equal(whole_of(model.head.weight), before)
        opt.zero_grad()
        step(inputs, labels).backward()
        opt.step()
        assert not torch.equal(whole_of(model.head.weight), before)
    if run.world > 1:
        with pytest.raises(InputError, match="the same loss"):
            model.head(torch.zeros(2, 8, dtype=torch.float64 if run.rank else torch.float32))
    model = net("ce")
    for message, given in (
        ("one dimension", {"mesh": "cpu"}),
        ("no nn.Linear is called", {"mesh": run.mesh, "name": "body"}),
        ("leave one without", {"mesh": run.mesh, "name": "few"}),
    ):
        model.few = nn.Linear(8, run.world - 1) if run.world > 1 else nn.Linear(8, 0)
        with pytest.raises(OptionError, match=message):
            elmo.distributed.shard_head(model, **given)
    elmo.optim.SGD(model.parameters(), 0.1)
    run.shard(model)
    with pytest.raises(ElmoError, match="ShardedLinear"):
        run.shard(model)
    opt = elmo.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ElmoError, match="owns"):
        elmo.distributed.unshard_head(model)
    with pytest.raises(ElmoError, match="owns"):
        model.head.double()
    step = compiled(model)
    loss = step(*run.own(batch(0, ROWS)))
    with pytest.raises(FusedUpdateError):
        torch.autograd.grad(loss, [model.head.weight])
    dist.barrier()


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

    def hinge(z: Tensor, y: Tensor) -> Tensor:
        return F.multi_margin_loss(z, y)

    class Penalized(Net):
        def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
            penalty = self.head.weight.square().mean()
            whole = penalty.full_tensor() if isinstance(penalty, DTensor) else penalty
            return super().forward(inputs, labels) + 0.1 * whole

    rows = batch(0, ROWS)
    for make, reason in ((lambda: Outputs(hinge), "sharded head"), (Penalized, "reads the weight")):
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


CASES: dict[str, Callable[[Run], None]] = {
    case.__name__: case
    for case in (
        bits, losses, training, accumulated, wrapped, other_backends, top, memory, saved, placed,
        refused, unread, left_alone,
    )
}  # fmt: skip


def main(rank: int, world: int, folder: str, cases: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    run = Run(rank, world, Path(folder))
    for case in cases.split("+"):
        CASES[case](run)
        print(f"{case}: as one process", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
