"""launch/node.py: Slurm's variables -> ranks. What Slurm really sets was copied from a real step of two nodes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch import node
from shards.errors import UserError
from shards.slice import Slice

TWO_NODES = {
    "SLURM_JOB_ID": "12",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "node[0-1]",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}


def with_scontrol(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Put a program `scontrol` that prints a text first on the PATH."""
    program = folder / "scontrol"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_ranks_come_from_slurms_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_scontrol(tmp_path, monkeypatch, "localhost\nnode1")
    assert node.rank_environment(TWO_NODES) == {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_SIZE": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "15012",
        "OMP_NUM_THREADS": "1",
    }


@pytest.mark.parametrize(
    ("counts", "node_id", "tasks"),
    [("1(x2)", 1, 1), ("4", 0, 4), ("4(x2),3", 0, 4), ("4(x2),3", 1, 4), ("4(x2),3", 2, 3), ("2,1(x3)", 3, 1)],
)
def test_tasks_on_node(counts: str, node_id: int, tasks: int) -> None:
    assert node.tasks_on_node(counts, node_id) == tasks


@pytest.mark.parametrize(("counts", "node_id"), [("4(x2)", 2), ("four", 0), ("", 0)])
def test_tasks_on_node_that_slurm_did_not_count(counts: str, node_id: int) -> None:
    with pytest.raises(UserError, match="SLURM_STEP_TASKS_PER_NODE"):
        node.tasks_on_node(counts, node_id)


def test_port_differs_by_job_and_by_restart() -> None:
    ports = {
        node.master_port({"SLURM_JOB_ID": str(job), "SLURM_RESTART_COUNT": str(restart)})
        for job in (1, 2, 400_000, 2**31)
        for restart in range(4)
    }
    assert len(ports) == 16
    assert all(15000 <= port < 30000 for port in ports)
    assert node.master_port({"SLURM_JOB_ID": "7"}) == node.master_port({"SLURM_JOB_ID": "7"})


def test_master_is_the_first_host_where_it_resolves() -> None:
    assert node.master_address(["gpu03", "gpu04"], known=lambda name: name == "gpu03") == "gpu03"
    assert node.master_address(["gpu03"], known=lambda name: False) == "127.0.0.1"


def test_master_is_the_node_address_where_the_name_does_not_resolve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_scontrol(tmp_path, monkeypatch, "NodeName=node0 Arch=x86_64 NodeAddr=127.0.0.1 NodeHostName=vm State=IDLE")
    assert node.master_address(["node0", "node1"], known=lambda name: name == "127.0.0.1") == "127.0.0.1"


def test_master_that_nobody_can_reach_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_scontrol(tmp_path, monkeypatch, "NodeName=node0 NodeAddr=node0 State=IDLE")
    with pytest.raises(UserError, match=r"'node0'.*NodeAddr"):
        node.master_address(["node0", "node1"], known=lambda name: False)


def test_a_gpu_per_task_is_refused() -> None:
    slurm = TWO_NODES | {"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "CUDA_VISIBLE_DEVICES": "0"}
    with pytest.raises(UserError, match="gpus-per-node"):
        node.rank_environment(slurm)


def test_arguments_default_to_the_demo() -> None:
    assert node.split_arguments([]) == ("configs/demo.yaml", [])
    assert node.split_arguments(["train.steps=3"]) == ("configs/demo.yaml", ["train.steps=3"])
    assert node.split_arguments(["a.yaml", "train.steps=3"]) == ("a.yaml", ["train.steps=3"])


def test_outside_of_srun_it_says_what_to_do() -> None:
    env = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    done = subprocess.run([sys.executable, "-m", "launch.node"], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 93
    assert "SLURM_PROCID is not set" in done.stderr
    assert "Traceback" not in done.stderr


ARRAY = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "15"}


def test_a_slice_comes_from_a_job_array() -> None:
    assert node.parse_slice("slurm", {**ARRAY, "SLURM_ARRAY_TASK_COUNT": "16"}) == Slice(3, 16)
    assert node.parse_slice("5/8", {}) == Slice(5, 8)
    some = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_MAX": "7"}
    assert node.parse_slice("slurm/16", some) == Slice(7, 16)


@pytest.mark.parametrize(
    ("text", "slurm", "words"),
    [
        ("slurm", {}, "SLURM_ARRAY_TASK_ID is not set"),
        ("slurm/16", {}, "SLURM_ARRAY_TASK_ID is not set"),
        ("slurm", {**ARRAY, "SLURM_ARRAY_TASK_COUNT": "2"}, "add --slice slurm/N"),
        ("slurm", {**ARRAY, "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "15"}, "add --slice slurm/N"),
        ("slurm/3", {**ARRAY, "SLURM_ARRAY_TASK_COUNT": "16"}, "must be I/N, counted from 0"),
        ("slurm/x", {**ARRAY, "SLURM_ARRAY_TASK_COUNT": "16"}, "must be I/N, counted from 0"),
        ("7", {}, "must be I/N, counted from 0"),
    ],
)
def test_a_slice_that_cannot_be_told(text: str, slurm: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        node.parse_slice(text, slurm)


def test_cores_of_a_task() -> None:
    assert (node.task_cores({"SLURM_CPUS_PER_TASK": "6"}), node.task_cores({})) == (6, 0)
