"""What deferred tensors stand for: a recipe and its inputs, a step after that, or plain values."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from elmo_compile.deferred.origin import Origin
from elmo_compile.deferred.step import Step
from elmo_compile.deferred.unchanged import Sample, can_sample, identity
from elmo_compile.errors import StaleLogitsError
from elmo_compile.numerics.capture import capturing
from elmo_compile.ops.data_parallel import active_wrapper
from elmo_compile.ops.kept import watch
from elmo_compile.ops.unfused import note


class State:
    """What one deferred tensor stands for: a recipe and its inputs, or a step after another state.

    Held by the tensor and by those made from it; told before a weight among its inputs changes.
    """

    made_easily = False
    """Whether the values are made again rather than kept where another's are made from them."""

    def __init__(self, fake: Tensor) -> None:
        self.fake = fake
        """Shape, strides and dtype."""
        self._values: Tensor | None = None
        self._inference = torch.is_inference_mode_enabled()
        self.overwritten = False
        """Whether the values were written to, or handed to someone who may."""
        self.copies: weakref.WeakSet[Derived] = weakref.WeakSet()
        """What is made from the values, or from views of them, as they were at first."""
        self.in_graph = capturing(fake.device)
        """Made while a CUDA graph was captured: what is computed then its replays compute again;
        what is computed later is not kept, since they change what it was computed from."""

    @property
    def outlives_capture(self) -> bool:
        """Whether this was made before the CUDA graph that is being captured: what were computed
        now, its replays would compute."""
        return not self.in_graph and capturing(self.fake.device)

    @property
    def memory(self) -> State:
        """The state whose values these are a view of, or this one."""
        return self

    @property
    def large(self) -> bool:
        """Whether these values are too many to be kept whole."""
        root, _ = self.recipe()
        size = self.fake.numel() * self.fake.element_size()
        return isinstance(root, Root) and size > root.origin.keeps_whole

    @property
    def outputs(self) -> int:
        """How many numbers a row of the root has."""
        root, _ = self.recipe()
        return root.fake.shape[-1] if root.fake.ndim else 1

    def overwrite(self) -> None:
        """The values are about to be written to, or their memory was handed out: the recipe does
        not stand for them any more. Small copies that are still to be made are made now."""
        _keep(self.memory.copies)
        self.memory.overwritten = True

    @property
    def values(self) -> Tensor | None:
        """The values, if they were made."""
        return self._values

    @property
    def available(self) -> bool:
        """Whether the values are there or need no weight any more."""
        return self._values is not None

    @property
    def settled(self) -> bool:
        """Whether the values need no computation."""
        return self._values is not None

    def real(self, why: str | Callable[[], str] = "") -> Tensor:
        """The values, made now if need be. Raises StaleLogitsError if that is too late.

        Args:
            why: for the report; empty where logits are kept by design.
        """
        if self._values is not None:
            return self._values
        if why and not self.available:
            self._count(why if isinstance(why, str) else why())
        same = torch.is_inference_mode_enabled() == self._inference
        mode = contextlib.nullcontext() if same else torch.inference_mode(self._inference)
        with mode, torch.no_grad():  # Values made in inference mode are of no use outside of it.
            made = self._make()
            made = _laid_out(made, self.fake) if self.memory is self else made
        if not self.in_graph or capturing(made.device):
            self._values = made
        return made

    def _count(self, why: str) -> None:
        """Tell the origin that its logits are made."""
        root, _ = self.recipe()
        if isinstance(root, Root):
            root.origin.made.count(why)
            for value in root.inputs:
                if isinstance(value, torch.nn.Parameter) and value.ndim == 2:
                    note(value, f"its deferred logits were made as values: {why}")

    def recipe(self) -> tuple[State, list[Step]]:
        """The root, and every step behind it."""
        return self, []

    def remake(self, steps: Sequence[Step]) -> Tensor:
        """Of a root: what the steps make of its values as they were at first."""
        raise NotImplementedError

    def _make(self) -> Tensor:
        raise NotImplementedError

    def after_change(self) -> None:
        """A weight among the inputs may have changed uncounted."""

    def top(self) -> tuple[Tensor, ...] | None:
        """Argmax, five largest values and indices of each row; None if that does not apply."""
        raise NotImplementedError


