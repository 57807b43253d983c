"""An update applied to a stored weight and its state, chunk of rows by chunk.

The same for a head's chunks, whose gradient was just formed, and for a parameter whose gradient
exists. Shapes: L rows, D columns, C rows of a chunk, H compensated rows.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch import Tensor

from elmo_compile.kernels.aten import steps
from elmo_compile.kernels.aten.compiled import SMALL, piece
from elmo_compile.kernels.aten.lanes import as_words, halves_order
from elmo_compile.numerics import philox
from elmo_compile.numerics.blockwise import Blockwise
from elmo_compile.numerics.formats import is_narrow
from elmo_compile.numerics.update import STATE_STREAMS, Update, accumulate_rows

Layout = Literal["plain", "pairs", "quads"]
"""`plain`: elements as they are. `pairs`: bf16 words of two, weight, gradient and state alike.
`quads`: E4M3 words of four, with a decoded copy and a gradient in `halves_order`."""
LANES = 16
"""int32 or float32 numbers of a vector of 512 bits. A row of whole vectors is seen as [-1, LANES]:
no code is then made for the rest of one, which is half of what a C++ compiler has to do."""
_KEY_ROWS = 1 << 16
"""Rows whose keys are made together, and kept."""
_BLOCK = 1 << 22
"""Elements of a parameter updated at once."""


def choose_layout(w_LD: Tensor, dw: torch.dtype, update: Update | None) -> Layout:
    """The fastest layout that a weight, its gradient's dtype and its state allow."""
    if dw != torch.bfloat16:
        return "plain"
    state: tuple[Any, ...] = () if update is None else update.moments
    all_kahan = update is not None and update.compensates_all
    if w_LD.dtype == torch.float8_e4m3fn and _whole_words(w_LD) and not state and not all_kahan:
        return "quads"
    if update is not None and update.compensation is not None and all_kahan:
        state = (*state, update.compensation)
    same = all(s.dtype == w_LD.dtype and _whole_words(s) for s in state)
    narrow = update is None or update.rounding == "stochastic" or all_kahan
    if w_LD.dtype == torch.bfloat16 and _whole_words(w_LD) and narrow and same:
        return "pairs"
    return "plain"


class ChunkUpdate:
    """One `Update` of one weight: `apply` it to a chunk of rows at a time."""

    def __init__(
        self, w_LD: Tensor, update: Update, layout: Layout, chunk: int, *, fast: bool
    ) -> None:
        update = update.on_host()
        self._w_LD, self._update, self._fast = w_LD, update, fast
        self._form = form = _Form(layout, w_LD, update, fast)
        # Seen as the code takes them once, and not for every chunk.
        self._state: list[Tensor | Blockwise] = (
            [update.row_sums[:, None]] if update.row_wise else list(update.moments)
        )
        self._w = form.of(w_LD)
        self._seen = [s if isinstance(s, Blockwise) else form.of(s) for s in self._state]
        compensation = update.compensation
        self._c: Tensor | None = None
        if compensation is not None and update.kahan_rows is None:
            self._c = form.of(compensation)
        rounded = update.rounding == "stochastic" and not update.compensates_all
        needed: list[tuple[int, Any]] = [
            (philox.WEIGHT, w_LD if rounded else None),
            *zip(STATE_STREAMS, (*update.moments, None, None)),
            (philox.COMPENSATION, compensation),
        ]
        self._keys = [
            RowKeys(update, stream, w_LD, chunk)
            if like is not None and is_narrow(like.dtype)
            else None
            for stream, like in needed
        ]

    def apply(
        self, start: int, stop: int, dw: Tensor, scale: float, decoded: Tensor | None = None
    ) -> None:
        """Update rows [start, stop) with the gradient `scale dw`; `decoded` are their values."""
        update, form = self._update, self._form
        keys = [key.of(start, stop) if key else None for key in self._keys]
        if update.row_wise:
            a = update.row_sums[start:stop]
            piece(steps.accumulate_rows_, self._fast)(a, dw, scale)
        rows = [_rows_of(s, start, stop) for s in self._state]
        if update.kahan_rows is not None:
            run = self._compensated(start, stop, dw, scale, rows, keys)
        state = [
            form.of(values) if isinstance(s, Blockwise) else s[start:stop]
            for s, values in zip(self._seen, rows)
        ]
        c = None if self._c is None else self._c[start:stop]
        form.run(self._w[start:stop], form.by_halves(decoded), form.gradient(dw), state, c, keys,
                 scale)  # fmt: skip
        if update.kahan_rows is not None:
            run()
        for stored, values in zip(self._state, rows):
            if isinstance(stored, Blockwise):
                stored.store(start, stop, values)

    def _compensated(
        self,
        start: int,
        stop: int,
        dw: Tensor,
        scale: float,
        state: list[Tensor],
        keys: list[Tensor | None],
    ) -> Any:
        """What updates the compensated rows of a chunk, from copies made before all are updated.

        Their state is updated with all the others', to the same values.
        """
        update = self._update
        rows_H, comp_HD = update.kahan_rows, update.compensation
        assert rows_H is not None
        assert comp_HD is not None
        bounds = torch.tensor([start, stop], device=rows_H.device)
        first, last = torch.searchsorted(rows_H, bounds).tolist()
        if first == last:
            return lambda: None
        inside = rows_H[first:last] - start
        stored = self._w_LD[start:stop]
        raw = stored.view(torch.uint8) if stored.element_size() == 1 else stored
        w = raw[inside].view(stored.dtype)
        copies = [s[inside] for s in state]
        own = [None, *(None if key is None else key[inside] for key in keys[1:])]
        dw = dw[inside]
        if self._form.layout == "quads":
            dw = restore_columns(dw)
        form = self._plain_form

        def run() -> None:
            form.run(
                form.of(w), None, form.of(dw), [form.of(s) for s in copies],
                form.of(comp_HD[first:last]), own, scale,
            )  # fmt: skip
            raw[inside] = w.view(raw.dtype)

        return run

    @functools.cached_property
    def _plain_form(self) -> _Form:
        return _Form("plain", self._w_LD, self._update, self._fast)


