"""The command line of train_xmc.py."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any, get_args

from xmc_checkpoint import CheckpointError, load_checkpoint
from xmc_model import KS, Backend, HeadDtype, LossValue, Rounding, Settings

DATA = Path(__file__).resolve().parent / "data" / "debian-xmc"
OUT = Path("runs") / "train_xmc"


def settings_of(options: argparse.Namespace) -> Settings:
    """The part of the options that determines the outcome."""
    return Settings(**{f.name: getattr(options, f.name) for f in dataclasses.fields(Settings)})


def parse(argv: list[str], description: str | None) -> argparse.Namespace:
    """The command line; with --resume, what it leaves unsaid comes from the checkpoint.

    Raises:
        CheckpointError: there is none to resume, or an option contradicts it.
    """
    parser, train_parser = parsers(description)
    options = parser.parse_args(argv)
    if options.command == "train" and options.resume:
        saved = load_checkpoint(options.out)
        of_run = saved["settings"] | saved["data"] | {"data": Path(saved["data"]["data"])}
        train_parser.set_defaults(**of_run)
        options = parser.parse_args(argv)
        for name, value in of_run.items():
            if getattr(options, name) != value:
                raise CheckpointError(
                    f"--{name.replace('_', '-')} {getattr(options, name)} contradicts the run in "
                    f"{options.out}, which has {value}; leave it out, or train anew without "
                    "--resume."
                )
    return options


def parsers(
    description: str | None,
) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """The parser of the whole command line, and that of `train`."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=form)
    commands = parser.add_subparsers(dest="command", required=True)
    train_parser = commands.add_parser("train", help="train (the default command)")
    add_settings(train_parser)
    add_files(train_parser)
    ask = commands.add_parser("predict", help="print the best labels of a text")
    ask.add_argument("text", help="a description, as of a package: name, what it does")
    ask.add_argument("--checkpoint", type=Path, default=OUT, metavar="DIR", help="of a training")
    ask.add_argument("--top", type=positive, default=8, metavar="K", help="labels to print")
    ask.add_argument("--threads", type=positive, metavar="N", help="default: 1")
    return parser, train_parser


def add_settings(parser: argparse.ArgumentParser) -> None:
    """One option for each field of `Settings`."""
    group = parser.add_argument_group("what is trained")
    default = Settings()

    def add(flag: str, help: str, **kwargs: Any) -> None:
        value = getattr(default, flag[2:].replace("-", "_"))
        group.add_argument(flag, default=value, help=f"{help} (default: {value})", **kwargs)

    add("--head-dtype", "storage of the head's weight", choices=get_args(HeadDtype))
    add("--rounding", "of updates to a bf16 or fp8 head", choices=get_args(Rounding))
    add("--backend", "of torch.compile; eager: none", choices=get_args(Backend))
    add("--loss-value", "in forward, or for less work in backward", choices=get_args(LossValue))
    add("--epochs", "passes over the training points", type=positive, metavar="N")
    add("--batch-size", "points a step", type=positive, metavar="N")
    add("--dim", "features of a point", type=positive, metavar="D")
    add("--head-lr", "SGD's rate at the start; falls to 0", type=float, metavar="RATE")
    add("--encoder-lr", "SparseAdam's rate at the start; falls to 0", type=float, metavar="RATE")
    add("--seed", "of initialisation, data order and rounding", type=int)


def add_files(parser: argparse.ArgumentParser) -> None:
    """Where things are, and how much of it to do."""
    add = parser.add_argument_group("files and limits").add_argument
    add("--data", type=Path, default=DATA, metavar="DIR", help="see examples/data/README.md")
    add("--out", type=Path, default=OUT, metavar="DIR", help=f"of checkpoint.pt (default: {OUT})")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--predictions", type=Path, metavar="FILE.npz", help=f"write {max(KS)} labels a test point")
    add("--limit", type=positive, metavar="N", help="use only the first N points of each part")
    add("--max-steps", type=positive, metavar="N", help="stop after N steps of this call")
    add("--threads", type=positive, metavar="N", help="default: 1")


def positive(text: str) -> int:
    """An integer from 1 on, for argparse."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer from 1 on, not {text!r}")
    return int(text)
