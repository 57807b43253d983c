"""Turning a model's head into a low-precision one, and back."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from elmo_compile.config import Options
from elmo_compile.errors import ElmoError, OptionError
from elmo_compile.heads.low_precision import STORAGE_DTYPES, LowPrecisionLinear
from elmo_compile.numerics.philox import CONVERSION
from elmo_compile.numerics.rounding import round_nearest, stochastic_round
from elmo_compile.numerics.update import Rounding
from elmo_compile.ops.exclusion import Exclusion, is_excluded
from elmo_compile.ops.owners import owner_of

M = TypeVar("M", bound=nn.Module)
_BLOCK = 1 << 22
_log = logging.getLogger("elmo_compile")
_EXCLUSION = "_elmo_exclusion"
_TIED = "a weight that is also looked up cannot be stored in a narrow type; give the head its own"


def convert_head(
    model: M,
    dtype: torch.dtype,
    *,
    name: str | None = None,
    init: Literal["keep", "zeros"] = "keep",
    rounding: Rounding = "stochastic",
    seed: int = 0,
) -> M:
    """Store a model's head in bf16 or fp8: no float32 copy of its weight remains.

    `w <- round(w)`. The bias stays (or becomes) float32. Call it before the optimizer is made,
    since the head gets a new Parameter. The share of weights that was rounded to zero is logged
    (logger "elmo_compile") and kept as `head.rounded_to_zero`.

    Args:
        model: changed in place; its head is the nn.Linear with the most outputs.
        dtype: torch.bfloat16 or torch.float8_e4m3fn.
        name: the head's qualified name, where the largest nn.Linear is not meant.
        init: "keep" rounds the present weights; "zeros" starts from zero.
        rounding: "stochastic" or "nearest", of the conversion.
        seed: of the conversion's rounding.

    Returns:
        `model`; if `model` itself is the head, the new head.

    Raises:
        OptionError: unknown dtype, rounding, init or name.
        ElmoError: no head was found; it is tied, parametrised, or owned by an optimizer already.
    """
    if dtype not in STORAGE_DTYPES:
        accepted = ", ".join(map(str, STORAGE_DTYPES))
        raise OptionError(f"convert_head: dtype={dtype}; accepted: {accepted}")
    if rounding not in ("stochastic", "nearest"):
        raise OptionError(f"convert_head: rounding={rounding!r}; accepted: 'stochastic', 'nearest'")
    if init not in ("keep", "zeros"):
        raise OptionError(f"convert_head: init={init!r}; accepted: 'keep', 'zeros'")
    path, head = find_head(model, name)
    if name is None:
        _check_no_table_is_the_head(model, path, head.out_features)
    if isinstance(head, LowPrecisionLinear):
        where = path or "the head"
        raise ElmoError(f"convert_head: {where} is converted already, to {head.storage_dtype}")
    check_replaceable(model, path, head, "convert_head", "converted")
    new = LowPrecisionLinear.of(head, dtype)
    with torch.no_grad():
        lost = _fill(new.weight, None if init == "zeros" else head.weight, rounding, seed)
        if head.bias is not None:
            new.bias.copy_(head.bias)
    new.rounded_to_zero = lost
    if is_excluded(head.weight):
        exclude(new)
    if lost > 0:
        _log.warning(
            "convert_head: %.1f %% of the weights of %s were not zero and became zero in %s",
            100 * lost, path or "the head", dtype,
        )  # fmt: skip
    return replace_head(model, path, new)


def dequantize_head(model: M, dtype: torch.dtype = torch.float32, *, name: str | None = None) -> M:
    """Turn converted heads back into plain nn.Linear (exact for float32 and wider).

    The head gets a new Parameter: to train on, make a new optimizer. An `elmo_compile.optim` that
    owns the old one raises at its next step.

    Args:
        model: changed in place.
        dtype: of the new weight and bias.
        name: qualified name of one head; None: every converted head.

    Returns:
        `model`; if `model` itself is the head, the new nn.Linear.

    Raises:
        ElmoError: there is no converted head (of that name), or it has hooks; nothing is changed.
    """
    found = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, LowPrecisionLinear) and name in (None, path)
    ]
    if not found:
        where = "" if name is None else f" named {name!r}"
        raise ElmoError(f"dequantize_head: the model has no converted head{where}")
    for path, head in found:
        _refuse_hooks(head, path or "the head", "dequantize_head")
    for path, head in found:
        has_bias = head.bias is not None
        with torch.device("meta"):
            new = nn.Linear(head.in_features, head.out_features, bias=has_bias, dtype=dtype)
        new.weight = nn.Parameter(head.weight.detach().to(dtype), head.weight.requires_grad)
        if has_bias:
            new.bias = nn.Parameter(head.bias.detach().to(dtype), head.bias.requires_grad)
        new.train(head.training)
        owner = owner_of(head.weight)
        if owner is not None:
            owner.notice_replacement(new.weight)
        model = replace_head(model, path, new)
    return model


def exclude(module: M) -> M:
    """Keep the backend from rewriting heads whose weight belongs to this module.

    It follows the Parameters: a copy or an unpickled module is excluded as well, a Parameter put in
    later is not. The report lists the head with code `excluded`.

    Args:
        module: an nn.Linear, or anything that holds heads.

    Returns:
        `module`.
    """
    setattr(module, _EXCLUSION, Exclusion(module.parameters()))
    return module


def find_head(
    model: nn.Module, name: str | None, who: str = "convert_head"
) -> tuple[str, nn.Linear]:
    """The nn.Linear called `name`, or the one with the most outputs. Raises ElmoError."""
    linears = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    if name is not None:
        if name not in linears:
            table = name in dict(_embeddings(model))
            why = f" ({name!r} is an embedding: {_TIED})" if table else ""
            raise OptionError(
                f"{who}: no nn.Linear is called {name!r}{why}; there are: "
                f"{sorted(linears) or 'none'}"
            )
        return name, linears[name]
    if not linears:
        raise ElmoError(f"{who}: the model has no nn.Linear; name= another kind of head")
    path = max(linears, key=lambda p: linears[p].out_features)
    rivals = [p for p in linears if linears[p].out_features == linears[path].out_features]
    if len(rivals) > 1:
        raise ElmoError(f"{who}: {rivals} have equally many outputs; say which with name=")
    return path, linears[path]


def _embeddings(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Name and rows of each embedding."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            yield path, module.num_embeddings


def _check_no_table_is_the_head(model: nn.Module, path: str, outputs: int) -> None:
    """Raise ElmoError where the largest layer is no head, and an embedding may well be."""
    least = Options().min_outputs
    larger = [(table, rows) for table, rows in _embeddings(model) if rows >= least > outputs]
    if larger:
        raise ElmoError(
            f"convert_head: the largest nn.Linear, {path!r}, has {outputs} outputs, the embedding "
            f"{larger[0][0]!r} {larger[0][1]} rows. If that is the head, it is tied: {_TIED}. If "
            f"{path!r} is meant, say name={path!r}"
        )


def check_replaceable(model: nn.Module, path: str, head: nn.Linear, who: str, what: str) -> None:
    """Raise ElmoError where a head cannot be replaced by one of another class.

    Args:
        who: is to replace it.
        what: it would be then.
    """
    where = path or "the head"
    plain = type(head) in (nn.Linear, LowPrecisionLinear)
    if parametrize.is_parametrized(head) or not plain:
        raise ElmoError(
            f"{who}: {where} is a {type(head).__name__}; only a plain nn.Linear without "
            f"parametrisations can be {what}"
        )
    params = dict(head.named_parameters(recurse=False))
    for own, param in params.items():
        readers = [n for n, p in model.named_parameters(remove_duplicate=False) if p is param]
        if len(readers) > 1:
            raise ElmoError(
                f"{who}: the {own} of {where} is tied ({readers}); a head that is {what} must own "
                f"its {own}. Untie it first, e.g. "
                f"head.{own} = nn.Parameter(head.{own}.detach().clone())"
            )
    _refuse_hooks(head, where, who)
    if owner_of(head.weight) is not None:
        raise ElmoError(
            f"{who}: an optimizer owns the weight of {where} already; call it before "
            "constructing the optimizer"
        )


def _refuse_hooks(head: nn.Module, where: str, who: str) -> None:
    hooks: list[Any] = [
        head._forward_hooks,
        head._forward_pre_hooks,
        head._backward_hooks,
        head._backward_pre_hooks,
    ]
    for param in head.parameters(recurse=False):
        hooks += [param._backward_hooks, param._post_accumulate_grad_hooks]
    if any(hooks):
        raise ElmoError(f"{who}: {where} has hooks, which would be lost; remove them first")


def _fill(weight: Tensor, values: Tensor | None, rounding: Rounding, seed: int) -> float:
    """Round `values` into `weight`; the share that was not zero and became zero."""
    if weight.is_meta:
        return 0.0  # Its values are loaded later.
    if values is None:
        weight.copy_(torch.zeros((), device=weight.device))
        return 0.0
    lost = 0
    for rows, block in _row_blocks(values):
        if rounding == "stochastic":
            rounded = stochastic_round(
                block, weight.dtype, seed=seed, stream=CONVERSION, offset=rows.start
            )
        else:
            rounded = round_nearest(block, weight.dtype)
        weight[rows] = rounded
        lost += int(block.count_nonzero()) - _count_nonzero(rounded)  # zeros stay zeros
    return lost / max(1, values.numel())


def _count_nonzero(narrow: Tensor) -> int:
    """Elements of a bf16 or fp8 tensor that are not zero, by their bits but the sign."""
    signed = {1: torch.int8, 2: torch.int16}[narrow.dtype.itemsize]
    magnitude = narrow.view(signed) & torch.iinfo(signed).max
    return int(magnitude.count_nonzero())


def _row_blocks(values: Tensor) -> Iterator[tuple[slice, Tensor]]:
    rows = max(1, _BLOCK // max(1, values.shape[1]))
    for start in range(0, values.shape[0], rows):
        block = slice(start, min(start + rows, values.shape[0]))
        yield block, values[block]


def replace_head(model: M, path: str, new: nn.Module) -> M:
    if not path:
        return new  # type: ignore[return-value]
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
    return model
