"""What every benchmark here needs: CPU seconds of a whole process tree, medians with spread, the machine's name.

Arms of a comparison run in processes of their own, in turn (A B C, then B C A, ...), so that a machine that slows down
or is used by others slows all of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

REPO = Path(__file__).resolve().parents[2]
CHILD_LIMIT_S = 1800


def cpu_s() -> float:
    """Process-CPU seconds of this process and of all its descendants, living and reaped."""
    me = psutil.Process()
    total_s = 0.0
    for process in (me, *me.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue  # it ended just now: its parent's reaped children hold it
        total_s += times.user + times.system + times.children_user + times.children_system
    return total_s


class Stopwatch:
    """Wall and CPU seconds since it was made."""

    def __init__(self) -> None:
        self._wall_s, self._cpu_s = time.perf_counter(), cpu_s()

    def read(self) -> dict[str, float]:
        return {"wall_s": time.perf_counter() - self._wall_s, "cpu_s": cpu_s() - self._cpu_s}


def machine() -> dict[str, Any]:
    """Where figures come from. The load says whether others were at work."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else "unknown",
        "cores": len(os.sched_getaffinity(0)),
        "load_1_min": round(os.getloadavg()[0], 1),
        "python": sys.version.split()[0],
        "date": time.strftime("%Y-%m-%d"),
    }


def spread(values: Sequence[float], digits: int = 4) -> dict[str, Any]:
    """Median, least and most of the repeats."""
    return {
        "median": round(float(np.median(values)), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
        "n": len(values),
    }


def summarize(runs: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, Any]]:
    """For each arm, the spread of each figure that its runs gave."""
    return {
        arm: {name: spread([row[name] for row in rows]) for name in rows[0] if isinstance(rows[0][name], int | float)}
        for arm, rows in runs.items()
        if rows
    }


def interleave(
    arms: Sequence[str], num_repeats: int, run: Callable[[str, int], dict[str, float] | None]
) -> dict[str, list[dict[str, float]]]:
    """Run every arm `num_repeats` times, in turn, beginning with another one each time. None: the arm cannot run."""
    runs: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
    failed: set[str] = set()
    for repeat in range(num_repeats):
        first = repeat % len(arms)
        for arm in (*arms[first:], *arms[:first]):
            if arm in failed:
                continue
            row = run(arm, repeat)
            if row is None:
                failed.add(arm)
                continue
            runs[arm].append(row)
            print(f"{repeat + 1}/{num_repeats} {arm}: {json.dumps(row)}", file=sys.stderr, flush=True)
    return {arm: rows for arm, rows in runs.items() if arm not in failed}


def run_child(arguments: Sequence[str], *, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Run a Python script of ours in a process of its own: its last line of output is JSON.

    Every process has one thread for arithmetic: several on two cores only disturb each other, on every arm alike.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.environ.get("PYTHONPATH", str(REPO)),
        **(environment or {}),
    }
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=CHILD_LIMIT_S
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def finish(result: dict[str, Any], json_file: Path | None) -> None:
    """Write the result where it was asked for, and print it as one line, without lists of single rows."""
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: value for name, value in result.items() if not name.endswith("_rows")}))
