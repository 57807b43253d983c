"""`Deferred`: a tensor without values that behaves as the tensor it stands for.

It comes out of an autograd node, so gradients, hooks and in-place writes are autograd's own. Below
autograd, `__torch_dispatch__` runs every operation on the values, made when first needed. Above it,
`__torch_function__` catches what need not make them (`functions.py`). Dynamo sees a wrapper
subclass and asks for the values (tried on torch 2.11 and 2.13).
"""

from __future__ import annotations

import functools
import threading
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from elmo_compile.deferred.made import COMPILED, read_by
from elmo_compile.deferred.origin import FAKES
from elmo_compile.deferred.state import Derived, Given, Root, State
from elmo_compile.deferred.step import Step
from elmo_compile.deferred.unchanged import version


class Deferred(Tensor):
    """Logits that are computed when their values are needed."""

    _state: State
    _streamed: list[tuple[Tensor, list[Step], Any]]
    """Results that were streamed, the steps to each, and the autograd node at that time."""
    apart = False
    """Whether writes into views of this tensor are counted for it alone, as for `logits.data`."""
    watched = False
    """Whether someone asked for the gradient of these logits."""
    _entered: Any = None
    """The autograd node that hands their gradient to the recipe's inputs, and only there."""

    @staticmethod
    def __new__(cls, state: State) -> Deferred:
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls,
            state.fake.shape,
            strides=state.fake.stride(),
            storage_offset=state.fake.storage_offset(),
            dtype=state.fake.dtype,
            device=state.fake.device,
        )
        made._state, made._streamed = state, []
        found: Deferred = made
        return found

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        values = self._state.values
        if values is not None and type(values) is not Tensor:
            return f"Deferred({tuple(values.shape)}, {values.dtype})"  # Inside a trace.
        return repr(self.materialize())

    def materialize(self) -> Tensor:
        """An ordinary tensor with these values and their gradient."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.view(self.shape)

    def take_data(self) -> Deferred:
        """`logits.data`: the same values, whose writes torch counts apart."""
        with torch._C.DisableTorchFunctionSubclass():
            data: Any = self.data
        data.apart = True
        taken: Deferred = data
        return taken

    def replace_values(self, values: Tensor) -> None:
        """`logits.data = values`. Raises RuntimeError if they are of another shape or dtype."""
        if values.shape != self.shape or values.dtype != self.dtype:
            raise RuntimeError(
                f"deferred logits of shape {tuple(self.shape)} and {self.dtype} cannot take data "
                f"of shape {tuple(values.shape)} and {values.dtype}; call .materialize() first"
            )
        if isinstance(values, Deferred):
            values = values.materialize()
        self._state = Given(values.detach())

    def attach(self) -> None:
        """Their gradient goes to the recipe's inputs: by the node that they come out of now."""
        self._entered = self._node

    @property
    def attached(self) -> bool:
        """Whether their gradient goes to the recipe's inputs, and only there. It does not where
        they became a leaf, or the result of another node, since they were made."""
        return self._entered is not None and self._entered is self._node

    @property
    def _node(self) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return self.grad_fn

    @property
    def written(self) -> bool:
        """Whether someone wrote into the logits, or into a view of them: torch counts it here,
        but in inference mode, where whoever made the values may have."""
        memory = self._state.memory
        if memory.overwritten or isinstance(memory, Given):
            return True
        with torch._C.DisableTorchFunctionSubclass():
            if self.is_inference():
                return memory.values is not None
            return bool(version(self))

    @property
    def untouched(self) -> bool:
        """Whether nobody wrote into these logits, nor asked for their gradient or for that of what
        they are made from: the recipe stands for them."""
        return not (self.asked_for or self.written)

    @property
    def asked_for(self) -> bool:
        """Whether someone asked for the gradient of these logits or of what they are made from."""
        state = self._state
        source = state.source if isinstance(state, Derived) else None
        return self.watched or (isinstance(source, Deferred) and source.asked_for)

    @property
    def losses(self) -> list[tuple[Tensor, list[Step]]]:
        """What was streamed from this tensor since it last became another node's result, and the
        steps from here to each result."""
        return [(loss, steps) for loss, steps, node in self._streamed if node is self._node]

    def values_at_first(self) -> Tensor:
        """The values that losses were streamed from."""
        root, steps = self._state.recipe()
        return root.remake(steps) if self.written else self._state.real()

    def remember(self, loss: Tensor, *steps: Step) -> None:
        """Note a result that was streamed, for `torch.autograd.grad(loss, logits)`."""
        self._streamed.append((loss, list(steps), self._node))
        state = self._state
        if isinstance(state, Derived) and isinstance(state.source, Deferred):
            state.source.remember(loss, state.step, *steps)

    def watch(self, how: str) -> None:
        """Someone asks for the gradient of these logits.

        Raises:
            RuntimeError: a loss of them was streamed: in its graph they are not.
        """
        self._refuse_beside_loss(how)
        if self.losses:
            raise RuntimeError(
                f"elmo_compile: `{how}` of deferred logits comes after a loss of them, whose "
                "backward would not see it; call it before the loss is taken, or take the loss of "
                "logits.materialize()"
            )
        self.watched = True

    def streamed(self, how: str) -> bool:
        """Whether losses of these logits were streamed, in whose graphs they are not.

        Raises:
            RuntimeError: as `watch`, of logits returned beside a loss of them.
        """
        self._refuse_beside_loss(how)
        return bool(self.losses)

    def _refuse_beside_loss(self, how: str) -> None:
        root, _ = self._state.recipe()
        if self.attached and isinstance(root, Root) and root.origin.has_loss:
            raise RuntimeError(
                f"elmo_compile: `{how}` of deferred logits that a compiled function returned "
                "beside a loss of them, whose backward would not see it; compile with "
                "options={'deferred_logits': False}, or take the loss outside"
            )

    def keep_gradient(self, *parts: Tensor | None) -> None:
        """Let `.grad` be the sum of these, and grow from now on: `backward(inputs=[logits])`."""
        self.watched = True
        found = [part for part in parts if part is not None]
        with torch._C.DisableTorchFunctionSubclass():
            self.retain_grad()
            self.grad = functools.reduce(torch.add, found).contiguous() if found else None

    def _is_view(self) -> bool:
        """Dynamo asks: it is to flatten a view by itself, where it would repeat it on its base."""
        return False

    @property
    def elmo_values(self) -> Tensor:
        """What `__tensor_flatten__` names."""
        return self._state.real(COMPILED)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        self._state.real(COMPILED)
        with torch._C.DisableTorchFunctionSubclass():
            if not self.requires_grad:  # views of them may come out of what is compiled
                self._state.overwrite()
        return ["elmo_values"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: Any, size: Any, stride: Any) -> Tensor:
        return Deferred(Given(inner["elmo_values"]))

    def _stable_hash_for_caching(self) -> str:
        return "elmo_compile.Deferred"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if not torch.compiler.is_compiling():
            from elmo_compile.deferred.functions import handle

            handled = handle(func, args, kwargs or {})
            if handled is not NotImplemented:
                return handled
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.detach.default:
            return _beside(args[0], args[0]._state)
        if func in _SHAPED and isinstance(args[0], Deferred):
            # Only the shape is read.
            size = args[0]._state.fake
            shaped = torch.zeros((), dtype=size.dtype, device=args[0].device).expand(size.shape)
            return func(shaped, *args[1:], **kwargs)
        if func.is_view and _local.deferring:
            return _view(args[0], Step(func, args[1:], kwargs))
        if torch.Tag.inplace_view in func.tags and func is not torch.ops.aten.detach_.default:
            name = func.overloadpacket.__name__
            raise RuntimeError(
                "elmo_compile: deferred logits (and large elmo_compile.multi_hot) cannot change "
                f"their shape in place (`{name}`); call .materialize() first, or what returns the "
                "result"
            )
        why = functools.partial(read_by, func.overloadpacket.__name__)
        plain_args, plain_kwargs = pytree.tree_map_only(
            Deferred, lambda d: d._state.real(why), (args, kwargs)
        )
        written = _written(func, args, kwargs)
        if func.is_view and args[0].apart:
            args[0]._state.overwrite()
        for logits in written:
            logits._state.overwrite()
        result = func(*plain_args, **plain_kwargs)
        returns = func._schema.returns
        # An operation may also return something else than what it wrote into.
        same = len(returns) == 1 and returns[0].alias_info is not None
        return written[0] if written and same else result


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Deferred]:
    """The deferred tensors that an operation writes into, by its schema."""
    if func.namespace == "c10d":  # collectives, whose schemas do not say
        found = pytree.tree_leaves((args, kwargs))
        return [value for value in found if isinstance(value, Deferred)]
    found = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += pytree.tree_leaves(args[i] if i < len(args) else kwargs.get(argument.name))
    return [value for value in found if isinstance(value, Deferred)]


