"""The README's commands are the ones that are tested, and its numbers are in committed results."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def commands() -> list[str]:
    """Every line of the README that makes a virtual environment."""
    return [line for line in (ROOT / "README.md").read_text().splitlines() if "-m venv" in line]


def test_ci_runs_the_readmes_test_command() -> None:
    (test,) = [line for line in commands() if line.endswith("-m pytest -n 2")]
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    assert test.replace("pip install", "pip install -q") in script


def test_the_main_command_runs_the_main_example() -> None:
    (train,) = [line for line in commands() if "pytest" not in line]
    assert train.endswith("examples/train_xmc.py")
    assert (ROOT / "examples" / "train_xmc.py").is_file()


def test_files_the_readme_names_exist() -> None:
    text = (ROOT / "README.md").read_text()
    links = [part.split(")")[0] for part in text.split("](")[1:]]
    local = [link.split("#")[0] for link in links if "://" not in link]
    missing = [link for link in local if link and not (ROOT / link).exists()]
    assert not missing


def test_the_documented_loop_runs(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "optimizers.md").read_text()
    _, _, after = text.partition("## A whole loop")
    code = after.split("```python\n")[1].split("```")[0]
    finished = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:elmo_compile", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "checkpoint.pt").stat().st_size > 4 * 50_000 * 64
