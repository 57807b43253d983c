"""Random expressions of logits: operations, what each is applied to, and its other arguments.

An operation that eager torch refuses is left out, so an expression is what torch computes.
"""

from __future__ import annotations

import linecache
from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Apply = Callable[..., Any]
MOST = 60_000
"""Numbers of a result."""


class Step(NamedTuple):
    """One operation, and the places of its operands among all results before it."""

    name: str
    operands: tuple[int, ...]
    apply: Apply

    def __str__(self) -> str:
        return f"{self.name}{self.operands} {_source(self.apply)}"


def _source(apply: Apply) -> str:
    """What a lambda says, or that which it calls."""
    code = getattr(apply, "__code__", None)
    if code is not None and "f" in code.co_freevars:
        inner = apply.__closure__[code.co_freevars.index("f")]  # type: ignore[attr-defined]
        return _source(inner.cell_contents)
    if code is None or code.co_filename != __file__:
        return str(getattr(apply, "__name__", apply))
    places = [place for place in code.co_positions() if place[0] and (place[2] or place[3])]
    lines = {place[0] for place in places}
    if len(lines) > 1:
        return f"{code.co_name}, lines {min(lines)} to {max(lines)}"
    line = linecache.getline(__file__, lines.pop()).encode()
    return line[min(place[2] for place in places) : max(place[3] for place in places)].decode()


