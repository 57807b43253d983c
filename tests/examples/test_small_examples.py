"""Every smaller example runs, short, and shows what it is there to show."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SHORT = ("inspect_graph", "language_model", "recommender", "several_devices", "test_my_head")


def printed(name: str, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    torch.compiler.reset()
    importlib.import_module(name).main(list(arguments))
    return " ".join(capsys.readouterr().out.split())


def test_inspect_graph(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = printed("inspect_graph", capsys, "--dump", str(tmp_path))
    assert "1 head rewritten" in shown
    assert "elmo.head_loss" in shown
    assert "the head's weight has no gradient" in shown
    assert any(tmp_path.rglob("report.txt"))


def test_inspect_graph_of_a_refusal(capsys: pytest.CaptureFixture[str]) -> None:
    shown = printed("inspect_graph", capsys, "--refused")
    assert "0 heads rewritten" in shown
    assert "remedy" in shown


@pytest.mark.parametrize(("optimizer", "gradient"), [("elmo", "none"), ("torch", "10 MiB")])
def test_language_model(optimizer: str, gradient: str, capsys: pytest.CaptureFixture[str]) -> None:
    few = ("--vocabulary", "40000", "--steps", "3", "--optimizer", optimizer)
    shown = printed("language_model", capsys, *few)
    assert f"fused update {optimizer == 'elmo'}" in shown
    assert f"gradient {gradient}" in shown


def test_recommender(capsys: pytest.CaptureFixture[str]) -> None:
    assert "next item: R@1" in printed("recommender", capsys, "--steps", "2")


def test_several_devices(examples: Path) -> None:
    """Under torchrun, as its first lines say."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    done = subprocess.run(
        [*command, "2", str(examples / "several_devices.py"), "--steps", "2"],
        capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "outputs 0 to 25000 of 2 processes" in " ".join(done.stdout.split())
    assert "of the genre" in done.stdout
    assert "no head's update was fused" not in done.stderr


def test_my_head(examples: Path) -> None:
    """The example is itself a test module: run in this process, so that it is compiled warm."""
    torch.compiler.reset()
    assert pytest.main(["-q", "-p", "no:cacheprovider", str(examples / "test_my_head.py")]) == 0


@pytest.mark.parametrize("name", SHORT)
def test_a_smaller_example_is_under_120_lines(name: str, examples: Path) -> None:
    assert len((examples / f"{name}.py").read_text().splitlines()) < 120
