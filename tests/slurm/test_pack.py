"""A job array on a real Slurm packs a data set in shares; a dependent job joins them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shards.verify import verify

ROOT = Path(__file__).resolve().parents[2]
FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
OPTIONS = ("--short-side", "48", "--max-frames", "32", "--val-fraction", "0")

pytestmark = pytest.mark.slow


def pack(slurm: Any, folder: Path, array: str, *words: str) -> str:
    return slurm.submit(
        f"--array={array}",
        "--cpus-per-task=1",
        f"--output={folder}/pack-%a.log",
        str(ROOT / "slurm" / "pack.sh"),
        str(ROOT / "configs" / "clips"),
        str(folder / "films"),
        *OPTIONS,
        *words,
    )


def said(folder: Path) -> str:
    return "\n".join(f"{path.name}: {path.read_text()}" for path in sorted(folder.glob("*.log")))


def wait(slurm: Any, folder: Path, job: str) -> list[str]:
    """State and exit code of every task of an array, or of one job."""

    def tasks() -> list[str]:
        return slurm.run("squeue", "-h", "-t", "all", "-r", "-j", job, "-o", "%T").split()

    def logs() -> str:
        return said(folder) + slurm.why()

    slurm.wait_for(lambda: all(state in FINAL for state in tasks()), 120, logs)
    return sorted(tasks())


def test_an_array_packs_and_a_dependent_job_joins(slurm: Any, tmp_path: Path) -> None:
    job = pack(slurm, tmp_path, "0-2")
    merge = slurm.submit(
        f"--dependency=afterok:{job}",
        f"--output={tmp_path}/merge.log",
        f"--wrap=python -m launch.cli index {tmp_path / 'films'} --merge",
    )
    assert wait(slurm, tmp_path, job) == ["COMPLETED"] * 3, said(tmp_path)
    assert wait(slurm, tmp_path, merge) == ["COMPLETED"], (tmp_path / "merge.log").read_text()
    assert verify(str(tmp_path / "films")) == []
    manifest = json.loads((tmp_path / "films" / "manifest.json").read_text())
    parts = [shard["name"].split("/")[1] for shard in manifest["splits"]["train"]["shards"]]
    assert parts == ["0000-of-0003", "0001-of-0003", "0002-of-0003"]

    again = pack(slurm, tmp_path, "1", "--slice", "slurm/3")
    assert wait(slurm, tmp_path, again) == ["COMPLETED"], said(tmp_path)
    assert "slice 1/3 is packed already" in (tmp_path / "pack-1.log").read_text()


def test_a_part_of_an_array_must_say_of_how_many(slurm: Any, tmp_path: Path) -> None:
    job = pack(slurm, tmp_path, "1,2")
    assert wait(slurm, tmp_path, job) == ["FAILED", "FAILED"]
    log = (tmp_path / "pack-1.log").read_text()
    assert "add --slice slurm/N" in log
    assert "Traceback" not in log
    assert not (tmp_path / "films").exists()
