"""Kill a run with SIGKILL at random moments until it has died N times, then let it finish: `make soak`.

    python tests/soak.py [--kills 100] [--ranks 2] [--seed N]

Every start is the real command in a process group of its own; a moment is drawn anew each time, from before the ranks
are up to well into training. Between two kills the run folder is looked at as a stranger would: every checkpoint that
has its final name must be whole. At the end: the audit, and how much work each kill cost.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
EVERY_STEPS = 10
MAX_START_S = 300.0


@dataclass
class Soak:
    """What N kills did to one run."""

    num_kills: int = 0
    num_starts: int = 0
    lost_steps: list[int] = field(default_factory=list[int])
    """Per kill: steps that were done and had to be done again."""
    num_allowed: int = 0
    """Kills whose lost steps lie within an interval and the write that was in flight."""
    broken: list[str] = field(default_factory=list[str])
    """Checkpoints under their final name that were not whole."""
    audit_exit: int | None = None
    audit: list[str] = field(default_factory=list[str])
    steps: int = 0
    wall_s: float = 0.0

    @property
    def is_good(self) -> bool:
        """Every kill survived, nothing lost beyond what is allowed, nothing damaged accepted."""
        return self.audit_exit == 0 and not self.broken and self.num_allowed == self.num_kills

    def to_json(self) -> dict[str, Any]:
        """For RESULTS.md."""
        lost = sorted(self.lost_steps)
        return {
            "kills": self.num_kills,
            "starts": self.num_starts,
            "steps": self.steps,
            "lost_steps_median": lost[len(lost) // 2] if lost else None,
            "lost_steps_max": max(lost, default=None),
            "allowed": self.num_allowed,
            "broken_checkpoints": self.broken,
            "audit_exit": self.audit_exit,
            "wall_s": round(self.wall_s, 1),
        }


def write_config(folder: Path, shards: Path, steps: int) -> Path:
    """A run small enough to be started a hundred times."""
    config = {
        "run": {"dir": str(folder / "run"), "seed": 7},
        "data": {"shards": str(shards), "frames": 8, "stride": 2, "size": 32, "workers": 1},
        "model": {"size": "nano"},
        "objective": {"masked_frame": {"mask_ratio": 0.5}},
        "train": {"steps": steps, "global_batch": 4, "micro_batch": 2, "precision": "fp32"},
        "zero": {"stage": 2},
        "optim": {"lr": 1e-3},
        "checkpoint": {"every_steps": EVERY_STEPS},
        "track": {"log_every_steps": 1},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def soak(folder: Path, shards: Path, *, kills: int, ranks: int, moments: random.Random) -> Soak:
    """Kill, look, go on; then finish and audit."""
    from pretrain.checkpoint import Checkpoint, candidates

    result, start_s = Soak(), time.monotonic()
    # Enough steps that no start finishes before its kill, and the last one has something left to do.
    result.steps = steps = 100 * kills
    config, run = write_config(folder, shards, steps), folder / "run"
    command = [sys.executable, "-m", "launch.cli", "pretrain", str(config), "--ranks", str(ranks)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    while result.num_kills < kills:
        before, last = newest_step(run), newest_attempt(run)
        process = _start(command, environment)
        result.num_starts += 1
        _until(process, run, before, last, moments)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        result.num_kills += 1
        saved = newest_step(run)
        done = num_done(run, since=saved, after=last)
        lost = max(0, done - saved)
        result.lost_steps.append(lost)
        # The boundary after `saved` was being written: at most two intervals and the step under way.
        result.num_allowed += lost <= 2 * EVERY_STEPS + 1
        for found in candidates(run):
            opened = Checkpoint(found)
            result.broken += opened.broken_files(opened.files)
        print(f"kill {result.num_kills}/{kills}: at step {done}, saved {saved}, lost {lost}", flush=True)
    last = newest_step(run) + 10
    finish = [*command, f"train.steps={last}", "--change"]
    done = subprocess.run(finish, cwd=ROOT, env=environment, check=False, capture_output=True, text=True)
    result.num_starts += 1
    if done.returncode:
        result.broken.append(f"the last start returned {done.returncode}: {done.stderr[-2000:]}")
    _audit(run, result)
    result.wall_s = time.monotonic() - start_s
    return result


def _start(command: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, stdout=quiet, stderr=quiet)


def _until(process: subprocess.Popen[bytes], run: Path, before: int, last: int, moments: random.Random) -> None:
    """One kill in five while the run is still starting; the others some steps on, some in the middle of a save."""
    if moments.random() < 0.2:
        time.sleep(moments.uniform(0.5, 6.0))
        return
    wanted, end_s = before + moments.randint(1, 2 * EVERY_STEPS), time.monotonic() + MAX_START_S
    while num_done(run, since=before, after=last) < wanted:
        if process.poll() is not None or time.monotonic() > end_s:
            raise SystemExit(f"the run came to no step {wanted} (returned {process.returncode}): see {run}/logs")
        time.sleep(0.005)
    time.sleep(moments.uniform(0, 0.1))


def newest_step(run: Path) -> int:
    """Step of the newest checkpoint under its final name; 0 where there is none."""
    steps = [int(f.name[5:]) for f in (run / "checkpoints").glob("step-*") if f.name[5:].isdigit()]
    return max(steps, default=0)


def _rows(run: Path) -> list[dict[str, Any]]:
    try:
        lines = (run / "metrics.jsonl").read_bytes().splitlines()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith(b"}")]


def newest_attempt(run: Path) -> int:
    """The newest attempt that metrics.jsonl knows of."""
    return max((row["attempt"] for row in _rows(run)), default=0)


def num_done(run: Path, since: int = 0, after: int = 0) -> int:
    """Largest step that attempts after number `after` have logged; `since` if none has."""
    steps = [row["step"] for row in _rows(run) if row["attempt"] > after and row["kind"] == "train"]
    return max(steps, default=since)


def _audit(run: Path, result: Soak) -> None:
    from pretrain.witness import audit_run

    proof = audit_run(run)
    result.audit_exit, result.audit = proof.exit_code, list(proof.lines)


def main() -> int:
    """0 if the run survived everything."""
    from shards.pack import PackOptions, pack

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4)))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pack(
            ROOT / "configs" / "clips",
            Path(folder) / "films",
            PackOptions(short_side=64, max_frames=32, stride=2),
            None,
        )
        moments = random.Random(options.seed)
        result = soak(Path(folder), Path(folder) / "films", kills=options.kills, ranks=options.ranks, moments=moments)
    print("\n".join(result.audit))
    print(json.dumps({"seed": options.seed, **result.to_json()}))
    return 0 if result.is_good else 1


if __name__ == "__main__":
    sys.exit(main())