PLAIN: list[Apply] = [
    torch.exp, torch.sigmoid, torch.tanh, F.relu, F.softplus, F.logsigmoid, torch.square, torch.abs,
    torch.neg, torch.sign, torch.floor, torch.round, torch.trunc, torch.frac, torch.erf, torch.sin,
    torch.expm1, torch.isnan, torch.isfinite, torch.nan_to_num, torch.clone, torch.detach,
    torch.flatten, torch.squeeze, torch.zeros_like, torch.diagonal, torch.tril, torch.aminmax,
    F.gelu, F.silu, F.mish, F.relu6, F.hardtanh, F.elu, torch.t, torch.mean, torch.sum, torch.std,
    torch.max, torch.min, torch.norm, torch.argmax, torch.unbind, torch.trapezoid,
    lambda a: a.abs().sqrt(), lambda a: a.abs().log1p(), lambda a: 1 - a, lambda a: 1 / (a + 7),
    lambda a: a**2, lambda a: a.pow(3), lambda a: 2**a, lambda a: a // 0.3, lambda a: a % 0.7,
    lambda a: a.clamp(-1, 1), lambda a: a.clamp(min=0.1), lambda a: F.leaky_relu(a, 0.1),
    lambda a: a.float(), lambda a: a.double(), lambda a: a.contiguous(), lambda a: a.type_as(a),
    lambda a: a.to(torch.float64, copy=True), lambda a: ~(a > 0), lambda a: torch.logaddexp(a, -a),
    lambda a: torch.xlogy(a.abs(), a.abs() + 1), lambda a: torch.logit(a.sigmoid()),
    lambda a: torch.where(a > 0, a, 0.0), lambda a: torch.where(a > 0.3, a, a.new_zeros(())),
    lambda a: a.mT, lambda a: a.transpose(0, 1), lambda a: a.flatten(0, 1), lambda a: a[None],
    lambda a: a.reshape(-1, a.shape[-1]), lambda a: a.unsqueeze(1), lambda a: a[..., None],
    lambda a: a[0], lambda a: a[-1], lambda a: a[1:], lambda a: a[:-1], lambda a: a[::2],
    lambda a: a[..., 0], lambda a: a[..., 3:], lambda a: a[..., :-5], lambda a: a[..., ::2],
    lambda a: a[..., 1:] - a[..., :-1], lambda a: a.split(2), lambda a: a.chunk(2),
    lambda a: torch.empty_like(a).copy_(a), lambda a: torch.full_like(a, 2.0) * a,
    lambda a: torch.einsum("...l->...", a), lambda a: torch.einsum("...l,...l->...", a, a),
    lambda a: a.flatten(0, -2)[:, None, :4] * a.flatten(0, -2)[None, :, :4],
    lambda a: torch.hstack((a, a)), lambda a: (a > 1).any(-1), lambda a: (a > -3).all(),
    lambda a: F.normalize(a, dim=-1), lambda a: F.layer_norm(a, a.shape[-1:]),
    lambda a: a.quantile(0.3, -1), lambda a: a.argsort(-1),
]  # fmt: skip
BREAKING: list[Apply] = [
    lambda a: list(a), lambda a: torch.tensor(a.detach().tolist()), lambda a: a[a > 2.0],
    lambda a: torch.tensor(a.flatten()[0].item()), lambda a: a.detach().unique(),
    lambda a: (a > 2.5).nonzero(), lambda a: a[a[..., 0] > 0], lambda a: torch.equal(a, a),
]  # fmt: skip
"""What breaks a graph: its shape, or what Python does next, depends on values."""
ALONG: list[Callable[[Tensor, int], Any]] = [
    torch.softmax, torch.log_softmax, torch.argmax, torch.argmin, torch.cumsum, F.softmin,
    torch.logcumsumexp, torch.unbind,
    lambda a, d: a.max(d), lambda a, d: a.min(d).values, lambda a, d: a.topk(2, d).values,
    lambda a, d: a.topk(2, d, largest=False).values, lambda a, d: a.sort(d).values,
    lambda a, d: a.median(d).values, lambda a, d: a.kthvalue(2, d).values,
    lambda a, d: a.cummax(d).values, lambda a, d: a.flip(d), lambda a, d: a.roll(1, d),
    lambda a, d: torch.cat((a, a), d), lambda a, d: torch.stack((a, a), d),
    lambda a, d: (a > 0).count_nonzero(d), lambda a, d: a.diff(dim=d),
    lambda a, d: a.repeat_interleave(2, d), lambda a, d: a.narrow(d, 1, 2),
    lambda a, d: a.select(d, 1), lambda a, d: a - a.logsumexp(d, keepdim=True),
    lambda a, d: a - a.mean(d, keepdim=True), lambda a, d: a.unflatten(d, (2, -1)),
    lambda a, d: a.index_select(d, torch.tensor([1, 0, 1])), lambda a, d: a.tensor_split(3, d),
    lambda a, d: a.movedim(d, 0), lambda a, d: a.swapaxes(d, 0),
    lambda a, d: a.index_add(d, torch.tensor([0]), a.narrow(d, 1, 1)),
    lambda a, d: a.index_fill(d, torch.tensor([0, 2]), -2.0),
]  # fmt: skip
REDUCED: list[Callable[[Tensor, int, bool], Any]] = [
    torch.sum, torch.logsumexp, torch.amax, torch.argmax, torch.nansum,
    lambda a, d, k: a.mean(d, keepdim=k), lambda a, d, k: a.amin(d, keepdim=k),
    lambda a, d, k: a.var(d, keepdim=k), lambda a, d, k: a.std(d, unbiased=False, keepdim=k),
    lambda a, d, k: a.norm(dim=d, keepdim=k), lambda a, d, k: torch.var_mean(a, d, keepdim=k),
    lambda a, d, k: torch.linalg.vector_norm(a, 1, d, k),
    lambda a, d, k: (a / 4).tanh().narrow(d, 0, 2).prod(d, k),
]  # fmt: skip
WITH_NUMBER: list[Callable[[Tensor, float], Tensor]] = [
    torch.mul, torch.div, torch.sub, lambda a, c: c + a, lambda a, c: a > c, torch.minimum,
    lambda a, c: torch.add(a, a.detach(), alpha=c),
]  # fmt: skip
WITH_LARGE: list[Callable[[Tensor, Tensor], Any]] = [
    torch.add, torch.mul, torch.maximum, torch.gt, lambda a, v: v - a,
    lambda a, v: torch.where(a > v, a, v), lambda a, v: a.masked_fill(v > 1, -3.0),
    lambda a, v: torch.where(v > 0, a, -9.0), lambda a, v: a * (v > 0),
]  # fmt: skip
"""With a tensor of one row, of one number a row, or of the size of the logits."""
WITH_ROWS: list[Callable[[Tensor, Tensor], Any]] = [
    lambda a, i: a[i], lambda a, i: a[i.tolist()], lambda a, i: a[i[0]], lambda a, i: a[..., i, :],
    lambda a, i: a[None, i], lambda a, i: a[-2:, ..., :7],
]  # fmt: skip
WITH_LABELS: list[Callable[[Tensor, Tensor], Any]] = [
    lambda a, y: a.gather(-1, y), lambda a, y: torch.take_along_dim(a, y, -1),
    lambda a, y: a > a.gather(-1, y[..., :1]), lambda a, y: a.scatter(-1, y, -7.0),
    lambda a, y: (a >= a.gather(-1, y[..., :1])).sum(-1), lambda a, y: a.softmax(-1).gather(-1, y),
    lambda a, y: a.scatter_add(-1, y, torch.ones_like(y, dtype=a.dtype)),
    lambda a, y: a - a.gather(-1, y[..., :1]), lambda a, y: a.log_softmax(-1).gather(-1, y),
    lambda a, y: a[torch.arange(len(a)), y.reshape(len(a), -1)[:, 0]],
    lambda a, y: a.scatter(-1, y, torch.zeros_like(y, dtype=a.dtype)),
]  # fmt: skip
CLASS_LOSSES: list[Callable[[Tensor, Tensor, Tensor, str], Tensor]] = [
    lambda a, y, w, how: F.cross_entropy(a, y, reduction=how),
    lambda a, y, w, how: F.cross_entropy(a, y, label_smoothing=0.2, reduction=how),
    lambda a, y, w, how: F.cross_entropy(a, y, weight=w, label_smoothing=0.1, reduction=how),
    lambda a, y, w, how: F.nll_loss(a.log_softmax(1), y, weight=w, reduction=how),
    lambda a, y, w, how: F.multi_margin_loss(a, y.clamp(min=0), reduction=how),
]
DENSE_LOSSES: list[Callable[[Tensor, Tensor, str], Tensor]] = [
    lambda a, v, how: F.binary_cross_entropy_with_logits(a, (v > 1).double(), reduction=how),
    lambda a, v, how: F.binary_cross_entropy(a.sigmoid(), (v > 1).double(), reduction=how),
    lambda a, v, how: F.binary_cross_entropy_with_logits(
        a, (v > 1).double(), pos_weight=v[..., :1, :].flatten(0, -2)[0].exp(), reduction=how
    ),
    lambda a, v, how: F.mse_loss(a, v, reduction=how),
    lambda a, v, how: F.mse_loss(v, a, reduction=how),
    lambda a, v, how: F.l1_loss(a, v, reduction=how),
    lambda a, v, how: F.huber_loss(a, v, reduction=how),
    lambda a, v, how: F.smooth_l1_loss(a, v, reduction=how),
    lambda a, v, how: F.kl_div(a.log_softmax(-1), v.softmax(-1), reduction=how),
    lambda a, v, how: F.kl_div(v.log_softmax(-1), a.softmax(-1), reduction=how),
    lambda a, v, how: F.cross_entropy(a, v.softmax(-1), reduction=how),
    lambda a, v, how: F.soft_margin_loss(a, v.sign(), reduction=how),
    lambda a, v, how: F.multilabel_soft_margin_loss(a, (v > 1).double(), reduction=how),
    lambda a, v, how: F.hinge_embedding_loss(a, v.sign(), reduction=how),
    lambda a, v, how: F.poisson_nll_loss(a, (v > 1).double(), reduction=how),
]
PRODUCTS: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda a, v: a @ v, lambda a, v: F.linear(a, v.t()), lambda a, v: a.softmax(-1) @ v,
    lambda a, v: a @ v[:, 0], lambda a, v: torch.einsum("...l,lk->...k", a, v),
]  # fmt: skip
TWO: list[Callable[[Tensor, Tensor], Any]] = [
    torch.add, torch.mul, torch.sub, torch.maximum, torch.gt, torch.le, torch.atan2, F.mse_loss,
    lambda a, b: a / (b.abs() + 1), lambda a, b: torch.where(a > b, a, b),
    lambda a, b: torch.add(a, b, alpha=0.3), lambda a, b: torch.lerp(a, b, 0.2),
    lambda a, b: F.mse_loss(a, b.detach()), lambda a, b: torch.cat((a, b), -1),
    lambda a, b: F.kl_div(a.log_softmax(-1), b.detach().softmax(-1), reduction="batchmean"),
    lambda a, b: torch.cat((a, b)), lambda a, b: torch.stack((a, b)), lambda a, b: a * b.detach(),
    lambda a, b: F.cross_entropy(a, b.softmax(-1)), lambda a, b: F.cosine_similarity(a, b, dim=-1),
    lambda a, b: a @ b.mT, lambda a, b: torch.addcmul(a, a, b), lambda a, b: (a * b).sum(-1),
    lambda a, b: torch.where(b > 0, a, 0.0), lambda a, b: a.masked_fill(b > 1, -3.0),
    lambda a, b: torch.einsum("...l,...l->...", a, b), lambda a, b: a.view_as(b),
    lambda a, b: a.expand_as(b), lambda a, b: a.pow(b.clamp(0, 2)), lambda a, b: a.mean() * b,
    lambda a, b: F.margin_ranking_loss(a, b, torch.ones_like(a), margin=0.1),
    lambda a, b: a.gather(-1, b.argmax(-1, keepdim=True)), lambda a, b: a[b.argmax(0)],
    lambda a, b: a.lerp(b, b.sigmoid()), lambda a, b: torch.stack((a.mean(), b.mean())),
]  # fmt: skip
WRITES: list[Callable[[Tensor, Tensor], Any]] = [
    lambda a, v: a.mul_(2.0), lambda a, v: a[..., 1].fill_(-4.0), lambda a, v: a[0].copy_(v),
    lambda a, v: a.masked_fill_(v > 1, -6.0), lambda a, v: a.clamp_(-1.5, 1.5),
    lambda a, v: a.add_(v), lambda a, v: a[1:].mul_(3), lambda a, v: a.copy_(v),
    lambda a, v: a.add_(a), lambda a, v: torch.mul(v, 2, out=torch.empty_like(a)),
]  # fmt: skip


