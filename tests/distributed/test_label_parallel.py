"""A sharded head (`elmo.distributed.shard_head`): any number of processes train as one does.

What each case is about is said in label_ranks.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from torch import nn

import elmo_compile as elmo
from elmo_compile.errors import ElmoError, OptionError

sys.path.insert(0, str(Path(__file__).parent))

from processes import run

SCRIPT = Path(__file__).with_name("label_ranks.py")


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_bits_are_those_of_one_process(world: int, tmp_path: Path) -> None:
    run(tmp_path, world, "bits+losses", script=SCRIPT)


@pytest.mark.parametrize(
    "cases",
    [
        "training+programs+accumulated+wrapped",
        "other_backends+top+memory+collected+fully_sharded",
        "saved+placed+refused+unread+left_alone",
        "whole_state+changed+unlike+loops+assigned+copied+planned_apart+kept",
    ],
)
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_train_as_one(world: int, cases: str, tmp_path: Path) -> None:
    run(tmp_path, world, cases, script=SCRIPT)


def test_without_processes() -> None:
    """Neither function does anything where there is no process group, or no sharded head."""
    with pytest.raises(OptionError, match="init_process_group"):
        elmo.distributed.shard_head(nn.Linear(4, 8), None)
    with pytest.raises(ElmoError, match="no sharded head"):
        elmo.distributed.unshard_head(nn.Linear(4, 8))
