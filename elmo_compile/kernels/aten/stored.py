"""A weight as stored, read as operands of matrix products and updated in place, chunk by chunk.

Three layouts. `plain`: elements as they are. `pairs`: bf16 words of two. `quads`: E4M3 words of
four, decoded to bf16 with the columns in `halves_order`. The last two need contiguous rows of whole
words and stochastic rounding. Shapes: L outputs, D features, C outputs of a chunk.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from elmo_compile.kernels.aten import decode, pieces, steps
from elmo_compile.kernels.aten.compiled import piece
from elmo_compile.kernels.aten.lanes import as_words, halves_order
from elmo_compile.numerics import philox
from elmo_compile.numerics.formats import is_narrow
from elmo_compile.numerics.update import Update

Layout = Literal["plain", "pairs", "quads"]
_KEY_ROWS = 1 << 16


class StoredWeight:
    """The weight of one call: `load` a chunk for the products, then `step` it."""

    def __init__(
        self, w_LD: Tensor, operand: torch.dtype, chunk: int, update: Update | None, fast: bool
    ) -> None:
        self.w_LD = w_LD.detach()
        self.operand = operand
        self.update = update
        self.fast = fast
        self.chunk = chunk
        self.layout = self._choose_layout()
        num_features = w_LD.shape[1]
        self._decoded: Tensor | None = None
        if w_LD.dtype != operand:
            self._decoded = torch.empty(chunk, num_features, dtype=operand, device=w_LD.device)
        self._gradient: Tensor | None = None
        per_word = {"plain": 1, "pairs": 2, "quads": 4}[self.layout]
        self._columns = torch.arange(
            0, num_features, per_word, dtype=torch.int32, device=w_LD.device
        )
        self._keys = [
            _RowKeys(update, stream, w_LD, chunk, fast) if update and needed else None
            for stream, needed in self._streams()
        ]

    def _choose_layout(self) -> Layout:
        w, update = self.w_LD, self.update
        if self.operand != torch.bfloat16:
            return "plain"
        stochastic = update is None or update.rounding == "stochastic"
        buffer = None if update is None else update.buffer
        if w.dtype == torch.float8_e4m3fn and _whole_words(w) and stochastic and buffer is None:
            return "quads"
        same = buffer is None or (buffer.dtype == w.dtype and _whole_words(buffer))
        if w.dtype == torch.bfloat16 and _whole_words(w) and stochastic and same:
            return "pairs"
        return "plain"

    def _streams(self) -> list[tuple[int, bool]]:
        """(stream, whether its random words are needed) of the weight and of its momentum."""
        update = self.update
        if update is None:
            return []
        buffer = update.buffer
        return [
            (philox.WEIGHT, update.rounding == "stochastic" and is_narrow(self.w_LD.dtype)),
            (philox.MOMENTUM, buffer is not None and is_narrow(buffer.dtype)),
        ]

    def features(self, x_ND: Tensor) -> Tensor:
        """Features with their columns in the order `load` gives the weight's."""
        if self.layout != "quads":
            return x_ND
        return x_ND[:, halves_order(x_ND.shape[1], x_ND.device)]

    def restore(self, columns_D: Tensor) -> Tensor:
        """Columns of a result back in the weight's own order."""
        if self.layout != "quads":
            return columns_D
        order = halves_order(columns_D.shape[1], columns_D.device)
        return torch.empty_like(columns_D).index_copy_(1, order, columns_D)

    def load(self, start: int, stop: int) -> Tensor:
        """w[start:stop] as an operand [C, D]; valid until the next `load`."""
        stored = self.w_LD[start:stop]
        if self._decoded is None:
            return stored
        out = self._decoded[: stop - start]
        if self.layout == "quads":
            piece(decode.quads_, self.fast)(as_words(out), as_words(stored))
        elif self.fast or stored.dtype != torch.float8_e4m3fn:
            piece(pieces.cast_, self.fast)(out, stored)
        else:
            decode.table_(out, stored)
        return out

    def step(self, start: int, stop: int, g_CN: Tensor, xs_ND: Tensor, scale: float) -> None:
        """Update w[start:stop] with the gradient `scale g xs`, given what `load` returned last."""
        assert self.update is not None
        update, stored = self.update, self.w_LD[start:stop]
        exact = update.rounding == "nearest" or not is_narrow(stored.dtype)
        if exact and update.buffer is None and stored.dtype == self.operand:
            # The product's own epilogue: the sum is formed in its accumulator and rounded once.
            keep = 1.0 - update.lr * update.weight_decay
            torch.addmm(stored, g_CN, xs_ND, beta=keep, alpha=-update.lr * scale, out=stored)
            return
        if self._gradient is None:
            self._gradient = torch.empty(
                self.chunk, stored.shape[1], dtype=self.operand, device=stored.device
            )
        dw = torch.mm(g_CN, xs_ND, out=self._gradient[: stop - start])
        m = None if update.buffer is None else update.buffer[start:stop]
        w_key, m_key = (keys.of(start, stop) if keys else None for keys in self._keys)
        rates = (scale, update.lr, update.weight_decay, update.momentum)
        if self.layout == "plain":
            run = piece(steps.plain_, self.fast, nesterov=update.nesterov)
            run(stored, dw, m, w_key, m_key, self._columns, *rates)
            return
        run = piece(steps.lanes_, self.fast, nesterov=update.nesterov)
        decoded = None if self._decoded is None else as_words(self._decoded[: stop - start])
        words = None if m is None else as_words(m)
        run(as_words(stored), decoded, as_words(dw), words, w_key, m_key, self._columns, *rates)


class _RowKeys:
    """Row keys of one stream, computed some 2^16 rows at a time."""

    def __init__(self, update: Update, stream: int, w_LD: Tensor, chunk: int, fast: bool) -> None:
        words = philox.counter_words(update.seed, update.param_id, update.step, stream)
        self._words = [torch.tensor(word, dtype=torch.int64) for word in words]
        self._first, self._rows, self._device = update.row_offset, w_LD.shape[0], w_LD.device
        self._block = chunk * max(1, _KEY_ROWS // chunk)
        self._start, self._keys = 0, torch.empty(0, dtype=torch.int32)
        self._fast = fast

    def of(self, start: int, stop: int) -> Tensor:
        """int32 [stop - start] keys; `start` and `stop` bound one chunk."""
        if not self._start <= start < stop <= self._start + self._keys.numel():
            self._start = start
            last = min(start + self._block, self._rows)
            rows = torch.arange(self._first + start, self._first + last, device=self._device)
            self._keys = piece(steps.row_keys, self._fast)(*self._words, rows)
        return self._keys[start - self._start : stop - self._start]


def _whole_words(t: Tensor) -> bool:
    """Whether rows of a contiguous tensor are whole, aligned 32-bit words."""
    per_word = 4 // t.element_size()
    return t.shape[1] % per_word == 0 and t.data_ptr() % 4 == 0
