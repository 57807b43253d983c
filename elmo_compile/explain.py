"""`elmo_compile.explain`: what the backend would do to a function, without doing it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx

from elmo_compile.config import Options
from elmo_compile.report.records import Report, Section


class _Stop(BaseException):
    """Leaves the explained function once its head was seen; no `except Exception` catches it."""


def explain(
    fn: Callable[..., Any],
    *args: Any,
    options: Options | dict[str, Any] | None = None,
    **kwargs: Any,
) -> Report:
    """What `torch.compile(fn, backend="elmo")` would do for these arguments.

    `fn` is traced, not trained: the run stops at the first graph with a candidate head, before that
    graph is executed, so no logits are made and no weight, gradient, optimizer state, buffer or
    random-number generator changes. Graphs before it (after graph breaks) run on copies of
    their buffers.

    Args:
        fn: a model, a function, or something torch.compile returned.
        *args: its arguments.
        options: as for the backend.
        **kwargs: its keyword arguments.

    Returns:
        A Report whose sections are the graphs that were seen.

    Raises:
        OptionError: an option is unknown or out of range.
        ElmoError: what the backend itself would raise, but for `strict`.
    """
    chosen = Options.from_mapping(options)
    sections: list[Section] = []
    inner = _unwrapped(fn)
    backend = functools.partial(_explaining_backend, options=chosen, sections=sections)
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            torch.compile(inner, backend=backend)(*args, **kwargs)
        except _Stop:
            pass  # The head's graph was analysed; running on would execute it.
    return Report(tuple(sections))


def _unwrapped(fn: Any) -> Any:
    """What torch.compile was given."""
    for name in ("_orig_mod", "_torchdynamo_orig_callable"):
        fn = getattr(fn, name, fn)
    return fn


def _explaining_backend(
    gm: fx.GraphModule, inputs: Sequence[Any], *, options: Options, sections: list[Section]
) -> Callable[..., Any]:
    from elmo_compile.backend import examine

    seen, has_heads = examine(gm, inputs, options, name=f"graph {len(sections)}")
    sections.append(seen)
    if has_heads or seen.refusals:

        def stop(*_: Any) -> Any:
            raise _Stop

        return stop
    return functools.partial(_run_untouched, gm)


def _run_untouched(gm: fx.GraphModule, *inputs: Any) -> Any:
    """Run a graph without a head, and undo what it wrote into its inputs."""
    tensors = [value for value in inputs if isinstance(value, torch.Tensor)]
    versions = [(t, t._version) for t in tensors if not t.is_inference()]
    small = {id(t): t.detach().clone() for t in tensors if not isinstance(t, torch.nn.Parameter)}
    results = gm(*inputs)
    with torch.no_grad():
        for tensor, version in versions:
            if tensor._version != version and id(tensor) in small:
                tensor.copy_(small[id(tensor)])
    return results
