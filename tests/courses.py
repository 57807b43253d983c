"""A model and its twin in eager torch, and what people do to a model in a notebook."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import elmo_compile as elmo
from elmo_compile.errors import ElmoError, StaleLogitsError

LABELS, FEATURES, INPUTS = 48, 8, 5


class Setup(NamedTuple):
    """How a model is trained throughout a course."""

    rule: str
    update_at: str
    max_norm: float | None
    bias: bool
    chunk: int
    loss_value: str
    deferred: Any
    budget: Any
    owner: str  # of the encoder: "elmo", or "torch"

    @property
    def limit(self) -> float | None:
        """Norm to clip to: of what one optimizer owns, and before the step."""
        whole = self.update_at == "step" and self.owner == "elmo"
        return self.max_norm if whole else None


class Net(nn.Module):
    """encoder -> head."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.encoder = nn.Linear(INPUTS, FEATURES)
        self.head = nn.Linear(FEATURES, LABELS, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.head(torch.tanh(self.encoder(x)))
        return z


def binary(z: Tensor, y: Tensor) -> Tensor:
    t = elmo.multi_hot(y[:, None], LABELS)
    return F.binary_cross_entropy_with_logits(z, t, reduction="sum") / len(z)


def focal(z: Tensor, y: Tensor) -> Tensor:
    p = torch.sigmoid(z)
    t = elmo.multi_hot(y[:, None], LABELS)
    rows = -(t * (1 - p) ** 2 * F.logsigmoid(z) + (1 - t) * p**2 * F.logsigmoid(-z)).sum(-1)
    return rows.mean()


def smoothed(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.float() / 0.8, y, label_smoothing=0.1)


def of_some_rows(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z[1:], y[1:])


Loss = Callable[[Tensor, Tensor], Tensor]
LOSSES: dict[str, Loss] = {
    "ce": F.cross_entropy, "bce": binary, "focal": focal, "smoothed": smoothed,
    "some rows": of_some_rows,
}  # fmt: skip
READINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "argmax": lambda z: z.argmax(-1),
    "top": lambda z: z.topk(3).values,
    "first": lambda z: z[0],
    "logsumexp": lambda z: z.logsumexp(-1),
    "softmax": lambda z: z.softmax(-1) + 0,
    "sum": lambda z: z.sum(),
    "values": lambda z: z + 1,
}


def batch(seed: int, rows: int = 6) -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, INPUTS, generator=make)
    return x, torch.randint(0, LABELS, (rows,), generator=make)


def torch_optimizer(rule: str, parameters: Any) -> torch.optim.Optimizer:
    if rule == "adamw":
        return torch.optim.AdamW(parameters, 0.01, eps=1e-3, weight_decay=0.1)
    momentum = 0.9 if rule == "momentum" else 0.0
    return torch.optim.SGD(parameters, 0.2, momentum=momentum, weight_decay=0.01)


def our_optimizer(setup: Setup, parameters: Any) -> torch.optim.Optimizer:
    how: dict[str, Any] = {"update_at": setup.update_at}
    if setup.update_at == "step":
        how |= {"accumulate": "stash", "max_norm": setup.limit}
    if setup.rule == "adamw":
        return elmo.optim.AdamW(parameters, 0.01, eps=1e-3, weight_decay=0.1, **how)
    momentum = 0.9 if setup.rule == "momentum" else 0.0
    return elmo.optim.SGD(parameters, 0.2, momentum=momentum, weight_decay=0.01, **how)


class Held(NamedTuple):
    """Logits that were returned, and eager's."""

    ours: Tensor
    theirs: Tensor
    labels: Tensor
    weight: int  # of World.weights


class Kept(NamedTuple):
    """A loss that was returned and not read, and eager's."""

    ours: Tensor
    theirs: Tensor
    weight: int


class Over(Exception):
    """A loop was refused in a way that leaves nothing to go on with but to start again."""


