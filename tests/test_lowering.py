"""What `lowering` starts ahead of Inductor leaves Inductor as it was; what it does to backwards."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import Tensor
from torch._inductor import cpu_vec_isa
from torch._inductor import utils as inductor_utils

import elmo_compile
from elmo_compile import backend, host_memory, lowering
from elmo_compile.kernels import aten


def probe() -> None:
    lowering.build_vector_probes.__wrapped__()
    for thread in threading.enumerate():
        if thread.name.startswith("elmo-vector-probe"):
            thread.join()


@pytest.mark.parametrize("works", [True, False])
def test_probes_write_nothing_to_what_inductor_asks(
    works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check_build(self: Any, code: str) -> bool:
        if not works:
            raise RuntimeError("no compiler")
        return True

    isas = cpu_vec_isa.supported_vec_isa_list
    picked = cpu_vec_isa.pick_vec_isa()
    before = [dict(vars(isa)) for isa in isas]
    monkeypatch.setattr(cpu_vec_isa.VecISA, "check_build", check_build)
    probe()
    assert [dict(vars(isa)) for isa in isas] == before
    assert cpu_vec_isa.pick_vec_isa() is picked


@pytest.mark.parametrize(("lower", "calls"), [("inductor", 1), ("eager", 0)])
def test_probes_are_built_for_inductor_alone(
    lower: str, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[bool] = []
    monkeypatch.setattr(backend, "build_vector_probes", lambda: called.append(True))
    model = torch.nn.Linear(3, 5)
    torch.compile(model, backend="elmo", options={"lower": lower})(torch.ones(2, 3))
    assert len(called) == calls


SCALE = torch.ops.elmo.scale_.default
SIZES = (1024, 1024)


def backward_graph(**changes: Any) -> fx.GraphModule:
    """`return scaled(made, factor)`, as AOTAutograd leaves it, or something near it."""
    options = {
        "shape": SIZES, "dtype": torch.bfloat16, "factor": (), "factor_dtype": torch.float32,
        "result": torch.bfloat16, "used_again": False, "returned": True, "turned": False,
        "strides": None,
    } | changes  # fmt: skip
    graph = fx.Graph()
    made, factor = graph.placeholder("made"), graph.placeholder("factor")
    value = torch.empty(options["shape"], dtype=options["dtype"], device="meta")
    made.meta["val"] = value if options["strides"] is None else value.t()
    scale = torch.empty(options["factor"], dtype=options["factor_dtype"], device="meta")
    factor.meta["val"] = scale
    operands = (factor, made) if options["turned"] else (made, factor)
    product = graph.call_function(torch.ops.elmo.scaled.default, operands)
    product.meta["val"] = torch.empty_like(made.meta["val"], dtype=options["result"])
    last = product
    if not options["returned"]:
        last = graph.call_function(torch.ops.aten.neg.default, (product,))
    if options["used_again"]:
        last = graph.call_function(torch.ops.aten.add.Tensor, (product, made))
    graph.output((last,))
    return fx.GraphModule(torch.nn.Module(), graph)


def rewritten(module: fx.GraphModule, monkeypatch: pytest.MonkeyPatch, donated: list[int]) -> bool:
    monkeypatch.setattr(inductor_utils, "get_donated_idxs", lambda: donated)
    lowering.scale_in_place(module)
    module.graph.lint()
    return bool(module.graph.find_nodes(op="call_function", target=SCALE))


def test_a_large_donated_gradient_is_scaled_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    module = backward_graph()
    assert rewritten(module, monkeypatch, [0])
    assert not module.graph.find_nodes(op="call_function", target=torch.ops.elmo.scaled.default)
    made = torch.randn(SIZES).bfloat16()
    wanted = (made.float() * 0.3).bfloat16()
    (result,) = module(made, torch.tensor(0.3))
    assert result is made
    torch.testing.assert_close(result, wanted, rtol=0, atol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": (1023, 1024)},
        {"shape": (), "factor": SIZES},
        {"factor": (1024,)},
        {"factor_dtype": torch.int64},
        {"dtype": torch.int32, "result": torch.float32},
        {"result": torch.float32},
        {"used_again": True},
        {"returned": False},
        {"turned": True},
        {"strides": "turned"},
    ],
)
def test_other_products_stay_inductor_s(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not rewritten(backward_graph(**changes), monkeypatch, [0])


@pytest.mark.parametrize("donated", [[], [1], None])
def test_what_is_not_the_backward_s_own_is_not_written(
    donated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not rewritten(backward_graph(), monkeypatch, donated)


@pytest.mark.parametrize("loss", ["bce", "ce"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_forward_s_gradient_is_the_parameter_s(
    loss: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No copy of it is made, and no pass over it where the upstream gradient is 1."""
    torch.manual_seed(0)
    encoder = torch.nn.Linear(16, 64, dtype=dtype)
    head = torch.nn.Linear(64, 20_000, dtype=dtype)

    def model(x: Tensor, y: Tensor) -> Tensor:
        z = head(torch.tanh(encoder(x)))
        if loss == "ce":
            return F.cross_entropy(z, y)
        targets = elmo_compile.multi_hot(y[:, None], z.shape[-1])
        return F.binary_cross_entropy_with_logits(z, targets, reduction="sum") / len(x)

    made: list[int] = []
    scaled: list[int] = []
    make, scale_ = host_memory.empty, aten.scale_

    def watched(*args: Any) -> Tensor:
        result = make(*args)
        if result.shape == head.weight.shape:
            made.append(result.data_ptr())
        return result

    def watched_scale(tensor: Tensor, factor: Tensor) -> None:
        before = tensor.clone()
        scale_(tensor, factor)
        scaled.append(int(not torch.equal(before, tensor)))

    monkeypatch.setattr(host_memory, "empty", watched)
    monkeypatch.setattr(aten, "scale_", watched_scale)
    step = torch.compile(model, backend="elmo", options={"memory_budget": "1GiB"})
    x, y = torch.randn(128, 16, dtype=dtype), torch.randint(20_000, (128,))
    parameters = [*head.parameters(), *encoder.parameters()]
    for factor, writes in ((1.0, 0), (0.3, 1)):
        for parameter in parameters:
            parameter.grad = None
        made.clear()
        scaled.clear()
        (step(x, y) * factor).backward()
        assert head.weight.grad is not None
        assert made == [head.weight.grad.data_ptr()]
        assert scaled == [writes]
        got = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        (model(x, y) * factor).backward()
        for found, parameter in zip(got, parameters, strict=True):
            assert found is not None
            assert parameter.grad is not None
            apart = (found.double() - parameter.grad.double()).norm()
            assert apart < (2e-2 if dtype == torch.bfloat16 else 1e-5) * parameter.grad.norm()
