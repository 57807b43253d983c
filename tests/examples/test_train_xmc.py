"""train_xmc.py on a small data set: learns, resumes bit for bit, predicts, refuses clearly."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import train_xmc
import xmc_checkpoint
import xmc_model

COMMON = ["--dim", "16", "--batch-size", "64", "--threads", "1", "--epochs", "3"]
HEADS = [
    ("float32", "eager"),
    ("float32", "elmo"),
    ("bfloat16", "elmo"),
    ("float8_e4m3fn", "elmo"),
    ("float8_e4m3fn", "eager"),
]


def train(data: Path, out: Path, *more: str, head: tuple[str, str] = HEADS[0]) -> dict[str, Any]:
    """Run `train` in this process; the checkpoint it left."""
    torch.compiler.reset()
    dtype, backend = head
    flags = ["--head-dtype", dtype, "--backend", backend]
    train_xmc.main([*COMMON, *flags, "--data", str(data), "--out", str(out), *more])
    return xmc_checkpoint.load_checkpoint(out)


def equal(a: Any, b: Any) -> bool:
    """Whether two nested states hold the same bits."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.nbytes == b.nbytes and bytes_of(a) == bytes_of(b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("head", HEADS, ids="-".join)
def test_it_learns_and_keeps_the_head_as_stored(
    head: tuple[str, str], small_data: Path, tmp_path: Path
) -> None:
    saved = train(small_data, tmp_path, head=head)
    history = saved["position"]["history"]
    assert len(history) == 3
    assert history[-1]["loss"] < history[0]["loss"] - 0.1
    assert saved["trainer"]["model"]["head.weight"].dtype == getattr(torch, head[0])
    assert saved["trainer"]["model"]["head.bias"].dtype == torch.float32


@pytest.mark.parametrize("head", [HEADS[0], HEADS[3]], ids="-".join)
def test_a_resumed_run_ends_with_the_same_bits(
    head: tuple[str, str], small_data: Path, tmp_path: Path
) -> None:
    """200 points in batches of 64 are 4 steps an epoch: stop within the second."""
    whole = train(small_data, tmp_path / "whole", head=head)
    halves = tmp_path / "halves"
    part = train(small_data, halves, "--max-steps", "6", head=head)
    assert (part["position"]["epoch"], part["position"]["step"]) == (1, 2)
    torch.compiler.reset()
    train_xmc.main(["--out", str(halves), "--resume", "--threads", "1"])
    resumed = xmc_checkpoint.load_checkpoint(halves)
    assert equal(resumed["trainer"], whole["trainer"])
    assert resumed["position"]["history"] == whole["position"]["history"]


def test_one_graph_serves_every_batch(small_data: Path, tmp_path: Path) -> None:
    """Numbers of points, words and labels change from batch to batch; nothing is recompiled."""
    torch._dynamo.utils.counters.clear()
    train(small_data, tmp_path, head=("float32", "elmo"))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_predictions_are_the_ranking_that_was_scored(small_data: Path, tmp_path: Path) -> None:
    path = tmp_path / "predictions.npz"
    saved = train(small_data, tmp_path, "--predictions", str(path))
    data = train_xmc.load(small_data)
    with np.load(path) as predictions:
        indices, probabilities = predictions["indices"], predictions["probabilities"]
    assert indices.shape == probabilities.shape == (len(data.test), 5)
    assert (np.diff(probabilities, axis=1) <= 0).all()
    assert 0 < probabilities.min() <= probabilities.max() < 1
    expected = xmc_model.score(indices, data.test, data)
    assert expected.items() <= saved["position"]["history"][-1].items()


@pytest.mark.parametrize("head", [HEADS[0], HEADS[3]], ids="-".join)
def test_predict_names_the_labels(
    head: tuple[str, str], small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(small_data, tmp_path, "--max-steps", "4", head=head)
    capsys.readouterr()
    train_xmc.main(["predict", "a library", "--checkpoint", str(tmp_path), "--top", "4"])
    printed = capsys.readouterr().out
    assert "a library" in printed
    assert printed.count("name-") == 4


def test_an_interrupt_ends_the_step_and_saves(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = xmc_model.Trainer.step
    taken = []

    def interrupted(self: xmc_model.Trainer, batch: Any) -> float:
        taken.append(1)
        if len(taken) == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batch)

    monkeypatch.setattr(xmc_model.Trainer, "step", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    saved = train(small_data, tmp_path)
    assert (saved["position"]["epoch"], saved["position"]["step"]) == (1, 2)
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume", "--out", "OUT/none"], "no such checkpoint"),
        (["predict", "x", "--checkpoint", "OUT/none"], "no such checkpoint"),
        (["predict", "x", "--checkpoint", "OUT/damaged"], "not a readable checkpoint"),
        (["--data", "OUT/none"], "no such file"),
        (["--resume", "--out", "OUT/run", "--head-lr", "3"], "--head-lr 3.0 contradicts the run"),
        (["predict", "!", "--checkpoint", "OUT/run"], "no word"),
    ],
)
def test_errors_say_what_is_wrong(
    arguments: list[str],
    message: str,
    small_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "checkpoint.pt").write_bytes(b"PK")
    train(small_data, tmp_path / "run", "--max-steps", "1")
    with pytest.raises(SystemExit) as stop:
        train_xmc.main([a.replace("OUT", str(tmp_path)) for a in arguments])
    assert stop.value.code == 1
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_crash_while_saving_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    xmc_checkpoint.save_checkpoint(tmp_path, {"value": 1})

    def fail(state: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(xmc_checkpoint.CheckpointError, match="disk full"):
        xmc_checkpoint.save_checkpoint(tmp_path, {"value": 2})
    assert xmc_checkpoint.load_checkpoint(tmp_path)["value"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_the_first_command_of_the_readme(examples: Path, tmp_path: Path) -> None:
    """As a newcomer runs it, on the carried data, but two steps long."""
    command = [sys.executable, str(examples / "train_xmc.py"), "--limit", "512", "--max-steps", "2"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "float8_e4m3fn" in run.stdout
    assert "5.3 MiB (1 B a weight)" in run.stdout
    assert "reference, popularity" in run.stdout
    assert (tmp_path / "runs" / "train_xmc" / "checkpoint.pt").exists()
