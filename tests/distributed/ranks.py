"""One process of a data-parallel run: train, then save the weights.

python ranks.py RANK WORLD FOLDER KIND DTYPE WRAP HOW

HOW: "loss": the model returns its loss; "logits": it returns logits; "bare": it does too, and is
also called without DDP between backward() and step(); "refused": its head's gradient is ordinary;
"biased": it returns its loss, and processes have different biases; "scaled": GradScaler scales it,
and in one step one process's head, and nothing else, has a loss that is not finite.
"""

from __future__ import annotations

import datetime
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torch.nn.parallel import DistributedDataParallel
from training import EAGER, LABELS, Net, batch, net

import elmo_compile as elmo
from elmo_compile.errors import FusedUpdateError

STEPS, MICRO, ROWS = 3, 2, 4


def part(step: int, micro: int, rank: int, world: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A process's share of a micro-batch of ROWS rows."""
    inputs, labels = batch(10 * step + micro, ROWS)
    rows = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    return inputs[rows], labels[rows]


class Scorer(Net):
    """The same without the loss."""

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(torch.tanh(self.encoder(inputs)))


class Apart(Net):
    """The head's loss, of features that get no gradient of it, and a loss of the features."""

    def forward(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        features = torch.tanh(self.encoder(inputs))
        return F.cross_entropy(self.head(features.detach()), labels), features.square().mean()


OVERFLOWS, SCALE = 1, 16.0
"""The step in which process 1's loss is not finite, and the scale at first."""


def scaled(rank: int, world: int, folder: str) -> None:
    """Train with a GradScaler, then save the weights."""
    model = net("ce", seed=rank, bias=False)
    model.__class__ = Apart
    elmo.distributed.ignore_heads(model)
    run = DistributedDataParallel(torch.compile(model, backend="elmo", options=EAGER))
    optimizer = elmo.optim.SGD(model.parameters(), 0.5, update_at="step")
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    for step in range(STEPS):
        head_loss, other = run(*part(step, 0, rank, world))
        if (step, rank) == (OVERFLOWS, 1):
            head_loss = head_loss * torch.inf
        scaler.scale(head_loss + other).backward()
        if step == 0:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert scaler.get_scale() == SCALE / 2
    assert optimizer.fused_parameters() == [model.head.weight]
    torch.save(model.state_dict(), f"{folder}/weights{rank}.pt")


def loss_of_logits(kind: str, logits: Tensor, labels: Tensor) -> Tensor:
    if kind == "ce":
        return F.cross_entropy(logits, labels)
    return F.binary_cross_entropy_with_logits(logits, elmo.multi_hot(labels[:, None], LABELS))


def main(rank: int, world: int, folder: str, kind: str, dtype: str, wrap: str, how: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=world,
        timeout=datetime.timedelta(seconds=90),
    )  # fmt: skip
    if how == "scaled":
        scaled(rank, world, folder)
    else:
        train(rank, world, folder, kind, dtype, wrap, how)
    torch.distributed.destroy_process_group()


def train(rank: int, world: int, folder: str, kind: str, dtype: str, wrap: str, how: str) -> None:
    """The other cases."""
    model = net(kind, seed=rank)  # what process 0 has is to count
    if how not in ("loss", "biased"):
        model.__class__ = Scorer
    if dtype != "float32":
        elmo.convert_head(model, dtype=getattr(torch, dtype), name="head")
    elmo.distributed.ignore_heads(model)
    if wrap == "outside":
        run = DistributedDataParallel(torch.compile(model, backend="elmo", options=EAGER))
    else:
        run = torch.compile(DistributedDataParallel(model), backend="elmo", options=EAGER)
    optimizer = elmo.optim.SGD(
        model.parameters(), 0.5, momentum=0.9, update_at="step", max_norm=0.5, accumulate="stash"
    )
    if how == "refused":
        inside = {"update_at": "backward", "max_norm": None, "accumulate": "error"}
        optimizer.param_groups[0].update(inside)
    if how == "biased":
        with torch.no_grad():
            model.head.bias += rank
    for step in range(STEPS):
        for micro in range(MICRO):
            inputs, labels = part(step, micro, rank, world)
            if how in ("loss", "biased"):
                loss = run(inputs, labels)
            else:
                loss = loss_of_logits(kind, run(inputs), labels)
            if how == "refused":
                with pytest.raises(FusedUpdateError, match="which nobody reduces"):
                    loss.backward()
                return
            (loss / MICRO).backward()
        if how == "bare":
            loss_of_logits(
                kind, torch.compile(model, backend="elmo", options=EAGER)(inputs), labels
            )
        if how == "biased":
            with pytest.raises(FusedUpdateError, match="bias must be the same in every process"):
                optimizer.step()
            return
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.fused_parameters() == [model.head.weight]
    torch.save(model.state_dict(), f"{folder}/weights{rank}.pt")
    torch.distributed.barrier()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
