"""launch/submit.py and launch/snapshot.py. sbatch and squeue are stand-ins here; tests/slurm has the real ones."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import snapshot
from launch.submit import Wanted, submit
from pretrain.config import load_config
from shards.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


class Cluster:
    """Stand-ins for sbatch and squeue: first on the PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.queue = folder / "queue"
        self.queue.touch()
        self.program("squeue", f"cat {self.queue}")
        self.program("sbatch", f"printf '%s\\n' \"$@\" > {folder}/called; env > {folder}/env; echo 42")

    def program(self, name: str, body: str) -> None:
        (self.folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (self.folder / name).chmod(0o755)

    @property
    def called(self) -> list[str]:
        return (self.folder / "called").read_text().splitlines()


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return Cluster(folder)


def test_a_job_is_submitted_with_its_own_code_and_config(
    cluster: Cluster, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    config, run = tiny_config(), tmp_path / "run"
    wanted = Wanted(nodes=2, gpus=4, time="24:00:00", partition="train", more=("--qos=long",))
    done = submit(config, ["train.steps=9", "data.run_length=2"], wanted, allow_change=True)
    code = run / "code" / "001"
    assert (done.job, done.code) == ("42", code)
    assert cluster.called == [
        "--parsable",
        "--export=ALL",
        "--job-name=run",
        f"--comment=tubelet {run}",
        f"--output={run}/logs/slurm-%j.log",
        "--nodes=2",
        "--time=24:00:00",
        "--partition=train",
        "--gpus-per-node=4",
        "--ntasks-per-node=4",
        "--qos=long",
        f"{code}/slurm/pretrain.sh",
        f"{code}/config.yaml",
        "--change",
    ]
    env = (cluster.folder / "env").read_text().splitlines()
    assert {f"TUBELET_CODE={code}", "TUBELET_NODES=2"} <= set(env)
    assert load_config(code / "config.yaml") == load_config(config, ["train.steps=9", "data.run_length=2"])
    for name in ("pretrain/train.py", "slurm/pretrain.sh", "configs/demo.yaml"):
        assert (code / name).read_bytes() == (ROOT / name).read_bytes()
    assert run.stat().st_mode & 0o777 == 0o700
    facts = json.loads((code / "code.json").read_text())
    assert facts["job"] == "42"
    assert submit(config, [], Wanted()).code == run / "code" / "002"


def test_a_dry_run_touches_nothing(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    done = submit(tiny_config(), [], Wanted(nodes=2), dry_run=True)
    assert (done.job, done.settings["train"]["steps"]) == (None, 6)
    assert shlex.split(done.lines()[0])[2:4] == ["sbatch", "--parsable"]
    assert not (tmp_path / "run").exists()


def test_a_run_has_one_job(cluster: Cluster, tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    config, run = tiny_config(), tmp_path / "run"
    cluster.queue.write_text(f"7|PENDING|2|1:00|(Priority)|tubelet {run}x\n8|RUNNING|2|1:00|n[1-2]|someone's\n")
    submit(config, [], Wanted())
    cluster.queue.write_text(f"7|PENDING|2|1:00|(Priority)|tubelet {run}\n")
    with pytest.raises(UserError, match="has job 7 already \\(PENDING\\)"):
        submit(config, [], Wanted())
    (run / "attempts").mkdir()
    (run / "attempts" / "0001.json").write_text(json.dumps({"start": "slurm-8.3"}))
    cluster.queue.write_text("8|RUNNING|2|1:00|n[1-2]|(null)\n")
    with pytest.raises(UserError, match="has job 8 already"):
        submit(config, [], Wanted())
    assert [folder.name for folder in (run / "code").iterdir()] == ["001"]


def test_what_cannot_be_submitted(
    cluster: Cluster, tiny_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = tiny_config(), tmp_path / "run"
    with pytest.raises(UserError, match=r"launch\.min_nodes is 3; it must not exceed --nodes \(2\)"):
        submit(config, ["launch.min_nodes=3"], Wanted(nodes=2))
    with pytest.raises(UserError, match=r"each of 16 ranks"):
        submit(config, [], Wanted(nodes=2, gpus=8))
    with pytest.raises(UserError, match="must be bare"):
        submit(config, ["data.eval_shards=s3://key:secret@host/films"], Wanted())
    run.mkdir(exist_ok=True)
    (run / "STOP").touch()
    with pytest.raises(UserError, match="STOP is there; the job would end at its start: remove it"):
        submit(config, [], Wanted())
    (run / "STOP").unlink()
    cluster.program("sbatch", "echo invalid partition >&2; exit 1")
    with pytest.raises(UserError, match=r"sbatch refused \(invalid partition\)"):
        submit(config, [], Wanted())
    assert list((run / "code").iterdir()) == []
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"sbatch is not on the PATH.*tubelet pretrain"):
        submit(config, [], Wanted())
    (run / "DONE").write_text('{"step": 6}')
    with pytest.raises(UserError, match="is finished \\(step 6\\)"):
        submit(config, [], Wanted())


def test_a_checkout_gives_what_it_tracks_and_new_modules(tmp_path: Path, tiny_config: Callable[..., Path]) -> None:
    root = tmp_path / "project"
    for name in ("shards/a.py", "configs/tracked.yaml", ".gitignore"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("pretrain/ignored.py\n")
    git = ("git", "-C", str(root), "-c", "user.name=x", "-c", "user.email=x")
    config = load_config(tiny_config())
    assert str(snapshot.revision(root)) == "not a git checkout"
    for words in (["init", "--quiet"], ["add", "-A"], ["commit", "--quiet", "-m", "x"]):
        subprocess.run([*git, *words], check=True)
    assert snapshot.revision(root).is_dirty is False
    for name in ("shards/a.py", "pretrain/new.py", "pretrain/ignored.py", "configs/secret.yaml"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("changed\n")
    assert str(snapshot.revision(root)).endswith("with changes that are not committed")
    code = snapshot.take_snapshot(tmp_path / "run", config, root=root)
    copied = {str(file.relative_to(code)) for file in code.rglob("*") if file.is_file()}
    assert copied == {"shards/a.py", "configs/tracked.yaml", "pretrain/new.py", "config.yaml", "code.json"}
    assert (code / "shards" / "a.py").read_text() == "changed\n"


def test_without_git_everything_but_caches_is_copied(tmp_path: Path, tiny_config: Callable[..., Path]) -> None:
    root = tmp_path / "installed"
    for name in ("shards/a.py", "shards/__pycache__/a.pyc", "tests/t.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    code = snapshot.take_snapshot(tmp_path / "run", load_config(tiny_config()), root=root)
    assert {str(file.relative_to(code)) for file in code.rglob("*.py*")} == {"shards/a.py"}


def test_a_login_node_needs_none_of_what_trains(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "run" / "attempts").mkdir(parents=True)
    program = """
import sys
sys.modules.update(dict.fromkeys(["torch", "deepspeed", "webdataset", "wandb", "transformers", "av", "decord"]))
from launch.cli import app
app(sys.argv[1].split("\\n"), standalone_mode=False)
app(["status", sys.argv[2]], standalone_mode=False)
"""
    words = "\n".join(["submit", str(tiny_config()), "--dry-run"])
    command = [sys.executable, "-c", program, words, str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "would run: sbatch" in done.stdout
    assert "never started" in done.stdout