def normal(r: Random, *shape: int) -> Tensor:
    make = torch.Generator().manual_seed(r.randrange(2**31))
    return torch.randn(shape, generator=make, dtype=torch.float64)


def labels(r: Random, outputs: int, *shape: int) -> Tensor:
    make = torch.Generator().manual_seed(r.randrange(2**31))
    return torch.randint(0, outputs, shape, generator=make)


def dim_of(r: Random, a: Tensor) -> int:
    return -1 if r.random() < 0.6 else r.randrange(-a.dim(), a.dim())


def with_large(r: Random, a: Tensor) -> Apply:
    of = r.choice([a.shape[-1:], (*a.shape[:-1], 1), a.shape])
    f, v = r.choice(WITH_LARGE), normal(r, *of)
    return lambda a: f(a, v)


def with_labels(r: Random, a: Tensor) -> Apply:
    f, y = r.choice(WITH_LABELS), labels(r, a.shape[-1], *a.shape[:-1], r.choice([1, 3]))
    return lambda a: f(a, y)


def class_loss(r: Random, a: Tensor) -> Apply:
    f, how = r.choice(CLASS_LOSSES), r.choice(["mean", "sum", "none"])
    w = normal(r, a.shape[-1]).exp()
    y = labels(r, a.shape[-1], *a.shape[:-1]).flatten()
    if r.random() < 0.3:
        y[0] = -100
    if r.random() < 0.3:
        y = y.reshape(a.shape[:-1])
        return lambda a: f(a.movedim(-1, 1), y, w, how)
    return lambda a: f(a.flatten(0, -2), y, w, how)


