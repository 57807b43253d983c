"""A graph as a Python file that runs by itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from elmo_compile.report.strip import EXAMPLE, Example

_EXTRA = re.compile(r"elmo_(?P<kind>anchor|handle|sink|carrier)_(?P<weight>\d+)")


def graph_source(graph: GraphModule, before: GraphModule, min_outputs: int = 1) -> str:
    """Python source of a graph: the class, its inputs by example, and a main part that runs it.

    Args:
        graph: stripped of its tensors.
        before: the graph it was made from, whose inputs are the weights of fused heads.
        min_outputs: of the smallest head that was rewritten.
    """
    readable = graph.print_readable(print_output=False, include_stride=False)
    programs = any("head_program" in str(node.target) for node in graph.graph.nodes)
    made = "\n".join(f"    graph.{line}" for line in _attributes(graph, "GraphModule"))
    parts = [
        "import math\nimport operator\nimport zlib\nfrom math import inf, nan\n\nimport torch\n"
        "from torch import device\n\nimport elmo_compile\nfrom elmo_compile import ops\n"
        "from elmo_compile.ops.fused import open_call\n"
        "from elmo_compile.ops.owners import owner_of\n\nops.load()\n",
        "\n".join(_imports(graph)),
        str(readable),
        f"\ndef build():\n    graph = GraphModule()\n{made}\n    return graph\n",
        _inputs(graph, before),
        _PROGRAMS.format(min_outputs=min_outputs) if programs else "",
        _MAIN.format(first="    make_programs()\n" if programs else ""),
    ]
    return "\n".join(part for part in parts if part)


_LIKE = '''
def like(name, shape, dtype):
    """Random values that depend on the input's name: the same before and after."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator).to(dtype)

'''
_PROGRAMS = '''
def make_programs():
    """Programs are named by a digest; compiling the graph they come from makes them."""
    import runpy
    from pathlib import Path

    before = runpy.run_path(str(Path(__file__).with_name("before.py")))
    inputs = before["example_inputs"]()
    options = {{"min_outputs": {min_outputs}}}
    torch.compile(before["build"](), backend="elmo", options=options)(*inputs)
'''


_MAIN = """
if __name__ == "__main__":
{first}    print(build()(*example_inputs()))
"""


def _imports(graph: GraphModule) -> Iterator[str]:
    """What the code names beside torch."""
    known = {"torch", "math", "operator", "device", "inf", "nan", "NoneType", "fx_pytree", "pytree"}
    for name, value in graph.graph.python_code("self").globals.items():
        module, inner = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
        if name in known or not module or not inner or "<" in inner:
            continue
        first, *rest = inner.split(".")
        yield (
            f"from {module} import {first} as {name}"
            if not rest
            else (f"import {module}; {name} = {module}.{inner}")
        )


def _attributes(graph: GraphModule, path: str) -> Iterator[str]:
    """Assignments that give a graph the submodules and constants it reads."""
    for name in dict.fromkeys(str(n.target) for n in graph.graph.nodes if n.op == "get_attr"):
        value: Any = graph
        for part in name.split("."):
            value = getattr(value, part, None)
        if isinstance(value, GraphModule):
            # The printed class is an attribute of the outer class, which an instance must hide.
            yield f"__dict__[{name!r}] = torch.fx.symbolic_trace({path}.{name}())"
        elif isinstance(value, torch.Tensor):
            yield f"__dict__[{name!r}] = torch.zeros({tuple(value.shape)}, dtype={value.dtype})"


def _inputs(graph: GraphModule, before: GraphModule) -> str:
    """A function that makes inputs of the sizes that were compiled."""
    weights = list(before.graph.find_nodes(op="placeholder"))
    lines, names, opened = [], [], set()
    for node in graph.graph.find_nodes(op="placeholder"):
        extra = _EXTRA.fullmatch(str(node.target))
        if extra is None:
            names.append(_example(node))
            continue
        kind, number = extra["kind"], extra["weight"]
        weight = _example(weights[int(number)])
        if kind == "carrier":
            names.append(f"torch.zeros({weight}.shape, requires_grad=True)")
            continue
        if number not in opened:
            opened.add(number)
            lines += [
                f"weight_{number} = torch.nn.Parameter({weight}.detach())",
                f"optimizer_{number} = elmo_compile.optim.SGD([weight_{number}], lr=0.1)",
                f"KEPT.append(optimizer_{number})  # it owns the weight while it lives",
                f"anchor_{number}, handle_{number}, sink_{number} = "
                f"open_call(owner_of(weight_{number}))",
            ]
        names.append(f"{kind}_{number}")
    body = "".join(f"    {line}\n" for line in lines)
    listed = "".join(f"        {name},\n" for name in names)
    return f"{_LIKE}\nKEPT = []\n\n\ndef example_inputs():\n{body}    return [\n{listed}    ]\n"


def _example(node: Node) -> str:
    """An expression for a value like the one the graph was compiled with."""
    example: Example | None = node.meta.get(EXAMPLE)
    if example is None:
        return "None"
    if example.dtype is None:
        return str(example.shape[0])
    if not example.dtype.is_floating_point:
        return f"torch.zeros({example.shape}, dtype={example.dtype})"
    made = f"like({str(node.target)!r}, {example.shape}, {example.dtype})"
    return f"{made}.requires_grad_()" if example.requires_grad else made
