"""What a resumed run may change, and what a new run may start from (C8). One rank: the decisions are the same."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pretrain.checkpoint import newest
from pretrain.journal import Journal, JournalRow
from pretrain.replay import replay_step
from pretrain.witness import audit_run
from tests.dist import ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory, packed: Path) -> Path:
    """A run that finished 2 steps."""
    folder = tmp_path_factory.mktemp("half")
    path = folder / "run.yaml"
    path.write_text(
        f"""
run: {{dir: {folder / "run"}, seed: 3}}
data: {{shards: {packed}, frames: 8, stride: 2, size: 32, workers: 1}}
model: {{size: nano}}
objective: {{masked_frame: {{mask_ratio: 0.5}}}}
train: {{steps: 2, global_batch: 4, micro_batch: 2, precision: fp32}}
zero: {{stage: 2}}
optim: {{lr: 1e-3}}
eval: {{every_steps: 2, num_clips: 3}}
"""
    )
    ranks.train(path, 1)
    return path


def fail(config: Path, *arguments: str) -> str:
    codes, outputs = ranks.finish(ranks.start(["-m", "pretrain.train", str(config), *arguments], 1))
    assert codes == [93], outputs
    return outputs[0]


def test_a_finished_run_says_so(half: Path) -> None:
    [output] = ranks.train(half, 1)
    assert "is finished (step 2)" in output


def test_a_refused_start_leaves_no_trace(half: Path) -> None:
    run_dir = half.parent / "run"
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    fail(half, "data.stride=3")
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before


def test_without_a_held_out_split_nothing_is_evaluated(half: Path, tmp_path: Path) -> None:
    output = ranks.train(half, 1, f"run.dir={tmp_path / 'run'}", "data.eval_split=none")[0]
    assert "holds nothing out" in output
    other = f"data.eval_shards={tmp_path}"
    assert "manifest" in fail(half, f"run.dir={tmp_path / 'other'}", other)


def test_another_data_or_seed_is_refused_and_names_both_values(half: Path) -> None:
    output = fail(half, "train.steps=4", "run.seed=4", "data.stride=3", "--change")
    assert "run.seed was 3 and is 4" in output
    assert "data.stride was 2 and is 3" in output
    assert "use run.dir=NEW train.init_from=" in output


def test_more_steps_need_change_and_are_recorded(half: Path) -> None:
    assert "train.steps was 2 and is 4; add --change" in fail(half, "train.steps=4")
    ranks.train(half, 1, "train.steps=4", "--change", "zero.stage=1", "train.micro_batch=1", "checkpoint.every_steps=1")
    found = newest(half.parent / "run")
    assert found is not None
    assert found.facts.step == 4
    assert found.facts.changes == ["step 2: train.steps was 2 and is 4"]
    assert audit_run(half.parent / "run").exit_code == 0


def test_torchrun_is_the_same_run(half: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "pretrain.train", str(half), f"run.dir={tmp_path / 'run'}", "eval.every_steps=0"]
    done = subprocess.run(command, cwd=ranks.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "x 2 ranks x" in done.stdout
    assert audit_run(tmp_path / "run").exit_code == 0


def test_numbers_that_blow_up_are_never_saved_and_ask_a_person(half: Path, tmp_path: Path) -> None:
    words = ("optim.lr=1e30", "train.steps=20", "checkpoint.every_steps=1", "failure.max_rollbacks=0")
    output = fail(half, f"run.dir={tmp_path / 'run'}", *words)
    assert "was not applied: not finite" in output
    assert "a lower optim.lr" in output
    found = newest(tmp_path / "run")
    if found is not None:
        shapes = found.facts.shapes
        values = [found.read(name, "fp32", 0, torch.Size(shape).numel()) for name, shape in shapes.items()]
        assert all(bool(torch.isfinite(value).all()) for value in values)


def test_replay_changes_nothing_but_pictures(half: Path) -> None:
    """Even where a sample fails here that did not fail there."""
    run_dir = half.parent / "run"
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file() and "pictures" not in path.parts}
    result = replay_step(run_dir, 0)
    assert result.matches
    assert result.is_committed
    assert result.weights_of_step is None
    damaged = Journal(run_dir / "journal", is_read_only=True)
    damaged.add(JournalRow(0, result.samples[0], result.samples[1], "checksum"))
    assert damaged.find(0) is not None
    after = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file() and "pictures" not in path.parts}
    assert after == before


def test_secrets_in_urls_reach_nothing(half: Path, tmp_path: Path) -> None:
    """C14: a start that fails on an address with a password in it."""
    run_dir = tmp_path / "run"
    config = tmp_path / "run.yaml"
    config.write_text(half.read_text().replace(str(half.parent / "run"), str(run_dir)))
    codes, outputs = ranks.finish(
        ranks.start(["-m", "pretrain.train", str(config), "data.eval_shards=ftp://me:CANARY@127.0.0.1:9/x?k=CANARY"], 1)
    )
    assert codes != [0]
    assert "CANARY" not in "".join(outputs)
    for path in run_dir.rglob("*"):
        assert not path.is_file() or b"CANARY" not in path.read_bytes(), path


def test_new_run_from_old_weights(half: Path, tmp_path: Path) -> None:
    """init_from takes the weights and nothing else: other data settings, position 0, a new head."""
    new = ["run.dir=" + str(tmp_path / "new"), f"train.init_from={half.parent / 'run'}", "data.stride=1"]
    [output] = ranks.train(half, 1, *new, "objective.frame_order={mask_ratio: 0.5}")
    assert "weights from" in output
    assert "new: objectives.frame_order" in output
    assert "from step 0 to 2" in output
    assert "model.size" in fail(half, *new[:2], "run.dir=" + str(tmp_path / "other"), "model.size=tiny")


def test_evaluation_moves_no_cursor(half: Path, tmp_path: Path) -> None:
    """With and without evaluation the same clips are consumed."""
    cursors = []
    for every in (0, 1):
        ranks.train(half, 1, f"run.dir={tmp_path / str(every)}", f"eval.every_steps={every}")
        found = newest(tmp_path / str(every))
        assert found is not None
        cursors.append(found.facts.cursor)
    assert cursors[0] == cursors[1]
    rows = [json.loads(line) for line in (tmp_path / "1" / "metrics.jsonl").read_text().splitlines()]
    evals = [row for row in rows if row["kind"] == "eval"]
    assert len(evals) == 2
    assert {"loss/masked_frame", "masked_frame/zero", "masked_frame/copy"} <= evals[0].keys()


def test_fillers_do_not_reach_the_ledger(half: Path, tmp_path: Path) -> None:
    """3 clips on 2 ranks in micro batches of 2: one blank filler, printed, weightless, in no row."""
    outputs = ranks.train(
        half, 2, f"run.dir={tmp_path / 'odd'}", "train.global_batch=3", "train.micro_batch=2", "eval.every_steps=0"
    )
    assert "with 1 blank fillers of weight 0" in outputs[0]
    result = audit_run(tmp_path / "odd")
    assert result.exit_code == 0
    assert result.counts["clips"] == 6


@pytest.mark.parametrize("kind", ["file", "no write"])
def test_a_run_folder_that_cannot_be_made(
    half: Path, tmp_path: Path, kind: str, tiny_config: Callable[..., Path]
) -> None:
    (tmp_path / "file").write_text("in the way")
    where = tmp_path / "file" / "run" if kind == "file" else Path("/proc/run")
    assert f"run.dir is {where}; it must be a folder that can be written" in fail(half, f"run.dir={where}")


def test_stop_file(half: Path, tmp_path: Path) -> None:
    """touch STOP: saves, removes the file, says 93; the same command goes on."""
    run_dir = tmp_path / "stop"
    run_dir.mkdir()
    (run_dir / "STOP").touch()
    arguments = [f"run.dir={run_dir}", "train.steps=5"]
    assert "the STOP file: saved at step" in fail(half, *arguments)
    assert not (run_dir / "STOP").exists()
    ranks.train(half, 1, *arguments)
    assert audit_run(run_dir).exit_code == 0
