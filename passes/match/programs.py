"""Any loss: what follows the logits as a program over chunks of outputs.

Requires: an ATen region from `retrace` that no rule of its own understood.
Ensures: a ProgramMatch, its program registered in this process, or a Refusal naming the operation
that cannot be done in chunks.
Numerics: everything computed from logits is computed in float32 (float64 for float64).
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.fx as fx

from elmo_compile.numerics.losses import LossName, LossSpec
from elmo_compile.passes.graphs import ancestors, args_of, hint, source_of, tensor_of
from elmo_compile.passes.match import linear
from elmo_compile.passes.match.refuse import NoMatch
from elmo_compile.passes.match.state import Kind, Logits
from elmo_compile.passes.records import AtenRegion, ProgramMatch
from elmo_compile.programs.build import build
from elmo_compile.programs.record import Program, Unsupported
from elmo_compile.report.records import Code, Refusal

aten = torch.ops.aten

_LOSSES = (
    "cross_entropy_loss", "binary_cross_entropy_with_logits", "nll_loss_nd", "nll_loss",
    "binary_cross_entropy", "multi_margin_loss", "multilabel_margin_loss", "soft_margin_loss",
    "kl_div", "mse_loss", "l1_loss", "huber_loss", "smooth_l1_loss", "poisson_nll_loss",
    "hinge_embedding_loss",
)  # fmt: skip
_NAMES = {"cross_entropy_loss": "cross_entropy", "nll_loss_nd": "nll_loss"}
_ROW_WISE = frozenset({"logsumexp", "log_softmax", "softmax", "_log_softmax", "_softmax", "amax",
                       "max", "gather", "argmax"})  # fmt: skip


def match_program(aten_region: AtenRegion) -> ProgramMatch | Refusal:
    """The region as a program, or the operation that stands in the way."""
    region = aten_region.region
    try:
        return _match(aten_region)
    except NoMatch as no:
        return no.refusal(region.seed)
    except Unsupported as no:
        node = no.node if no.node is not None else region.seed
        return Refusal(
            code=Code.UNKNOWN_LOSS,
            node=f"{node.name} ({getattr(node.target, '__name__', node.target)})",
            source=source_of(no.node) or source_of(region.seed),
            reason=no.reason,
            remedy=no.remedy,
        )


def _match(aten_region: AtenRegion) -> ProgramMatch:
    region, module = aten_region.region, aten_region.module
    if region.grad_enabled is None:
        raise NoMatch(
            Code.UNKNOWN_LOSS, region.seed, "gradients are switched on or off inside this region",
            "keep the head and its loss in one grad mode: what reads logits made under no_grad "
            "belongs into the no_grad block",
        )  # fmt: skip
    products = _products(aten_region)
    if not products:
        raise NoMatch(
            Code.UNKNOWN_LOSS, region.seed, "the product with the weight is not understood",
            "use nn.Linear, F.linear or x @ w.t()",
        )  # fmt: skip
    found = list(products.values())
    special = [node.target in linear.HEAD_OPS for node in products]
    if any(special) and len(special) > 1:
        raise NoMatch(
            Code.UNKNOWN_LOSS, region.seed,
            "one of two heads of a loss is stored in bf16 or fp8, or spread over processes",
            "store both in float32 or bfloat16 as ordinary linear layers",
        )  # fmt: skip
    weights = [logits.weight for logits in found]
    _check_features(products)
    _check_weights(aten_region, found)
    places = list(module.graph.find_nodes(op="placeholder"))
    biases = {logits.bias for logits in found}
    operands = {n for logits in found for n in (logits.x, logits.weight)} - biases
    wanted = [
        i
        for i, node in enumerate(places)
        if node not in operands and node.users and aten_region.requires_grad(node)
        and cast(Any, tensor_of(node)).is_floating_point()
    ]  # fmt: skip
    seed = tensor_of(region.seed)
    compute = found[0].compute_dtype if seed is None else seed.dtype
    if compute not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise NoMatch(
            Code.UNSUPPORTED_DTYPE, region.seed, f"products in {compute}", "use bfloat16 or float32"
        )
    x = tensor_of(found[0].x)
    assert x is not None
    with torch.fx.traceback.preserve_node_meta():
        program = build(
            module, list(products), num_outputs=region.num_outputs, name=_name(module),
            wanted=wanted, grad=bool(region.grad_enabled), mode=_fake_mode(places),
            work=torch.float64 if compute == torch.float64 else torch.float32,
        )  # fmt: skip
    _check_dtypes(aten_region, program)
    return ProgramMatch(
        aten=aten_region,
        program=program,
        loss=LossSpec(name=cast(LossName, program.name), targets="classes", reduction="none"),
        xs=tuple(logits.x for logits in found),
        weights=tuple(weights),
        num_features=hint(x.shape[-1]),
        compute_dtype=compute,
        logits_upcast=False,
        rows=x.numel() // hint(x.shape[-1]),
        bias=found[0].bias,
    )


def _products(aten_region: AtenRegion) -> dict[fx.Node, Logits]:
    """The products with a weight of num_outputs rows, in graph order."""
    L, kinds = aten_region.region.num_outputs, dict[fx.Node, Kind]()
    found: dict[fx.Node, Logits] = {}
    for node in aten_region.module.graph.nodes:
        if node.op != "call_function":
            continue
        view = linear.weight_view(node, kinds, L)
        if view is not None:
            kinds[node] = view
            continue
        out = tensor_of(node)
        if out is None or out.ndim == 0 or hint(out.shape[-1]) != L:
            continue
        if not _multiplies(node):
            continue
        logits = linear.linear_head(node, kinds, L)
        if isinstance(logits, Logits):
            found[node] = logits
    return found


def _multiplies(node: fx.Node) -> bool:
    return node.target in (
        aten.linear.default, aten.matmul.default, aten.mm.default, aten.addmm.default,
        aten.einsum.default, *linear.HEAD_OPS,
    )  # fmt: skip


def _check_features(products: dict[fx.Node, Logits]) -> None:
    """No product may multiply what is made from logits: they would be made whole for it."""
    for product, logits in products.items():
        if not products.keys().isdisjoint(ancestors(logits.x)):
            raise NoMatch(
                Code.UNKNOWN_LOSS, product,
                "the features of this head are made from the logits of another",
                "compute the two heads in compiled functions of their own",
            )  # fmt: skip


def _check_weights(aten_region: AtenRegion, found: list[Logits]) -> None:
    for logits in found:
        weight = tensor_of(logits.weight)
        if logits.weight.op != "placeholder" or weight is None:
            raise NoMatch(
                Code.WEIGHT_COMPUTED, aten_region.region.seed,
                "the head's weight is computed next to the head",
                "use a plain Parameter of shape [num_outputs, num_features]",
            )  # fmt: skip
        for size in weight.shape:
            int(size)  # A symbolic one becomes a constant that Dynamo guards.


def _check_dtypes(aten_region: AtenRegion, program: Program) -> None:
    """Every result of the region must be a tensor."""
    for node in aten_region.region.outputs:
        if tensor_of(node) is None:
            raise NoMatch(
                Code.UNKNOWN_LOSS, node, "a part of a tuple is made from the logits",
                "take the tuple apart inside the compiled function",
            )  # fmt: skip


def _fake_mode(places: list[fx.Node]) -> Any:
    tensors: list[Any] = [tensor_of(node) for node in places]
    return next(tensor.fake_mode for tensor in tensors if hasattr(tensor, "fake_mode"))


def _name(module: fx.GraphModule) -> str:
    """The loss as torch.nn.functional names it, else `separable` or `row_wise`, or `topk`."""
    names = [str(getattr(n.target, "_opname", "")) for n in module.graph.nodes]
    for loss in _LOSSES:
        if loss in names:
            return _NAMES.get(loss, loss)
    reads_labels = any(args_of(n) for n in module.graph.nodes)
    if reads_labels and "topk" in names:
        return "topk"
    return "row_wise" if _ROW_WISE & set(names) else "separable"
