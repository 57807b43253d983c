"""Cases of label_ranks.py about heads in models: wrappers, memory, checkpoints, bad input."""

from __future__ import annotations

import copy
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from label_run import BF16, FP8, ROWS, Run, same, train
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from training import (
    EAGER,
    LABELS,
    Net,
    batch,
    compiled,
    net,
)

import elmo_compile as elmo
from elmo_compile.backend import elmo_backend
from elmo_compile.errors import ElmoError, FusedUpdateError, InputError, OptionError
from elmo_compile.heads.sharded import ShardedLinear, whole_of
from elmo_compile.testing.memory import PeakBytes

# Around a model


def wrapped(run: Run) -> None:
    """In DistributedDataParallel, compiled outside or inside, the update in backward()."""
    for outside in (True, False):
        model, twin = net("bce", seed=run.rank if outside else 0), net("bce")
        run.shard(model)
        opt = elmo.optim.SGD(model.parameters(), 0.5, momentum=0.9)
        other = elmo.optim.SGD(twin.parameters(), 0.5, momentum=0.9)
        torch._dynamo.reset()
        graphs = []

        def counted(gm: Any, inputs: Any, graphs: list[Any] = graphs) -> Any:
            graphs.append(gm)
            return elmo_backend(gm, inputs, options=EAGER)

        if outside:
            # So small buckets let Dynamo divide the graph wherever a parameter is read.
            torch.distributed._DEFAULT_FIRST_BUCKET_BYTES = 1
            wrapper = DistributedDataParallel(model, bucket_cap_mb=1e-5)
            step = torch.compile(wrapper, backend=counted)
        else:
            step = DistributedDataParallel(torch.compile(model, backend="elmo", options=EAGER))
        for seed in range(2):
            opt.zero_grad()
            step(*run.own(batch(seed, ROWS))).backward()
            opt.step()
        assert len(graphs) > 1 or not outside
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


class _Margin(Net):
    """A loss without kernels of its own."""

    def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        return F.multi_margin_loss(self.head(torch.tanh(self.encoder(inputs))), labels)


def _margin() -> Net:
    torch.manual_seed(0)
    return _Margin()


def refused(run: Run) -> None:
    """Bad input of one process is an error of all before anything changes, and may be mended."""
    last = run.world - 1
    hypers: list[dict[str, Any]] = [{}, {"update_at": "step"}, {"fused": False}]
    for make, hyper in [(make, hyper) for make in (net, _margin) for hyper in hypers]:
        model: Any = make()
        run.shard(model)
        opt = elmo.optim.SGD(model.parameters(), 0.5, **hyper)
        step = compiled(model)
        before = whole_of(model.head.weight).clone()
        inputs, labels = run.own(batch(0, ROWS))
        wrong = labels.clone()
        wrong[0] = LABELS if run.rank == last else 0
        told = rf"(label.*|index) {LABELS}" if run.rank == last else f"refused in process {last}"
        with pytest.raises((InputError, IndexError), match=told):
            step(inputs, wrong)
        bad = inputs.clone()
        bad[0, 0] = float("nan") if run.rank == last else 0.0
        opt.zero_grad()
        if "fused" not in hyper:
            with pytest.raises(InputError, match=r"features|refused in process"):
                _whole_step(step, opt, bad, labels)
        assert torch.equal(whole_of(model.head.weight), before)
        opt.zero_grad()
        step(inputs, labels).backward()
        opt.step()
        assert not torch.equal(whole_of(model.head.weight), before)
    if run.world > 1:
        with pytest.raises(InputError, match="must be the same"):
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


def collected(run: Run) -> None:
    """torch.distributed.checkpoint saves and loads model and optimizer, whole and in parts."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_state_dict,
        set_state_dict,
    )

    def fresh(seed: int, dtype: torch.dtype) -> tuple[Any, Any]:
        model = elmo.convert_head(net("ce", seed=seed), dtype)
        run.shard(model)
        return model, elmo.optim.AdamW(model.parameters(), 0.01)

    batches = [batch(seed, ROWS) for seed in range(4)]
    for dtype in (BF16, FP8):
        model, opt = fresh(0, dtype)
        train(run, model, opt, batches[:2])
        if dtype == BF16:  # gloo and NCCL send no fp8
            whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
            assert tuple(whole["head.weight"].shape) == (LABELS, 8)
        folder = run.folder / f"dcp{dtype}"
        dcp.save(dict(zip(("model", "opt"), get_state_dict(model, opt))), checkpoint_id=folder)
        train(run, model, opt, batches[2:])
        again, other = fresh(5, dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*no head's update was fused")
            parts = dict(zip(("model", "opt"), get_state_dict(again, other)))
        dcp.load(parts, checkpoint_id=folder)
        set_state_dict(again, other, model_state_dict=parts["model"], optim_state_dict=parts["opt"])
        train(run, again, other, batches[2:])
        same(again, elmo.distributed.unshard_head(copy.deepcopy(model)))


def fully_sharded(run: Run) -> None:
    """FSDP2 around it, which leaves the head alone; torch's own optimizer on the rest, or all."""
    from torch.distributed.fsdp import fully_shard

    for rule in (elmo.optim.SGD, torch.optim.SGD):
        model, twin = net("ce"), net("ce")
        run.shard(model)
        fully_shard(model, mesh=run.mesh, ignored_params=set(model.head.parameters()))
        opt = rule(model.parameters(), 0.5)
        other = torch.optim.SGD(twin.parameters(), 0.5)
        step = compiled(model)
        for seed in range(2):
            rows = batch(seed, ROWS)
            opt.zero_grad()
            other.zero_grad()
            step(*run.own(rows)).backward()
            twin(*rows).backward()
            if rule is torch.optim.SGD:
                norms = [
                    torch.nn.utils.clip_grad_norm_(m.parameters(), 0.05) for m in (model, twin)
                ]
                found = norms[0].full_tensor() if isinstance(norms[0], DTensor) else norms[0]
                torch.testing.assert_close(found, norms[1])
            opt.step()
            other.step()
        assert elmo.is_fused(model.head.weight) is (rule is elmo.optim.SGD)
        for (name, param), q in zip(model.named_parameters(), twin.parameters()):
            torch.testing.assert_close(
                param.full_tensor(), q.detach(), rtol=1e-5, atol=1e-6, msg=lambda m, n=name: n + m
            )


CASES = (wrapped, collected, fully_sharded, other_backends, top, memory, saved, placed, refused)
