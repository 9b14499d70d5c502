"""The promise: killed with SIGKILL at any moment, the same command ends where the uninterrupted run ends, bit by bit.

2 ranks, ZeRO-2, bf16, accumulation 2 (C2, C4, C8, C10).
"""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pretrain.checkpoint import Checkpoint, candidates, newest
from pretrain.ledger import ROW_DTYPE, walk_lineage
from pretrain.witness import audit_run
from tests.dist import ranks

pytestmark = pytest.mark.slow

ROOT = ranks.ROOT
SEAMS = (
    "between step and ledger",
    "after the lineage",
    "between ledger and rename",
    "between rename and pointer",
    "inside the write",
)
STATES = ("fp32", "exp_avg", "exp_avg_sq")


def final_states(run_dir: Path) -> dict[str, torch.Tensor]:
    found = newest(run_dir)
    assert found is not None
    assert found.facts.step == 6
    return {
        f"{name} {state}": found.read(name, state, 0, int(torch.Size(shape).numel()))
        for name, shape in found.facts.shapes.items()
        for state in STATES
    }


def consumed(run_dir: Path) -> list[tuple[int, ...]]:
    """(step, position, draw, sample, checksum) of every committed row, in the order of the run."""
    found = newest(run_dir)
    assert found is not None
    rows: list[tuple[int, ...]] = []
    for _, link in walk_lineage(run_dir / "ledger", found.lineage):
        for segment in link.segments:
            data = np.fromfile(run_dir / "ledger" / segment.file, ROW_DTYPE)
            rows += [tuple(int(row[key]) for key in ("step", "position", "draw", "sample", "checksum")) for row in data]
    return sorted(rows)


def assert_same_end(run_dir: Path, reference: Path) -> None:
    assert consumed(run_dir) == consumed(reference)
    expected = final_states(reference)
    for name, values in final_states(run_dir).items():
        assert torch.equal(values, expected[name]), name
    result = audit_run(run_dir)
    assert result.exit_code == 0, "\n".join(result.lines)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, packed: Path) -> Path:
    """The run nobody disturbed."""
    folder = tmp_path_factory.mktemp("reference")
    ranks.train(write_config(folder, packed), 2)
    return folder / "run"


def write_config(folder: Path, packed: Path, steps: int = 6) -> Path:
    path = folder / "run.yaml"
    path.write_text(
        f"""
run: {{dir: {folder / "run"}, seed: 3}}
data: {{shards: {packed}, frames: 8, stride: 2, size: 32, workers: 1}}
model: {{size: nano}}
objective: {{masked_frame: {{mask_ratio: 0.5}}, frame_order: {{mask_ratio: 0.5, min_motion: 0}}}}
train: {{steps: {steps}, global_batch: 8, micro_batch: 2, precision: bf16}}
zero: {{stage: 2}}
optim: {{lr: 1e-3}}
checkpoint: {{every_steps: 2}}
track: {{log_every_steps: 1}}
"""
    )
    return path


def test_the_reference_is_exact_and_reproducible(reference: Path, tmp_path: Path, packed: Path) -> None:
    ranks.train(write_config(tmp_path, packed), 2)
    assert_same_end(tmp_path / "run", reference)
    assert len(consumed(reference)) == 6 * 8


@pytest.mark.parametrize("seam", SEAMS)
def test_killed_at_a_seam(seam: str, reference: Path, tmp_path: Path, packed: Path) -> None:
    config = write_config(tmp_path, packed)
    program = [str(Path(__file__).with_name("die_at.py")), seam, "4", str(config)]
    codes, outputs = ranks.finish(ranks.start(program, 2))
    assert codes == [-signal.SIGKILL] * 2, outputs
    whole = [folder.name for folder in candidates(tmp_path / "run")]
    assert ("step-000004" in whole) == (seam == "between rename and pointer")
    ranks.train(config, 2)
    assert_same_end(tmp_path / "run", reference)
    assert not list((tmp_path / "run" / "checkpoints").glob("*.tmp"))


