"""The command line: `elmo-compile env | bench | tune | explain`."""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from elmo_compile.config import Options
from elmo_compile.errors import ElmoError, OptionError
from elmo_compile.planner import cpu_cache_bytes
from elmo_compile.report.render import human_bytes

if TYPE_CHECKING:
    from elmo_compile.bench import Case

EXIT_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; a mistake is one line on stderr and exit code 2."""
    arguments = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], None] = arguments.command
    try:
        command(arguments)
    except ElmoError as error:
        print(f"elmo-compile: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_ERROR
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="elmo-compile", description=__doc__)
    parser.add_argument("--version", action="version", version=_version("elmo-compile"))
    commands = parser.add_subparsers(required=True, metavar="{env,bench,tune,explain}")
    add = functools.partial(
        commands.add_parser, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )

    env = add("env", help="versions, devices and whether the backend is known")
    env.set_defaults(command=_env)

    bench = add("bench", help="time one head step against eager torch")
    _add_head(bench, device="cpu")
    bench.add_argument(
        "--optimizer", choices=("sgd", "momentum", "adamw"), default="sgd", help="of the update"
    )
    bench.add_argument(
        "--state-dtype", choices=("float32", "bfloat16", "8bit"),
        help="of its state; eager's is the weight's",
    )  # fmt: skip
    bench.add_argument("--rounds", type=int, default=5, help="of which medians are taken")
    bench.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of a CPU; 1 on a busy machine"
    )
    bench.set_defaults(command=_bench)

    tune = add("tune", help="find a head's fastest tiles on a GPU, and keep them")
    _add_head(tune, device="cuda")
    tune.add_argument(
        "--state", choices=("none", "moments", "kahan"), default="none",
        help="of the optimizer: SGD; AdamW with bf16 moments; the same with a compensation",
    )  # fmt: skip
    tune.add_argument("--list", action="store_true", help="only print what would be timed")
    tune.add_argument("--chip", type=int, help="with --list: 90 for sm_90, which need not be there")
    tune.set_defaults(command=_tune)

    explain = add("explain", help="what the backend would do with your program")
    explain.add_argument(
        "target", metavar="MODULE:CALLABLE", help="returns (fn, args) or (fn, args, kwargs)"
    )
    explain.add_argument("--dump", metavar="DIR", default=None, help="write report and graphs")
    explain.set_defaults(command=_explain)
    return parser


def _add_head(parser: argparse.ArgumentParser, device: str) -> None:
    """The arguments of which `_case` makes a head."""
    parser.add_argument("--rows", "-N", type=int, default=128, help="rows of a batch")
    parser.add_argument("--features", "-D", type=int, default=768, help="inputs of the head")
    parser.add_argument("--outputs", "-L", type=int, default=131072, help="labels, items, tokens")
    parser.add_argument("--dtype", default="bfloat16", help="of the stored weight")
    parser.add_argument("--loss", choices=("bce", "ce"), default="bce", help="binary or softmax")
    parser.add_argument("--positives", type=int, default=5, help="labels per row (bce)")
    parser.add_argument("--device", default=device, help="cpu, cuda, cuda:0")
    parser.add_argument("--chunk-size", type=int, help="outputs; the planner's choice without")
    parser.add_argument("--memory-budget", help='bytes or "64MiB"')


def _env(_: argparse.Namespace) -> None:
    rows = {
        "elmo-compile": _version("elmo-compile"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cpu": f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads of "
        f"{os.cpu_count()} cores",
        "last-level cache": human_bytes(cpu_cache_bytes()),
        "cuda": _cuda(),
        "tuned tiles": _tuned(),
        "backend": _backend(),
    }
    for name, value in rows.items():
        print(f"{name:<17} {value}")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cuda() -> str:
    if not torch.cuda.is_available():
        return "no device"
    names = []
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        names.append(
            f"{found.name} (sm_{found.major}{found.minor}, {human_bytes(found.total_memory)}, "
            f"L2 {human_bytes(found.L2_cache_size)})"
        )
    return "; ".join(names)


def _tuned() -> str:
    from elmo_compile.tune import summary

    return summary() if _version("triton") != "not installed" else "none, without triton"


def _backend() -> str:
    registered = importlib.metadata.entry_points(group="torch_dynamo_backends")
    for entry in registered:
        if entry.name == "elmo":
            return f"registered as 'elmo' ({entry.value})"
    return "not registered: install the package (pip install elmo-compile)"


def _case(arguments: argparse.Namespace, **more: Any) -> Case:
    from elmo_compile import bench

    return bench.Case(
        rows=arguments.rows,
        features=arguments.features,
        outputs=arguments.outputs,
        dtype=_dtype(arguments.dtype),
        loss="cross_entropy" if arguments.loss == "ce" else "binary_cross_entropy_with_logits",
        positives=arguments.positives,
        options=Options(chunk_size=arguments.chunk_size, memory_budget=arguments.memory_budget),
        **more,
    )


def _tune(arguments: argparse.Namespace) -> None:
    if _version("triton") == "not installed":
        raise OptionError("tiles are Triton's: pip install 'elmo-compile[triton]' first.")
    from elmo_compile.tune import command

    if _dtype(arguments.dtype) == torch.float64:
        raise OptionError("--dtype float64 cannot be tuned: no Triton kernel has a form of it.")
    if arguments.chip is not None and not arguments.list:
        raise OptionError("--chip names a chip to list tiles for; accepted with --list only.")
    device = "cuda" if arguments.chip is not None else _device(arguments.device)
    if torch.device(device).type != "cuda":
        raise OptionError(f"--device {device} cannot be tuned; accepted: cuda, cuda:0.")
    case = _case(arguments, device=device)
    if arguments.list:
        command.show_candidates(case, arguments.state, arguments.chip)
    else:
        command.tune_and_save(case, arguments.state)


def _bench(arguments: argparse.Namespace) -> None:
    from elmo_compile import bench

    case = _case(
        arguments,
        device=_device(arguments.device),
        rounds=arguments.rounds,
        optimizer=arguments.optimizer,
        state_dtype=arguments.state_dtype,
    )
    if arguments.threads < 1:
        raise OptionError(f"--threads {arguments.threads} cannot be used; at least 1.")
    torch.set_num_threads(arguments.threads)
    console = Console(width=100)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    result = bench.run(case)
    plural = "s" if arguments.threads > 1 else ""
    threads = f", {arguments.threads} thread{plural}" if case.device == "cpu" else ""
    title = (
        f"One step of a head, {_OPTIMIZERS[case.optimizer]}: "
        f"{arguments.loss}, N={case.rows} D={case.features} L={case.outputs}, "
        f"{str(case.dtype).removeprefix('torch.')}{threads}; median of {case.rounds}"
    )
    table = Table()
    for name in ("", "wall ms", "cpu ms", "ratio", "memory"):
        table.add_column(name, justify="right" if name else "left")
    floor = result.timings[0].seconds
    memory = {
        bench.FUSED: result.plan.memory.bytes_after,
        bench.UNFUSED: result.unfused_plan.memory.bytes_after,
        bench.EAGER: result.eager_bytes,
    }
    for timing in result.timings:
        held = memory.get(timing.name)
        table.add_row(
            timing.name,
            f"{1e3 * timing.seconds:.1f}",
            f"{1e3 * timing.cpu_seconds:.1f}",
            f"{timing.seconds / floor:.2f}",
            "-" if held is None else human_bytes(held),
        )
    if case.device == "cpu" and load > 0.5:
        console.print(
            Text(
                f"other work was running (load {load:.1f}): threads wait for each other, and times "
                "say little; --threads 1 suffers least"
            )
        )
    console.print(Text(title))
    console.print(table)
    console.print(Text(f"chunks of {result.plan.chunk_size}; memory as planned, not measured"))
    for state in bench.state_of(case):
        size = int(state.each * case.outputs * case.features)
        console.print(Text(f"the optimizer's {state.label} takes {human_bytes(size)} of it"))
    before, after = memory[bench.EAGER], memory[bench.FUSED]
    console.print(
        Text(
            f"with a fused update a step holds {human_bytes(after)} instead of "
            f"{human_bytes(before)}: {human_bytes(abs(before - after))} "
            f"{'less' if after <= before else 'more'}, {before / after:.1f} times"
        )
    )
    for sentence in result.skipped:
        console.print(Text(f"skipped {sentence}"))


_OPTIMIZERS = {"sgd": "SGD", "momentum": "SGD with momentum", "adamw": "AdamW"}
_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp8": "float8_e4m3fn"}


def _dtype(name: str) -> torch.dtype:
    name = name.removeprefix("torch.")
    found = getattr(torch, _SHORT.get(name, name), None)
    accepted = ("float64", "float32", "bfloat16", "float16", "float8_e4m3fn")
    if isinstance(found, torch.dtype) and str(found).removeprefix("torch.") in accepted:
        return found
    raise OptionError(f"--dtype {name} cannot be used; accepted: {', '.join(accepted)}.")


def _device(name: str) -> str:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise OptionError(f"--device {name} cannot be used; accepted: cpu, cuda, cuda:0.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise OptionError(f"--device {name}: this machine has no CUDA device.")
    return name


def _explain(arguments: argparse.Namespace) -> None:
    from elmo_compile import explain

    function, args, kwargs = _program(arguments.target)
    report = explain(function, *args, **kwargs)
    print(report)
    if arguments.dump:
        print(f"written to {report.dump(arguments.dump)}")


def _program(target: str) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """What MODULE:CALLABLE returns, as function, arguments and keyword arguments."""
    accepted = "accepted: MODULE:CALLABLE, which returns (fn, args) or (fn, args, kwargs)"
    name, colon, attribute = target.partition(":")
    if not (name and colon and attribute):
        raise OptionError(f"{target!r} cannot be explained; {accepted}.")
    sys.path.insert(0, os.getcwd())
    try:
        factory = getattr(importlib.import_module(name), attribute)
    except (ImportError, AttributeError) as error:
        raise OptionError(f"{target!r} cannot be imported: {error}.") from error
    finally:
        sys.path.remove(os.getcwd())
    made = factory()
    if not (isinstance(made, tuple) and len(made) in (2, 3) and callable(made[0])):
        raise OptionError(f"{target}() returned {type(made).__name__}; {accepted}.")
    kwargs = made[2] if len(made) == 3 else {}
    if not (isinstance(made[1], (tuple, list)) and isinstance(kwargs, dict)):
        raise OptionError(f"{target}(): args must be a tuple and kwargs a dict; {accepted}.")
    return cast(Callable[..., Any], made[0]), tuple(made[1]), kwargs


if __name__ == "__main__":
    raise SystemExit(main())
