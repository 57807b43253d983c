"""An optimizer's state: what is kept for a parameter, in which dtype, and where.

Shapes: a state has its parameter's shape; Adagrad's is one number a row. R rows, D columns of a
parameter seen as a matrix.
"""

from __future__ import annotations

import functools
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor

from elmo_compile.errors import OptionError
from elmo_compile.numerics.blockwise import Blockwise
from elmo_compile.numerics.formats import is_narrow
from elmo_compile.numerics.state_size import StateSize

DTYPES: dict[Any, Any] = {
    None: None, "float32": torch.float32, "bfloat16": torch.bfloat16, "8bit": "8bit",
    torch.float32: torch.float32, torch.bfloat16: torch.bfloat16,
}  # fmt: skip
"""What `state_dtype` may be, and what it means (None: by the weight's dtype)."""

_BLOCK, _LEAST_BLOCK = 256, 32
"""Elements that share a scale in 8-bit state, at most and at least."""
_LEAST_8BIT = 4096
"""Smaller parameters keep wide state, as in bitsandbytes and torchao."""
_MOST_FREQUENT = 0.05
"""Share of the rows that is compensated where only counts are given."""


def default_dtype(weight: torch.dtype) -> torch.dtype:
    """What state of a weight is stored in unless asked for otherwise."""
    if weight.itemsize == 1:
        return torch.bfloat16
    return torch.float32 if weight == torch.float16 else weight


def state_dtype(weight: torch.dtype, wanted: Any) -> torch.dtype:
    """The dtype of a plain state tensor; `wanted` as in `DTYPES`."""
    dtype = DTYPES[wanted]
    if weight == torch.float64 or weight.is_complex or not isinstance(dtype, torch.dtype):
        return default_dtype(weight)
    return dtype


def slot(
    held: dict[str, Any], name: str, param: Tensor, wanted: Any, *, signed: bool
) -> Tensor | Blockwise:
    """A state shaped like its parameter, zeros at first, where and as the parameter is now.

    Args:
        held: the parameter's state, which it is kept in (8 bits: as codes and, under `name` +
            "_scale", scales).
        wanted: a key of `DTYPES`.
        signed: whether values may be negative (8 bits have a table for each).
    """
    if wanted == "8bit" and _takes_8bit(param):
        return _blockwise_slot(held, name, param, signed)
    if f"{name}_scale" in held:
        held[name] = _decoded(held, name, param, signed)
    if name not in held:
        held[name] = torch.zeros_like(param, dtype=state_dtype(param.dtype, wanted))
    held[name] = held[name].to(param.device, state_dtype(param.dtype, wanted))
    found: Tensor = held[name]
    return found


def slot_size(name: str, param: Tensor, wanted: Any) -> StateSize:
    """The size of a `slot` of a matrix."""
    if wanted == "8bit" and _takes_8bit(param):
        return StateSize(name, torch.uint8, 1 + Fraction(4, _block_size(param)))
    dtype = state_dtype(param.dtype, wanted)
    return StateSize(name, dtype, Fraction(dtype.itemsize))


def compensated(group: dict[str, Any], param: Tensor) -> Literal["none", "some", "all"]:
    """Which rows of a parameter are compensated."""
    if not takes_compensation(param):
        return "none"
    named = group["kahan_rows"] is not None and param.dim() == 2
    if named and param.shape[0] == most_rows(group):
        return "some"
    return "all" if group["rounding"] == "kahan" else "none"


def compensation(
    held: dict[str, Any], group: dict[str, Any], param: Tensor
) -> tuple[Any, Tensor | None, Tensor | None]:
    """(rounding of the other rows, compensation, the rows it belongs to), made at first use."""
    rounding, rows, which = group["rounding"], group["kahan_rows"], compensated(group, param)
    other = "stochastic" if rounding == "kahan" else rounding
    if which == "none":
        return other, None, None
    if "compensation" not in held:
        some = which == "some"
        if some:
            held["kahan_rows"] = rows.to(param.device)
        like = param[: len(rows)] if some else param
        held["compensation"] = torch.zeros_like(like, dtype=group["compensation_dtype"])
    for name in ("compensation", "kahan_rows"):
        if name in held:
            held[name] = held[name].to(param.device)
    return other, held["compensation"], held.get("kahan_rows")


def compensation_sizes(group: dict[str, Any], param: Tensor) -> list[StateSize]:
    """The sizes of a matrix's compensation, and of the numbers of its rows."""
    which, dtype = compensated(group, param), group["compensation_dtype"]
    if which == "none":
        return []
    whole = StateSize("compensation", dtype, Fraction(dtype.itemsize))
    if which == "all":
        return [whole]
    rows = len(group["kahan_rows"])
    numbers = StateSize("kahan_rows", torch.int64, Fraction(8), rows=rows, columns=1)
    return [whole._replace(rows=rows), numbers]


def _blockwise_slot(held: dict[str, Any], name: str, param: Tensor, signed: bool) -> Blockwise:
    table, scales = _table(signed, param.device), f"{name}_scale"
    if scales not in held:
        wide = held.get(name)
        blocks = param.numel() // _block_size(param)
        zero = int((table == 0).nonzero()[0, 0])
        held[name] = torch.full_like(param, zero, dtype=torch.uint8)
        held[scales] = torch.zeros(blocks, dtype=torch.float32, device=param.device)
        if wide is not None:  # until now it was not stored in 8 bits
            values = wide.to(param.device, torch.float32)
            state, rows = Blockwise(held[name], held[scales], table), _rows_of(param)
            state.store(0, rows, values.reshape(rows, -1))
    for key in (name, scales):
        held[key] = held[key].to(param.device)
    return Blockwise(held[name], held[scales], table)


