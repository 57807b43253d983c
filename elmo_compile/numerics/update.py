"""The updates of the optimizers, as data and as one arithmetic function per rule.

All arithmetic is float32 (float64 for float64 weights) on the loaded values, with one rounding at
the store (ALGORITHMS: "updates on low-precision weights"). Whoever loads and stores (a chunk of a
head, a whole parameter, eager or compiled code) calls `advance` and does nothing else to numbers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from elmo_compile.errors import FusedUpdateError
from elmo_compile.numerics.blockwise import Blockwise
from elmo_compile.numerics.capture import capturing
from elmo_compile.numerics.formats import StorageFormat
from elmo_compile.numerics.philox import MOMENTUM, SECOND_MOMENT

Rounding = Literal["stochastic", "nearest", "kahan"]
RuleName = Literal["sgd", "adamw", "lion", "adagrad"]

STATE_STREAMS = (MOMENTUM, SECOND_MOMENT)
"""Rounding streams of `Update.state`, in order."""


class Rates(NamedTuple):
    """The numbers of one update; what a rule does not use is 0."""

    lr: float
    weight_decay: float = 0.0
    beta1: float = 0.0
    """SGD's momentum; the decay of the first moment (AdamW's: debiased)."""
    beta2: float = 0.0
    """The decay of the second moment (AdamW's: debiased); Lion's of its moment."""
    eps: float = 0.0
    error: float = 0.0
    """ECO's factor on the rounding error (`eco_factor`)."""


class Form(NamedTuple):
    """What of an update is fixed in the code that runs it."""

    rule: RuleName = "sgd"
    nesterov: bool = False
    eco: bool = False
    decay: bool = True
    """Whether there is a weight decay: 0 times an infinite weight would be NaN."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Update:
    """One update of one weight: hyper-parameters as they are now, state, rounding counters."""

    rule: RuleName = "sgd"
    lr: float | Tensor
    """A float64 scalar on the weight's device is read there, when the update happens."""
    lr_share: int = 1
    """How many updates share one rate: each has `lr / lr_share`."""
    weight_decay: float = 0.0
    beta1: float = 0.0
    beta2: float = 0.0
    debias: bool = False
    """Take `debiased` betas of this step."""
    eps: float = 0.0
    nesterov: bool = False
    eco: bool = False
    """Add the weight's rounding error to the first state (ECO): no master weights are missed."""
    state: tuple[Tensor | Blockwise, ...] = ()
    """Shaped like the weight: SGD's momentum (or nothing), AdamW's m and v, Lion's m. Adagrad's is
    one float32 number a row. float32, bfloat16 (always rounded stochastically: with rounding to
    nearest it would never decay), or block-wise 8 bits."""
    compensation: Tensor | None = None
    """Kahan's: shaped like the weight, or [H, D] with `kahan_rows`; bf16 or E5M2, None without."""
    kahan_rows: Tensor | None = None
    """int64 [H], ascending: the rows that `compensation` belongs to; None: all."""
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    """How a weight stored in bf16 or fp8 is rounded (to nearest where it is compensated); a
    float32 weight is never rounded."""
    seed: int = 0
    param_id: int = 0
    """Stable 32-bit stream of this parameter, saved in the optimizer's state."""
    step: int | Tensor = 0
    """How many updates this parameter has had before this one (the first update has step 0); an
    int64 scalar on the weight's device, as `lr`."""
    row_offset: int = 0
    """First row of this tensor in the unsharded stored tensor."""

    @property
    def on_device(self) -> bool:
        """Whether rate and step are the device's: a CUDA graph may be captured, and its replays
        are further updates."""
        return isinstance(self.step, Tensor)

    def on_host(self) -> Update:
        """The same with rate and step as numbers, for which the host waits.

        Raises:
            FusedUpdateError: a CUDA graph is being captured.
        """
        if not self.on_device:
            return self
        assert isinstance(self.step, Tensor)
        if capturing(self.step.device):
            raise FusedUpdateError(
                "a CUDA graph is being captured with an update that must know its step on the "
                "host: of a loss without kernels of its own, a float64, complex, sparse or "
                "8-bit ordinary parameter, or two uses of one head. Leave it out of the capture"
            )
        return dataclasses.replace(self, lr=float(self.lr), step=int(self.step))

    @property
    def rates(self) -> Rates:
        """The numbers. Not of an update `on_device`."""
        assert not isinstance(self.lr, Tensor), "on_host() comes first"
        assert not isinstance(self.step, Tensor), "on_host() comes first"
        lr = float(self.lr) / self.lr_share
        beta1, beta2 = self.beta1, self.beta2
        if self.debias:
            beta1, beta2 = debiased(beta1, self.step), debiased(beta2, self.step)
        error = eco_factor(lr, self.beta1) if self.eco else 0.0
        return Rates(lr, self.weight_decay, beta1, beta2, self.eps, error)

    @property
    def form(self) -> Form:
        """The code."""
        return Form(self.rule, self.nesterov, self.eco, self.weight_decay != 0)

    @property
    def row_wise(self) -> bool:
        """Whether the state is a number a row (Adagrad)."""
        return self.rule == "adagrad"

    @property
    def moments(self) -> tuple[Tensor | Blockwise, ...]:
        """The state that is shaped like the weight."""
        return () if self.row_wise else self.state

    @property
    def row_sums(self) -> Tensor:
        """Adagrad's state."""
        sums = self.state[0]
        assert isinstance(sums, Tensor)
        return sums

    @property
    def compensates_all(self) -> bool:
        """Whether every row is compensated."""
        return self.compensation is not None and self.kahan_rows is None


State = tuple[Tensor, ...]


def sgd(w: Tensor, grad: Tensor, state: State, r: Rates, form: Form) -> tuple[Tensor, State]:
    """`g <- g + wd w; m <- beta1 m + g; u = -lr (g + beta1 m | m | g)` (torch.optim.SGD).

    The momentum starts at zero, which makes its first value `g`, as in torch.
    """
    step = grad + r.weight_decay * w if form.decay else grad
    if state:
        m = r.beta1 * state[0] + step
        state = (m,)
        step = step + r.beta1 * m if form.nesterov else m
    return -r.lr * step, state


def _decayed(step: Tensor, w: Tensor, r: Rates, form: Form) -> Tensor:
    """A step with decoupled weight decay."""
    return step + r.weight_decay * w if form.decay else step


def adamw(w: Tensor, grad: Tensor, state: State, r: Rates, form: Form) -> tuple[Tensor, State]:
    """`m <- b1 m + (1-b1) g; v <- b2 v + (1-b2) g^2; u = -lr (m / (sqrt(v) + eps) + wd w)`.

    With debiased b1, b2 (`debiased`) m and v are torch.optim.AdamW's bias-corrected moments.
    """
    m = r.beta1 * state[0] + (1.0 - r.beta1) * grad
    v = r.beta2 * state[1] + (1.0 - r.beta2) * grad * grad
    return -r.lr * _decayed(m / (torch.sqrt(v) + r.eps), w, r, form), (m, v)


def lion(w: Tensor, grad: Tensor, state: State, r: Rates, form: Form) -> tuple[Tensor, State]:
    """`u = -lr (sign(b1 m + (1-b1) g) + wd w); m <- b2 m + (1-b2) g` (arXiv 2302.06675)."""
    direction = torch.sign(r.beta1 * state[0] + (1.0 - r.beta1) * grad)
    m = r.beta2 * state[0] + (1.0 - r.beta2) * grad
    return -r.lr * _decayed(direction, w, r, form), (m,)


def adagrad(w: Tensor, grad: Tensor, state: State, r: Rates, form: Form) -> tuple[Tensor, State]:
    """`u = -lr (g / (sqrt(a) + eps) + wd w)`, a one number a row, which holds this g already.

    `a <- a + mean_d g^2` is `accumulate_rows`.
    """
    return -r.lr * _decayed(grad / (torch.sqrt(state[0]) + r.eps), w, r, form), ()


RULES: dict[str, Callable[[Tensor, Tensor, State, Rates, Form], tuple[Tensor, State]]] = {
    "sgd": sgd, "adamw": adamw, "lion": lion, "adagrad": adagrad,
}  # fmt: skip


def accumulate_rows(a_L: Tensor, grad_LD: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """Row-wise Adagrad's `a + mean_d (scale g)^2`, in a's dtype."""
    columns = max(1, grad_LD.shape[1])
    return a_L + grad_LD.to(a_L.dtype).square().sum(1) * (scale * scale / columns)


def advance(
    form: Form,
    w: Tensor,
    grad: Tensor,
    state: State,
    c: Tensor | None,
    rates: Rates,
    to_grid: Callable[[Tensor], Tensor],
    largest: StorageFormat | None = None,
) -> tuple[Tensor, State, Tensor | None]:
    """One update: (weight on its grid, state before rounding, compensation before rounding).

    `u` from the rule; without compensation `w' = round(w + u)`; with it (Kahan)
    `s = c + u; w' = round(w + s); c' = s + (w - w')`, c' at most half a step where w' is the
    format's largest, so that it does not grow without end. ECO adds `error e` to the first
    state, times `sqrt(v) + eps` for AdamW, where e is what the rounding of w lost.

    Args:
        w, grad, state, c: in arithmetic precision. Adagrad's state broadcasts over a row.
        to_grid: rounds to the weight's storage format; identity where that is wide.
        largest: the format whose largest value saturates, where c is given.

    Source: ALGORITHMS.md section 3; optimi (Kahan); ECO (arXiv 2601.22101).
    """
    u, state = RULES[form.rule](w, grad, state, rates, form)
    if c is None:
        v = w + u
        new = to_grid(v)
    else:
        s = c + u
        v = w + s
        new = to_grid(v)
        c = s + (w - new)
        if largest is not None:
            half = half_step_at_largest(largest)
            c = torch.where(new.abs() >= largest.max, c.clamp(-half, half), c)
    if form.eco:
        error = rates.error * (v - new)
        if form.rule == "adamw":
            error = error * (torch.sqrt(state[1]) + rates.eps)
        state = (state[0] + error, *state[1:])
    return new, state, c


def half_step_at_largest(fmt: StorageFormat) -> float:
    """Half the distance between a format's two largest values."""
    return 2.0 ** (math.frexp(fmt.max)[1] - 2 - fmt.mantissa_bits)


def debiased(beta: float, step: int) -> float:
    """`(beta^t - beta) / (beta^t - 1)` for the t-th update, t = step + 1: 0 at the first.

    A moving average with it is the bias-corrected one. Source: optimi.
    """
    power = beta ** (step + 1)
    return (power - beta) / (power - 1.0)


def eco_factor(lr: float, beta1: float) -> float:
    """`(1 - 1/beta1) / lr` of ECO, beta1 as given; 0 where lr is 0."""
    return (1.0 - 1.0 / beta1) / lr if lr else 0.0
