"""A head on the device, to be stepped by different tiles from the same weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from elmo_compile import bench
from elmo_compile.errors import OptionError
from elmo_compile.numerics.losses import BCE
from elmo_compile.numerics.update import Update
from elmo_compile.tune.clock import Step
from elmo_compile.tune.search import Fields, Kept, Told, Trial, said

State = Literal["none", "moments", "kahan"]
STATES: tuple[State, ...] = ("none", "moments", "kahan")
"""Of the update: SGD; AdamW with bf16 moments; the same with a bf16 compensation."""
_TENSORS = {"none": 0, "moments": 2, "kahan": 3}
SUMS, ROUNDED = 1e-3, 0.1
"""How far results may be apart, as a share of their norm: sums in another order; how far weights
moved, which is such a sum rounded at random."""
_ENDS = 4096
"""Outputs at either end whose weights are compared."""

Checked = list[tuple[str, Tensor, float]]
"""Results by name, and how far they may be apart."""


class WrongResult(Exception):
    """A tile computes something else than the table's."""


class TunedHead:
    """Weights, state and a batch; `step` is the training step that tiles are timed by."""

    def __init__(self, case: bench.Case, state: State, table: Fields) -> None:
        """
        Raises:
            OptionError: no chunk fits the budget, or the head does not fit the device.
        """
        if state == "kahan" and case.dtype == torch.float32:
            raise OptionError(
                "--state kahan cannot be used with --dtype float32: no rounding. Use moments."
            )
        self._table = table
        self._plan = bench.planned(case, fused=True)
        self.chunk = self._plan.chunk_size
        # A ragged last chunk would be compiled for each tile again.
        case = dataclasses.replace(case, outputs=case.outputs // self.chunk * self.chunk)
        self.outputs = case.outputs
        _require_memory(case, state)
        self._problem, _ = bench.problem_of(case, self._plan)
        w_LD = self._problem.w_LD
        self._scale_N = torch.full(
            (case.rows,), 1 / case.rows, dtype=torch.float32, device=w_LD.device
        )
        self._start_LD = w_LD.clone()
        self._state = [torch.zeros_like(w_LD, dtype=torch.bfloat16) for _ in range(_TENSORS[state])]
        self._update = Update(lr=bench.LR)
        if self._state:
            first, second, *compensation = self._state
            self._update = Update(
                rule="adamw", lr=bench.LR, beta1=0.9, beta2=0.999, eps=1e-8, state=(first, second),
                compensation=compensation[0] if compensation else None,
            )  # fmt: skip
        self._wanted: dict[bool, Checked] = {}

    def measure(self, field: str, fields: Fields, timer: Callable[[Step], float]) -> float:
        """Seconds of a step with some fields changed.

        Raises:
            WrongResult: it computes something else than with the table's tiles.
        """
        value = self._problem.loss.name == BCE and field != "logits"
        if value not in self._wanted:
            with self._tiles({}):
                self._wanted[value] = list(self._results(value))
        with self._tiles(fields):
            _require_same(self._results(value), self._wanted[value])
            return timer(lambda: self._step(value))

    def set_back(self, kept: dict[str, Kept], told: Told) -> None:
        """Give up what kernels beside the step cannot run by: the forward, a real weight gradient
        and the largest logits have these tiles too."""
        changed = [field for field in kept if kept[field].tile != self._table[field]]
        if not changed:
            return
        with self._tiles({}):
            wanted = list(self._others())
        for field in changed:
            try:
                with self._tiles({field: kept[field].tile}):
                    _require_same(self._others(), wanted)
            except Exception as error:  # as in the search
                failed = f"outside the step: {said(error)}"
                told(Trial(field=field, tile=kept[field].tile, number=0, of=0, failed=failed))
                before = kept[field].table_seconds
                kept[field] = Kept(self._table[field], before, before)

    def _tiles(self, fields: Fields) -> Any:
        from elmo_compile.kernels.triton.configs import override_tiles

        return override_tiles(**{**self._table, **fields})

    def _step(self, value: bool) -> Any:
        return bench.fused_step(self._problem, self._scale_N, self._plan, self._update, value=value)

    def _results(self, value: bool) -> Iterator[tuple[str, Tensor, float]]:
        """Of one step from the start."""
        self._start_again()
        result = self._step(value)
        yield "dx", result.dx_ND, SUMS
        if result.rows_N is not None:
            yield "losses", result.rows_N, SUMS
        for name, part in (("first", slice(0, _ENDS)), ("last", slice(-_ENDS, None))):
            moved = self._problem.w_LD[part].float() - self._start_LD[part].float()
            yield f"the {name} weights", moved, ROUNDED

    def _others(self) -> Iterator[tuple[str, Tensor, float]]:
        from elmo_compile import kernels

        self._start_again()
        p, chunk = self._problem, self.chunk
        family = kernels.select(p.x_ND.device)
        made = family.forward(p)
        yield "losses", made.rows_N, SUMS
        _, _, dw_CD = next(iter(family.head_chunks(p, made.stats_2N, self._scale_N)))
        yield "dw", dw_CD, SUMS
        top = family.topk(p.x_ND, p.w_LD[:chunk], None, min(5, chunk), chunk, p.compute_dtype)
        yield "top-k", top[0], SUMS

    def _start_again(self) -> None:
        self._problem.w_LD.copy_(self._start_LD)
        for tensor in self._state:
            tensor.zero_()


def _require_same(got: Iterator[tuple[str, Tensor, float]], wanted: Checked) -> None:
    for (name, found, apart), (_, expected, _) in zip(got, wanted, strict=True):
        if not (found - expected).norm() <= apart * expected.norm():
            raise WrongResult(f"{name} are not what the table's tiles make")


def _require_memory(case: bench.Case, state: State) -> None:
    weights = case.outputs * case.features
    needed = weights * (2 * case.dtype.itemsize + 2 * _TENSORS[state])
    available = bench.available_bytes(case.device)
    if available is not None and needed > available:
        raise OptionError(
            f"tuning needs {needed} bytes on {case.device} (the weights twice, and their state) "
            f"and {available} are available. Fewer --outputs do: tiles do not depend on them."
        )
