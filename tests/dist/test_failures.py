"""Numbers that go wrong, ranks that hang, disks that refuse: what a run does by itself, and when it asks a person."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from pretrain.attempt import Outcome, read_outcome
from pretrain.checkpoint import newest
from pretrain.decisions import Decisions
from pretrain.ledger import ROW_DTYPE
from pretrain.track import read_rows
from pretrain.witness import audit_run
from tests.dist import ranks

pytestmark = pytest.mark.slow


def write_config(folder: Path, packed: Path, **changes: Any) -> Path:
    path = folder / "run.yaml"
    settings: dict[str, dict[str, Any]] = {
        "run": {"dir": str(folder / "run"), "seed": 3},
        "data": {"shards": str(packed), "frames": 8, "stride": 2, "size": 32, "workers": 1},
        "model": {"size": "nano"},
        "objective": {"masked_frame": {"mask_ratio": 0.5}},
        "train": {"steps": 8, "global_batch": 4, "micro_batch": 1, "precision": "fp32"},
        "zero": {"stage": 2},
        "optim": {"lr": 1e-3},
        "checkpoint": {"every_steps": 2, "background": False},
        "track": {"log_every_steps": 1},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        settings.setdefault(section, {}).update({name: value} if name else value)
    path.write_text(json.dumps(settings))
    return path


def sick(config: Path, kind: str, step: int, rank: int, world: int) -> tuple[list[int], str]:
    program = [str(Path(__file__).with_name("sick.py")), kind, str(step), str(rank), str(config)]
    codes, outputs = ranks.finish(ranks.start(program, world))
    return codes, "\n".join(outputs)


def outcome_of(folder: Path, attempt: int | None = None) -> Outcome:
    outcome = read_outcome(folder / "run", attempt)
    assert outcome is not None
    return outcome


def events(folder: Path) -> list[str]:
    return [row["event"] for row in read_rows(folder / "run") if row["kind"] == "event"]


def check_audit(folder: Path, exit_code: int, num_withheld: int) -> None:
    result = audit_run(folder / "run")
    assert result.exit_code == exit_code, "\n".join(result.lines)
    assert result.counts["withheld"] == num_withheld
    assert result.counts["clips"] == 8 * 4 - num_withheld


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "bf16"), (3, "fp32")])
def test_nan_on_one_rank_is_skipped_by_all(tmp_path: Path, packed: Path, stage: int, precision: str) -> None:
    config = write_config(tmp_path, packed, zero__stage=stage, train__precision=precision)
    codes, output = sick(config, "nan", 3, 1, 2)
    assert codes == [0, 0], output
    [skip] = Decisions(tmp_path / "run" / "journal", is_writer=False).skips
    rows = [row for file in (tmp_path / "run" / "ledger").glob("*.rows") for row in _rows(file)]
    assert skip.step == 3
    assert len(skip.samples) == 2, "the two clips of rank 1, not those of rank 0"
    assert not [row for row in rows if row["step"] == 3]
    assert "step 4 was not applied: not finite: loss of samples" in output
    assert events(tmp_path) == ["skipped"]
    check_audit(tmp_path, 3, 4)
    found = newest(tmp_path / "run")
    assert found is not None
    assert found.facts.optimizer_steps == 7


def _rows(file: Path) -> Any:
    import numpy as np

    return np.fromfile(file, ROW_DTYPE)


def test_a_decision_is_obeyed_after_a_kill(tmp_path: Path, packed: Path) -> None:
    """The step that was skipped is stepped over by the resumed run, although nothing is wrong with it there."""
    config = write_config(tmp_path, packed, failure__max_skips=9)
    codes, output = sick(config, "nan", 3, 0, 1)
    assert codes == [0], output
    run = tmp_path / "run"
    for folder in sorted((run / "checkpoints").glob("step-*"))[1:]:
        (folder / "manifest.json").unlink()  # as if it had been killed before them
    (run / "DONE").unlink()
    before = newest_facts_step(run)
    assert before == 6
    ranks.train(config, 2)
    check_audit(tmp_path, 3, 4)
    assert events(tmp_path) == ["skipped"]


def newest_facts_step(run: Path) -> int:
    found = newest(run)
    assert found is not None
    return found.facts.step


@pytest.mark.parametrize(("world", "stage"), [(2, 2), (1, 3), (1, 0)])
def test_too_many_skips_roll_back_and_go_on(tmp_path: Path, packed: Path, world: int, stage: int) -> None:
    config = write_config(tmp_path, packed, failure__max_skips=1, zero__stage=stage)
    codes, output = sick(config, "nan", 5, world - 1, world)
    assert codes == [0] * world, output
    assert "rolled back: at step 6 back to 4, over 5 to 5" in output
    assert outcome_of(tmp_path, 1).outcome == "rolled_back"
    assert outcome_of(tmp_path, 2).outcome == "finished"
    assert events(tmp_path) == ["skipped", "rolled_back"]
    check_audit(tmp_path, 3, 4)


def test_a_spike_rolls_back(tmp_path: Path, packed: Path) -> None:
    config = write_config(tmp_path, packed, failure__spike_sigma=50, failure__spike_window_steps=8, train__steps=14)
    codes, output = sick(config, "spike", 11, 0, 1)
    assert codes == [0], output
    [back] = Decisions(tmp_path / "run" / "journal", is_writer=False).rollbacks
    assert (back.to, back.first, back.stop) == (10, 10, 12)
    result = audit_run(tmp_path / "run")
    assert result.exit_code == 3, "\n".join(result.lines)
    assert result.counts["withheld"] == 8


def test_three_roll_backs_ask_a_person(tmp_path: Path, packed: Path) -> None:
    config = write_config(
        tmp_path, packed, failure__max_skips=1, failure__max_rollbacks=2, train__steps=20, checkpoint__every_steps=1
    )
    codes, output = sick(config, "nan from", 3, 0, 1)
    assert codes == [93], output
    outcome = outcome_of(tmp_path)
    assert outcome.outcome == "person"
    assert "rolled back 2 times before (at step 4 back to 3, over 3 to 3" in outcome.reason
    assert "a lower optim.lr" in outcome.reason
    assert newest_facts_step(tmp_path / "run") <= 5


def test_a_rank_that_hangs_is_named(tmp_path: Path, packed: Path) -> None:
    config = write_config(
        tmp_path, packed,
        limits={"read_attempt_s": 1, "read_deadline_s": 2, "wait_limit_s": 4, "step_limit_s": 6},
        data__decode_deadline_s=3,
    )  # fmt: skip
    codes, output = sick(config, "hang", 3, 1, 2)
    assert set(codes) <= {75, -signal.SIGKILL}, output
    assert 75 in codes
    outcome = outcome_of(tmp_path)
    assert outcome.blamed == (1,), outcome.reason
    assert "rank 1 at sick.py" in outcome.reason or "rank 1 at engine.py" in outcome.reason
    assert "in sleep" in output or "in forward" in output, "the stacks"
    ranks.train(config, 2)
    check_audit(tmp_path, 0, 0)


def test_a_disk_full_for_a_while_costs_one_save(tmp_path: Path, packed: Path) -> None:
    config = write_config(tmp_path, packed)
    codes, output = sick(config, "full once", 4, 1, 2)
    assert codes == [0, 0], output
    assert "the save of step 4 failed (No space left on device); training goes on" in output
    assert events(tmp_path) == ["save_failed"]
    check_audit(tmp_path, 0, 0)


def test_a_disk_that_stays_full_ends_the_attempt(tmp_path: Path, packed: Path) -> None:
    config = write_config(tmp_path, packed, checkpoint__max_age_s=0.5, train__steps=4000)
    codes, output = sick(config, "full", 4, 0, 1)
    assert codes == [75], output
    assert "no save works any more" in outcome_of(tmp_path).reason
    assert newest_facts_step(tmp_path / "run") == 2


def test_a_ledger_that_cannot_be_written_ends_the_attempt_at_the_last_commit(tmp_path: Path, packed: Path) -> None:
    config = write_config(tmp_path, packed)
    codes, output = sick(config, "ledger", 5, 1, 2)
    assert codes == [75, 75], output
    assert "the ledger cannot be written" in outcome_of(tmp_path).reason
    assert newest_facts_step(tmp_path / "run") == 4
    ranks.train(config, 2)
    check_audit(tmp_path, 0, 0)
