"""What the launchers of one call share: the problem's tensors in kernel form, tiles, constants."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import torch
import triton.language as tl
from torch import Tensor

from elmo_compile.errors import InputError
from elmo_compile.kernels.problem import HeadProblem
from elmo_compile.kernels.triton import configs
from elmo_compile.kernels.triton.positives import tile_bounds
from elmo_compile.kernels.triton.tuned import tuned_tiles
from elmo_compile.numerics.features import to_codes
from elmo_compile.numerics.losses import Positives

_COMPUTE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_WEIGHTS = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)
_FP16_GRADIENT_SCALE, _FP16_COUNTED_SCALE = 4096.0, 64.0
"""Gradients of classes and marks are at most 1, of counted or dense targets as large as these."""
_MAX_CHUNK = 1 << 23
"""Outputs at once: a tile of rows of the gradient buffer stays within 32-bit offsets."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """One head call as the kernels see it."""

    x_ND: Tensor
    """Contiguous, in the compute type."""
    w_LD: Tensor
    """As stored; fp8 as bytes."""
    logits_x_ND: Tensor
    """x as an operand of the logits' product: `x_ND`, or its E4M3 codes as bytes."""
    x_scale_N: Tensor | None
    """float32 scales of the codes; None where there are none."""
    b_L: Tensor | None
    problem: HeadProblem
    chunk: int
    tiles: configs.Tiles
    processors: int
    gradient_scale: float
    """Factor on stored gradients: float16 would lose those below 6e-8. A power of two."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(N, D, L)."""
        return (*self.x_ND.shape, self.w_LD.shape[0])

    @functools.cached_property
    def constants(self) -> dict:
        """Compile-time arguments of every product."""
        exact = self.problem.compute_dtype == torch.float32
        tf32 = exact and torch.backends.cuda.matmul.fp32_precision == "tf32"
        return {
            "COMPUTE": _COMPUTE[self.problem.compute_dtype],
            "PRECISION": "tf32" if tf32 or not exact else "ieee",
        }

    def logits_tile(self, *, value: bool) -> configs.Tile:
        """The tile of the logits' product. `value`: the loss itself is formed, not only g.

        BCE's value, and targets that are more than marks, keep a second tile in registers.
        """
        target = self.problem.target
        marks = isinstance(target, Positives) and target.values_M is None
        narrow = self.problem.loss.targets != "classes" and (value or not marks)
        tile = self.tiles.logits_narrow if narrow else self.tiles.logits
        # Codes are half as wide: as many bytes a step.
        return tile if self.x_scale_N is None else tile._replace(inner=2 * tile.inner)

    def chunks(self) -> Iterator[tuple[int, int, int]]:
        """(number, first output, one past the last) of each chunk."""
        outputs = self.w_LD.shape[0]
        for number, start in enumerate(range(0, outputs, self.chunk)):
            yield number, start, min(start + self.chunk, outputs)


def prepare(p: HeadProblem) -> Call:
    """The call's tensors cast and laid out for the kernels: one copy of x at most.

    Raises:
        InputError: a dtype these kernels have no form of (float64: use the reference family).
    """
    if p.compute_dtype not in _COMPUTE or p.w_LD.dtype not in _WEIGHTS:
        raise InputError(
            f"the Triton kernels got weight {p.w_LD.dtype} with compute_dtype {p.compute_dtype}; "
            f"they accept weights in {_WEIGHTS} and products in {tuple(_COMPUTE)}. "
            "float64 runs in the reference kernels."
        )
    chip, processors = configs.chip_of(p.x_ND.device)
    fp8 = p.w_LD.dtype == torch.float8_e4m3fn
    x_ND = p.x_ND.to(p.compute_dtype).contiguous()
    logits_x_ND, x_scale_N = x_ND, None
    if p.fp8_features and chip not in configs.WITHOUT_FP8:
        codes_ND, x_scale_N = to_codes(x_ND)  # exact: x was rounded so
        logits_x_ND = codes_ND.view(torch.uint8)
    return Call(
        x_ND=x_ND,
        logits_x_ND=logits_x_ND,
        x_scale_N=x_scale_N,
        w_LD=p.w_LD.view(torch.uint8) if fp8 else p.w_LD,
        b_L=None if p.b_L is None else _as_float(p.b_L).contiguous(),
        problem=p,
        chunk=max(1, min(p.chunk, p.w_LD.shape[0], _MAX_CHUNK)),
        tiles=configs.tiles_for(chip, p.compute_dtype, tuned_tiles(p, chip)),
        processors=processors,
        gradient_scale=_gradient_scale(p),
    )


def _gradient_scale(p: HeadProblem) -> float:
    if p.compute_dtype != torch.float16:
        return 1.0
    marks = isinstance(p.target, Positives) and p.target.values_M is None
    return _FP16_GRADIENT_SCALE if marks or p.loss.targets == "classes" else _FP16_COUNTED_SCALE


def _as_float(b_L: Tensor) -> Tensor:
    return b_L.float() if b_L.dtype == torch.float64 else b_L


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Targets:
    """Targets in kernel form; what a loss does not use is None (compiled away)."""

    kind: str
    """`classes`, `dense` or `pairs`."""
    target: Tensor | None = None
    rows: Tensor | None = None
    cols: Tensor | None = None
    values: Tensor | None = None
    bounds: Tensor | None = None
    """int64 [chunks, tiles + 1], see `tile_bounds`."""

    def mass(self) -> Tensor:
        """float64 [N]: the sum of each row's dense targets."""
        return self.target.sum(1, dtype=torch.float64)

    def arguments(self, number: int, start: int) -> dict:
        """Kernel arguments for the chunk `number` that begins at output `start`."""
        dense = self.kind == "dense"
        return {
            "target_ptr": self.target[:, start:] if dense else self.target,
            "target_n": self.target.stride(0) if dense else 0,
            "target_l": self.target.stride(1) if dense else 0,
            "rows_ptr": self.rows,
            "cols_ptr": self.cols,
            "values_ptr": self.values,
            "bounds_ptr": None if self.bounds is None else self.bounds[number],
            "first_output": start,
            "TARGETS": self.kind,
        }


def prepare_targets(c: Call, chunk: int, block: int) -> Targets:
    """Targets for chunks of `chunk` outputs cut in tiles of `block`."""
    given = c.problem.target
    if c.problem.loss.targets == "classes":
        return Targets(kind="classes", target=given.contiguous())
    if isinstance(given, Positives):
        return Targets(
            kind="pairs",
            rows=given.rows_M.contiguous(),
            cols=given.cols_M.contiguous(),
            values=None if given.values_M is None else given.values_M.float().contiguous(),
            bounds=tile_bounds(given.cols_M.contiguous(), c.shape[2], chunk, block),
        )
    if given.dtype == torch.bool:
        given = given.view(torch.uint8)
    return Targets(kind="dense", target=given)
