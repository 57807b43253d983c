"""One of two processes that do not do the same in a step.

python uneven_ranks.py RANK WORLD FOLDER CASE
"""

from __future__ import annotations

import copy
import datetime
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torch.nn.parallel import DistributedDataParallel
from training import EAGER, LABELS, Net, assert_same, batch, net

import elmo_compile as elmo
from elmo_compile.errors import FusedUpdateError


class Dense(Net):
    """Binary cross entropy of dense targets."""

    def forward(self, inputs: Tensor, y: Tensor) -> Tensor:
        z = self.head(torch.tanh(self.encoder(inputs)))
        return F.binary_cross_entropy_with_logits(z, y)


class Sometimes(Net):
    """Without labels, the head is not used."""

    def forward(self, inputs: Tensor, labels: Tensor | None) -> Tensor:
        h = torch.tanh(self.encoder(inputs))
        if labels is None:
            return h.square().mean()
        return F.cross_entropy(self.head(h), labels)


def pair(kind: type, **hyper: Any) -> tuple[Any, Any, Any, Any]:
    """(model, its wrapper, its optimizer, the same with torch's optimizer), weights the same."""
    model = net()
    model.__class__ = kind
    twin = copy.deepcopy(model)
    elmo.distributed.ignore_heads(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="elmo", options=EAGER)
    run = DistributedDataParallel(compiled, find_unused_parameters=True)
    opt = elmo.optim.SGD(
        model.parameters(), 0.5, momentum=0.9, update_at="step", accumulate="stash", **hyper
    )
    other = DistributedDataParallel(twin, find_unused_parameters=True)
    return model, run, opt, (twin, other, torch.optim.SGD(twin.parameters(), 0.5, momentum=0.9))


def dense(rank: int) -> None:
    """Each process keeps targets as pairs or as they are, by their number."""
    model, run, opt, (twin, other, torchs) = pair(Dense)
    make = torch.Generator().manual_seed(rank)
    for shares in (((0.02, 0.5), (0.02, 0.02)), ((0.9, 0.02), (0.9, 0.9)), ((0.02, 0.02),) * 2):
        for share in shares[rank]:
            inputs, y = torch.randn(4, 5, generator=make), torch.rand(4, LABELS, generator=make)
            for each in (run, other):
                each(inputs, (y < share).float()).backward()
        for each in (opt, torchs):
            each.step()
            each.zero_grad()
        assert_same(model, twin)


def unused(rank: int, *, scaled: bool = False) -> None:
    """A process that does not use the head has a gradient of zeros; so has none if none does."""
    model, run, opt, (twin, other, torchs) = pair(Sometimes)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0, enabled=scaled)
    for step, who in enumerate([(0,), (1,), (), (0, 1), (1,)]):
        inputs, labels = batch(2 * step + rank)
        for each in (run, other):
            loss = each(inputs, labels if rank in who else None)
            (scaler.scale(loss) if each is run else loss).backward()
        scaler.step(opt)
        scaler.update()
        torchs.step()
        for each in (opt, torchs):
            each.zero_grad()
        assert_same(model, twin)
    assert elmo.is_fused(model.head.weight)


def scaled(rank: int) -> None:
    """With a GradScaler, which asks the processes before the step."""
    unused(rank, scaled=True)


def refused(rank: int) -> None:
    """A step that one process refuses is refused by all, and may be tried again."""
    model, run, opt, _ = pair(Sometimes)
    run(*batch(rank)).backward()
    if rank == 1:
        with torch.no_grad():
            model.head.weight.add_(1.0)
    before = copy.deepcopy(model.state_dict())
    message = r"refused in process 1" if rank == 0 else r"changed between backward\(\) and opt"
    for _ in range(2):
        with pytest.raises(FusedUpdateError, match=message):
            opt.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    opt.zero_grad()
    run(*batch(rank)).backward()
    opt.step()


def unlike(rank: int) -> None:
    """Another loss in another process."""
    _, run, opt, _ = pair(Dense)
    inputs, labels = batch(rank)
    run(inputs, F.one_hot(labels, LABELS).float()).backward()
    if rank == 1:
        (owner,) = [o for o in opt._owners if o.kept]
        owner.kept[0].scale_N = owner.kept[0].scale_N.double()
    with pytest.raises(FusedUpdateError, match="the same loss, dtypes"):
        opt.step()


def join(rank: int) -> None:
    """Processes that run out of data would not be there to answer."""
    _, run, opt, _ = pair(Sometimes)
    with pytest.raises(FusedUpdateError, match="run out of data under join"), run.join():
        run(*batch(rank))
    del opt  # whose head it is


def summed(rank: int) -> None:
    """A collective writes into deferred logits and targets: later losses are of what it wrote."""
    encode: Any = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Linear(4, 70_000))
    for parameter in encode.parameters():
        torch.distributed.broadcast(parameter.data, 0)
    options = {**EAGER, "deferred_logits": True}
    inputs, ids = torch.randn(64, 5), torch.randint(0, 70_000, (64, 3))
    with torch.no_grad():
        z, y = torch.compile(encode, backend="elmo", options=options)(inputs), encode(inputs)
        targets = elmo.multi_hot(ids, 70_000)
        same = torch.ops.elmo.multi_hot(ids, 70_000, None)
        for each in (z, y, targets, same):
            torch.distributed.all_reduce(each)
        apart = torch.compile(encode, backend="elmo", options=options)(inputs)
        torch.testing.assert_close(F.cross_entropy(z, ids[:, 0]), F.cross_entropy(y, ids[:, 0]))
        torch.testing.assert_close(F.mse_loss(apart, targets), F.mse_loss(encode(inputs), same))


CASES = {one.__name__: one for one in (dense, unlike, unused, scaled, refused, join, summed)}


def main(rank: int, world: int, folder: str, case: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    for each in case.split("+"):
        CASES[each](rank)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