def dense_loss(r: Random, a: Tensor) -> Apply:
    f, v, how = r.choice(DENSE_LOSSES), normal(r, *a.shape), r.choice(["mean", "sum", "none"])
    return lambda a: f(a, v, how)


def _of(functions: list[Any], given: Callable[[Random, Tensor], tuple[Any, ...]]) -> Any:
    """One of `functions`, with what is drawn for it."""

    def build(r: Random, a: Tensor, *others: Tensor) -> Apply:
        f, drawn = r.choice(functions), given(r, a)
        return lambda *operands: f(*operands, *drawn) if drawn else f(*operands)

    return build


BUILDERS: dict[str, Callable[..., Apply]] = {
    "plain": lambda r, a: r.choice(PLAIN),
    "breaking": lambda r, a: r.choice(BREAKING),
    "along": _of(ALONG, lambda r, a: (dim_of(r, a),)),
    "reduced": _of(REDUCED, lambda r, a: (dim_of(r, a), r.random() < 0.5)),
    "with number": _of(WITH_NUMBER, lambda r, a: (r.choice([0.5, 2, -1.0, 1 / 3]),)),
    "with large": with_large,
    "with rows": _of(WITH_ROWS, lambda r, a: (labels(r, len(a), 3),)),
    "with labels": with_labels,
    "class loss": class_loss,
    "dense loss": dense_loss,
    "product": _of(PRODUCTS, lambda r, a: (normal(r, a.shape[-1], 3),)),
    "write": _of(WRITES, lambda r, a: (normal(r, a.shape[-1]),)),
    "two": lambda r, a, b: r.choice(TWO),
}
CHANCES = {"plain": 10, "along": 4, "reduced": 3, "with large": 3, "two": 4}
"""Against 2 of each other kind."""


