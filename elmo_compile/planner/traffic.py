"""Operations and bytes of weight that one step of a head moves."""

from __future__ import annotations

import dataclasses
from typing import Any

import sympy

from elmo_compile.planner.memory import state_bytes
from elmo_compile.planner.shape import D, HeadShape, L, N


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrafficTable:
    """Formulas in N, D, L, and the same at the sizes of one head."""

    products: int
    """[N, D] x [D, L]-sized matrix products in a step."""
    operations: Any
    """Floating-point operations of the products: 2 N L D each."""
    read: Any
    """Bytes read of weight and optimizer state, each chunk staying in cache between its uses."""
    written: Any
    """Bytes written of weight, weight gradient and optimizer state."""
    operations_number: int
    read_bytes: int
    written_bytes: int


def count_products(shape: HeadShape, *, once: bool = False) -> int:
    """Matrix products of one step.

    The logits in forward (not where the value is deferred to the backward), the logits again in
    the backward (not where they are made `once`: held, or the forward forms the gradients), the
    feature gradient and the weight gradient: 4 at most, 3 deferred or once, 1 without a backward.
    """
    passes = 1 if once else _passes(shape)
    if not shape.trains:
        return passes
    return passes + int(shape.features_trainable) + int(shape.weight_trainable)


def _passes(shape: HeadShape) -> int:
    """Times the logits are computed."""
    if shape.program is not None:
        return shape.program.forward + (shape.program.backward if shape.trains else 0)
    return 2 if shape.trains and not shape.value_in_backward else 1


def head_traffic(
    shape: HeadShape, *, at_once: bool = False, row_block: int = 0, held: bool = False
) -> TrafficTable:
    """The step's operations and bytes moved (a lower bound: features and targets not counted).

    Blocks of rows read the weight twice each, for the logits and for the feature gradient, and add
    to the weight gradient of those before.
    """
    weight = shape.weight_dtype.itemsize * L * D
    blocks = sympy.ceiling(N / row_block) if row_block else sympy.Integer(1)
    # With held logits the weight is read for them, and again for its products in the backward.
    passes = 1 if at_once else _passes(shape)
    if row_block:
        passes = (1 + int(shape.features_trainable)) * blocks
    read, written = passes * weight, sympy.Integer(0)
    if shape.weight_trainable and shape.fused_update:
        written = weight
        state = sympy.Add(*(state_bytes(size) for size in shape.state))
        read, written = read + state, written + state
    elif shape.weight_trainable:
        gradient = shape.weight_gradient_dtype.itemsize * L * D
        read, written = read + (blocks - 1) * gradient, blocks * gradient
    products = count_products(shape, once=at_once or held)
    operations = 2 * products * N * L * D
    return TrafficTable(
        products=products,
        operations=operations,
        read=read,
        written=written,
        operations_number=shape.number(operations),
        read_bytes=shape.number(read),
        written_bytes=shape.number(written),
    )
