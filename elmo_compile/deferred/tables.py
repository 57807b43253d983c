"""The operations on deferred logits that need not make their values, by meaning.

docs/logits.md shows them to users.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


def _methods(*names: str) -> set[Any]:
    """Methods of Tensor, and functions of torch by the same names."""
    methods = {found for name in names if (found := getattr(torch.Tensor, name, None))}
    public = [name for name in names if not name.startswith("__")]
    functions = {found for name in public if (found := getattr(torch, name, None))}
    return methods | {found for found in functions if callable(found)}  # torch.float is a dtype


COMPARISONS = _methods(
    "gt", "ge", "lt", "le", "eq", "ne", "__gt__", "__ge__", "__lt__", "__le__", "__eq__", "__ne__",
    "greater", "greater_equal", "less", "less_equal", "not_equal",
)  # fmt: skip
"""Have no gradient, whatever their arguments have."""

SCALES = COMPARISONS | _methods(
    "mul", "div", "add", "sub", "__mul__", "__rmul__", "__truediv__", "__add__", "__radd__",
    "__sub__", "multiply", "divide", "true_divide", "subtract",
)  # fmt: skip
"""Take a number that is a tensor to the program: an annealed temperature is one program."""

SELECTS = _methods("narrow", "select", "index_select", "__getitem__")
"""Rows, where they leave the outputs whole."""

ELEMENTWISE = SCALES | _methods(
    "neg", "negative", "__neg__", "__rsub__", "__rtruediv__", "sigmoid", "tanh", "exp",
    "log", "log1p", "expm1", "sqrt", "rsqrt", "square", "pow", "__pow__", "abs", "absolute",
    "__abs__", "reciprocal", "clamp", "clip", "clamp_min", "clamp_max", "relu", "sign",
    "nan_to_num", "masked_fill", "where", "maximum", "minimum", "isnan", "isinf",
    "isfinite", "logical_not", "__invert__", "bitwise_not",
) | {F.logsigmoid, F.softplus}  # fmt: skip
"""Each entry by itself, with numbers, and tensors that are small beside the logits."""

PLACES = _methods("scatter", "index_fill")
"""Write numbers at places among the outputs: items seen before."""

OTHER_VALUES = ELEMENTWISE | PLACES | {F.softmax, F.log_softmax, F.normalize} | _methods(
    "softmax", "log_softmax",
)  # fmt: skip
"""Whose largest entries do not follow from those of the logits."""

STAYS_DEFERRED = OTHER_VALUES | SELECTS | _methods(
    "float", "double", "half", "bfloat16", "to", "type", "contiguous", "clone", "view", "reshape",
    "flatten", "unflatten", "unsqueeze", "squeeze",
)  # fmt: skip
"""One tensor in, one out, and nothing read of it but by the next operation."""

PERMUTES = _methods(
    "transpose", "permute", "swapaxes", "swapdims", "movedim", "moveaxis", "t"
) | {getattr(torch.Tensor, name).__get__ for name in ("T", "mT")}  # fmt: skip
"""Order the dimensions anew."""

PARTS = _methods("split", "chunk", "tensor_split", "unbind", "__iter__")
"""Parts of the rows."""

AUTOCAST = {F.softmax, F.log_softmax, F.softplus} | _methods(
    "softmax", "log_softmax", "exp", "log", "log1p", "expm1", "pow", "__pow__", "reciprocal",
    "rsqrt",
)  # fmt: skip
"""Of these, what autocast runs in another dtype (float32, on CUDA)."""

LOSSES = {
    F.cross_entropy, F.nll_loss, F.binary_cross_entropy_with_logits, F.binary_cross_entropy,
    F.multi_margin_loss, F.multilabel_soft_margin_loss, F.soft_margin_loss, F.hinge_embedding_loss,
    F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.poisson_nll_loss, F.kl_div,
}  # fmt: skip
"""Fused where they are reduced to rows or a scalar."""

ROWS = _methods(
    "gather", "take_along_dim", "logsumexp", "sum", "mean", "std", "var", "norm", "amax", "amin",
    "any", "all", "count_nonzero",
) | {torch.linalg.vector_norm}  # fmt: skip
"""Parts of a loss written by hand, and metrics. Each would be an update of its own, so they stream
where no update is fused."""

TOPS = _methods("argmax", "topk", "max")
"""Answered by the largest values of each row."""

STORAGES = _methods("untyped_storage", "storage")

SHARES = STORAGES | _methods("numpy", "data_ptr", "__dlpack__", "__array__", "share_memory_")
"""Hand out memory that may be written to where torch does not count it."""

READS = SHARES | _methods(
    "tolist", "__deepcopy__", "__reduce_ex__", "__dlpack_device__", "__format__", "is_shared",
    "pin_memory", "is_set_to",
)  # fmt: skip
"""Python's ways around the dispatcher: they are given an ordinary tensor."""

CALLS_PYTHON = _methods("apply_", "map_", "map2_")
"""Write what a Python function makes of each value, around the dispatcher."""

DETACHES = _methods("detach")
"""Of a loss whose value is known: an ordinary tensor, as `torch.tensor([loss, ...])` needs it."""

WATCHES = _methods("register_hook", "retain_grad")
"""Ask for the gradient of the logits: from then on losses are taken of the values, and a loss that
was taken before is an error."""
