"""`update_at="step"`: what must see the whole gradient, equal to a model that is not fused."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
import training
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from training import (
    EAGER,
    FEATURES,
    INDUCTOR,
    LABELS,
    assert_same,
    batch,
    compiled,
    net,
    reference,
    train,
    updates,
)

import elmo_compile as elmo
from elmo_compile.errors import FusedUpdateError, InputError

STEP = {"update_at": "step"}
owned = functools.partial(training.owned, update_at="step")


class Focal(nn.Module):
    """A head whose loss has no kernels of its own: it runs as a program."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(5, FEATURES)
        self.head = nn.Linear(FEATURES, LABELS)

    def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        z = self.head(torch.tanh(self.encoder(inputs)))
        y = F.one_hot(labels, LABELS).to(z.dtype)
        p = torch.sigmoid(z)
        value = F.binary_cross_entropy_with_logits(z, y, reduction="none")
        return (value * (y * (1 - p) + (1 - y) * p) ** 2).mean()


def model_of(kind: str) -> nn.Module:
    if kind == "focal":
        torch.manual_seed(0)
        return Focal()
    return net(kind)


KINDS = ["ce", "bce", "focal"]


@pytest.mark.parametrize("lower", ["eager", "inductor"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_an_unfused_model(kind: str, lower: str) -> None:
    model = model_of(kind)
    want = reference(model, 3, momentum=0.9, weight_decay=0.01)
    step, opt = owned(model, {**EAGER, "lower": lower}, momentum=0.9, weight_decay=0.01)
    before = model.head.weight.detach().clone()
    step(*batch(0)).backward()
    assert torch.equal(model.head.weight, before)
    assert model.head.weight.grad is None
    opt.step()
    opt.zero_grad()
    train(step, opt, 2, start=1)
    assert_same(model, want)
    assert updates(opt, model.head.weight) == 3
    assert opt.fused_parameters() == [model.head.weight]


def clipped(model: nn.Module, steps: int, max_norm: float, micro: int = 1) -> nn.Module:
    """A copy after eager steps with torch's clipping, `micro` batches a step."""
    twin = copy.deepcopy(model)
    opt = torch.optim.SGD(twin.parameters(), 0.5)
    for i in range(steps):
        opt.zero_grad()
        for j in range(micro):
            (twin(*batch(i * micro + j, 6 + j)) / micro).backward()
        clip_grad_norm_(twin.parameters(), max_norm)
        opt.step()
    return twin


@pytest.mark.parametrize("max_norm", [0.05, 100.0])
@pytest.mark.parametrize("kind", KINDS)
def test_max_norm_is_torch_s_clipping(kind: str, max_norm: float) -> None:
    model = model_of(kind)
    want = clipped(model, 3, max_norm)
    step, opt = owned(model, max_norm=max_norm)
    train(step, opt, 3)
    assert_same(model, want)


@pytest.mark.parametrize("max_norm", [None, 0.05])
@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_of_several_sizes(kind: str, max_norm: float | None) -> None:
    model = model_of(kind)
    want = clipped(model, 2, 1e9 if max_norm is None else max_norm, micro=3)
    step, opt = owned(model, accumulate="stash", max_norm=max_norm)
    for i in range(2):
        for j in range(3):
            (step(*batch(3 * i + j, 6 + j)) / 3).backward()
        opt.step()
        opt.zero_grad()
    assert_same(model, want)
    assert updates(opt, model.head.weight) == 2


def test_the_norm_does_not_cancel() -> None:
    """Nearly constant features and centred gradients: of the Gram form nothing would be left."""
    torch.manual_seed(0)
    head = nn.Linear(32, LABELS)
    with torch.no_grad():
        head.weight.mul_(1e-6)
    x = 1000 + 1e-2 * torch.randn(6, 32)
    y = torch.arange(6)

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = head

        def forward(self, x: Tensor, g: Tensor, y: Tensor) -> Tensor:
            rows = F.cross_entropy(self.head(x), y, reduction="none")
            return (rows * g).sum()

    g = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    y = torch.zeros(6, dtype=torch.int64)  # alike in every row: sums over rows all but vanish
    model = Head()
    twin = copy.deepcopy(model).double()
    twin(x.double(), g.double(), y).backward()
    norm = twin.head.weight.grad.norm()
    step, opt = compiled(model), elmo.optim.SGD(model.parameters(), 1e-3, **STEP, max_norm=1.0)
    step(x, g, y).backward()
    (owner,) = [o for o in opt._owners if o.kept]
    got = owner.squared_norm().sqrt()
    dense = copy.deepcopy(head)
    torch.autograd.backward((F.cross_entropy(dense(x), y, reduction="none") * g).sum())
    eager = abs(float(dense.weight.grad.double().norm() / norm) - 1)
    assert abs(float(got / norm) - 1) <= 2 * eager + 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_grad_scaler(kind: str) -> None:
    model = model_of(kind)
    want = clipped(model, 2, 0.05)
    step, opt = owned(model, max_norm=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for i in range(2):
        scaler.scale(step(*batch(i))).backward()
        scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
    assert_same(model, want)
    before = copy.deepcopy(model.state_dict())
    scaler.scale(step(*batch(5)) * 1e38).backward()  # overflows when scaled
    scaler.step(opt)
    scaler.update()
    opt.zero_grad()
    assert scaler.get_scale() == 512.0
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    scaler.scale(step(*batch(2))).backward()
    scaler.step(opt)
    assert updates(opt, model.head.weight) == 3


def test_grad_scaler_with_nothing_but_the_head() -> None:
    model = net(bias=False)
    model.encoder.requires_grad_(False)
    step, opt = owned(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(step(*batch())).backward()
    scaler.step(opt)
    scaler.update()
    assert_same(model, reference_frozen())


def reference_frozen() -> nn.Module:
    twin = net(bias=False)
    twin.encoder.requires_grad_(False)
    return reference(twin, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_is_not_finite_is_skipped(kind: str) -> None:
    model = model_of(kind)
    want = reference(model, 1)
    step, opt = owned(model, nonfinite="skip")
    inputs, labels = batch(0)
    broken = inputs.clone()
    broken[2, 1] = float("nan")
    for given in (broken, inputs):
        step(given, labels).backward()
        opt.step()
        opt.zero_grad()
    assert opt.skipped_steps == 1
    assert_same(model, want)
    assert updates(opt, model.head.weight) == 1


def test_a_gradient_elsewhere_that_is_not_finite_skips_the_head_too() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    step, opt = owned(model, nonfinite="skip")
    step(*batch(0)).backward()
    model.encoder.bias.grad[0] = float("inf")
    opt.step()
    assert opt.skipped_steps == 1
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_not_finite_is_an_error_before_anything_is_modified() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    step, opt = owned(model)
    inputs, labels = batch(0)
    inputs[0] = float("inf")
    inputs[0, 0] = float("nan")
    step(inputs, labels).backward()
    with pytest.raises(InputError, match=r"head head\.weight.*nonfinite='skip'"):
        opt.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    opt.zero_grad()
    train(step, opt, 1)
    assert_same(model, reference(net(), 1))


def test_a_second_backward_is_an_error_unless_it_is_to_accumulate() -> None:
    model = net()
    step, opt = owned(model)
    step(*batch(0)).backward()
    with pytest.raises(FusedUpdateError, match="accumulate='stash'"):
        step(*batch(1)).backward()
    opt.zero_grad()
    train(step, opt, 1)
    assert_same(model, reference(net(), 1))


def test_clipping_from_outside_names_max_norm() -> None:
    model = net()
    step, opt = owned(model)
    step(*batch(0)).backward()
    with pytest.raises(FusedUpdateError, match="max_norm"):
        clip_grad_norm_(model.parameters(), 1.0)
    opt.step()


def test_some_heads_at_step_some_in_backward() -> None:
    model = net()
    want = reference(model, 2)
    opt = elmo.optim.SGD(
        [{"params": model.head.parameters(), **STEP}, {"params": model.encoder.parameters()}], 0.5
    )
    train(compiled(model), opt, 2)
    assert_same(model, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("kind", ["ce", "bce"])
def test_low_precision_heads_store_what_the_update_in_backward_stores(
    kind: str, dtype: torch.dtype
) -> None:
    stored = []
    for update_at in ("backward", "step"):
        model = net(kind, seed=3)
        elmo.convert_head(model, dtype=dtype, name="head")
        step = compiled(model)
        opt = elmo.optim.AdamW(model.parameters(), 0.01, seed=5, update_at=update_at)
        train(step, opt, 3)
        stored.append((model.head.weight.detach(), opt.state[model.head.weight]["exp_avg"]))
    for a, b in zip(*stored):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_dense_targets_are_kept_sparse() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = net("bce").head

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return F.binary_cross_entropy_with_logits(self.head(x), y, reduction="sum")

    model = Dense()
    x, y = torch.randn(6, FEATURES), (torch.rand(6, LABELS) < 0.05).float()
    y[1, 4] = 0.25
    step, opt = compiled(model), elmo.optim.SGD(model.parameters(), 0.1, **STEP)
    step(x, y).backward()
    (owner,) = [o for o in opt._owners if o.kept]
    assert owner.kept[0].problem.loss.targets == "pairs"
    twin = copy.deepcopy(model)
    twin(x, y).backward()
    torch.optim.SGD(twin.parameters(), 0.1).step()
    y.fill_(1.0)  # after backward the user may do what they like with it
    opt.step()
    assert_same(model, twin)


@pytest.mark.parametrize("options", [EAGER, INDUCTOR], ids=["eager", "inductor"])
def test_loss_values_are_those_of_the_forward(options: dict) -> None:
    model = net("bce")
    twin = copy.deepcopy(model)
    step, opt = owned(model, options)
    other = torch.optim.SGD(twin.parameters(), 0.5)
    for i in range(2):
        loss, want = step(*batch(i)), twin(*batch(i))
        loss.backward()
        want.backward()
        torch.testing.assert_close(loss.detach(), want.detach())
        for each in (opt, other):
            each.step()
            each.zero_grad()


class Encoded(nn.Module):
    """Returns logits; the losses are outside."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = net().encoder, net().head

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(torch.tanh(self.encoder(inputs)))


@pytest.mark.parametrize("max_norm", [None, 0.1])
def test_two_losses_of_the_same_deferred_logits(max_norm: float | None) -> None:
    """One with kernels, one by a program, in one backward: both are kept and added."""
    model = Encoded()
    twin = copy.deepcopy(model)
    run, opt = owned(model, max_norm=max_norm)
    other = torch.optim.SGD(twin.parameters(), 0.5)
    for i in range(2):
        inputs, labels = batch(i)
        for make, each in ((run, opt), (twin, other)):
            z = make(inputs)
            loss = F.cross_entropy(z, labels) + F.cross_entropy(
                z, labels.flip(0), label_smoothing=0.1
            )
            loss.backward()
            if each is other and max_norm is not None:
                clip_grad_norm_(twin.parameters(), max_norm)
            each.step()
            each.zero_grad()
    assert_same(model, twin)
    assert opt.fused_parameters()


def test_the_report_says_when_and_at_what_price() -> None:
    found = {}
    for update_at in ("backward", "step"):
        model = net("bce")
        step = compiled(model, loss_value="deferred")
        opt = elmo.optim.SGD(model.parameters(), 0.5, update_at=update_at)
        train(step, opt, 1)
        (found[update_at],) = elmo.last_report().matches
    assert (found["backward"].products, found["step"].products) == (3, 4)
    assert found["step"].fused_update
    assert "update_at='step'" in str(elmo.last_report())


@pytest.mark.parametrize("accumulate", ["stash", "error"])
def test_a_scaler_goes_on_after_an_overflow(accumulate: str) -> None:
    model = model_of("ce")
    want = reference(model, 2)
    step, opt = owned(model, accumulate=accumulate)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for scale, number in ((1.0, 0), (float("inf"), 7), (1.0, 1)):
        scaler.scale(step(*batch(number)) * scale).backward()
        scaler.step(opt)
        scaler.update()
        model.zero_grad()
    assert scaler.get_scale() == 2.0**9
    assert_same(model, want)