def results_of(found: Any) -> list[Tensor]:
    """The tensors among what an operation returned, four at most."""
    if isinstance(found, bool):
        return [torch.tensor(found)]
    parts = list(found) if isinstance(found, tuple | list) else [found]
    return [part for part in parts if isinstance(part, Tensor)][:4]


class Expression:
    """Steps that eager torch takes from these logits, and what it gets.

    Args:
        z: is written to, if `without` allows writes.
        without: kinds of operations that are not drawn.
    """

    def __init__(self, r: Random, z: Tensor, length: int, without: tuple[str, ...] = ()) -> None:
        self.steps: list[Step] = []
        self.results = [z]
        kinds = [kind for kind in BUILDERS if kind not in without]
        weights = [CHANCES.get(kind, 2) for kind in kinds]
        while len(self.steps) < length:
            (kind,) = r.choices(kinds, weights)
            self._try(r, kind)

    def _try(self, r: Random, kind: str) -> None:
        operands = tuple(self._place(r) for _ in range(2 if kind == "two" else 1))
        given = [self.results[place] for place in operands]
        before = [result._version for result in self.results]
        try:
            apply = BUILDERS[kind](r, *given)
            found = results_of(apply(*given))
        except Exception:  # Whatever it is, there is no such expression.
            assert before == [result._version for result in self.results]
            return
        if all(result.numel() <= MOST for result in found):
            self.steps.append(Step(kind, operands, apply))
            self.results.extend(found)

    def _place(self, r: Random) -> int:
        """The logits, the last result, or any."""
        last = len(self.results) - 1
        return r.choice([0, 0, last, r.randrange(last + 1)])

    def run(self, z: Tensor) -> list[Tensor]:
        results = [z]
        for step in self.steps:
            results.extend(results_of(step.apply(*(results[place] for place in step.operands))))
        return results

    def __str__(self) -> str:
        return "\n".join(f"  {number}: {step}" for number, step in enumerate(self.steps, 1))
