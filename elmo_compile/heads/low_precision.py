"""`LowPrecisionLinear`: an nn.Linear whose weight stays in bf16 or fp8."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from elmo_compile.errors import ElmoError
from elmo_compile.numerics.rounding import round_nearest
from elmo_compile.ops import linear  # registers elmo::lowp_linear
from elmo_compile.ops.linear import carry

_ROWS = 1 << 14
STORAGE_DTYPES = (torch.bfloat16, torch.float8_e4m3fn)
"""What a head can be stored in."""

WIDER = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""What a head's weight can be loaded from, beside its own dtype."""


class LowPrecisionLinear(nn.Linear):
    """z = x W^T + b with W stored in bf16 or fp8 and b in float32.

    Eagerly it widens the weight to the features' dtype a chunk of outputs at a time, and its weight
    gets a float32 `.grad`. Compiled with `backend="elmo"` it is rewritten together with its loss.
    `.to()`, `.half()` and the like move the weight but leave its dtype (and the bias's) as it is.

    Shapes: x [..., D], weight [L, D], bias [L], z [..., L].
    """

    storage_dtype: torch.dtype
    """What the weight is stored in, whatever the model is cast to."""
    rounded_to_zero: float
    """Share of the weights that the conversion made zero."""

    @classmethod
    def of(cls, head: nn.Linear, dtype: torch.dtype) -> LowPrecisionLinear:
        """A head shaped like `head` with uninitialised weights, on its device."""
        guard_against_torch_optim()
        with torch.device("meta"):
            new = cls(head.in_features, head.out_features, bias=head.bias is not None)
        new.storage_dtype, new.rounded_to_zero = dtype, 0.0
        device = head.weight.device
        new.weight = nn.Parameter(
            torch.empty(head.weight.shape, dtype=dtype, device=device),
            requires_grad=head.weight.requires_grad,
        )
        new.weight.grad_dtype = None
        if head.bias is not None:
            bias = torch.empty(head.bias.shape, dtype=torch.float32, device=device)
            new.bias = nn.Parameter(bias, requires_grad=head.bias.requires_grad)
        new.train(head.training)
        return new

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As nn.Module's: copied and unpickled heads do not come from `of`."""
        guard_against_torch_optim()
        super().__setstate__(state)  # type: ignore[no-untyped-call]

    def forward(self, input: Tensor) -> Tensor:
        """Logits [..., L] in the dtype of the features [..., D]."""
        self._check_storage()
        if torch.compiler.is_compiling():
            z: Tensor = torch.ops.elmo.lowp_linear.default(input, self.weight, self.bias, None)
            return z
        carrier = None
        if torch.is_grad_enabled() and self.weight.requires_grad:
            carrier = carry(self.weight)
        z = torch.ops.elmo.lowp_linear.default(input, self.weight.detach(), self.bias, carrier)
        return z

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> LowPrecisionLinear:
        """Apply a move or cast, but keep the storage dtypes."""
        super()._apply(keeping_dtype(fn), recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """As nn.Module's; wider weights are rounded to nearest and saturate on every device."""
        key = f"{prefix}weight"
        given = state_dict.get(key)
        if (
            isinstance(given, Tensor)
            and given.dtype in WIDER
            and not args[0].get("assign_to_params_buffers")
        ):
            state_dict = {**state_dict, key: rounded_to(given, self.storage_dtype)}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _check_storage(self) -> None:
        if self.weight.dtype != self.storage_dtype:
            raise ElmoError(
                f"the weight of a head converted to {self.storage_dtype} is {self.weight.dtype}: "
                "something replaced it (load_state_dict(assign=True)?). Load without assign=True, "
                "or convert it with elmo_compile.dequantize_head(model)"
            )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, storage_dtype={self.storage_dtype}"


@functools.cache
def guard_against_torch_optim() -> None:
    """Have torch's own optimizers raise, before they change anything, where they would fail at an
    fp8 weight with the parameters before it updated already."""
    register_optimizer_step_pre_hook(_refuse_fp8)


def _refuse_fp8(optimizer: Any, args: Any, kwargs: Any) -> None:
    if not getattr(type(optimizer).step, "__module__", "").startswith("torch.optim"):
        return
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if weight.dtype == torch.float8_e4m3fn and weight.grad is not None:
                name = type(optimizer).__name__
                raise ElmoError(
                    f"torch.optim.{name} cannot update a weight of shape {tuple(weight.shape)} "
                    "in torch.float8_e4m3fn; nothing was changed. Use elmo_compile.optim for the "
                    "whole model or for the head's parameters alone, or store the head in "
                    "bfloat16: elmo_compile.convert_head(model, dtype=torch.bfloat16)"
                )


def keeping_dtype(fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """What moves a tensor as `fn` does, but leaves its dtype."""

    def apply(tensor: Tensor) -> Tensor:
        # Only the device and layout of the result matter; fp8 data never takes part in a cast.
        probe = fn(torch.empty(0, dtype=torch.float32, device=tensor.device))
        if tensor.is_meta:
            return torch.empty_like(tensor, device=probe.device)
        moved = tensor.to(device=probe.device)
        if probe.is_shared() and not moved.is_shared():  # type: ignore[no-untyped-call]
            moved.share_memory_()  # type: ignore[no-untyped-call]
        return moved

    return apply


def rounded_to(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`round_nearest`, some rows at a time: its temporaries are several float32 copies."""
    out = torch.empty(values.shape, dtype=dtype, device=values.device)
    for rows, block in zip(torch.split(out, _ROWS), torch.split(values, _ROWS)):
        rows.copy_(round_nearest(block, dtype))
    return out


__all__ = ["STORAGE_DTYPES", "LowPrecisionLinear", "linear"]
