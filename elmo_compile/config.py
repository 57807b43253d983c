"""The options of the backend: one frozen record, validated where it is made."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import hashlib
import inspect
import itertools
import math
import re
import textwrap
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import torch

from elmo_compile.errors import OptionError

_T = TypeVar("_T")
Lower = Literal["inductor", "eager"]
LossValue = Literal["auto", "exact", "deferred"]

COMPUTE_DTYPES = (
    torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32, torch.float64,
)  # fmt: skip
"""Operand dtypes the matrix products of a head can have."""

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS[f"{_letter}IB"] = 1024**_power
    _UNITS[f"{_letter}B"] = 1000**_power
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]*)\s*")


def _with_field_docs(cls: type[_T]) -> type[_T]:
    """Add the string under each field to the class's own, where `help` shows it."""
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    except OSError:  # installed without its source
        return cls
    assert isinstance(tree, ast.ClassDef)
    lines = [inspect.cleandoc(cls.__doc__ or ""), "", "Fields:"]
    for field, text in itertools.pairwise(tree.body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            assert isinstance(text.value, ast.Constant)
            words = " ".join(str(text.value.value).split())
            lines.append(f"    {ast.unparse(field.target)} ({ast.unparse(field.annotation)}):")
            lines += textwrap.wrap(words, 88, initial_indent=8 * " ", subsequent_indent=8 * " ")
    cls.__doc__ = "\n".join(lines)
    return cls


@_with_field_docs
@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What `torch.compile(model, backend="elmo", options=...)` accepts.

    Raises:
        OptionError: a value is of the wrong type or out of its range.
    """

    min_outputs: int = 16384
    """A head with fewer outputs (last dimension of the logits) is left alone; at least 1."""
    memory_budget: int | str | None = None
    """Upper bound, in bytes or as "512MiB", "1.5GiB", "300MB", on the temporaries of one step of a
    head; stored as int. None: the planner's choice."""
    chunk_size: int | None = None
    """Outputs per chunk, at least 1; more than the head has means all of them. None: the planner's
    choice. Given, it wins over `memory_budget`."""
    compute_dtype: torch.dtype | str | None = None
    """Operand dtype of the matrix products, as torch.dtype or its name ("bfloat16"); stored as
    torch.dtype. None: by storage dtype and device. `float8_e4m3fn`, for heads stored so: features
    are rounded to E4M3 too, each row with a scale that is a power of two, for the losses with
    kernels of their own and all their gradients; chips with fp8 products (sm_89 and newer) take
    them for the logits, others the same numbers in bf16. Never chosen by default."""
    loss_value: LossValue = "auto"
    """When the number is computed. `exact`: in forward, by a product of its own. `deferred`: NaN
    until backward() fills it in, one product less with a fused update. `auto`: a tensor that
    computes itself, by the product of its own, if it is read before backward(), and is filled in
    for nothing otherwise; `exact` where the loss is not returned as it is."""
    deferred_logits: Literal["auto"] | bool = "auto"
    """What happens to logits that leave the graph. `auto`: they are deferred; if someone still
    holds them when the weight changes, they are kept whole up to `memory_budget` (64 MiB where not
    given), beyond it the argmax and the five largest of each row. True: only the latter are kept.
    False: the head is left alone, and the report names the reader."""
    lower: Lower = "inductor"
    """What compiles the rest of the graph: `inductor`, or `eager` to run it as it is."""
    mode: str | None = None
    """Inductor's mode ("reduce-overhead", ...), since torch.compile forbids `mode=` together with
    `options=`."""
    inductor: Mapping[str, Any] | None = None
    """Inductor config entries passed on as they are; stored read-only."""
    strict: bool = False
    """Raise NotRewritten, listing every refusal, if a candidate head was not rewritten."""

    def __post_init__(self) -> None:
        """Check every field; parse sizes and dtypes into what the fields promise."""
        _require_count("min_outputs", self.min_outputs)
        if self.chunk_size is not None:
            _require_count("chunk_size", self.chunk_size)
        if self.memory_budget is not None:
            object.__setattr__(self, "memory_budget", parse_bytes(self.memory_budget))
        if self.compute_dtype is not None:
            object.__setattr__(self, "compute_dtype", _parse_dtype(self.compute_dtype))
        _check_loss_value(self.loss_value)
        _check_deferred_logits(self.deferred_logits)
        _require_choice("lower", self.lower, ("inductor", "eager"))
        if not (self.mode is None or isinstance(self.mode, str)):
            raise _bad("mode", self.mode, "a string such as 'reduce-overhead', or None")
        object.__setattr__(self, "inductor", _freeze_inductor(self.inductor))
        if not isinstance(self.strict, bool):
            raise _bad("strict", self.strict, "True or False")

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any] | Options | None) -> Options:
        """Options from what `torch.compile(options=...)` was given.

        Args:
            options: field names and values, an Options (returned as it is), or None (defaults).

        Raises:
            OptionError: an unknown key (the nearest valid one is named) or a bad value.
        """
        if isinstance(options, cls):
            return options
        if options is None:
            return cls()
        if not isinstance(options, Mapping):
            raise _bad("options", options, "a dict, elmo_compile.Options or None")
        valid = [field.name for field in dataclasses.fields(cls)]
        for key in options:
            if key not in valid:
                raise OptionError(_unknown_key(key, valid))
        return cls(**options)

    @property
    def budget_bytes(self) -> int | None:
        """`memory_budget` as parsed."""
        return self.memory_budget if isinstance(self.memory_budget, int) else None

    @property
    def compute(self) -> torch.dtype | None:
        """`compute_dtype` as parsed."""
        return self.compute_dtype if isinstance(self.compute_dtype, torch.dtype) else None

    def cache_tag(self) -> str:
        """A short string, equal for equal options in every process, for cache keys."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["inductor"] = sorted((self.inductor or {}).items())
        return "elmo-" + hashlib.sha256(repr(sorted(values.items())).encode()).hexdigest()[:12]

    def __hash__(self) -> int:
        return hash(self.cache_tag())

    def __reduce__(self) -> tuple[Any, ...]:
        # A mappingproxy cannot be pickled or deep-copied; the mapping it was made from can.
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["inductor"] = None if self.inductor is None else dict(self.inductor)
        return Options.from_mapping, (values,)


def parse_bytes(size: int | str) -> int:
    """A size in bytes from an int or from text such as "512MiB" (1024) or "300MB" (1000).

    Raises:
        OptionError: not a finite number of bytes of at least 1.
    """
    accepted = 'bytes as a positive int, or text such as "512MiB", "1.5GiB" or "300MB"'
    if isinstance(size, bool) or not isinstance(size, (int, str)):
        raise _bad("memory_budget", size, accepted)
    value: float = 0
    if isinstance(size, int):
        value = size
    elif (found := _SIZE.fullmatch(size)) and found[2].upper() in _UNITS:
        value = float(found[1]) * _UNITS[found[2].upper()]
    if not (math.isfinite(value) and value >= 1):
        raise _bad("memory_budget", size, accepted)
    return int(value)


def _parse_dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = dtype
    if isinstance(dtype, str):
        found = getattr(torch, dtype.removeprefix("torch."), dtype)
    if isinstance(found, torch.dtype) and found in COMPUTE_DTYPES:
        return found
    names = ", ".join(str(accepted) for accepted in COMPUTE_DTYPES)
    raise _bad("compute_dtype", dtype, f"one of {names} (or its name), or None")


def _check_loss_value(value: object) -> None:
    _require_choice("loss_value", value, ("auto", "exact", "deferred"))


def _check_deferred_logits(value: object) -> None:
    if not (isinstance(value, bool) or value == "auto"):
        raise _bad("deferred_logits", value, "'auto', True or False")


def _freeze_inductor(inductor: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    if inductor is None:
        return None
    if not isinstance(inductor, Mapping) or not all(isinstance(key, str) for key in inductor):
        raise _bad("inductor", inductor, "a dict of Inductor config names to values, or None")
    return MappingProxyType(dict(inductor))


def _require_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _bad(name, value, "an int of at least 1")


def _require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise OptionError(str(_bad(name, value, " or ".join(map(repr, choices)))) + hint)


def _bad(name: str, value: object, accepted: str) -> OptionError:
    return OptionError(f"{name}={value!r} cannot be used; accepted: {accepted}.")


def _unknown_key(key: object, valid: list[str]) -> str:
    near = difflib.get_close_matches(str(key), valid, n=1, cutoff=0.0)[0]
    return f"unknown option {key!r}; did you mean {near!r}? Accepted: {', '.join(valid)}."