class Root(State):
    """A recipe and the inputs of one call."""

    def __init__(self, origin: Origin, inputs: Sequence[Any], collected: Any = None) -> None:
        super().__init__(origin.fake(inputs))
        self.origin = origin
        self._collected: Any = None
        if collected is not None:
            self.collect(collected)
        self.inputs = tuple(inputs)
        self.data_parallel = active_wrapper()
        """The DistributedDataParallel in whose forward they were made: their losses are its."""
        self._versions = [identity(value) for value in self.inputs]
        watched = (self.inputs[place] for place in sorted(origin.output.shared))
        self._samples = [Sample(value) for value in watched if can_sample(value)]
        self._outdated = False
        self._top: tuple[Tensor, ...] | None = None
        for value in self.inputs:
            if isinstance(value, torch.nn.Parameter):
                watch(value, self)

    @property
    def read_elsewhere(self) -> list[Tensor]:
        """Weights among the inputs that the graph of the forward also read for something else: an
        embedding tied to the head."""
        output = self.origin.output
        sources = [source for source in output.sources if source[0] != "carrier"]
        return [
            value
            for (kind, position), value in zip(sources, self.inputs)
            if kind == "input" and position in output.read_again
            if isinstance(value, torch.nn.Parameter)
        ]

    def remake(self, steps: Sequence[Step]) -> Tensor:
        self.check()
        return self.origin.make(self.inputs, steps)

    @property
    def stale(self) -> bool:
        """Whether an input changed since the forward."""
        return self._outdated or [identity(value) for value in self.inputs] != self._versions

    def check(self, *, may_wait: bool = True) -> None:
        """Raise StaleLogitsError if the values can no longer be made.

        Args:
            may_wait: for a GPU, to look whether the weight was written uncounted.
        """
        if may_wait or self.fake.device.type == "cpu":
            self._look()
        if self.in_graph and not capturing(self.fake.device):
            raise StaleLogitsError(
                "the logits were deferred while a CUDA graph was captured, and were not read then: "
                "replays do not make them. Read them, or what you need of them, before the capture "
                "ends"
            )
        if self.stale:
            raise StaleLogitsError(
                "the logits were deferred, and the weight or features they are made from changed "
                "since (an update in backward(), optimizer.step(), or a write). Read them before "
                "backward(), call `.materialize()` on them, or compile with "
                f"options={{'deferred_logits': False}}; {self._kept}"
            )

    def _look(self) -> bool:
        """Whether an input changed, uncounted writes to weights included."""
        if not self.stale:
            self._outdated = not all(sample.holds() for sample in self._samples)
        return self.stale

    @property
    def _kept(self) -> str:
        if self._top is None and self._collected is None:
            return "no optimizer's step announced the change, so nothing was kept"
        return "argmax and topk(k <= 5) of each row were kept"

    def _make(self) -> Tensor:
        return self.remake(())

    def top(self) -> tuple[Tensor, ...] | None:
        if self._top is None:
            if self._collected is not None:
                self._top = self._shaped(*self._collected.result())
            elif self._look():
                return None
            else:
                self.check()
                self._top = self.origin.top(self.inputs)
        return self._top

    def collect(self, top: Any) -> None:
        """Take the largest logits that a loss pass found (`TopRows`), if they are of these rows."""
        if self._collected is None and top.rows * self.fake.shape[-1] == self.fake.numel():
            self._collected = top

    def _shaped(self, values: Tensor, indices: Tensor) -> tuple[Tensor, ...]:
        """The largest logits that a loss pass collected, [N, k], as `Origin.top` gives them."""
        rows = self.fake.shape[:-1]
        values = values.to(self.fake.dtype).reshape(*rows, -1)
        indices = indices.reshape(*rows, -1)
        return indices[..., 0], values, indices

    def before_change(self) -> None:
        """Keep what can be kept: the values where they are small, else the top of each row."""
        if self.outlives_capture or self.stale:
            return
        if self._values is not None:
            _keep(copy for copy in self.copies if copy.source_changed)
        elif self.large:
            self.top()
        elif not self._look():
            self.real()

    def after_change(self) -> None:
        self._outdated = True