class _Form:
    """How compiled code takes the rows of a weight and what goes with them."""

    def __init__(self, layout: Layout, w_LD: Tensor, update: Update, fast: bool) -> None:
        self.layout, self._update = layout, update
        columns_D = columns_of(w_LD, {"plain": 1, "pairs": 2, "quads": 4}[layout])
        width = columns_D.numel()
        self._vectors = width % LANES == 0 and width > LANES
        self._columns = self._split(columns_D)
        code = steps.plain_ if layout == "plain" else steps.lanes_
        self._piece = piece(code, fast, vectors=self._vectors, form=update.form)

    def of(self, t: Tensor) -> Tensor:
        """Rows as words, where the layout is of words, and these as vectors; a number a row,
        [C, 1], broadcasts as before."""
        return self._split(t if self.layout == "plain" or t.shape[-1] == 1 else as_words(t))

    def by_halves(self, t: Tensor | None) -> Tensor | None:
        """Decoded rows in `halves_order` as [C, 2, their halves]."""
        if t is None:
            return None
        words_CD = as_words(t)
        return self._split(words_CD.view(words_CD.shape[0], 2, words_CD.shape[1] // 2))

    def gradient(self, dw: Tensor) -> Tensor:
        """A gradient, whose columns are those of the decoded rows where there are any."""
        if self.layout != "quads":
            return self.of(dw)
        halves = self.by_halves(dw)
        assert halves is not None
        return halves

    def run(
        self,
        w: Tensor,
        decoded: Tensor | None,
        dw: Tensor,
        state: list[Tensor],
        c: Tensor | None,
        keys: list[Tensor | None],
        scale: float,
    ) -> None:
        """Update what `of` and `by_halves` returned in place."""
        first, second, *_ = (*state, None, None)
        taken = (w, dw) if self.layout == "plain" else (w, decoded, dw)
        c_key = None if c is None else keys[3]
        self._piece(
            *taken, first, second, c, *keys[:3], c_key, self._columns, scale, *self._update.rates
        )

    def _split(self, t: Tensor) -> Tensor:
        """[.., D] as [.., D / LANES, LANES], where rows are whole vectors."""
        if not self._vectors:
            return t
        return t.unsqueeze(-1) if t.shape[-1] == 1 else t.view(*t.shape[:-1], -1, LANES)


def _rows_of(state: Tensor | Blockwise, start: int, stop: int) -> Tensor:
    """Rows of a state: the stored ones, or their values as float32."""
    return state.load(start, stop) if isinstance(state, Blockwise) else state[start:stop]


def update_rows(w_RD: Tensor, grad_RD: Tensor, update: Update, factor: float = 1.0) -> None:
    """Update a contiguous matrix from `factor` times a gradient that exists, block by block."""
    rows, columns = w_RD.shape
    fast = w_RD.numel() >= SMALL and w_RD.device.type == "cpu"
    block = max(1, min(rows, _BLOCK // max(1, columns)))
    layout = choose_layout(w_RD, grad_RD.dtype, update)
    if layout == "quads" or (layout == "pairs" and not _whole_words(grad_RD)):
        layout = "plain"
    run = ChunkUpdate(w_RD, update, layout, block, fast=fast)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for start in range(0, rows, block):
            stop = min(start + block, rows)
            run.apply(start, stop, grad_RD[start:stop], factor)


def update_given_rows(w_RD: Tensor, rows_K: Tensor, grad_KD: Tensor, update: Update) -> None:
    """Update some rows from a gradient of these rows alone: SGD without state, or Adagrad."""
    with torch.no_grad():
        update = update.on_host()
        work = torch.float64 if w_RD.dtype == torch.float64 else torch.float32
        sum_K1: Tensor | None = None
        if update.row_wise:
            a_K = accumulate_rows(update.row_sums[rows_K], grad_KD)
            update.row_sums[rows_K] = a_K
            sum_K1 = a_K[:, None]
        key_K = None
        if is_narrow(w_RD.dtype) and update.rounding == "stochastic":
            key_K = philox.row_keys(
                update.seed, update.param_id, int(update.step), philox.WEIGHT,
                rows_K + update.row_offset,
            )  # fmt: skip
            key_K = philox.half_mixed(key_K)
        raw = w_RD.view(torch.uint8) if w_RD.element_size() == 1 else w_RD
        w_KD = raw[rows_K].view(w_RD.dtype)
        steps.plain_(
            w_KD, grad_KD.to(work), sum_K1, None, None, key_K, None, None, None,
            columns_of(w_RD, 1), 1.0, *update.rates, form=update.form,
        )  # fmt: skip
        raw[rows_K] = w_KD.view(raw.dtype)


class RowKeys:
    """Row keys of one stream, half mixed, computed some 2^16 rows at a time."""

    def __init__(self, update: Update, stream: int, w_LD: Tensor, chunk: int) -> None:
        self._words = philox.counter_words(update.seed, update.param_id, int(update.step), stream)
        self._first, self._rows, self._device = update.row_offset, w_LD.shape[0], w_LD.device
        self._block = chunk * max(1, _KEY_ROWS // chunk)
        self._start, self._keys = 0, torch.empty(0, dtype=torch.int32)

    def of(self, start: int, stop: int) -> Tensor:
        """int32 [stop - start] keys; `start` and `stop` bound one chunk."""
        if not self._start <= start < stop <= self._start + self._keys.numel():
            self._start = start
            last = min(start + self._block, self._rows)
            self._keys = self._made(self._first + start, self._first + last)
        return self._keys[start - self._start : stop - self._start]

    def _made(self, first: int, last: int) -> Tensor:
        if self._device.type != "cpu":
            rows = torch.arange(first, last, device=self._device)
            return philox.half_mixed(philox.row_keys_from_words(self._words, rows))
        return philox.half_mixed(philox.row_keys_in_order(self._words, first, last))


def columns_of(w_LD: Tensor, per_word: int) -> Tensor:
    """int32 [D / per_word]: the column of the first element of each word, half mixed."""
    d = torch.arange(0, w_LD.shape[1], per_word, dtype=torch.int32, device=w_LD.device)
    return philox.half_mixed(d)


def restore_columns(columns: Tensor) -> Tensor:
    """Columns in `halves_order` back in their own."""
    order = halves_order(columns.shape[1], columns.device)
    return torch.empty_like(columns).index_copy_(1, order, columns)


def _whole_words(t: Tensor) -> bool:
    """Whether rows of a contiguous tensor are whole, aligned 32-bit words."""
    per_word = 4 // t.element_size()
    return t.is_contiguous() and t.shape[1] % per_word == 0 and t.data_ptr() % 4 == 0