class _Local(threading.local):
    deferring = False
    """Whether views are to be deferred tensors themselves: `autograd_view` is making one."""


_local = _Local()


@functools.cache
def keep_from_dynamo() -> None:
    """Let Dynamo trace through `__torch_function__`, but not compile it as a function of its own
    where a graph broke before: there it would be compiling, and what it does then is not what it
    is to do when it runs. Tried on torch 2.11, 2.13 and 2.15."""
    frames = torch._C._dynamo.eval_frame
    skip = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.SKIP)
    function: Any = Deferred.__torch_function__
    frames.set_code_exec_strategy(function.__func__.__code__, skip)


_SHAPED = frozenset(
    getattr(torch.ops.aten, name).default
    for name in ("ones_like", "zeros_like", "empty_like", "full_like", "rand_like", "randn_like",
                 "new_empty", "new_zeros", "new_ones", "new_full")
)  # fmt: skip


def autograd_view(logits: Deferred, step: Step) -> Deferred:
    """A view as autograd makes it: writes into it, and into what it views, reach the other."""
    _local.deferring = True
    try:
        with torch._C.DisableTorchFunctionSubclass():
            made: Deferred = step(logits)
    finally:
        _local.deferring = False
    return made


def _view(logits: Deferred, step: Step) -> Deferred:
    """What the dispatcher returns for one view."""
    with FAKES:
        made = step(logits._state.fake)
    return _beside(logits, Derived(logits, logits._state, step, made))


def _beside(logits: Deferred, state: State) -> Deferred:
    """A tensor that shares the version counter of `logits`: it has one where they do."""
    with torch.inference_mode(logits.is_inference()):
        made = Deferred(state)
    made.apart = logits.apart
    return made
