"""`elmo_compile.explain`: what the backend would do to a function, without doing it.

Why Dynamo compiled nothing is asked of its counters (`torch._dynamo.utils`, tried on 2.13).
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from elmo_compile.config import Options
from elmo_compile.report.records import Report, Section


class _Stop(BaseException):
    """Leaves the explained function once its head was seen; no `except Exception` catches it."""


@dataclasses.dataclass
class _Session:
    """One call of `explain`: what it asks with, and what it has seen."""

    options: Options
    sections: list[Section] = dataclasses.field(default_factory=list)


_active = threading.local()


def explain(
    fn: Callable[..., Any],
    *args: Any,
    options: Options | dict[str, Any] | None = None,
    **kwargs: Any,
) -> Report:
    """What `torch.compile(fn, backend="elmo")` would do for these arguments.

    `fn` is traced, not trained: the run stops at the first graph with a candidate head, before that
    graph is executed, so no logits are made and no weight, gradient, optimizer state, buffer or
    random-number generator changes. Graphs before it (after graph breaks) are run, and what they
    write into their inputs is undone. A backward or an optimizer's step ends the run as well.

    Args:
        fn: a model, a function, or something torch.compile returned; it may be a whole training
            step.
        *args: its arguments.
        options: as for the backend.
        **kwargs: its keyword arguments.

    Returns:
        A Report whose sections are the graphs that were seen.

    Raises:
        OptionError: an option is unknown or out of range.
        ElmoError: what the backend itself would raise, but for `strict`.
    """
    session = _Session(Options.from_mapping(options))
    before, refused = getattr(_active, "session", None), _refused_by_dynamo()
    with _generators_kept(), _no_training(), contextlib.suppress(_Stop):
        _active.session = session
        try:
            traced: Any = torch.compile(_unwrapped(fn), backend=_explaining_backend)
            traced(*args, **kwargs)
        finally:
            _active.session = before
    report = Report(tuple(session.sections))
    if report.matches or report.refusals:
        return report
    fresh = [reason.partition("\n")[0] for reason in _refused_by_dynamo() - refused]
    found = _recurrent(_unwrapped(fn), [*args, *kwargs.values()])
    return dataclasses.replace(report, notes=_no_head(bool(report.sections), fresh, found))


def _no_head(compiled: bool, refused: Sequence[str], recurrent: Sequence[str]) -> tuple[str, ...]:
    """Why no head was seen, in sentences.

    Args:
        compiled: whether there was a graph.
        refused: what Dynamo said, in this call, of code it does not trace.
        recurrent: names of the modules that it skips the calling function for.
    """
    notes: tuple[str, ...] = ()
    if not compiled:
        why = f" ({'; '.join(refused)})" if refused else ""
        notes += (f"Dynamo compiled nothing: the function was skipped, and runs as it is{why}",)
    if recurrent and not torch._dynamo.config.allow_rnn:
        notes += (
            f"Dynamo skips a function that calls {', '.join(recurrent)}: set "
            "torch._dynamo.config.allow_rnn = True, or call it in a method of its own, decorated "
            "with @torch.compiler.disable, so that the function with the head is compiled",
        )
    return notes


def _refused_by_dynamo() -> Counter[str]:
    """How often Dynamo has met each kind of code that it does not trace, so far."""
    from torch._dynamo.utils import counters

    return Counter(counters.get("unimplemented")) + Counter(counters.get("graph_break"))


def _recurrent(fn: Any, args: Sequence[Any]) -> list[str]:
    """Names of the RNN modules near a function: its own, its closure's, its arguments'."""
    near = [fn, getattr(fn, "__self__", None), *args]
    if inspect.isfunction(fn):
        with contextlib.suppress(ValueError):  # A cell of the closure is empty.
            cells = inspect.getclosurevars(fn)
            near += [*cells.nonlocals.values(), *cells.globals.values()]
    found = {
        id(module): f"{name or 'the module'} (nn.{type(module).__name__})"
        for root in near
        if isinstance(root, torch.nn.Module)
        for name, module in root.named_modules()
        if isinstance(module, torch.nn.RNNBase)
    }
    return list(found.values())


def _unwrapped(fn: Any) -> Any:
    """What torch.compile was given."""
    for name in ("_orig_mod", "_torchdynamo_orig_callable"):
        fn = getattr(fn, name, fn)
    if isinstance(fn, torch.nn.Module) and fn._compiled_call_impl is not None:
        return fn._call_impl  # `model.compile(...)` was used.
    return fn


def _explaining_backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """One backend for every call of `explain`: a backend of its own for each would fill Dynamo's
    cache of the user's function, whose entries are counted whatever backend made them."""
    from elmo_compile.backend import keep

    return _Explained(keep(gm))


