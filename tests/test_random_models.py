"""Small models drawn from a grammar of heads, operations, losses, dtypes and uses, against eager.

ELMO_EXAMPLES says how many are drawn.

Whatever is drawn: nothing crashes, and value, gradients and other results are eager's. All of it is
within what the README says is found, so every head must be rewritten.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import elmo_compile as elmo
from elmo_compile.deferred import Deferred
from elmo_compile.report import store

ROWS, D, L = 6, 12, 150


class Drawn(NamedTuple):
    """One program of the grammar."""

    head: str
    between: str
    logits: tuple[str, ...]
    loss: str
    reduction: str
    use: str
    dtype: torch.dtype
    chunk: int


HEADS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "module": lambda m, h: m.head(h),
    "functional": lambda m, h: F.linear(h, m.head.weight),
    "matmul": lambda m, h: h @ m.head.weight.t() + m.head.bias,
    "einsum": lambda m, h: torch.einsum("...d,ld->...l", h, m.head.weight),
    "scaled_weight": lambda m, h: F.linear(h, m.head.weight * m.scale, m.head.bias),
    "normalised": lambda m, h: F.normalize(h, dim=-1) @ F.normalize(m.head.weight, dim=-1).t() * 9,
    "low_rank": lambda m, h: m.head(h) + m.up(m.down(h)),
}
BETWEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda h: h,
    "sequence": lambda h: h.view(2, 3, D),
    "shifted": lambda h: torch.cat((h, h[:1]))[:-1],
    "normalised": lambda h: F.layer_norm(h, (D,)),
    "scaled": lambda h: h * D**0.5,
}
LOGITS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "float": lambda m, z: z.double() if z.dtype == torch.float64 else z.float(),
    "temperature": lambda m, z: z / 0.7,
    "softcap": lambda m, z: 5 * torch.tanh(z / 5),
    "prior": lambda m, z: z + m.prior,
    "learned_scale": lambda m, z: z * m.scale.exp(),
    "masked": lambda m, z: z.masked_fill(m.hidden, -30.0),
}


def flat(z: Tensor) -> Tensor:
    return z.reshape(-1, L)


def margin(z: Tensor, y: Tensor) -> Tensor:
    """A loss nobody has written before."""
    own = z.gather(1, y[:, None])
    return (F.softplus(z - own + 0.5).sum(1) - 0.7).log1p()


def focal(z: Tensor, y: Tensor) -> Tensor:
    t = elmo.multi_hot(y[:, None], L).to(z.dtype)
    p = torch.sigmoid(z)
    hit = p * t + (1 - p) * (1 - t)
    return ((1 - hit) ** 2 * F.binary_cross_entropy_with_logits(z, t, reduction="none")).sum(1)


LOSSES: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "cross_entropy": lambda m, z, y: F.cross_entropy(z, y, reduction="none"),
    "ignored": lambda m, z, y: F.cross_entropy(z, y, ignore_index=3, reduction="none"),
    "smoothed": lambda m, z, y: F.cross_entropy(z, y, label_smoothing=0.2, reduction="none"),
    "class_weights": lambda m, z, y: F.cross_entropy(
        z, y, weight=m.prior.exp().to(z.dtype), reduction="none"
    ),
    "z_loss": lambda m, z, y: (
        F.cross_entropy(z, y, reduction="none") + 1e-2 * z.logsumexp(-1).square()
    ),
    "by_hand": lambda m, z, y: z.logsumexp(-1) - z.gather(1, y[:, None])[:, 0],
    "nll": lambda m, z, y: F.nll_loss(F.log_softmax(z, -1), y, reduction="none"),
    "bce": lambda m, z, y: F.binary_cross_entropy_with_logits(
        z, elmo.multi_hot(y[:, None], L).to(z.dtype), reduction="none"
    ).sum(-1),
    "focal": lambda m, z, y: focal(z, y),
    "margin": lambda m, z, y: margin(z, y),
    "squares": lambda m, z, y: (z - m.prior).square().mean(1),
    "entropy": lambda m, z, y: -(z.softmax(-1) * z.log_softmax(-1)).sum(-1),
}
REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": torch.mean,
    "sum": torch.sum,
    "weighted": lambda rows: (
        (rows * torch.linspace(0.1, 1, rows.shape[0], dtype=rows.dtype)).sum() / 7
    ),
    "rows": lambda rows: rows,
}
USES = ("loss", "metrics", "logits")


class Model(nn.Module):
    def __init__(self, drawn: Drawn) -> None:
        super().__init__()
        self.drawn = drawn
        self.encoder = nn.Linear(5, D)
        self.head = nn.Linear(D, L)
        self.down, self.up = nn.Linear(D, 2, bias=False), nn.Linear(2, L, bias=False)
        self.scale = nn.Parameter(torch.tensor(0.3))
        self.register_buffer("prior", torch.rand(L).log() / 4)
        self.register_buffer("hidden", torch.arange(L) % 7 == 5)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        drawn = self.drawn
        h = BETWEEN[drawn.between](torch.tanh(self.encoder(x)))
        z = HEADS[drawn.head](self, h)
        for name in drawn.logits:
            z = LOGITS[name](self, z)
        loss = REDUCTIONS[drawn.reduction](LOSSES[drawn.loss](self, flat(z), y))
        if drawn.use == "metrics":
            return loss, flat(z).argmax(-1), flat(z).topk(3).values.detach()
        return (loss, z) if drawn.use == "logits" else (loss,)


programs = st.builds(
    Drawn,
    head=st.sampled_from(sorted(HEADS)),
    between=st.sampled_from(sorted(BETWEEN)),
    logits=st.lists(st.sampled_from(sorted(LOGITS)), max_size=2, unique=True).map(tuple),
    loss=st.sampled_from(sorted(LOSSES)),
    reduction=st.sampled_from(sorted(REDUCTIONS)),
    use=st.sampled_from(USES),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    chunk=st.sampled_from([1, 40, 77, L]),
)


def check(drawn: Drawn) -> None:
    torch._dynamo.reset()
    store.clear()
    torch.manual_seed(0)
    model = Model(drawn).to(drawn.dtype)
    plain = copy.deepcopy(model)
    x, y = torch.randn(ROWS, 5, dtype=drawn.dtype), torch.randint(0, L, (ROWS,))
    y[0], y[1] = 3, 4
    theirs = plain(x, y)
    theirs[0].sum().backward()
    options = {"lower": "eager", "min_outputs": 64, "chunk_size": drawn.chunk}
    step: Any = torch.compile(model, backend="elmo", options=options, fullgraph=True)
    mine = step(x, y)
    mine[0].sum().backward()
    report = elmo.last_report()
    assert report.matches, str(report)
    assert not report.refusals, str(report)
    assert (type(mine[-1]) is Deferred) == (drawn.use == "logits")
    for one, other in zip(mine, theirs):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one.detach() + 0, other.detach(), rtol=1e-4, atol=1e-4)
    for (name, one), (_, other) in zip(model.named_parameters(), plain.named_parameters()):
        assert (one.grad is None) == (other.grad is None), name
        if other.grad is not None:
            error = float((one.grad - other.grad).norm())
            assert error <= 1e-3 * float(other.grad.norm()) + 1e-5, name


@settings(
    max_examples=int(os.environ.get("ELMO_EXAMPLES", "40")),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(programs)
def test_like_eager(drawn: Drawn) -> None:
    check(drawn)
