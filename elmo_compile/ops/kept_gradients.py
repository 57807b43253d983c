"""What backwards left for `opt.step()` to update a head's weight from, until it is one gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from elmo_compile.errors import FusedUpdateError
from elmo_compile.numerics.capture import capturing
from elmo_compile.ops.data_parallel import group_of_ignored
from elmo_compile.ops.device_flag import DeviceFlag
from elmo_compile.ops.dtensors import local_of, placed_as, sum_over_shards
from elmo_compile.ops.gather import gathered
from elmo_compile.ops.merged import merged
from elmo_compile.ops.second_pass import Kept, keep_dense, squared_norm


class Policy(NamedTuple):
    """When and how a weight's optimizer wants it updated."""

    at_step: bool = False
    """By `opt.step()`, from what backwards kept; else inside backward."""
    accumulate: str = "error"
    """What several backwards before a step mean: see the optimizers."""
    clips: bool = False
    """The gradient's norm will be asked for."""
    capturable: bool = False
    """Rate and step are the device's: a CUDA graph may hold the update."""


class KeptGradients:
    """The gradient of one weight that is not a tensor: of all its uses, and of all processes."""

    def __init__(self, param: Tensor, name: str) -> None:
        super().__init__()
        self.param = param
        self.name = name
        self.superseded = False
        """Another optimizer took this weight over."""
        self.in_use = False
        """A compiled graph fuses this weight's update."""
        self.policy: Callable[[], Policy] = Policy
        """Reads how the weight is to be updated now."""
        self.kept: list[Kept] = []
        """What backwards left for `opt.step()` to update from."""
        self._kept_of: Any = None
        self._shared: int = 0
        """How many of `kept`, from the first, are of all processes already."""
        self._dense: list[Kept] = []
        """The gradient in `.grad`, as the last `settle` found it."""
        self.reduce_over: Any = None
        """Under DistributedDataParallel: the process group whose mean of `kept` is wanted. Stays
        from one step to the next: a process that does not use the head in one takes part in it."""
        self._ever_kept = False
        self._settled = False
        """Nothing was kept since `settle`."""
        self._kept_invalid = DeviceFlag()
        """CUDA: what was kept is invalid."""
        self._dense_invalid = DeviceFlag()
        """CUDA: `_dense` is invalid."""

    @property
    def weight(self) -> Tensor:
        """The parameter's values, detached: of a sharded one this process's part."""
        return local_of(self.param)

    def keep(self, kept: Kept, reduce_over: Any = None) -> None:
        """Leave a backward's gradient for `opt.step()`.

        Args:
            reduce_over: the process group of the DistributedDataParallel its forward was in. As in
                DDP, one such backward makes the sum of all of a step the processes' mean.
        """
        if self.kept:
            self._check_unchanged()
        else:
            self.reduce_over = None
        if None not in (self.reduce_over, reduce_over) and self.reduce_over is not reduce_over:
            raise FusedUpdateError(
                "backwards of two DistributedDataParallel modules with different process groups "
                f"reached the head weight {self.name} before opt.step(). Call it between them"
            )
        if reduce_over is not None:
            self.reduce_over = reduce_over
        self.kept.append(kept)
        self._ever_kept, self._settled = True, False
        if self.param.is_cuda:
            self._kept_invalid.add(kept.wrong.to(torch.int32))
        self._kept_of = self.param._version, self.param.dtype

    def forget_kept(self) -> None:
        """Drop what backwards kept: the gradient is zeroed."""
        self.kept, self._dense, self._shared = [], [], 0
        self._settled = False
        self._kept_invalid.clear()
        self._dense_invalid.clear()

    def settle(self) -> None:
        """Before a step: what was kept as one gradient, of all processes and uses of the weight.

        A gradient in `.grad` (another use of the weight) is part of it, as it is now: a step that
        was refused may be tried again.
        """
        self._dense = []
        self._dense_invalid.clear()
        grad, group = self.param.grad, self.shared_with()
        try:
            if self.kept:
                self._check_unchanged()
        except FusedUpdateError:
            self.tell_refusal()
            raise
        if grad is not None and (self.kept or group is not None):
            self._dense = [keep_dense(local_of(placed_as(grad, self.param)))]
            if self.param.is_cuda:
                self._dense_invalid.add(self._dense[0].wrong.to(torch.int32))
        if group is not None:
            own = [*self.kept[self._shared :], *self._dense]
            of_all = gathered(own, group, self.param.detach())
            self.kept = [*self.kept[: self._shared], *of_all]
            self._kept_of = self.param._version, self.param.dtype
            self.in_use |= bool(of_all)
        self.kept = merged(self.kept)
        self._shared, self._settled = len(self.kept), True

    def tell_refusal(self) -> bool:
        """Let the other processes' steps raise, as this one's is about to; whether there are any.

        They would wait for this one in `settle`.
        """
        group = self.shared_with()
        if group is not None:
            gathered([], group, self.param.detach(), failed=True)
        return group is not None

    def shared_with(self) -> Any:
        """The process group that is to exchange what its processes kept; None if none is.

        Raises:
            FusedUpdateError: it is, but a CUDA graph is being captured.
        """
        group = self.reduce_over
        if not self._ever_kept and self.policy().at_step:
            group = group_of_ignored(self.param)
        if group is None or self._settled or self.superseded or not dist.is_initialized():
            return None
        if dist.get_world_size(group) == 1:
            return None
        if capturing(self.param.device):
            raise FusedUpdateError(
                f"a CUDA graph is being captured, but the processes that train the head weight "
                f"{self.name} tell each other how many rows they have in every step. Leave "
                "opt.step() out of the capture, or use one process"
            )
        return group

    def _check_unchanged(self) -> None:
        if self._kept_of != (self.param._version, self.param.dtype):
            raise FusedUpdateError(
                f"the head weight {self.name} was changed between backward() and opt.step(): the "
                "gradient of its former values can no longer be formed. Load or change weights "
                "before the forward or after the step, and clear with opt.zero_grad()"
            )

    def wrong(self) -> Tensor:
        """Whether anything kept is invalid or not finite, as a bool scalar on its device."""
        return torch.stack([one.wrong for one in (*self.kept, *self._dense)]).any()

    def kept_is_wrong(self) -> bool:
        """`wrong` for the host, which waits for the backwards only. `settle` comes first."""
        if self.param.is_cuda and self.reduce_over is None:
            return self._kept_invalid.is_set() or self._dense_invalid.is_set()
        return bool(self.wrong())

    def squared_norm(self) -> Tensor:
        """The squared norm of the kept gradient, float64. `settle` comes first."""
        norm2 = squared_norm([*self.kept, *self._dense], self.weight)
        return sum_over_shards(norm2, self.param)