class _Explained:
    """A graph that says what the backend would do with it when it is reached."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph = graph

    def __call__(self, *inputs: Any) -> Any:
        session = getattr(_active, "session", None)
        if session is None:
            return self.graph(*inputs)
        from elmo_compile.backend import examine

        name = f"graph {len(session.sections)}"
        seen, has_heads = examine(self.graph, inputs, session.options, name=name)
        session.sections.append(seen)
        if has_heads or seen.refusals:
            raise _Stop
        return _run_untouched(self.graph, *inputs)


def _run_untouched(gm: fx.GraphModule, *inputs: Any) -> Any:
    """Run a graph without a head, and undo what it wrote into its inputs."""
    tensors = [value for value in inputs if isinstance(value, torch.Tensor)]
    parameters = [tensor for tensor in tensors if isinstance(tensor, torch.nn.Parameter)]
    others = [tensor for tensor in tensors if not isinstance(tensor, torch.nn.Parameter)]
    # By value: batch norm writes its statistics without telling their version counters.
    values = [(t, t.detach().clone()) for t in others if not t.is_inference()]
    keep = _KeepWritten(parameters)
    try:
        with keep:
            return gm(*inputs)
    finally:
        keep.restore()
        with torch.no_grad():
            for tensor, value in values:
                if not torch.equal(tensor, value):
                    tensor.copy_(value)


class _KeepWritten(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Copies a parameter's memory before the first write into it, to restore it afterwards."""

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in parameters}
        self._saved: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func._schema.is_mutable:
            flat = torch.utils._pytree.tree_leaves((args, kwargs))
            for tensor in flat:
                key = tensor.untyped_storage()._cdata if isinstance(tensor, torch.Tensor) else 0
                if key in self._storages and key not in self._saved:
                    self._saved[key] = self._storages[key].clone()  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))

    def restore(self) -> None:
        for key, value in self._saved.items():
            self._storages[key].copy_(value)


@contextlib.contextmanager
def _generators_kept() -> Iterator[None]:
    """Leave the random-number generators of torch, Python and NumPy as they are."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    numpy = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), numpy and numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)


@contextlib.contextmanager
def _no_training() -> Iterator[None]:
    """End an explained run, in this thread, at its first backward or optimizer step."""
    handle = register_optimizer_step_pre_hook(_stop_instead(lambda *_: None))
    places: tuple[Any, ...] = (torch.Tensor, torch.autograd)
    originals = [place.backward for place in places]
    for place, original in zip(places, originals):
        place.backward = _stop_instead(original)
    try:
        yield
    finally:
        handle.remove()
        for place, original in zip(places, originals):
            place.backward = original


def _stop_instead(original: Callable[..., Any]) -> Callable[..., Any]:
    def stop(*args: Any, **kwargs: Any) -> Any:
        if getattr(_active, "session", None) is not None:
            raise _Stop
        return original(*args, **kwargs)

    stopped: Callable[..., Any] = torch.compiler.disable(stop)  # type: ignore[no-untyped-call]
    return stopped
