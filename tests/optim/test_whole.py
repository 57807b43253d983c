"""Whether a step is skipped: found in gradients of every dtype, read from a device once."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from training import batch, net, owned, train

import elmo_compile as elmo
from elmo_compile.errors import InputError
from elmo_compile.optim.whole import Gradients

SHAPES = [(), (7,), (5, 3), (0, 3), (2, 3, 4)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64]


class Counted(TorchDispatchMode):
    """How often each operation ran."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def gradients(*extra: Tensor) -> Gradients:
    """The largest finite values, in every shape and dtype, and further gradients."""
    given = [
        torch.full(shape, torch.finfo(dtype).max, dtype=dtype)
        for shape in SHAPES
        for dtype in DTYPES
    ]
    params = [nn.Parameter(torch.zeros_like(grad.to_dense())) for grad in (*given, *extra)]
    for param, grad in zip(params, (*given, *extra)):
        param.grad = grad.clone()
    opt = elmo.optim.SGD(params, 0.1, fused=False, nonfinite="skip")
    return Gradients(opt._members(), [])


def test_the_host_reads_one_flag_whatever_the_number_of_gradients() -> None:
    whole = gradients()
    kept = [grad.clone() for _, grad in whole.dense]
    with Counted() as counted:
        assert not whole.must_skip()
    assert counted.calls["_local_scalar_dense"] == 1
    assert counted.calls["isfinite"] + counted.calls["abs"] <= 2
    for (_, grad), before in zip(whole.dense, kept):
        assert torch.equal(grad, before)
        assert grad._version == 0


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_element_is_found(dtype: torch.dtype, value: float) -> None:
    bad = torch.zeros(100, 3, dtype=dtype)
    if dtype.is_complex:
        torch.view_as_real(bad)[71, 1, 1] = value
    else:
        bad[71, 1] = value
    assert gradients(bad).must_skip()
    assert gradients(bad[:0], bad.t()).must_skip()
    wrong = gradients(bad).wrong_on_device([])
    assert wrong is not None
    assert int(wrong) == 1


def test_sparse_gradients_are_summed_first() -> None:
    def sparse(*values: float) -> Tensor:
        places = torch.zeros(1, len(values), dtype=torch.int64)
        return torch.sparse_coo_tensor(
            places, torch.tensor(values)[:, None], (4, 1), check_invariants=True
        )

    huge = torch.finfo(torch.float32).max
    assert not gradients(sparse(1.0, huge)).must_skip()
    assert gradients(sparse(huge, huge)).must_skip()


def test_a_group_that_does_not_skip_is_not_looked_at() -> None:
    param = nn.Parameter(torch.zeros(3))
    param.grad = torch.full((3,), torch.nan)
    opt = elmo.optim.SGD([param], 0.1, fused=False)
    whole = Gradients(opt._members(), [])
    assert not whole.must_skip()
    assert whole.wrong_on_device([]) is None


@pytest.mark.parametrize("nonfinite", ["error", "skip"])
def test_a_norm_that_is_not_finite_leaves_the_head_alone(nonfinite: str) -> None:
    """The NaN is another parameter's; the common factor would store it in every weight."""
    model = net()
    step, opt = owned(model, update_at="step", max_norm=1.0, nonfinite=nonfinite)
    train(step, opt, 1)
    step(*batch()).backward()
    next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[0] = torch.nan
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    if nonfinite == "error":
        with pytest.raises(InputError, match="is not finite; nothing was updated"):
            opt.step()
    else:
        opt.step()
        assert opt.skipped_steps == 1
    for name, param in model.named_parameters():
        assert torch.equal(param, before[name])
    opt.zero_grad()
    train(step, opt, 1)
    assert not torch.equal(model.head.weight, before["head.weight"])