class Derived(State):
    """A cast, a view or another step after a state."""

    def __init__(
        self,
        source: Tensor,
        state: State,
        step: Step,
        made: Tensor,
        others: Sequence[Tensor] = (),
    ) -> None:
        super().__init__(made)
        self.source = source
        """The deferred tensor the step is applied to."""
        self._others = others
        """Deferred tensors of the same logits among the step's other arguments."""
        self.parent, self.step = state, step
        if not self.is_view:
            for parent in (state, *(other._state for other in others)):  # type: ignore[attr-defined]
                parent.memory.copies.add(self)

    @property
    def memory(self) -> State:
        return self.parent.memory if self.is_view else self

    @property
    def source_changed(self) -> bool:
        """Whether someone wrote into what the step is applied to."""
        return any(one.written for one in (self.source, *self._others))  # type: ignore[attr-defined]

    @property
    def history_changed(self) -> bool:
        """Whether someone wrote into that, or into what it is made from."""
        if self.source_changed:
            return True
        states = [one._state for one in (self.source, *self._others)]  # type: ignore[attr-defined]
        return any(isinstance(state, Derived) and state.history_changed for state in states)

    @property
    def available(self) -> bool:
        return self._values is not None or self.parent.available

    def recipe(self) -> tuple[State, list[Step]]:
        root, steps = self.parent.recipe()
        return root, [*steps, self.step]

    def before(self) -> Tensor:
        """What the step is applied to: of a copy, as it was then."""
        if not self.is_view:
            root, steps = self.parent.recipe()
            if self.source_changed or (root.made_easily and self.parent.values is None):
                return root.remake(steps)
        return self.parent.real()

    @property
    def is_view(self) -> bool:
        """Whether the step shares memory with what it was applied to."""
        root_bytes = self.parent.fake.untyped_storage()._cdata
        return bool(self.fake.untyped_storage()._cdata == root_bytes)

    def _make(self) -> Tensor:
        root, _ = self.recipe()
        if not self.step.reads_logits:
            made: Tensor = self.step(self.before())
        elif self.history_changed:
            made = root.remake(self.recipe()[1])
        else:
            made = self.step(self.before(), root=root.real())
        return made

    def top(self) -> tuple[Tensor, ...] | None:
        found = self.parent.top()
        size = self.fake.shape[-1] if self.fake.ndim else 0
        if found is None or self.fake.ndim < 2 or size != self.parent.fake.shape[-1]:
            return None
        first, values, indices = found
        name, rows = self.step.func.__name__, self.fake.shape[:-1]
        if self.step.takes_rows(self.parent.fake.ndim):
            values, indices = self.step(values), self.step(indices)
            return indices[..., 0], values, indices
        if name in ("view", "reshape", "flatten", "unsqueeze", "squeeze", "contiguous", "clone"):
            return (
                first.reshape(rows),
                values.reshape(*rows, values.shape[-1]),
                indices.reshape(*rows, values.shape[-1]),
            )
        # Rounded to fewer bits, other logits may tie with the largest.
        wider = torch.promote_types(self.parent.fake.dtype, self.fake.dtype) == self.fake.dtype
        if wider and name in ("float", "double", "half", "bfloat16", "to", "type"):
            return first, values.to(self.fake.dtype), indices
        return None


class Given(State):
    """Values that exist, as Dynamo hands them in."""

    def __init__(self, values: Tensor) -> None:
        super().__init__(values)
        self._values = values


def _laid_out(made: Tensor, as_told: Tensor) -> Tensor:
    """Values in the strides that were told; of some operations torch's fake tensors tell others
    than its kernels then return."""
    if made.stride() == as_told.stride():
        return made
    return torch.empty_strided(
        made.shape, as_told.stride(), dtype=made.dtype, device=made.device
    ).copy_(made)


def _keep(copies: Iterable[Derived]) -> None:
    """Make the small ones, unless it is too late already: they say so when they are read."""
    for copy in list(copies):
        if not copy.large:
            with contextlib.suppress(StaleLogitsError):
                copy.real()
