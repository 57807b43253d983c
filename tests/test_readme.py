"""The README's commands are the ones that are tested, and its numbers are in committed results."""

from __future__ import annotations

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