def _decoded(held: dict[str, Any], name: str, param: Tensor, signed: bool) -> Tensor:
    """State that is no longer stored in 8 bits, as values; its scales are dropped."""
    codes, scale = held[name], held.pop(f"{name}_scale").to(held[name].device)
    state = Blockwise(codes, scale, _table(signed, codes.device))
    return state.load(0, _rows_of(codes)).view(codes.shape)


def number_of_rows(param: Tensor) -> int:
    """Of a parameter seen as a matrix whose state is a number a row: [D] is D of them."""
    numbers = torch.view_as_real(param) if param.is_complex() else param
    columns = numbers.shape[-1] if numbers.dim() > 1 else 1
    return numbers.numel() // columns if columns else 0


def _rows_of(param: Tensor) -> int:
    return param.numel() // param.shape[-1]


@functools.cache
def _table(signed: bool, device: torch.device) -> Tensor:
    """The 256 values of the dynamic 8-bit type, ascending, as torchao has them."""
    from torchao.optim.quant_utils import create_dynamic_map

    return torch.tensor(create_dynamic_map(signed=signed), dtype=torch.float32, device=device)


def _takes_8bit(param: Tensor) -> bool:
    wide_enough = param.dim() >= 2 and param.numel() >= _LEAST_8BIT
    plain = param.is_contiguous() and param.dtype != torch.float64 and not param.is_complex()
    return wide_enough and plain and _block_size(param) >= _LEAST_BLOCK


def _block_size(param: Tensor) -> int:
    """The largest power of two that divides a row, at most 256: blocks do not cross rows."""
    size = 1
    while size < _BLOCK and param.shape[-1] % (2 * size) == 0:
        size *= 2
    return size


def takes_compensation(param: Tensor) -> bool:
    """Whether rounding loses anything of this parameter: bf16 and fp8."""
    return is_narrow(param.dtype)


def resolve_rows(given: Any, num_rows: int) -> Tensor:
    """The rows that `kahan_rows=` names, int64, ascending.

    Args:
        given: an int h (rows 0 to h - 1); a share in (0, 1] (of rows, from 0); row numbers (a list
            or 1-D integer tensor); counts (1-D, one for each row, not a permutation of the rows),
            of which the most frequent 5 % are meant; or (int or share, counts).
        num_rows: of the weight.

    Raises:
        OptionError: none of these, or a row out of range.
    """
    how_many, rest = None, given
    if isinstance(given, tuple) and len(given) == 2 and not isinstance(given[1], int | float):
        how_many, rest = given
    if isinstance(rest, int | float) and not isinstance(rest, bool):
        return torch.arange(_count(rest, num_rows), device="cpu")
    try:
        values = torch.as_tensor(rest).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise _bad_rows(given) from error
    if values.dim() != 1 or values.dtype in (torch.bool, torch.complex64):
        raise _bad_rows(given)
    numbered = not values.is_floating_point() and how_many is None
    if values.numel() == num_rows and not (numbered and _is_permutation(values)):
        count = _count(_MOST_FREQUENT if how_many is None else how_many, num_rows)
        order = torch.argsort(values, descending=True, stable=True)
        return order[:count].sort().values
    if not numbered:
        raise OptionError(
            f"kahan_rows: {values.numel()} counts were given for a weight of {num_rows} rows; "
            "accepted: one count for each row"
        )
    if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < num_rows:
        raise OptionError(
            f"kahan_rows holds rows from {int(values.min())} to {int(values.max())}; accepted: "
            f"0 to {num_rows - 1}, the rows of the group's largest weight"
        )
    found: Tensor = torch.unique(values.to(torch.int64))
    return found


def _is_permutation(values: Tensor) -> bool:
    numbers = torch.arange(values.numel(), device=values.device)
    return bool(torch.equal(values.sort().values.to(torch.int64), numbers))


def _count(wanted: Any, num_rows: int) -> int:
    if isinstance(wanted, float):
        if not 0.0 < wanted <= 1.0:
            raise _bad_rows(wanted)
        return max(1, round(wanted * num_rows))
    if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1:
        raise _bad_rows(wanted)
    return min(wanted, num_rows)


def _bad_rows(given: Any) -> OptionError:
    return OptionError(
        f"kahan_rows={given!r}; accepted: a number of rows, a share in (0, 1], row numbers, one "
        "count for each row, or a pair (number or share, counts)"
    )


def most_rows(group: dict[str, Any]) -> int:
    """Rows of the group's largest weight: the one that `kahan_rows` is about."""
    return max((p.shape[0] for p in group["params"] if p.dim() == 2), default=0)


def rows_of_group(group: dict[str, Any], params: list[Any], *, asked: bool) -> Tensor | None:
    """`kahan_rows` of a group as row numbers. Raises OptionError.

    Args:
        asked: whether it was given for this very group, which must have a matrix then.
    """
    tensors = [p[1] if isinstance(p, tuple) else p for p in params]
    rows = max((p.shape[0] for p in tensors if isinstance(p, Tensor) and p.dim() == 2), default=0)
    if not rows and not asked:
        return None
    if not rows:
        raise OptionError("kahan_rows was given for a group without a matrix")
    return resolve_rows(group["kahan_rows"], rows)
