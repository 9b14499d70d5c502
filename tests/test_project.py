"""The project as a whole: what it depends on it uses, and a login node needs neither torch nor DeepSpeed."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("shards", "pretrain", "launch")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMPORT_NAMES = {"decord2": "decord", "PyYAML": "yaml", "pillow": "PIL"}


def product_files() -> list[Path]:
    return [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]


def imported() -> set[str]:
    """Top-level modules that product code imports, at the top of a file or inside a function."""
    found: set[str] = set()
    for file in product_files():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.split(".")[0])
    return found


def requirement_name(requirement: str) -> str:
    return re.split(r"[<>=!~;\[ ]", requirement, maxsplit=1)[0]


def test_every_dependency_is_used() -> None:
    names = [requirement_name(requirement) for requirement in PROJECT["dependencies"]]
    assert {"torch", "deepspeed", "webdataset", "decord2", "wandb", "fsspec", "s3fs", "einops"} <= set(names)
    used = imported()
    assert [name for name in names if IMPORT_NAMES.get(name, name) not in used] == []


def test_everything_imported_is_a_dependency() -> None:
    known = {IMPORT_NAMES.get(requirement_name(r), requirement_name(r)) for r in PROJECT["dependencies"]}
    third_party = imported() - set(sys.stdlib_module_names) - set(PACKAGES) - known
    assert third_party == set()


def test_every_version_is_pinned() -> None:
    pinned = {
        line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    }
    wanted = PROJECT["dependencies"] + [r for extra in PROJECT["optional-dependencies"].values() for r in extra]
    assert [r for r in wanted if requirement_name(r).lower() not in pinned] == []


@pytest.mark.parametrize("command", [["--help"], ["config"], ["pretrain", "--help"], ["pretrain", "missing.yaml"]])
def test_works_on_a_login_node(command: list[str]) -> None:
    """torch, DeepSpeed and webdataset cannot be imported; None in sys.modules makes an import fail."""
    hidden = "import sys; sys.modules.update(dict.fromkeys(['torch', 'deepspeed', 'webdataset', 'av', 'decord']))"
    code = f"{hidden}; sys.argv = ['tubelet', *{command!r}]; from launch.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == (2 if command[-1] == "missing.yaml" else 0), done.stderr


def test_no_attic() -> None:
    names = {file.stem for file in product_files()}
    assert not names & {"utils", "util", "common", "helpers", "misc"}
    assert max(len(file.relative_to(ROOT).parts) for file in product_files()) <= 3


TWO_GROUPS = """
def test_{name}_{number}(tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    with (folder.parent / "{name}").open("a") as seen:
        seen.write(folder.name + "\\n")
"""


def test_what_shares_something_stays_with_one_worker(tmp_path: Path) -> None:
    """Two workers, the real conftest, four files in two groups: each group is seen by one of them."""
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=lambda folder, names: [n for n in names if n[0] == "_"])
    for name in ("slurm", "dist"):
        shutil.rmtree(tmp_path / "tests" / name)
        (tmp_path / "tests" / name).mkdir()
        for number in range(2):
            body = "".join(TWO_GROUPS.format(name=name, number=each) for each in range(4))
            (tmp_path / f"tests/{name}/test_{number}.py").write_text(body)
    where = ["tests/slurm", "tests/dist", "--basetemp", str(tmp_path / "base"), "--rootdir", str(tmp_path)]
    workers = ["-n", "2", "--dist", "loadscope", "--no-loadscope-reorder", "--import-mode=importlib", "-q"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *workers, *where], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("slurm", "dist"):
        seen = (tmp_path / "base" / name).read_text().split()
        assert len(seen) == 8
        assert len(set(seen)) == 1
