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

LARGE = 1 << 20
"""Elements of a gradient that is worth an operation of its own."""


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
    seconds of a first step, though it will use the widest set alone. Here they run in threads, from
    when a graph arrives: its passes and the tracing of kernels need a core at most.

    The widest set's program is built, loaded and so answered for; who knows it knows the narrower
    ones, whose programs are not built. Of what a set may have beyond (bf16, VNNI) the programs are
    built only: that answer is noted in the object asked, and must be noted in Inductor's. It waits
    for the files by their locks.
    """
    try:
        # All three here: threads must not import.
        from torch._inductor import codecache, cpp_builder, cpu_vec_isa  # noqa: F401

        base, names = cpu_vec_isa.VecISA, cpu_vec_isa.x86_isa_checker()
        isas = [
            type(isa)
            for isa in cpu_vec_isa.supported_vec_isa_list
            if all(name in names for name in str(isa).split())
        ]
    except (ImportError, AttributeError):  # another torch: Inductor builds them when it asks
        return

    def answer(widest: type[Any], *narrower: type[Any]) -> None:
        if base.__bool__(widest()):  # cached by class, as for Inductor's own object of it
            for isa in narrower:
                known: Any = isa()
                known.check_build = lambda code: True
                base.__bool__(known)

    def build_rest(*isas: type[Any]) -> None:
        for isa in isas:
            bool(_without_base(isa, base)())

    if isas:
        pool = concurrent.futures.ThreadPoolExecutor(2, "elmo-vector-probe")
        for task in (answer, build_rest):
            pool.submit(contextvars.copy_context().run, _quietly, task, *isas)
        pool.shutdown(wait=False)


def _without_base(isa: type[Any], base: type[Any]) -> type[Any]:
    """A class of instruction sets of which all is built but the base's program; nothing loaded."""

    def check_build(self: Any, code: str) -> bool:
        return code == base._avx_code or bool(isa.check_build(self, code))

    return type("Probe", (isa,), {"check_build": check_build, "_probe_load": lambda *_: True})


def _quietly(task: Callable[..., None], *args: Any) -> None:
    """Run something that is done again, and then spoken of, where it fails here."""
    with contextlib.suppress(Exception):
        task(*args)


def lower(
    module: fx.GraphModule, inputs: Sequence[Any], options: Options, *, rewritten: bool
) -> Callable[..., Any]:
    """Compile a graph inside Dynamo's compilation, where its symbolic sizes are known.

    Args:
        module: the graph.
        inputs: one example for each of its inputs.
        rewritten: whether a head was replaced in it. Other graphs are compiled as Inductor does.
    """
    if options.lower == "eager":
        return module
    from torch._inductor import compile_fx

    from elmo_compile.activations import few_activations

    settings: Any = torch.compiler.config
    tag = cache_tag(options)
    at_once = torch.ops.elmo.head_loss_at_once.default
    made_at_once = module.graph.find_nodes(op="call_function", target=at_once)

    def inner_compile(graph: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        """Also called when the first backward runs, long after this function returned."""
        # Inductor's own CUDA graphs are not for what writes to its inputs.
        if made_at_once and kwargs.get("is_backward") and not kwargs.get("cudagraphs"):
            scale_in_place(graph)
        with settings.patch(cache_key_tag=tag):
            return compile_fx.compile_fx_inner(graph, *args, **kwargs)

    patches = inductor_config(options)
    sparing = few_activations(patches) if rewritten else contextlib.nullcontext(patches)
    with settings.patch(cache_key_tag=tag), sparing as patches:
        compiled: Any = compile_fx.compile_fx(
            module, list(inputs), inner_compile=inner_compile, config_patches=patches
        )
    call: Callable[..., Any] = compiled
    return call


def scale_in_place(backward: fx.GraphModule) -> None:
    """Let a backward graph multiply by `elmo::scale_` what it would return as `elmo::scaled`.

    That is done to large tensors that the backward alone holds ("donated": AOTAutograd refuses to
    run such a graph twice) and uses for nothing else: gradients that `elmo::head_loss_at_once` made
    in the forward. Tried on torch 2.11, 2.13 and 2.15.
    """
    try:
        from torch._inductor.utils import get_donated_idxs
    except ImportError:  # another torch: one more pass over the gradient
        return
    graph, donated = backward.graph, set(get_donated_idxs() or ())
    returned = graph.find_nodes(op="output")[0].all_input_nodes
    for number, made in enumerate(graph.find_nodes(op="placeholder")):
        if number not in donated or len(made.users) != 1:
            continue
        (product,) = made.users
        if product not in returned or product.target is not torch.ops.elmo.scaled.default:
            continue
        first, factor = product.args
        if first is made and _is_large_and_scaled(made, factor, product):
            with graph.inserting_before(product):
                graph.call_function(torch.ops.elmo.scale_.default, (made, factor))
            product.replace_all_uses_with(made)
            graph.erase_node(product)
    backward.recompile()


def _is_large_and_scaled(*nodes: Any) -> bool:
    """Whether (tensor, factor, product) are a large tensor, a scalar, and a tensor like it."""
    values = [node.meta.get("val") if isinstance(node, fx.Node) else None for node in nodes]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    if len(tensors) < len(nodes):
        return False
    made, factor, product = tensors
    if not all(each.is_floating_point() for each in (made, factor)):
        return False
    if (product.dtype, product.shape) != (made.dtype, made.shape):
        return False
    same_device = made.device == factor.device == product.device
    large = isinstance(made.numel(), int) and made.numel() >= LARGE
    return same_device and large and factor.ndim == 0 and made.is_contiguous()


def lower_later(module: fx.GraphModule, options: Options, dynamic: bool) -> Callable[..., Any]:
    """Compile a graph at run time, when its first call shows that it is needed."""
    if options.lower == "eager":
        return module

    def backend(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return lower(graph, inputs, options, rewritten=True)

    compiled: Callable[..., Any] = torch.compile(
        module, backend=backend, fullgraph=True, dynamic=True if dynamic else None
    )
    return compiled


def cache_tag(options: Options) -> str:
    """What distinguishes our compiled artefacts in Inductor's and AOTAutograd's caches."""
    return f"elmo-compile-{formulas()}-{options.cache_tag()}"
