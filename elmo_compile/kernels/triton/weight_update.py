"""The update of a head's weight, chunk by chunk, in the place of its gradient."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from elmo_compile.kernels.triton.configs import Tile
from elmo_compile.kernels.triton.features import SplitSums
from elmo_compile.kernels.triton.launch import Call
from elmo_compile.kernels.triton.random_bits import RowKeys
from elmo_compile.kernels.triton.records import records
from elmo_compile.kernels.triton.update import features_update_kernel, update_kernel
from elmo_compile.kernels.triton.weights import WeightGradient
from elmo_compile.numerics.blockwise import Blockwise
from elmo_compile.numerics.formats import format_of, is_narrow
from elmo_compile.numerics.update import Update, half_step_at_largest

PROGRAMS_EACH = 2
"""Of the shared pass, on a processor at once: one computes while another waits for its loads."""


def shared_sums(c: Call, update: Update) -> SplitSums | None:
    """Sums of dx for a pass that dx and the update share; None where they do not.

    One tile must hold all rows of the batch. Where rows of the weight do not begin at multiples of
    16 elements, loads take single elements, and the tile of a large batch would not fit registers.
    """
    tile = _shared_tile(c, update)
    N, D, _ = c.shape
    if tile is None or tile.rows < N or (D % 16 and N > 64):
        return None
    return SplitSums(c, tile, PROGRAMS_EACH * c.processors)


def _shared_tile(c: Call, update: Update) -> Tile | None:
    state = update.moments or update.compensation is not None
    return c.tiles.shared_with_state if state else c.tiles.shared


class WeightUpdate:
    """One update of the weight and its state, in place."""

    def __init__(
        self,
        product: WeightGradient,
        update: Update,
        guard: Tensor | None = None,
        sums: SplitSums | None = None,
    ) -> None:
        """
        Args:
            product: of the call.
            guard: None, or one int32 on the device: not zero leaves everything as it is.
            sums: None, or where to add dx in the same pass (`shared_sums`).
        """
        self._product, self._update, self._guard, self._sums = product, update, guard, sums
        self._call = product.call
        w_LD = product.call.problem.w_LD
        self._record = records([update], w_LD.device)
        self._row_keys = RowKeys(w_LD, update, self._record)
        self._constants = self._forms()
        self._slots: Tensor | None = None
        if update.kahan_rows is not None:
            self._slots = slots_of(update.kahan_rows, product.call.shape[2])

    def apply(self, g_NL: Tensor, start: int, stop: int) -> None:
        """Update outputs [start, stop) with the chunk's gradient."""
        update, guard = self._update, self._guard
        if update.row_wise:
            self._accumulate_rows(g_NL, start, stop)
        held = [
            s.load(start, stop) if isinstance(s, Blockwise) else s[start:stop]
            for s in update.moments
        ]
        first, second = (*held, None, None)[:2]
        kernel, (grid, arguments) = self._launch(stop - start, g_NL)
        kernel[(grid,)](
            g_NL,
            self._product.x_ND,
            self._product.unit,
            self._call.w_LD[start:stop],
            first,
            second,
            update.row_sums[start:stop] if update.row_wise else None,
            self._compensation(start, stop),
            None if self._slots is None else self._slots[start:stop],
            guard,
            *self._row_keys.of(start, stop),
            self._record,
            **self._constants,
            **arguments,
        )
        for stored, value in zip(update.moments, held):
            if isinstance(stored, Blockwise):
                stored.store(start, stop, value, None if guard is None else guard.view(()) != 0)

    def _launch(self, L: int, g_NL: Tensor) -> tuple[Any, tuple[int, dict]]:
        """The kernel, and (programs, arguments) for a chunk of L outputs."""
        c, update, sums = self._call, self._update, self._sums
        if sums is None:
            much = len(update.moments) > 1 or update.compensation is not None
            tile = c.tiles.weights_with_state if much else c.tiles.weights
            return update_kernel, self._product.launch(L, g_NL, tile)
        shared = _shared_tile(c, update)
        assert shared is not None
        N, D, _ = c.shape
        return features_update_kernel, (
            sums.grid(L),
            {
                "dx_ptr": sums.sums_SND,
                "N": N,
                "D": D,
                "L": L,
                "g_stride": g_NL.stride(0),
                "outputs_each": sums.outputs_each,
                "BLOCK_N": sums.block_n,
                "BLOCK_D": shared.columns,
                "BLOCK_L": shared.inner,
                "EVEN_N": sums.block_n == N,
                "EVEN_D": D % shared.columns == 0,
                "EVEN_L": L % shared.inner == 0,
                "num_warps": shared.warps,
                "num_stages": shared.stages,
                **c.constants,
            },
        )

    def _forms(self) -> dict[str, Any]:
        """What the kernels are compiled for."""
        update, w_LD = self._update, self._call.problem.w_LD
        c, fmt = update.compensation, format_of(w_LD.dtype) if is_narrow(w_LD.dtype) else None
        return {
            "RULE": update.rule,
            "NESTEROV": update.nesterov,
            "ECO": update.eco,
            "DECAY": update.form.decay,
            "STOCHASTIC": update.rounding == "stochastic",
            "E5M2": c is not None and c.dtype == torch.float8_e5m2,
            "LARGEST": fmt.max if fmt else math.inf,
            "HALF": half_step_at_largest(fmt) if fmt else math.inf,
        }

    def _compensation(self, start: int, stop: int) -> Tensor | None:
        """The compensation as the kernel takes it: all of it where rows have places in it."""
        c = self._update.compensation
        if c is None:
            return None
        c = c.view(torch.uint8) if c.dtype == torch.float8_e5m2 else c
        return c[start:stop] if self._slots is None else c

    def _accumulate_rows(self, g_NL: Tensor, start: int, stop: int) -> None:
        """Row-wise Adagrad's sums: a tile does not own all of D, so from `sum_n g (y y^T g)`."""
        product = self._product
        squares_L = product.squares(g_NL, stop - start)
        squares_L *= product.unit.double().square() / product.x_ND.shape[1]
        if self._guard is not None:
            squares_L = torch.where(self._guard == 0, squares_L, 0.0)
        sums_L = self._update.row_sums
        sums_L[start:stop] += squares_L.to(sums_L.dtype)


def slots_of(rows_H: Tensor, num_rows: int) -> Tensor:
    """int32 [L]: where each row stands among `rows_H`, -1 if it does not."""
    slots = torch.full((num_rows,), -1, dtype=torch.int32, device=rows_H.device)
    slots[rows_H] = torch.arange(rows_H.numel(), dtype=torch.int32, device=rows_H.device)
    return slots
