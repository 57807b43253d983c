"""A weight as stored, read as operands of matrix products and updated in place, chunk by chunk.

Three layouts. `plain`: elements as they are. `pairs`: bf16 words of two. `quads`: E4M3 words of
four, decoded to bf16 with the columns in `halves_order`. The last two need contiguous rows of whole
words and stochastic rounding. Shapes: L outputs, D features, C outputs of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from elmo_compile import host_memory
from elmo_compile.kernels.aten import decode, pieces
from elmo_compile.kernels.aten.chunk_update import ChunkUpdate, choose_layout, restore_columns
from elmo_compile.kernels.aten.compiled import SMALL_WEIGHT, piece
from elmo_compile.kernels.aten.lanes import as_words, halves_order
from elmo_compile.numerics.formats import is_narrow
from elmo_compile.numerics.update import Update


class StoredWeight:
    """The weight of one call: `load` a chunk for the products, then `step` it."""

    def __init__(
        self, w_LD: Tensor, operand: torch.dtype, chunk: int, update: Update | None, fast: bool
    ) -> None:
        self.w_LD = w_LD.detach()
        self.operand = operand
        self.update = update = None if update is None else update.on_host()
        self.fast = fast = fast or w_LD.numel() >= SMALL_WEIGHT
        self.chunk = chunk
        self.layout = choose_layout(self.w_LD, operand, update)
        self._decoded: Tensor | None = None
        if w_LD.dtype != operand:
            shape = (chunk, w_LD.shape[1])
            self._decoded = host_memory.scratch(self, shape, operand, w_LD.device)
        self._gradient: Tensor | None = None
        self._chunk_update: ChunkUpdate | None = None
        if update is not None:
            self._chunk_update = ChunkUpdate(w_LD, update, self.layout, chunk, fast=fast)

    def features(self, x_ND: Tensor) -> Tensor:
        """Features with their columns in the order `load` gives the weight's."""
        if self.layout != "quads":
            return x_ND
        return x_ND[:, halves_order(x_ND.shape[1], x_ND.device)]

    def restore(self, columns_D: Tensor) -> Tensor:
        """Columns of a result back in the weight's own order."""
        if self.layout != "quads":
            return columns_D
        return restore_columns(columns_D)

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
        update, stored = self.update, self.w_LD[start:stop]
        assert update is not None
        assert self._chunk_update is not None
        exact = update.rounding == "nearest" or not is_narrow(stored.dtype)
        plain_sgd = update.rule == "sgd" and not update.state and update.compensation is None
        if exact and plain_sgd and stored.dtype == self.operand:
            # The product's own epilogue: the sum is formed in its accumulator and rounded once.
            rates = update.rates
            keep = 1.0 - rates.lr * rates.weight_decay
            torch.addmm(stored, g_CN, xs_ND, beta=keep, alpha=-rates.lr * scale, out=stored)
            return
        if self._gradient is None:
            shape = (self.chunk, stored.shape[1])
            self._gradient = host_memory.scratch(self, shape, self.operand, stored.device)
        dw = torch.mm(g_CN, xs_ND, out=self._gradient[: stop - start])
        decoded = None
        if self.layout == "quads" and self._decoded is not None:
            decoded = self._decoded[: stop - start]
        self._chunk_update.apply(start, stop, dw, scale, decoded)
