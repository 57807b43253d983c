"""Hand a rewritten graph to what compiles the rest of it.

Uses private APIs: `torch._inductor.compile_fx`, `torch._inductor.list_mode_options`,
`torch._inductor.cpu_vec_isa` and `torch.compiler.config.cache_key_tag` (tried on torch 2.11 and
2.13; `cpu_vec_isa` on 2.13, and there in 2.11 to 2.15).
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import contextvars
import functools
import hashlib
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any

import torch
import torch.fx as fx

from elmo_compile.config import Options


@functools.cache
def formulas() -> str:
    """A digest of the ops' source: caches on disk see neither a schema nor an autograd formula."""
    digest = hashlib.sha256()
    files = (
        file for file in resources.files("elmo_compile.ops").iterdir() if file.name.endswith(".py")
    )
    for file in sorted(files, key=lambda file: file.name):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def inductor_config(options: Options) -> dict[str, Any]:
    """Inductor's config for these options."""
    config: dict[str, Any] = {}
    if options.mode is not None and options.mode != "default":
        config.update(torch._inductor.list_mode_options(options.mode))
    config.update(options.inductor or {})
    return config


@functools.cache
def build_vector_probes() -> None:
    """Start to build what Inductor looks for in its cache before it compiles for a CPU.

    With an empty cache it asks of each set of vector instructions, one after the other, whether the
    C++ compiler and torch know it: six runs of the compiler on an AVX-512 machine, 10 of the 20
    seconds of a first step. Here they run in threads, a set each, from when a graph arrives: its
    passes and the tracing of kernels need a core at most.

    Inductor comes to the same conclusions by itself: it waits for these files by their locks, and
    loads them. It is spared that only where its own cached answer is made here.
    """
    try:
        # All three here: threads must not import.
        from torch._inductor import codecache, cpp_builder, cpu_vec_isa  # noqa: F401

        names = cpu_vec_isa.x86_isa_checker()
        known = [
            type(isa)
            for isa in cpu_vec_isa.supported_vec_isa_list
            if all(name in names for name in str(isa).split())
        ]
    except (ImportError, AttributeError):  # another torch: Inductor builds them when it asks
        return

    def build(isa: type[Any]) -> None:
        with contextlib.suppress(Exception):  # Inductor will meet it again, and say so
            if cpu_vec_isa.VecISA.__bool__(isa()):
                # What the set has beyond its base is noted in the object asked: not in Inductor's.
                bool(type("Probe", (isa,), {"_probe_load": lambda self, path: True})())

    if known:
        pool = concurrent.futures.ThreadPoolExecutor(len(known), "elmo-vector-probe")
        for isa in known:
            pool.submit(contextvars.copy_context().run, build, isa)
        pool.shutdown(wait=False)


def lower(module: fx.GraphModule, inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    """Compile a graph inside Dynamo's compilation, where its symbolic sizes are known.

    Args:
        module: the graph.
        inputs: one example for each of its inputs.
    """
    if options.lower == "eager":
        return module
    from torch._inductor import compile_fx

    settings: Any = torch.compiler.config
    tag = cache_tag(options)

    def inner_compile(*args: Any, **kwargs: Any) -> Any:
        """Also called when the first backward runs, long after this function returned."""
        with settings.patch(cache_key_tag=tag):
            return compile_fx.compile_fx_inner(*args, **kwargs)

    with settings.patch(cache_key_tag=tag):
        compiled: Any = compile_fx.compile_fx(
            module,
            list(inputs),
            inner_compile=inner_compile,
            config_patches=inductor_config(options),
        )
    call: Callable[..., Any] = compiled
    return call


def lower_later(module: fx.GraphModule, options: Options, dynamic: bool) -> Callable[..., Any]:
    """Compile a graph at run time, when its first call shows that it is needed."""
    if options.lower == "eager":
        return module

    def backend(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return lower(graph, inputs, options)

    compiled: Callable[..., Any] = torch.compile(
        module, backend=backend, fullgraph=True, dynamic=True if dynamic else None
    )
    return compiled


def cache_tag(options: Options) -> str:
    """What distinguishes our compiled artefacts in Inductor's and AOTAutograd's caches."""
    return f"elmo-compile-{formulas()}-{options.cache_tag()}"
