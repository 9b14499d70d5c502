"""launch/node.py: Slurm's variables -> ranks. What Slurm really sets was copied from a real step of two nodes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from launch import cores, node
from launch.interface import addresses_of, interface_to, interfaces
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
    with_scontrol(tmp_path, monkeypatch, "localhost\n127.0.0.1")
    assert node.rank_environment(TWO_NODES | {"SLURMD_NODENAME": "node1"}) == {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_SIZE": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "15012",
        "OMP_NUM_THREADS": "1",
        "TUBELET_NODE": "node1",
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
    }


def test_the_batch_script_has_asked_for_the_hosts() -> None:
    """No scontrol here, as in a container; and what the user has set stays."""
    slurm = TWO_NODES | {"TUBELET_HOSTS": "gpu03/gpu04", "GLOO_SOCKET_IFNAME": "ib7"}
    env = node.rank_environment(slurm)
    assert (env["MASTER_ADDR"], env["GLOO_SOCKET_IFNAME"]) == ("gpu03", "ib7")


def test_the_interface_leads_to_another_node() -> None:
    """The first node asks for the way to the second: to itself, it would be loopback."""
    named = {address: name for name in interfaces() for address in addresses_of(name) if "." in address}
    mine, name = list(named.items())[-1]  # loopback, on a machine that has nothing else
    assert interface_to(mine) == name, "what the other nodes see of this one"
    assert interface_to("127.0.0.1") == "lo"
    assert interface_to("nobody.invalid") is None
    first = {"SLURM_NODEID": "0"}
    assert node.network([mine, "127.0.0.1"], first)["NCCL_SOCKET_IFNAME"] == "lo"
    assert node.network([mine, "127.0.0.1"], {"SLURM_NODEID": "1"})["NCCL_SOCKET_IFNAME"] == name
    assert node.network([mine], first)["GLOO_SOCKET_IFNAME"] == "lo", "one node alone"
    assert node.network(["nobody.invalid"] * 2, first) == {}


def test_an_interface_that_is_not_there_is_refused() -> None:
    assert node.network(["a", "b"], {"TUBELET_INTERFACE": "lo"})["GLOO_SOCKET_IFNAME"] == "lo"
    with pytest.raises(UserError, match=r"launch\.interface is ib7.*lo"):
        node.network(["a", "b"], {"TUBELET_INTERFACE": "ib7"})


def test_each_rank_gets_whole_cores_of_one_socket() -> None:
    """Two sockets of four cores with two threads, numbered as Linux does: 0-7 are cores, 8-15 their second threads."""
    blocks = [cores.block(range(16), rank, 4, place=lambda cpu: (cpu % 8 // 4, cpu % 8)) for rank in range(4)]
    assert blocks == [[0, 1, 8, 9], [2, 3, 10, 11], [4, 5, 12, 13], [6, 7, 14, 15]]
    uneven = [cores.block([3, 5, 6, 7, 9], rank, 2, place=lambda cpu: (0, cpu)) for rank in range(2)]
    assert uneven == [[3, 5], [6, 7, 9]]


@pytest.mark.parametrize(
    ("allowed", "given", "local_size", "mine", "words"),
    [
        (range(8), 8, 2, [4, 5, 6, 7], "4-7"),
        (range(8), 8, 1, None, "one rank"),
        (range(4), 8, 2, None, "bound by Slurm"),
        (range(64), 8, 2, None, "Slurm gave 8 and does not say which of 64"),
        (range(2), 2, 4, None, "fewer than ranks"),
    ],
)
def test_cores_are_divided_only_where_they_are_ours(
    monkeypatch: pytest.MonkeyPatch, allowed: range, given: int, local_size: int, mine: list[int] | None, words: str
) -> None:
    monkeypatch.setattr(cores, "place_of", lambda cpu: (0, cpu))
    found, said = cores.choose(list(allowed), {"SLURM_CPUS_ON_NODE": str(given)}, local_size - 1, local_size)
    assert found == mine
    assert words in said


def test_ranges() -> None:
    assert cores.ranges([0, 1, 2, 8, 10, 11]) == "0-2,8,10-11"


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


def test_a_port_that_somebody_has_is_passed_over() -> None:
    with socket.socket() as taken:
        taken.bind(("", node.free_port(29_990)))
        taken.listen()
        port = taken.getsockname()[1]
        assert 15_000 <= node.free_port(port) < 30_000
        assert node.free_port(port) != port
    assert (
        node.rank_environment(TWO_NODES | {"TUBELET_HOSTS": "a/b", "TUBELET_PORT": "15077"})["MASTER_PORT"] == "15077"
    )


def test_ranks_meet_at_the_first_host_where_it_resolves() -> None:
    assert node.meeting_hosts(["gpu03", "gpu04", "gpu05"], known=lambda name: True) == ["gpu03", "gpu04"]
    assert node.meeting_hosts(["gpu03"], known=lambda name: False) == ["127.0.0.1"]


def test_a_host_is_its_node_address_where_the_name_does_not_resolve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_scontrol(tmp_path, monkeypatch, "NodeName=node0 Arch=x86_64 NodeAddr=127.0.0.1 NodeHostName=vm State=IDLE")
    assert node.address_of("node0", known=lambda name: name == "127.0.0.1") == "127.0.0.1"


def test_a_host_that_nobody_can_reach_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_scontrol(tmp_path, monkeypatch, "NodeName=node0 NodeAddr=node0 State=IDLE")
    with pytest.raises(UserError, match=r"'node0'.*NodeAddr"):
        node.address_of("node0", known=lambda name: False)


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


def test_a_refusal_holds_no_secrets(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(slurm: Mapping[str, str]) -> dict[str, str]:
        raise UserError("http://key:CANARY@host/gpu is no interface")

    monkeypatch.setattr(node, "rank_environment", refuse)
    with pytest.raises(SystemExit) as ended:
        node.main([])
    assert (ended.value.code, capsys.readouterr().err) == (93, "http://host/gpu is no interface\n")


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
