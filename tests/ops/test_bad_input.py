"""Promise 8: bad input is refused before anything is modified, and the message says what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training import EAGER, LABELS, batch, compiled, net, owned, updates

import elmo_compile as elmo
from elmo_compile.errors import FusedUpdateError, InputError

TARGETS = {
    "too large": (torch.tensor([1, 48, 3, 4, 5, 6]), r"label 48 at row 1.*0 <= class < 48"),
    "negative": (torch.tensor([1, 2, 3, 4, -7, 6]), r"label -7 at row 4"),
}


@pytest.mark.parametrize("optimizer", ["fused", "none"])
@pytest.mark.parametrize(
    ("case", "lower"), [("too large", "eager"), ("negative", "eager"), ("too large", "inductor")]
)
def test_labels_out_of_range(case: str, optimizer: str, lower: str) -> None:
    labels, message = TARGETS[case]
    model = net()
    opt = elmo.optim.SGD(model.parameters(), 0.5) if optimizer == "fused" else None
    step = compiled(model, {**EAGER, "lower": lower})
    with pytest.raises(InputError, match=message):
        step(batch()[0], labels)
    with torch.no_grad(), pytest.raises(InputError, match=message):
        step(batch()[0], labels)
    assert opt is None or updates(opt, model.head.weight) == 0


@pytest.mark.parametrize("labels", [torch.tensor([[0, 48]] * 6), torch.tensor([[0, -2]] * 6)])
def test_multi_hot_labels_out_of_range(labels: Tensor) -> None:
    class Multi(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(5, LABELS)

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            y = elmo.multi_hot(labels, LABELS)
            return F.binary_cross_entropy_with_logits(self.head(x), y)

    model = Multi()
    step, opt = owned(model)
    with pytest.raises(InputError, match="0 <= label < 48, or -1 for padding"):
        step(batch()[0], labels)
    assert len(elmo.last_report().matches) == 1
    assert updates(opt, model.head.weight) == 0


@pytest.mark.parametrize(
    "labels",
    [torch.zeros(6), torch.zeros(5, dtype=torch.int64), torch.zeros(6, 2, dtype=torch.int64)],
    ids=["float ids", "fewer rows", "2-D"],
)
def test_targets_of_the_wrong_kind_fail_as_in_eager(labels: Tensor) -> None:
    model = net()
    with pytest.raises((RuntimeError, ValueError)):
        model(batch()[0], labels)
    before = model.head.weight.detach().clone()
    step, opt = owned(model)
    with pytest.raises(Exception, match=r"(?i)target|size|shape|dtype|expected"):
        step(batch()[0], labels).backward()
    assert torch.equal(model.head.weight, before)
    assert updates(opt, model.head.weight) == 0


@pytest.mark.parametrize("where", ["features", "upstream gradient"])
@pytest.mark.parametrize(
    ("value", "lower"),
    [(float("nan"), "eager"), (float("inf"), "eager"), (float("nan"), "inductor")],
)
def test_values_that_are_not_finite(value: float, where: str, lower: str) -> None:
    model = net("bce")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step, opt = owned(model, {**EAGER, "lower": lower})
    inputs, labels = batch()
    if where == "features":
        inputs[2, 0] = value
        if value == float("inf"):  # tanh(inf) = 1
            inputs[2, :] = float("nan")
    loss = step(inputs, labels)
    scale = 1.0 if where == "features" else value
    with pytest.raises(InputError, match=rf"the {where} of the head head.weight.*NaN or infinity"):
        (loss * scale).backward()
    assert updates(opt, model.head.weight) == 0
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
    opt.zero_grad()
    step(*batch()).backward()  # the head is still usable
    opt.step()
    assert updates(opt, model.head.weight) == 1


def call(**changes: Any) -> Tensor:
    """`elmo::head_loss` with arguments that fit, but for the changes."""
    from elmo_compile import ops
    from elmo_compile.numerics.losses import CE, LossSpec

    ops.load()
    given: dict[str, Any] = {
        "x": torch.randn(3, 4),
        "weight": torch.randn(9, 4),
        "bias": torch.zeros(9),
        "target": torch.zeros(3, dtype=torch.int64),
        "target_aux": None,
        "carrier": None,
        "loss": LossSpec(name=CE, targets="classes").encode(),
        "scale": 1.0,
        "divisor": 1,
        "chunk": 4,
        "compute": torch.float32,
        **changes,
    }
    return torch.ops.elmo.head_loss(*given.values())[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.randn(3, 5)}, r"features have 5 columns .*weight is \(9, 4\)"),
        ({"x": torch.zeros(3, 4, dtype=torch.int64)}, "floating point"),
        ({"bias": torch.zeros(8)}, r"bias .*\(8,\).*9"),
        ({"target": torch.zeros(2, dtype=torch.int64)}, r"targets? .*2.*3"),
        ({"target": torch.zeros(3)}, "int64"),
        ({"target": torch.tensor([0, 9, 0])}, "label 9 at row 1"),
        ({"loss": "hinge"}, "LossSpec"),
    ],
    ids=["columns", "integers", "bias", "rows", "floats", "label", "loss"],
)
def test_the_op_checks_its_arguments(changes: dict, message: str) -> None:
    assert call().isfinite()
    with pytest.raises(ValueError, match=message):
        call(**changes)


LOSSES = [F.binary_cross_entropy_with_logits, F.mse_loss]


def dense(kind: str) -> Tensor:
    """Dense targets, NaN in one place; or features that make logits overflow."""
    target = torch.rand(6, LABELS)
    if kind == "targets":
        target[0, 0] = float("nan")
    return target


def regression(loss: Any, kind: str, encoder: bool) -> tuple[Any, nn.Module]:
    head = nn.Linear(5, LABELS, bias=False)
    model = nn.Sequential(nn.Linear(5, 5) if encoder else nn.Identity(), head)
    if kind == "logits":
        with torch.no_grad():
            head.weight[3] = 3e38
    return compiled(lambda x, y: loss(model(x), y)), model


@pytest.mark.parametrize("encoder", [True, False])
@pytest.mark.parametrize("kind", ["targets", "logits"])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_gradient_that_is_not_finite_is_skipped(loss: Any, kind: str, encoder: bool) -> None:
    step, model = regression(loss, kind, encoder)
    opt = elmo.optim.SGD(model.parameters(), 0.5, update_at="step", nonfinite="skip")
    before = model[1].weight.detach().clone()
    x = batch()[0].abs() * 100
    step(x, dense(kind)).backward()
    assert opt.fused_parameters()
    finite = kind == "logits" and loss is LOSSES[0] and not encoder  # sigmoid(inf) is 1
    opt.step()
    assert opt.skipped_steps == int(not finite)
    assert torch.equal(model[1].weight, before) != finite


@pytest.mark.parametrize("encoder", [True, False])
@pytest.mark.parametrize("loss", LOSSES)
def test_nan_targets_found_after_the_update_are_told(loss: Any, encoder: bool) -> None:
    step, model = regression(loss, "targets", encoder)
    opt = elmo.optim.SGD(model.parameters(), 0.5)
    with pytest.raises(InputError, match="the weight now holds NaN"):
        step(batch()[0], dense("targets")).backward()
    with pytest.raises(FusedUpdateError, match="inconsistent"):
        opt.step()


def test_grad_scaler_sees_nan_targets() -> None:
    step, model = regression(F.mse_loss, "targets", encoder=False)
    opt = elmo.optim.SGD(model.parameters(), 0.5, update_at="step")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(step(batch()[0], dense("targets"))).backward()
    scaler.step(opt)
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert bool(torch.isfinite(model[1].weight).all())
