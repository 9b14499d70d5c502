"""Pools of real gloo ranks that several tests share: starting ranks costs more than most tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.dist.ranks import ROOT, environments


class RankPool:
    """`world` processes in one process group; `run` calls a function of jobs.py on all of them at once."""

    def __init__(self, world: int, logs: Path) -> None:
        self.world = world
        self._processes: list[subprocess.Popen[bytes]] = []
        self._logs: list[Path] = []
        self._answers = []
        for rank, environment in enumerate(environments(world)):
            read, write = os.pipe()
            environment["ANSWERS"] = str(write)
            log = logs / f"pool-{world}-rank-{rank}.log"
            with log.open("wb") as out:
                process = subprocess.Popen(
                    [sys.executable, str(Path(__file__).with_name("rank.py"))],
                    stdin=subprocess.PIPE,
                    stdout=out,
                    stderr=out,
                    env=environment,
                    pass_fds=[write],
                    cwd=ROOT,
                )
            os.close(write)
            self._processes.append(process)
            self._answers.append(os.fdopen(read, "r"))
            self._logs.append(log)

    @property
    def is_alive(self) -> bool:
        return all(process.poll() is None for process in self._processes)

    def run(self, job: str, **arguments: Any) -> list[Any]:
        """Answers of all ranks, in the order of ranks. Fails with the log of the first rank that died."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps({"job": job, "arguments": arguments}).encode() + b"\n")
            process.stdin.flush()
        answers = []
        for rank, pipe in enumerate(self._answers):
            line = pipe.readline()
            if not line:
                self.close()
                raise AssertionError(f"rank {rank} died:\n{self._logs[rank].read_text()[-4000:]}")
            answer = json.loads(line)
            if "error" in answer:
                self.close()  # after an exception inside a collective the group is unusable
                raise AssertionError(f"rank {rank}: {answer['error']}")
            answers.append(answer["result"])
        return answers

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
