"""Heads whose outputs are spread over processes: each stores, and updates, its own rows."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from elmo_compile.distributed.data_parallel import ignore_parameters
from elmo_compile.errors import ElmoError, OptionError
from elmo_compile.heads.convert import check_replaceable, exclude, find_head, replace_head
from elmo_compile.heads.low_precision import LowPrecisionLinear
from elmo_compile.heads.sharded import ShardedLinear, whole_of
from elmo_compile.ops.exclusion import is_excluded
from elmo_compile.ops.owners import owner_of
from elmo_compile.ops.shards import Agreement, LabelShard
from elmo_compile.optim import guards

M = TypeVar("M", bound=nn.Module)
_BLOCK_BYTES = 1 << 26
"""Weights that process 0 sends at once."""


def shard_head(model: M, mesh: Any, *, name: str | None = None) -> M:
    """Spread the outputs of a model's head over the processes of a mesh.

    Process r keeps rows [r c, (r + 1) c) of weight and bias, c = ceil(L / W), as DTensors
    (`Shard(0)`) with the values of process 0. Features and targets of all processes are gathered
    for it, softmax statistics combined, dx summed; its gradient is the mean over processes, as
    DistributedDataParallel makes those of the other parameters, which it keeps out of the head.
    Rounding bits are those of the whole head, for any number of processes.

    Call it in every process, after `convert_head` and before the optimizer is made, with the very
    module that DistributedDataParallel is then given (or before `fully_shard`, with the head's
    parameters in `ignored_params`). Every process must then call the model, `backward()` and
    `opt.step()` as often as the others.

    Args:
        model: changed in place; its head is the nn.Linear with the most outputs. Weights on the
            meta device stay there, as this process's rows: `to_empty` them.
        mesh: a `DeviceMesh` of one dimension and all processes.
        name: the head's qualified name, where the largest nn.Linear is not meant.

    Returns:
        `model`; if `model` itself is the head, the sharded one.

    Raises:
        OptionError: no such mesh or head; fewer outputs than the processes need.
        ElmoError: the head is tied, parametrised, has hooks, or is owned by an optimizer already.
        InputError: the processes do not have the same head.
    """
    group = _group_of(mesh)
    with _together(group, mesh.device_type) as agreement:
        if isinstance(model, DistributedDataParallel):
            raise OptionError(
                "shard_head: the model is in DistributedDataParallel already; shard its head first"
            )
        path, head = find_head(model, name, who="shard_head")
        check_replaceable(model, path, head, "shard_head", "sharded")
        _check_device(path, head.weight, mesh)
        shard = LabelShard(group, head.out_features)
        if any(first == last for first, last in shard.bounds):
            raise OptionError(
                f"shard_head: {head.out_features} outputs over {shard.world} processes would leave "
                "one without any; use fewer processes"
            )
        params = dict(head.named_parameters(recurse=False))
        agreement.tell(
            same=[
                (n, tuple(p.shape), p.dtype, p.is_meta, p.requires_grad) for n, p in params.items()
            ]
        )
    parts = {n: _part(p, shard, mesh) for n, p in params.items()}
    if isinstance(head, LowPrecisionLinear):
        parts["weight"].grad_dtype = None
    new = ShardedLinear.of(head, parts["weight"], parts.get("bias"))
    if is_excluded(head.weight):
        exclude(new)
    guards.install()  # GradScaler takes no mixture of DTensors and others
    model = replace_head(model, path, new)
    ignore_parameters(model, [f"{path}.{n}" if path else n for n in params])
    return model


def unshard_head(model: M, *, name: str | None = None) -> M:
    """Undo `shard_head`: every process gets all rows of weight and bias. Collective.

    Args:
        model: changed in place.
        name: qualified name of one head; None: every sharded head.

    Returns:
        `model`; if `model` itself is the head, the new one.

    Raises:
        ElmoError: there is no sharded head (of that name), or an optimizer owns it.
    """
    sharded = {p: m for p, m in model.named_modules() if isinstance(m, ShardedLinear)}
    if not sharded:
        raise ElmoError("unshard_head: the model has no sharded head")
    mesh: Any = next(iter(sharded.values())).weight
    with _together(mesh.device_mesh.get_group(), mesh.device.type) as agreement:
        found = [(path, head) for path, head in sharded.items() if name in (None, path)]
        if not found:
            raise ElmoError(f"unshard_head: no sharded head is called {name!r}: {sorted(sharded)}")
        for path, head in found:
            if owner_of(head.weight) is not None:
                raise ElmoError(
                    f"unshard_head: an optimizer owns the weight of {path or 'the head'}; delete "
                    "the optimizer first"
                )
        agreement.tell(same=[path for path, _ in found])
    for path, head in found:
        model = replace_head(model, path, _whole(head))
    return model


def _together(group: Any, device_type: str) -> Agreement:
    device = torch.device(device_type)
    if device_type == "cuda":
        device = torch.device(device_type, torch.cuda.current_device())
    return Agreement(
        group, device, "shard_head or unshard_head", "the head (name, shapes, dtypes, device)"
    )


def _whole(head: ShardedLinear) -> nn.Linear:
    with torch.device("meta"):
        new = nn.Linear(head.in_features, head.out_features, bias=head.bias is not None)
    if head.storage_dtype is not None:
        new = LowPrecisionLinear.of(new, head.storage_dtype)
    for name, param in head.named_parameters(recurse=False):
        setattr(new, name, nn.Parameter(whole_of(param), requires_grad=param.requires_grad))
    if head.storage_dtype is not None:
        new.weight.grad_dtype = None
    return new.train(head.training)


def _group_of(mesh: Any) -> Any:
    """The process group of a mesh. Raises OptionError."""
    if not dist.is_available() or not dist.is_initialized():
        raise OptionError("shard_head: call torch.distributed.init_process_group first")
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(mesh, DeviceMesh) or mesh.ndim != 1:
        given = f"{mesh.ndim} dimensions" if isinstance(mesh, DeviceMesh) else type(mesh).__name__
        raise OptionError(
            f"shard_head: mesh has {given}; accepted: a DeviceMesh of one dimension, e.g. "
            'init_device_mesh("cuda", (world_size,))'
        )
    if mesh.size() != dist.get_world_size():
        raise OptionError(
            f"shard_head: the mesh has {mesh.size()} of {dist.get_world_size()} processes; "
            "accepted: all. The others' copies of the head would be trained apart"
        )
    return mesh.get_group()


def _check_device(path: str, weight: Tensor, mesh: Any) -> None:
    if not weight.is_meta and weight.device.type != mesh.device_type:
        raise OptionError(
            f"shard_head: the weight of {path or 'the head'} is on {weight.device}, the mesh is of "
            f"{mesh.device_type}; move the model first"
        )


def _part(param: Tensor, shard: LabelShard, mesh: Any) -> nn.Parameter:
    """This process's rows of a parameter as a DTensor, with the values of process 0."""
    from torch.distributed.tensor import DTensor, Shard

    own = param.new_empty(shard.count, *param.shape[1:]).detach()
    if not param.is_meta:
        with torch.no_grad():
            _receive(own, param.detach(), shard)
    whole: Any = DTensor.from_local(
        own, mesh, [Shard(0)], run_check=False, shape=param.shape, stride=param.stride()
    )
    return nn.Parameter(whole, requires_grad=param.requires_grad)


def _receive(own: Tensor, whole: Tensor, shard: LabelShard) -> None:
    """Fill this process's rows from process 0, some rows at a time."""
    sender = dist.get_global_rank(shard.group, 0)
    sends = dist.get_rank() == sender
    row = max(1, whole[0].numel() * whole.element_size())
    step = max(1, _BLOCK_BYTES // row)
    for start in range(0, shard.num_outputs, step):
        block = whole[start : start + step]
        block = block.contiguous() if sends else torch.empty_like(block).contiguous()
        raw = block.view(-1).view(torch.uint8)
        if shard.world > 1:
            dist.broadcast(raw, src=sender, group=shard.group)
        first = max(start, shard.first)
        last = min(start + len(block), shard.first + shard.count)
        if first < last:
            own[first - shard.first : last - shard.first] = block[first - start : last - start]
