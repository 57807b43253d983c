"""DTensor parameters (FSDP2): each process updates its shard, with the bits of the whole tensor.

Private names of torch: `torch.distributed.tensor._utils.compute_local_shape_and_global_offset`
(tried on 2.13).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from elmo_compile.errors import FusedUpdateError, OptionError
from elmo_compile.numerics.formats import is_narrow
from elmo_compile.numerics.update import Update
from elmo_compile.ops.dtensors import is_head, is_sharded, local_of, placed_as
from elmo_compile.ops.owners import Owner
from elmo_compile.ops.shards import Agreement
from elmo_compile.optim.state import state_dtype


def check_sharded(group: dict[str, Any], params: Iterable[Any], *, row_wise: bool) -> None:
    """Raise OptionError for a DTensor that a group's update cannot be made shard by shard of.

    Args:
        group: its hyper-parameters.
        row_wise: whether the state is a number a row.
    """
    tensors = [p[1] if isinstance(p, tuple) else p for p in params]
    for param in filter(is_sharded, tensors):
        shown = f"a DTensor parameter of shape {tuple(param.shape)} and {param.placements}"
        if group.get("state_dtype") == "8bit":
            raise OptionError(
                f"state_dtype='8bit' with {shown}: its blocks are those of a whole tensor. Use "
                "torch.bfloat16 or torch.float32 state"
            )
        if group["kahan_rows"] is not None:
            raise OptionError(f"kahan_rows with {shown}: use rounding='kahan', which is all rows")
        if group["capturable"]:
            raise OptionError(
                f"capturable=True with {shown}: the processes agree on a step on the host. Use "
                "capturable=False"
            )
        if any(place.is_partial() for place in param.placements):
            raise OptionError(f"{shown}: a sum that was not made cannot be updated")
        by_rows = all(place.is_replicate() or place.is_shard(0) for place in param.placements)
        if row_wise and not (by_rows and param.dim() <= 2 and not param.is_complex()):
            raise OptionError(
                f"row-wise Adagrad with {shown}: a row's sum must be within one shard. Accepted: "
                "real matrices and vectors, sharded over dimension 0 (Shard(0))"
            )
        if not by_rows and _rounds(param.dtype, group):
            raise OptionError(
                f"stochastic rounding with {shown}: random bits belong to whole rows. Accepted: "
                "Shard(0); or float32 weights and state, sharded anyhow"
            )


def _rounds(weight: torch.dtype, group: dict[str, Any]) -> bool:
    """Whether the weight or its state is rounded."""
    return is_narrow(weight) or is_narrow(state_dtype(weight, group.get("state_dtype")))


def state_like(value: Any, param: Any) -> Tensor:
    """A saved state tensor with a parameter's placements: of a whole one this process's rows, and
    for a whole parameter all rows of a sharded one. Collective where it was placed otherwise."""
    if not is_sharded(param):
        whole: Tensor = value.full_tensor() if is_sharded(value) else value
        return whole
    if is_sharded(value):
        placed: Tensor = placed_as(value, param)
        return placed
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, param.device_mesh, param.placements, src_data_rank=None)


@contextlib.contextmanager
def stepping(owners: Iterable[Owner]) -> Iterator[None]:
    """Around the checks of a step: the processes of a sharded head all make it, or all raise."""
    sharded = [owner for owner in owners if is_head(owner.param)]
    if not sharded or not dist.is_initialized():
        yield
        return
    first: Any = sharded[0].param
    agreement = Agreement(
        first.device_mesh.get_group(), first.device, "opt.step() of a sharded head",
        "what backward() and other uses of the head's weight left", FusedUpdateError,
    )  # fmt: skip
    with agreement:
        yield
        left = [(o.pending, len(o.kept), o.param.grad is None) for o in sharded]
        agreement.tell(same=left)


def row_sums(param: Any) -> Tensor:
    """A float number for each row of a DTensor, zeros, sharded as it is."""
    from torch.distributed.tensor import DTensor

    shape, _ = _place(param)
    wide = torch.float64 if param.dtype == torch.float64 else torch.float32
    local = torch.zeros(shape[0], dtype=wide, device=param.device)
    made: Tensor = DTensor.from_local(
        local, param.device_mesh, param.placements, run_check=False,
        shape=torch.Size([param.shape[0]]), stride=(1,),
    )  # fmt: skip
    return made


def _place(param: Any) -> tuple[Sequence[int], Sequence[int]]:
    """(shape of this process's shard, where it begins)."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)


def _local(t: Any) -> Any:
    """This process's shard of a DTensor; anything else as it is."""
    return local_of(t) if is_sharded(t) else t


def local_update(param: Tensor, update: Update) -> Update:
    """The update of this process's rows of a DTensor; of another parameter the same one."""
    if not is_sharded(param):
        return update
    _, start = _place(param)
    offset = start[0] if param.dim() else 0
    return dataclasses.replace(
        update,
        state=tuple(_local(s) for s in update.state),
        compensation=_local(update.compensation),
        row_offset=offset * math.prod(param.shape[1:-1]),
    )


class Shard:
    """This process's part of an update: what `_Matrix` takes, and what comes home after it."""

    def __init__(self, param: Any, grad: Any, update: Update) -> None:
        grad = placed_as(grad, param)
        self._whole, self._copies = param, list[tuple[Tensor, Tensor]]()
        self.param, self.grad = _local(param), _local(grad)
        self.update = local_update(param, update)
        if param.dim() < 2 and not update.row_wise:
            self._as_one_row()

    def _as_one_row(self) -> None:
        """A vector is one row, whose bits go by columns: the shard in its place of all."""
        update, compensation = self.update, self.update.compensation
        start, state = update.row_offset, update.state
        rounded = [self.param, *state, *([] if compensation is None else [compensation])]
        if any(is_narrow(t.dtype) for t in rounded):
            self.param = self._placed(self.param, start)
            self.grad = self._placed(self.grad, start)
            state = tuple(self._placed(s, start) for s in state)
            if compensation is not None:
                compensation = self._placed(compensation, start)
        self.update = dataclasses.replace(
            update, state=state, compensation=compensation, row_offset=0
        )

    def _placed(self, t: Any, start: int) -> Tensor:
        whole: Tensor = t.new_zeros(self._whole.shape)
        part = whole[start : start + t.numel()]
        part.copy_(t)
        self._copies.append((t, part))
        return whole

    def write_back(self) -> None:
        """Write what was updated in a copy, and count the update as a change of the DTensor."""
        for home, part in self._copies:
            home.copy_(part)
        torch.autograd.graph.increment_version(self._whole)


def values_of(grad: Tensor) -> Tensor:
    """The numbers of a gradient that this process has."""
    found: Tensor = grad.coalesce().values() if grad.is_sparse else _local(grad)
    return found


def agreed(flag: bool, grads: Iterable[Any]) -> bool:
    """Whether any process that has a shard of these gradients says so. Collective."""
    meshes = {grad.device_mesh: grad.device for grad in grads if is_sharded(grad)}
    for _ in meshes:  # once for each: what one mesh says must reach those before it
        for mesh, device in meshes.items():
            said = torch.tensor([flag], dtype=torch.int32, device=device)
            for dimension in range(mesh.ndim):
                dist.all_reduce(said, dist.ReduceOp.MAX, group=mesh.get_group(dimension))
            flag = bool(said)
    return flag