class World:
    """The two models, and what happens to them."""

    def __init__(self, setup: Setup) -> None:
        torch._dynamo.reset()
        torch.manual_seed(0)
        self.setup = setup
        self.ours = Net(setup.bias)
        self.theirs = copy.deepcopy(self.ours)
        self.compile()
        self.optimizers = self.make_optimizers()
        self.reference = torch_optimizer(setup.rule, self.theirs.parameters())
        self.held: list[Held] = []
        self.kept: list[Kept] = []
        self.pending = 0
        self.weights = 0  # how often the head changed
        self.written = 0  # its number when it was last written behind torch's back
        self.ahead = False  # the head: updated in a backward whose step is to come

    def make_optimizers(self) -> list[torch.optim.Optimizer]:
        """Of all parameters, or of the head and of the encoder."""
        if self.setup.owner == "elmo":
            return [our_optimizer(self.setup, self.ours.parameters())]
        encoder = torch_optimizer(self.setup.rule, self.ours.encoder.parameters())
        return [our_optimizer(self.setup, self.ours.head.parameters()), encoder]

    def clear(self, *, to_none: bool = True) -> None:
        for opt in (*self.optimizers, self.reference):
            opt.zero_grad(set_to_none=to_none)
        self.pending, self.ahead = 0, False

    def compile(self) -> None:
        options = self.options = {
            "lower": "eager", "min_outputs": 32, "chunk_size": self.setup.chunk,
            "loss_value": self.setup.loss_value, "deferred_logits": self.setup.deferred,
            "memory_budget": self.setup.budget,
        }  # fmt: skip
        model = self.ours

        def build(loss: Loss) -> Any:
            return torch.compile(lambda x, y: loss(model(x), y), backend="elmo", options=options)

        def loss_and_logits(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            z = model(x)
            return F.cross_entropy(z, y), z

        self.inside = {name: build(loss) for name, loss in LOSSES.items()}
        options = {**options, "loss_value": "auto"}
        self.logits = torch.compile(model, backend="elmo", options=options)
        self.both = torch.compile(loss_and_logits, backend="elmo", options=options)

    # What is compared.

    def check(self) -> None:
        wanted = dict(self.theirs.named_parameters())
        for name, param in self.ours.named_parameters():
            torch.testing.assert_close(
                param.detach(), wanted[name].detach(), rtol=1e-4, atol=2e-5,
                msg=lambda m, n=name: f"{n}: {m}",
            )  # fmt: skip
            if name.startswith("encoder"):
                one, other = param.grad, wanted[name].grad
                assert (one is None) == (other is None), name
                if other is not None:
                    torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-5)

    def losses(self, way: str, kind: str, seed: int) -> tuple[Tensor, Tensor]:
        x, y = batch(seed, 6 + seed % 3)
        if way == "outside":
            return LOSSES[kind](self.logits(x), y), LOSSES[kind](self.theirs(x), y)
        if way == "both":
            return self.both(x, y)[0], F.cross_entropy(self.theirs(x), y)
        return self.inside[kind](x, y), LOSSES[kind](self.theirs(x), y)

    def backward(self, mine: Any, their: Any) -> bool:
        """Both, or neither: whether it was refused, as what one step may not have been told of."""
        weight: Any = self.ours.head.weight
        in_backward = self.setup.update_at == "backward" and weight.requires_grad
        try:
            mine.backward()
        except ElmoError:
            assert in_backward
            assert self.ahead or (weight.grad is not None and bool(weight.grad.any()))
            return False
        if self.ahead:  # it made a gradient, beside the update
            with pytest.raises(ElmoError):
                self.optimizers[0].step()
            raise Over
        their.backward()
        self.pending += 1
        self.ahead = in_backward and (weight.grad is None or not bool(weight.grad.any()))
        return True

    # What may happen.

    def train(self, way: str, kind: str, seed: int, scale: float, read: bool) -> None:
        mine, their = self.losses(way, kind, seed)
        if read and not self.ahead:
            torch.testing.assert_close(mine.detach() + 0, their.detach(), rtol=1e-4, atol=1e-5)
        if not their.requires_grad:
            assert not mine.requires_grad
            return
        if self.backward(mine * scale, their * scale):
            torch.testing.assert_close(mine.detach() + 0, their.detach(), rtol=1e-4, atol=1e-5)

    def step(self, to_none: bool, closure: bool) -> None:
        if not self.pending:
            self.clear()  # of zeros, by which torch.optim would decay and go on
        if self.setup.limit is not None:
            torch.nn.utils.clip_grad_norm_(self.theirs.parameters(), self.setup.limit)
        for opt in self.optimizers:
            opt.step(lambda: 0.0) if closure else opt.step()
        self.reference.step()
        self.weights += bool(self.pending)
        self.clear(to_none=to_none)

    def zero(self, to_none: bool) -> None:
        """What a backward has done to the head stays: that is said, and not for this course."""
        if not self.ahead:
            self.clear(to_none=to_none)

    def evaluate(self, way: str, kind: str, seed: int) -> None:
        if self.ahead:
            return  # the head is a step ahead
        with torch.inference_mode() if seed % 2 else torch.no_grad():
            mine, their = self.losses(way, kind, seed)
        assert not mine.requires_grad
        torch.testing.assert_close(mine + 0, their, rtol=1e-4, atol=1e-5)

    def discard(self, way: str, kind: str, seed: int) -> None:
        self.losses(way, kind, seed)

    def hold(self, seed: int, grad: bool) -> None:
        if self.ahead:
            return
        x, y = batch(seed)
        with torch.set_grad_enabled(grad):
            self.held.append(Held(self.logits(x), self.theirs(x), y, self.weights))

    def read(self, which: int, how: str) -> None:
        if not self.held:
            return
        held = self.held[which % len(self.held)]
        reading = READINGS[how]
        expected = reading(held.theirs.detach())
        changed = held.weight != self.weights or (self.ahead)
        try:
            with torch.no_grad():
                found = reading(held.ours) + 0
        except StaleLogitsError:
            assert changed
            return
        torch.testing.assert_close(found, expected + 0, rtol=1e-4, atol=1e-4)

    def train_on_held(self, which: int, kind: str) -> None:
        """In eager a backward through weights that were written raises."""
        if not self.held:
            return
        held = self.held[which % len(self.held)]
        if self.ahead or held.weight < self.written:
            return
        their = LOSSES[kind](held.theirs, held.labels)
        wanted = [param for param in self.theirs.parameters() if param.requires_grad]
        try:
            torch.autograd.grad(their, wanted, retain_graph=True, allow_unused=True)
        except RuntimeError:
            with pytest.raises(RuntimeError):
                LOSSES[kind](held.ours, held.labels).backward()
            return
        mine = LOSSES[kind](held.ours, held.labels)
        if self.backward(mine, their):
            torch.testing.assert_close(mine.detach() + 0, their.detach(), rtol=1e-4, atol=1e-5)
        self.held = [other for other in self.held if other is not held]

    def keep(self, way: str, kind: str, seed: int) -> None:
        if not self.ahead:
            self.kept.append(Kept(*self.losses(way, kind, seed), self.weights))

    def ask(self, which: int, backward: bool) -> None:
        """For a loss that is older; its value is that of the weights it was made with."""
        if not self.kept:
            return
        kept = self.kept.pop(which % len(self.kept))
        changed = kept.weight != self.weights or self.ahead
        try:
            found = kept.ours.detach() + 0
        except StaleLogitsError:
            assert changed
        else:
            torch.testing.assert_close(found, kept.theirs.detach(), rtol=1e-4, atol=1e-5)
        if backward and not changed and kept.theirs.requires_grad:
            self.backward(kept.ours, kept.theirs)

    def perturb(self, how: str) -> None:
        if self.pending:
            return
        for model in (self.ours, self.theirs):
            weight = model.head.weight
            with torch.no_grad():
                if how == "decay":
                    weight.mul_(0.9)
                elif how == "row":
                    weight[3].fill_(0.1)
                elif how == "data":
                    weight.data.mul_(0.9)
                elif how == "swap":
                    weight.data = weight.data * 0.9
                else:
                    state = {name: value * 0.9 for name, value in model.state_dict().items()}
                    model.load_state_dict(state)
        self.weights += 1
        if how in ("data", "swap"):
            self.written = self.weights

    def freeze(self, what: str, wanted: bool) -> None:
        if self.pending:
            return
        for model in (self.ours, self.theirs):
            getattr(model, what).requires_grad_(wanted)

    def rate(self, factor: float) -> None:
        if self.pending:
            return
        for opt in (*self.optimizers, self.reference):
            for group in opt.param_groups:
                group["lr"] *= factor

    def checkpoint(self, fresh: bool) -> None:
        """Into the same model, or into new ones."""
        if self.pending:
            return
        self.clear()
        parts = (self.ours, *self.optimizers)
        state = copy.deepcopy([part.state_dict() for part in parts])
        if fresh:
            flags = [param.requires_grad for param in self.ours.parameters()]
            self.ours = Net(self.setup.bias)
            for param, flag in zip(self.ours.parameters(), flags, strict=True):
                param.requires_grad_(flag)
            self.compile()
            self.optimizers = self.make_optimizers()
        else:
            with torch.no_grad():
                self.ours.head.weight.zero_()
        for part, saved in zip((self.ours, *self.optimizers), state, strict=True):
            part.load_state_dict(saved)
        self.weights += 1
        self.held.clear()
        self.kept.clear()

    def copied(self, seed: int) -> None:
        """A copy has its own weights, and trains by itself."""
        if self.pending:
            return
        twin, reference = copy.deepcopy(self.ours), copy.deepcopy(self.theirs)
        opt = torch.optim.SGD(twin.parameters(), 0.1)
        other = torch.optim.SGD(reference.parameters(), 0.1)
        x, y = batch(seed)
        F.cross_entropy(torch.compile(twin, backend="elmo", options=self.options)(x), y).backward()
        F.cross_entropy(reference(x), y).backward()
        for which in (opt, other):
            which.step()
        for one, same in zip(twin.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(one, same, rtol=1e-4, atol=2e-5)

    def twice(self, way: str, kind: str, seed: int) -> None:
        """Two backwards of one loss."""
        if self.setup.update_at != "step":
            return
        mine, their = self.losses(way, kind, seed)
        if their.requires_grad:
            for loss in (mine, their):
                loss.backward(retain_graph=True)
            self.backward(0.5 * mine, 0.5 * their)

    def scaled(self, way: str, kind: str, seed: int) -> None:
        """A GradScaler around a step."""
        if self.setup.update_at != "step" or self.pending or self.setup.owner == "torch":
            return
        mine, their = self.losses(way, kind, seed)
        if not their.requires_grad:
            return
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(mine).backward()
        their.backward()
        if self.setup.limit is not None:
            torch.nn.utils.clip_grad_norm_(self.theirs.parameters(), self.setup.limit)
        scaler.step(self.optimizers[0])
        scaler.update()
        self.reference.step()
        self.weights += 1
        self.clear()

    def wrong(self, way: str, kind: str, seed: int) -> None:
        """A label that does not exist."""
        x, y = batch(seed)
        y[1] = LABELS + 3
        ways: dict[str, Callable[[], Tensor]] = {
            "inside": lambda: self.inside[kind](x, y),
            "outside": lambda: LOSSES[kind](self.logits(x), y),
            "both": lambda: self.both(x, y)[0],
        }
        with pytest.raises((ElmoError, IndexError)):
            ways[way]().backward()

    def encoder_first(self, way: str, kind: str, seed: int) -> None:
        """torch.autograd.grad of something else updates nothing."""
        mine, their = self.losses(way, kind, seed)
        if not self.theirs.encoder.weight.requires_grad:
            return
        (found,) = torch.autograd.grad(mine, self.ours.encoder.weight)
        (expected,) = torch.autograd.grad(their, self.theirs.encoder.weight)
        if not self.ahead:
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-5)

    def several(self, way: str, kind: str, seed: int) -> None:
        """Two batches in one backward."""
        if self.setup.update_at != "step":
            return
        first, second = self.losses(way, kind, seed), self.losses("inside", "ce", seed + 1)
        if first[1].requires_grad:
            self.backward(first[0] + 0.5 * second[0], first[1] + 0.5 * second[1])

    def penalty(self, seed: int) -> None:
        if self.setup.update_at != "step" or not self.theirs.head.weight.requires_grad:
            return
        mine, their = self.losses("inside", "ce", seed)
        norms = [model.head.weight.square().sum() for model in (self.ours, self.theirs)]
        self.backward(mine + 0.01 * norms[0], their + 0.01 * norms[1])

    def hook(self, seed: int) -> None:
        """A head with a hook gets a gradient, which the optimizer takes."""
        if self.pending or not self.theirs.head.weight.requires_grad:
            return
        hooks = [
            model.head.weight.register_hook(lambda g: g * 0.5) for model in (self.ours, self.theirs)
        ]
        mine, their = self.losses("inside", "ce", seed)
        self.backward(mine, their)
        self.step(True, False)
        for hook in hooks:
            hook.remove()
