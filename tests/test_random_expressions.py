"""Random expressions of logits, inside and outside the compiled function, against eager torch.

ELMO_EXPRESSIONS says how many of each are drawn, ELMO_EXPRESSIONS_FROM their first seed.

Whatever is made of the logits of a compiled model (derived, reduced, combined, written to), every
value, `requires_grad`, gradient and step is eager's, or an error of this package says why not and
nothing has changed. Weights and features are multiples of 2^-16 and logits float64, so that they
are the same to the last bit however they are summed, and comparisons have no ties to break.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
import torch
from expressions import Expression
from torch import Tensor, nn

import elmo_compile as elmo
from elmo_compile.deferred import Deferred
from elmo_compile.errors import ElmoError

WORDS, D, L = 50, 8, 96
FIRST = int(os.environ.get("ELMO_EXPRESSIONS_FROM", "0"))


def seeds(usual: int) -> range:
    return range(FIRST, FIRST + int(os.environ.get("ELMO_EXPRESSIONS", usual)))


class Net(nn.Module):
    def __init__(self, bias: bool, frozen: bool) -> None:
        super().__init__()
        self.encoder = nn.Embedding(WORDS, D, dtype=torch.float64)
        self.head = nn.Linear(D, L, bias=bias, dtype=torch.float64)
        self.head.requires_grad_(not frozen)
        with torch.no_grad():
            self.head.weight.mul_(2)
            for param in self.parameters():
                param.copy_((param * 2**16).round() / 2**16)

    def forward(self, words: Tensor) -> Tensor:
        z: Tensor = self.head(self.encoder(words))
        return z


class World:
    """A model, its twin in eager torch, an expression, and its results in both."""

    def __init__(self, seed: int, inside: bool) -> None:
        torch._dynamo.reset()
        torch.manual_seed(seed)
        self.r = r = Random(seed)
        self.ours = Net(r.random() < 0.5, r.random() < 0.2)
        self.theirs = copy.deepcopy(self.ours)
        self.update_at = r.choice([None, None, "backward", "step", "step"])
        self.grad = self.update_at is not None or r.random() < 0.6
        self.optimizers = self.make_optimizers()
        self.shape = r.choice([(6,), (6,), (2, 3)])
        self.words = torch.randint(0, WORDS, self.shape)
        self.options = {
            "lower": "eager", "min_outputs": 32, "chunk_size": r.choice([7, 32, L]),
            "memory_budget": r.choice([None, "1KiB"]),
        }  # fmt: skip
        without = ("breaking",) if inside else ()
        with torch.set_grad_enabled(self.grad):
            z = self.theirs(self.words)
            self.expression = Expression(r, z, r.choice([2, 3, 5, 8, 14]), without)
        self.wanted = self.expression.results

    def make_optimizers(self) -> list[torch.optim.Optimizer]:
        """Of the twin, and if something is fused of the model."""
        theirs = torch.optim.SGD(self.theirs.parameters(), 0.25)
        if self.update_at is None:
            return [theirs]
        how: dict[str, Any] = {"update_at": self.update_at}
        if self.update_at == "step":
            how["accumulate"] = self.r.choice(["stash", "materialize"])
        return [theirs, elmo.optim.SGD(self.ours.parameters(), 0.25, **how)]

    def compute(self, inside: bool) -> None:
        expression, model = self.expression, self.ours

        def whole(words: Tensor) -> list[Tensor]:
            return expression.run(model(words))

        with torch.set_grad_enabled(self.grad):
            if inside:
                compiled: Any = torch.compile(whole, backend="elmo", options=self.options)
                self.found = compiled(self.words)
            else:
                compiled = torch.compile(model, backend="elmo", options=self.options)
                self.found = expression.run(compiled(self.words))
        ours, theirs = ([t.requires_grad for t in many] for many in (self.found, self.wanted))
        assert ours == theirs

    def check_values(self) -> None:
        order = list(range(len(self.wanted)))
        self.r.shuffle(order)
        for place in order:
            mine = self.found[place].detach()
            assert_alike(mine.materialize() if isinstance(mine, Deferred) else mine,
                         self.wanted[place].detach(), f"result {place}")  # fmt: skip

    def backward(self) -> bool:
        """Of some results: whether eager torch does it, and nothing was refused."""
        able = [place for place, value in enumerate(self.wanted) if trains(value)]
        if not able:
            return False
        chosen = [self.r.choice(able) for _ in range(self.r.choice([1, 1, 2, 3]))]
        weights = [self.r.choice([1 / 8, -1 / 3]) for _ in chosen]
        try:
            self.total(self.wanted, chosen, weights).backward()
        except RuntimeError:  # something that the gradient needs was written to
            return False
        before = copy.deepcopy(self.ours.state_dict())
        try:
            self.total(self.found, chosen, weights).backward()
        except ElmoError:
            assert self.update_at == "backward"
            for name, value in self.ours.state_dict().items():
                assert torch.equal(before[name], value), f"a refused backward changed {name}"
            return False
        self.updated = not torch.equal(self.ours.head.weight, before["head.weight"])
        return True

    def total(self, results: Sequence[Tensor], chosen: list[int], weights: list[float]) -> Tensor:
        parts = [w * results[place].double().sum() for place, w in zip(chosen, weights)]
        return torch.stack(parts).sum()

    def check_gradients(self) -> None:
        for (name, one), other in zip(self.ours.named_parameters(), self.theirs.parameters()):
            assert (one.grad is None) == (other.grad is None), name
            if one.grad is not None and other.grad is not None:
                assert_alike(one.grad, other.grad, f"gradient of {name}")

    def check_step(self) -> None:
        theirs, ours = self.optimizers
        head: Any = self.ours.head.weight
        if self.updated and head.grad is not None:
            # Of a use that no forward told of: a loss of every other column, say.
            with pytest.raises(ElmoError, match="also received a dense gradient"):
                ours.step()
            return
        ours.step()
        theirs.step()
        for (name, one), other in zip(self.ours.named_parameters(), self.theirs.parameters()):
            assert_alike(one.detach(), other.detach(), name)


def trains(value: Tensor) -> bool:
    try:
        finite = bool(value.detach().isfinite().all())
    except RuntimeError:  # a part of what was written to since
        return False
    return value.requires_grad and value.is_floating_point() and finite


def assert_alike(mine: Tensor, theirs: Tensor, what: str) -> None:
    if not theirs.is_floating_point():
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs), what
        return
    # Sums of float32 parts differ in their order.
    torch.testing.assert_close(
        mine, theirs, rtol=1e-4, atol=1e-4, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )


def check(seed: int, inside: bool) -> None:
    world = World(seed, inside)
    try:
        world.compute(inside)
        late = world.r.random() < 0.5
        if not late:
            world.check_values()
        trained = world.backward()
        if trained and world.update_at is None:
            world.check_gradients()
        elif trained:
            world.check_step()
        if late and world.update_at is None:
            world.check_values()
    except BaseException as error:
        error.add_note(f"seed {seed}: {world.shape} {world.options} {world.update_at}")
        error.add_note(f"gradient {world.grad}\n{world.expression}")
        raise


@pytest.mark.parametrize("seed", seeds(150))
def test_outside(seed: int) -> None:
    check(seed, inside=False)


@pytest.mark.parametrize("seed", seeds(25))
def test_inside(seed: int) -> None:
    check(seed, inside=True)
