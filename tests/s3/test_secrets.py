"""Nothing leaks (C14): secrets are planted wherever a run can meet them, and looked for in everything it leaves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from launch import cli
from shards import storage
from tests.dist import ranks
from tests.s3.conftest import Gateway

pytestmark = pytest.mark.slow

PASSWORD, TOKEN, KEY = "canary-p4ssw0rd", "canary-t0k3n", "canary-4p1k3y"
IMAGE = f"docker://user:{PASSWORD}@registry.example/train?token={TOKEN}"
PROLOGUE = f"curl https://user:{PASSWORD}@host.example/up?token={TOKEN}"


def run(*words: object) -> str:
    done = CliRunner().invoke(cli.app, list(map(str, words)))
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def test_nothing_that_a_run_leaves_holds_a_secret(
    gateway: Gateway,
    aws: Callable[..., None],
    packed: Path,
    tiny_config: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run that reads S3 with the keys of the environment, tells wandb, is looked into, and is exported."""
    bucket = f"s3://films/secrets/{tmp_path.name}"
    for file in packed.iterdir():
        storage.upload(file, f"{bucket}/{file.name}")
    for name in ("WANDB_API_KEY", "HF_TOKEN", "SLURM_JWT", "GITHUB_TOKEN"):
        monkeypatch.setenv(name, KEY)
    monkeypatch.setenv("WANDB_MODE", "offline")
    changes: dict[str, Any] = {
        "data.shards": bucket,
        "train.steps": 4,
        "track.wandb": "offline",
        "track.wandb_pictures": True,
        "track.wandb_code": True,
        "launch.container": IMAGE,
        "launch.prologue": PROLOGUE,
    }
    config, folder = tiny_config("run", **changes), tmp_path / "run"
    told = ranks.train(config, 1)
    told.append(run("replay", folder, "--step", 1))
    told.append(run("audit", folder))
    told.append(run("report", folder, "--wandb"))
    assert told[-1].splitlines()[-1] == f"next: wandb sync {next((folder / 'wandb').glob('offline-run-*'))}"
    told.append(run("report", folder, "--json"))
    told.append(run("export", folder, tmp_path / "export"))

    left = [file for place in (folder, tmp_path / "export") for file in place.rglob("*") if file.is_file()]
    parts = {file.relative_to(tmp_path).parts[1] for file in left}
    assert {"config.yaml", "environment.json", "metrics.jsonl", "attempts", "checkpoints", "ledger", "logs"} <= parts
    assert {"pictures", "wandb", "report.html", "config.json", "model.safetensors"} <= parts
    for secret in (gateway.key, gateway.secret, PASSWORD, TOKEN, KEY):
        assert not [text for text in told if secret in text]
        assert [file for file in left if secret.encode() in file.read_bytes()] == []
    # the places were reached, so the search can fail: without their secrets the addresses are there
    assert "docker://registry.example/train" in (folder / "config.yaml").read_text()
    assert "https://host.example/up" in (folder / "report.html").read_text()
    assert b"docker://registry.example/train" in next(folder.glob("wandb/offline-run-*/*.wandb")).read_bytes()
    assert oct(folder.stat().st_mode & 0o777) == "0o700"
