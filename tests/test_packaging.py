"""What is shipped: the package list, the passes folder, the entry points, wheel and sdist."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ("elmo_compile", "passes", "pyproject.toml", "README.md", "LICENSE")


def read_pyproject() -> dict:
    """pyproject.toml as data."""
    if sys.version_info < (3, 11):
        pytest.skip("tomllib is in Python 3.11 and newer")
    import tomllib

    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def packages_on_disk() -> set[str]:
    """Dotted names of every folder with an __init__.py."""
    found = set()
    for start, prefix in ((ROOT / "elmo_compile", ""), (ROOT / "passes", "elmo_compile.")):
        for folder, folders, files in os.walk(start):
            folders[:] = [f for f in folders if not (Path(folder) / f).is_symlink()]
            if "__init__.py" in files:
                found.add(prefix + ".".join(Path(folder).relative_to(ROOT).parts))
    return found


def python(code: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_the_package_list_is_what_is_on_disk():
    listed = read_pyproject()["tool"]["setuptools"]["packages"]
    assert listed == sorted(listed)
    assert set(listed) == packages_on_disk()


def test_passes_is_one_folder_under_both_paths():
    link = ROOT / "elmo_compile" / "passes"
    assert link.is_symlink()
    assert os.readlink(link) == "../passes"


def test_importing_the_folder_names_the_right_import():
    done = python("import passes", ROOT)
    assert done.returncode != 0
    assert "elmo_compile.passes" in done.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> tuple[Path, Path]:
    """(wheel, sdist), built from a copy of the working tree without network."""
    if shutil.which("git") is None:
        pytest.skip("the files to build from are asked of git")
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in SHIPPED:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
            shutil.copytree(source, tree / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(source, tree / name)
    for hook in ("build_sdist", "build_wheel"):
        code = f"from setuptools import build_meta; build_meta.{hook}({str(out)!r})"
        done = python(code, tree)
        assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


def test_the_wheel_holds_every_module_once(distributions):
    names = zipfile.ZipFile(distributions[0]).namelist()
    modules = {n for n in names if n.endswith(".py")}
    expected = set()
    for package in packages_on_disk():
        folder = ROOT.joinpath(*package.split("."))
        expected |= {"/".join((*package.split("."), f.name)) for f in folder.glob("*.py")}
    assert modules == expected
    assert "elmo_compile/passes/__init__.py" in modules
    assert "elmo_compile/py.typed" in names
    assert not [n for n in names if n.startswith(("passes/", "tests/"))]


def test_the_sdist_builds_the_same_wheel(distributions, tmp_path):
    wheel, sdist = distributions
    with tarfile.open(sdist) as archive:
        # Python 3.11.3 and 3.10.11 have no filters yet.
        archive.extractall(
            tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {})
        )
    (tree,) = tmp_path.iterdir()
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    done = python(code, tree)
    assert done.returncode == 0, done.stderr
    rebuilt = zipfile.ZipFile(tmp_path / wheel.name)
    assert set(rebuilt.namelist()) == set(zipfile.ZipFile(wheel).namelist())


def test_an_installed_wheel_works_from_anywhere(distributions, tmp_path):
    target, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    zipfile.ZipFile(distributions[0]).extractall(target)
    code = "import elmo_compile.passes; print(elmo_compile.passes.__file__)"
    done = python(code, empty, PYTHONPATH=str(target))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(target / "elmo_compile" / "passes" / "__init__.py")


def test_the_backend_needs_no_import(tmp_path):
    code = """
import sys, torch
import torch.nn.functional as F

class Head(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(8, 20000)
    def forward(self, x, y):
        return F.cross_entropy(self.head(x), y)

assert not [m for m in sys.modules if m.startswith("elmo_compile")]
model = Head()
x, y = torch.randn(4, 8), torch.randint(20000, (4,))
compiled = torch.compile(model, backend="elmo", options={"lower": "eager"})
torch.testing.assert_close(compiled(x, y), model(x, y))
import elmo_compile
(match,) = elmo_compile.last_report().matches
assert match.loss == "cross_entropy", match
"""
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr
