"""Every command and every link of the README, and its Python, run as a reader would run them."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml

from pretrain.config import parse
from tests.s3.conftest import Gateway, gateway
from tests.shards.conftest import write_video

__all__ = ["gateway"]  # a fixture: the S3 server of the commands with s3://

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()

QUICK = {
    "pretrain": " model.size=nano data.size=32 train.steps=3 train.global_batch=4 train.micro_batch=2"
    " schedule.warmup_steps=1 eval.num_clips=2",
    "bench": " --seconds 1",
}
"""Added to a command: the same command, less of it."""
ON_SLURM = ("submit", "status")
"""Run by tests/slurm/test_submit.py."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands(first_word: str) -> list[str]:
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    return [line.partition("  #")[0].strip() for line in lines if line.startswith(first_word)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's home with a few videos in class folders, and the project's configs beside them."""
    home = tmp_path_factory.mktemp("home")
    for film in (ROOT / "configs" / "clips").iterdir():
        folder = home / "videos" / film.stem.split("_")[0]
        folder.mkdir(parents=True)
        shutil.copy(film, folder)
    shutil.copy(ROOT / "configs" / "clips" / "city_320x180_h264.mp4", home / "videos" / "clip.mp4")
    shutil.copytree(ROOT / "configs", home / "configs")
    write_video(home / "more" / "bars.mp4", num_frames=80)
    (home / "data" / "others").mkdir(parents=True)
    with tarfile.open(home / "data" / "others" / "films-000.tar", "w") as tar:
        for number, film in enumerate(sorted((ROOT / "configs" / "clips").iterdir())):
            tar.add(film, f"{number:03d}{film.suffix}")
    return home


def run(line: str, home: Path, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    words = [word.replace("~", str(home)) for word in shlex.split(line)]
    assert words[0] == "tubelet"
    return subprocess.run(
        [sys.executable, "-m", "launch.cli", *words[1:]],
        cwd=home,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(home), "OMP_NUM_THREADS": "1", **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_the_commands_in_their_order(home: Path, gateway: Gateway) -> None:
    lines = commands("tubelet")
    assert [line.split()[1] for line in lines[:3]] == ["pack", "pretrain", "report"]
    for line in (line for line in lines if line.split()[1] not in ON_SLURM):
        done = run(line + QUICK.get(line.split()[1], ""), home, gateway.environment())
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    assert (home / "runs" / "laptop" / "report.html").stat().st_size > 10_000
    assert (home / "filled-in.mp4").stat().st_size > 1000


@pytest.mark.slow
def test_the_python_uses_what_the_commands_made(home: Path) -> None:
    """Runs after the commands: the export in six lines, and the bare loop."""
    python = blocks("python")
    assert len(python) == 2
    assert len([line for line in python[0].splitlines() if line]) <= 6 + 1
    loop = [line for line in python[1].splitlines() if line]
    assert len(loop) <= 8
    shutil.copy(home / "videos" / "clip.mp4", home / "clip.mp4")
    bounded = python[1].replace("for batch in loader:", "import itertools\nfor batch in itertools.islice(loader, 2):")
    for code in (
        python[0] + "assert features.shape == (1, 96) or features.ndim == 2, features.shape\n",
        bounded + "assert clips_BCTHW.shape == (8, 3, 16, 112, 112)\nassert position['position'] == 16\n",
    ):
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=home,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr


def test_the_yaml_is_a_valid_config() -> None:
    plain = yaml.safe_load((ROOT / "configs" / "laptop.yaml").read_text())
    (block,) = blocks("yaml")
    config, problems = parse(
        {**plain, "run": {"dir": "runs/x"}, "data": {"size": 112, **yaml.safe_load(block)["data"]}}
    )
    assert problems == []
    assert config is not None
    assert len(config.data.sources) == 2


def test_make_targets_exist() -> None:
    targets = [line.split()[1] for line in commands("make")]
    assert targets[:2] == ["demo", "test"]
    for target in targets:
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), target


def test_sbatch_lines_name_what_is_there() -> None:
    lines = commands("sbatch")
    assert len(lines) == 2
    for word in " ".join(lines).split():
        if word.startswith(("slurm/", "configs/")):
            assert (ROOT / word).is_file(), word


def test_links_and_tests_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert len(links) > 20
    named = re.findall(r"tests/[\w/]+(?:\.py)?", README)
    for path in {*links, *named}:
        assert (ROOT / path).exists(), path
