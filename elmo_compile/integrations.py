"""What torch and other libraries must be told of the backend's name.

torch finds it by an entry point of the installed package; a checkout on `sys.path` has none, and
registers the backend when it is imported (`torch._dynamo.register_backend`, tried on 2.11 to 2.15).

accelerate, and through it `transformers.Trainer`, keeps a list of its own of the backends of
torch.compile and refuses others: `torch_compile_backend="elmo"` needs a member there (tried on
accelerate 1.15). It is added when accelerate is imported, before or after this package.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

_MODULE = "accelerate.utils.dataclasses"


def register() -> None:
    """Make the name known to torch, and to accelerate, now or once it is imported."""
    if not entry_points(group="torch_dynamo_backends", name="elmo"):
        _register_with_torch()
    module = sys.modules.get(_MODULE)
    if module is not None:
        _add_backend(module)
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


def _register_with_torch() -> None:
    from torch._dynamo import register_backend

    from elmo_compile.backend import elmo_backend

    register_backend(elmo_backend, name="elmo")


def _add_backend(module: ModuleType) -> None:
    """Add the member ELMO to accelerate's enumeration of backends."""
    backends: Any = getattr(module, "DynamoBackend", None)
    if backends is None or "ELMO" in backends.__members__:
        return
    member = str.__new__(backends, "ELMO")
    member._name_ = member._value_ = "ELMO"
    backends._member_map_["ELMO"] = backends._value2member_map_["ELMO"] = member
    backends._member_names_.append("ELMO")


class _WhenImported(importlib.abc.MetaPathFinder):
    """Finds one module as the finders behind it do, and adds the backend once it has run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _add_backend(module)