@pytest.mark.parametrize(("world", "stage"), [(1, 3), (3, 0)])
def test_killed_and_resumed_on_another_number_of_ranks(
    world: int, stage: int, reference: Path, tmp_path: Path, packed: Path
) -> None:
    """2 ranks at stage 2 are killed; others at another stage end with the same samples, and the audit is exact."""
    config = write_config(tmp_path, packed)
    program = [str(Path(__file__).with_name("die_at.py")), "between step and ledger", "4", str(config)]
    ranks.finish(ranks.start(program, 2))
    ranks.train(config, world, f"zero.stage={stage}")
    assert consumed(tmp_path / "run") == consumed(reference)
    result = audit_run(tmp_path / "run")
    assert result.exit_code == 0, "\n".join(result.lines)


def num_logged(run_dir: Path) -> int:
    """Largest step in metrics.jsonl."""
    try:
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return 0
    steps = [json.loads(line)["step"] for line in lines if line.endswith("}")]
    return max(steps, default=0)


def wait_for(is_so: Callable[[], bool], process: subprocess.Popen[Any], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so() and process.poll() is None:
        assert time.monotonic() < deadline, "the run made no progress"
        time.sleep(0.02)


def test_a_signal_loses_no_step(reference: Path, tmp_path: Path, packed: Path) -> None:
    """SIGTERM to every rank: they agree, save, say 75, and go on from the very step."""
    config = write_config(tmp_path, packed)
    started = ranks.start(["-m", "pretrain.train", str(config)], 2)
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for(metrics.exists, started[0])  # its first row is written once signals are heard
    for rank in started:
        rank.send_signal(signal.SIGTERM)
    codes, outputs = ranks.finish(started)
    assert codes == [75, 75], outputs
    [outcome] = (tmp_path / "run" / "attempts").glob("*.outcome.json")
    stopped_at = json.loads(outcome.read_text())["step"]
    saved = newest(tmp_path / "run")
    assert saved is not None
    assert saved.facts.step == stopped_at == num_logged(tmp_path / "run") < 6
    ranks.train(config, 2)
    assert_same_end(tmp_path / "run", reference)


@pytest.mark.parametrize("damage", ["truncated", "bit flipped", "removed", "manifest flipped"])
def test_a_damaged_checkpoint_is_passed_over(damage: str, reference: Path, tmp_path: Path, packed: Path) -> None:
    config = write_config(tmp_path, packed)
    run_dir = tmp_path / "run"
    subprocess.run(["cp", "-r", str(reference), str(run_dir)], check=True)
    (run_dir / "DONE").unlink()
    folder = candidates(run_dir)[0]
    path = folder / ("manifest.json" if damage == "manifest flipped" else "rank-00001.safetensors")
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(data[:-1])
    elif damage == "removed":
        path.unlink()
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    ranks.train(config, 2, f"run.dir={run_dir}")
    assert_same_end(run_dir, reference)
    assert (
        "is not whole" in (run_dir / "logs" / "rank-1.log").read_text() + (run_dir / "logs" / "rank-0.log").read_text()
    )


def test_no_whole_checkpoint_is_never_a_new_start(reference: Path, tmp_path: Path, packed: Path) -> None:
    config = write_config(tmp_path, packed)
    subprocess.run(["cp", "-r", str(reference), str(tmp_path / "run")], check=True)
    (tmp_path / "run" / "DONE").unlink()
    for folder in candidates(tmp_path / "run"):
        (folder / "rank-00000.safetensors").unlink()
    codes, outputs = ranks.finish(ranks.start(["-m", "pretrain.train", str(config)], 2))
    assert 93 in codes
    assert "none of them is whole" in "".join(outputs)
    assert len(candidates(tmp_path / "run")) == 2


def test_an_older_attempt_stops_before_it_writes(tmp_path: Path, packed: Path) -> None:
    """A second start on the same run takes over; the first stops with 93 at its next save and commits nothing more."""
    config = write_config(tmp_path, packed, steps=400)
    [first] = ranks.start(["-m", "pretrain.train", str(config), "checkpoint.every_steps=3"], 1)
    wait_for(lambda: num_logged(tmp_path / "run") >= 1, first)
    (tmp_path / "run" / "attempts" / "0002.json").write_text("{}")
    [code], [output] = ranks.finish([first])
    assert code == 93
    assert "attempt 2 at work" in output
    saved = [Checkpoint(folder).facts.attempt for folder in candidates(tmp_path / "run")]
    assert set(saved) <= {1}
    assert not list((tmp_path / "run" / "checkpoints").glob("*.0002.tmp"))
