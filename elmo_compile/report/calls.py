"""Which call of a compiled function a graph is being compiled for.

A function with graph breaks is compiled piece by piece while it runs: the backend is called once
for its first graph, then again from inside the running function. Dynamo does not say that these
belong together; the Python stack does. Only file names are read (torch 2.11 to 2.13 have these).
"""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Hashable, Iterator
from types import FrameType

ENTRY = "torch/_dynamo/eval_frame.py"
COMPILER = "torch/_dynamo/convert_frame.py"
MACHINERY = ("torch/_dynamo/", "torch/nn/modules/module.py", "/contextlib.py")
"""What runs between a call and its first graph: dispatch to a module's `forward` included."""


class _State(threading.local):
    frame = 0
    group: Hashable = None


_state = _State()
_numbers = itertools.count()


def current_call() -> Hashable:
    """A key shared by all graphs compiled during one call of a compiled function; None outside."""
    names = [(name, id(frame)) for frame, name in _stack()]
    compilers = [i for i, (name, _) in enumerate(names) if name.endswith(COMPILER)]
    entries = [i for i, (name, _) in enumerate(names) if name.endswith(ENTRY)]
    if not compilers or not entries or entries[-1] < compilers[-1]:
        return None
    running = names[compilers[-1] : entries[-1]]
    inside = any(all(part not in name for part in MACHINERY) for name, _ in running)
    outermost = names[entries[-1]][1]
    # An address alone may be a later call's: that one begins with no function running inside it.
    if not (inside and _state.frame == outermost):
        _state.frame, _state.group = outermost, ("call", next(_numbers))
    return _state.group


def _stack() -> Iterator[tuple[FrameType, str]]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame, frame.f_code.co_filename.replace("\\", "/")
        frame = frame.f_back
