"""`ShardedLinear`: an nn.Linear whose outputs are spread over the processes of a mesh."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from elmo_compile.errors import ElmoError
from elmo_compile.heads.low_precision import WIDER, LowPrecisionLinear, keeping_dtype, rounded_to
from elmo_compile.ops.collectives import gather_rows
from elmo_compile.ops.dtensors import local_of, local_part, note_head
from elmo_compile.ops.linear import carry
from elmo_compile.ops.owners import owner_of
from elmo_compile.ops.sharded_linear import sharded_head
from elmo_compile.ops.shards import LabelShard, note_group


class ShardedLinear(nn.Linear):
    """z = x W^T + b with the rows of W and b spread over processes, as DTensors (`Shard(0)`).

    Each process hands in features of its own and gets their logits, of all outputs. Compiled with
    `backend="elmo"` it is rewritten together with its loss; eagerly the logits exist. Every call is
    collective, and so is its backward.

    Shapes: x [..., D], weight [L, D], bias [L], z [..., L]; N and the leading dimensions may differ
    between processes.
    """

    storage_dtype: torch.dtype | None
    """What the weight is stored in whatever the model is cast to; None if it follows casts."""

    @classmethod
    def of(cls, head: nn.Linear, weight: nn.Parameter, bias: nn.Parameter | None) -> ShardedLinear:
        """A head in the place of `head`.

        Args:
            weight, bias: DTensors, sharded over dimension 0 of a mesh of one dimension.
        """
        with torch.device("meta"):
            new = cls(head.in_features, head.out_features, bias=False)
        new.storage_dtype = head.storage_dtype if isinstance(head, LowPrecisionLinear) else None
        new.weight = weight
        new.register_parameter("bias", bias)
        new._note()
        new.train(head.training)
        return new

    def _note(self) -> None:
        note_head(self.weight, converted=self.storage_dtype is not None)
        note_group(self.weight)
        torch.compiler.allow_in_graph(sharded_head)  # type: ignore[no-untyped-call]
        self._shard = LabelShard.of(self.weight).encode()

    def forward(self, input: Tensor) -> Tensor:
        """Logits [..., L] in the dtype of the features [..., D], or of autocast."""
        x = input
        if self.storage_dtype is None and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if torch.compiler.is_compiling():
            return sharded_head(x, self.weight, self.bias, self._shard)
        bias = None if self.bias is None else local_part(self.bias)
        carrier = None
        if torch.is_grad_enabled() and self.weight.requires_grad:
            carrier = carry(self.weight)
        op = torch.ops.elmo.sharded_linear.default
        z: Tensor = op(x, local_of(self.weight), bias, carrier, self._shard)
        return z

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> ShardedLinear:
        """Apply a move or cast; a converted head keeps its storage dtypes."""
        if self.storage_dtype is not None:
            fn = keeping_dtype(fn)
        probe = torch.empty(0, dtype=self.weight.dtype, device=self.weight.device)
        moved = fn(probe)
        if (moved.dtype, moved.device) != (probe.dtype, probe.device):
            if owner_of(self.weight) is not None:
                raise ElmoError(
                    "a sharded head was to be moved or cast, but an optimizer owns its weight "
                    "already; do so before constructing the optimizer"
                )
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            self._note()
        return self  # else there is nothing to do, and torch would swap the Parameters' contents

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """As nn.Module's; a whole tensor is accepted too, of which this process takes its rows.

        Wider weights of a converted head are rounded to nearest and saturate.
        """
        state_dict = dict(state_dict)
        for name, param in self.named_parameters(recurse=False):
            given = state_dict.get(prefix + name)
            if isinstance(given, Tensor) and given.shape == param.shape:
                state_dict[prefix + name] = self._part_of(given, param)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._note()  # of another Parameter, with assign=True

    def _part_of(self, given: Any, param: Any) -> Any:
        """A whole tensor, or a DTensor, as a DTensor like `param`."""
        from torch.distributed.tensor import DTensor

        if isinstance(given, DTensor):
            local = given.redistribute(param.device_mesh, param.placements).to_local()
        else:
            shard = LabelShard.of(self.weight)
            local = given.detach()[shard.first : shard.first + shard.count].clone()
        if self.storage_dtype is not None and param is self.weight and given.dtype in WIDER:
            local = rounded_to(local, self.storage_dtype)
        return DTensor.from_local(
            local.to(param.device, param.dtype), param.device_mesh, param.placements,
            run_check=False, shape=param.shape, stride=param.stride(),
        )  # fmt: skip

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardedLinear:
        """Without gradients, as nn.Parameter's: torch copies those of DTensors, but not that they
        may have another dtype."""
        grads = [(param, param.grad) for param in self.parameters(recurse=False)]
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        try:
            for param, _ in grads:
                param.grad = None
            new.__setstate__(copy.deepcopy(self.__dict__, memo))
        finally:
            for param, grad in grads:
                param.grad = grad
        return new

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._note()

    def extra_repr(self) -> str:
        shard = LabelShard.of(self.weight)
        stored = "" if self.storage_dtype is None else f", storage_dtype={self.storage_dtype}"
        return (
            f"{super().extra_repr()}, outputs {shard.first} to {shard.first + shard.count} of "
            f"{shard.world} processes{stored}"
        )


def whole_of(param: Any) -> Tensor:
    """All rows of a DTensor with `Shard(0)`, on every process. Collective.

    Sent as bytes: process groups refuse fp8.
    """
    shard = LabelShard(param.device_mesh.get_group(), param.shape[0])
    sizes = [last - first for first, last in shard.bounds]
    return torch.cat(gather_rows(local_of(param), sizes, shard.group))
