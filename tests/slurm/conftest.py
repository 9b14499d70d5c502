"""A real Slurm of several virtual nodes on this machine: own folder, own ports, own munge; no root, no systemd.

What makes requeues fast (6 s instead of 121) is set here; `RequeueExit` is not, because few clusters set it.
"""

from __future__ import annotations

import getpass
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.left_out import leave_out

ROOT = Path(__file__).resolve().parents[2]
NUM_NODES = 4
DAEMONS = ("slurmctld", "slurmd", "munged")
CLIENTS = ("sbatch", "srun", "scancel", "scontrol", "sinfo")
INSTALL = "apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge"

CONFIG = """\
ClusterName=tubelet
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=2,batch_sched_delay=0
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
SlurmdTimeout=10
ReturnToService=2
KillWait=30
JobRequeue=1
NodeName=DEFAULT CPUs=2 RealMemory=4000 State=UNKNOWN
NodeName=node[0-{last}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{slurmd_ports}]
PartitionName=train Nodes=node[0-{last}] Default=YES MaxTime=INFINITE State=UP
"""


@dataclass
class Slurm:
    """A running cluster. Every process of its jobs carries its SLURM_CONF in the environment: so they are found."""

    folder: Path
    ports: list[int]
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def env(self) -> dict[str, str]:
        outer = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))}
        path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"  # jobs run with the tests' Python
        return {**outer, "PATH": path, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def start(self) -> None:
        host = socket.gethostname().partition(".")[0]
        for name in ("munge", "state", *(f"spool/node{number}" for number in range(NUM_NODES))):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "slurm.conf").write_text(
            CONFIG.format(
                host=host,
                user=getpass.getuser(),
                folder=self.folder,
                ports=self.ports,
                slurmd_ports=",".join(map(str, self.ports[1:])),
                last=NUM_NODES - 1,
            )
        )
        self._start_munge()
        self._daemon("slurmctld", "slurmctld", "-D", "-f", str(self.folder / "slurm.conf"))
        for number in range(NUM_NODES):
            self.start_node(number)
        wait_for(lambda: self.run("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == str(NUM_NODES), 60, self.why)

    def start_node(self, number: int) -> None:
        name = f"node{number}"
        self._daemon(name, "slurmd", "-D", "-f", str(self.folder / "slurm.conf"), "-N", name)

    def run(self, *command: str, cwd: Path | None = None) -> str:
        done = subprocess.run(command, env=self.env, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode:
            raise AssertionError(f"{command} ended with {done.returncode}: {done.stdout}{done.stderr}\n{self.why()}")
        return done.stdout

    def submit(self, *arguments: str, cwd: Path = ROOT) -> str:
        """`sbatch` with these arguments in the folder `cwd`; returns the job id."""
        return self.run("sbatch", "--parsable", *arguments, cwd=cwd).strip()

    def job(self, job: str) -> dict[str, str]:
        """Fields of a job; Slurm has no accounting here, so only while it remembers the job (5 minutes)."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", "--oneliner", job)))

    def processes(self, *words: str, job: str | None = None) -> list[int]:
        """Living processes of this cluster's jobs whose command line holds all the words."""
        found: list[int] = []
        mine = f"SLURM_CONF={self.folder}/slurm.conf".encode()
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                env = (entry / "environ").read_bytes().split(b"\0")
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            of_job = f"SLURM_JOB_ID={job}".encode() in env if job else any(v.startswith(b"SLURM_JOB_ID=") for v in env)
            if mine in env and of_job and all(word in command for word in words):
                found.append(int(entry.name))
        return found

    def kill(self, *words: str, job: str | None = None) -> int:
        """SIGKILL to those processes, from outside; returns how many there were."""
        pids = self.processes(*words, job=job)
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        return len(pids)

    def kill_node(self, number: int) -> None:
        """What a node does that loses its power: its slurmd, the managers of its steps and all their processes end."""
        name = f"node{number}"
        self.daemons[name].kill()
        self.daemons[name].wait()
        tasks = [pid for pid in self.processes() if f"SLURMD_NODENAME={name}".encode() in environment_of(pid)]
        managers = {parent_of(pid) for pid in tasks}
        for pid in [*(pid for pid in managers if b"slurmstepd" in command_of(pid)), *tasks]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def wait_for(self, ready: Callable[[], bool], timeout_s: float, why: Callable[[], str]) -> None:
        """Poll until ready; an AssertionError that says why when it takes too long."""
        wait_for(ready, timeout_s, why)

    def why(self) -> str:
        """What the controller said last, for a failing test."""
        return f"--- slurmctld\n{(self.folder / 'slurmctld.log').read_text(errors='replace')[-2000:]}"

    def stop(self) -> None:
        """End every daemon and every job process of this cluster; the tests of others are not touched."""
        for name, daemon in reversed(list(self.daemons.items())):
            if name != "munged":
                daemon.terminate()
        for name, daemon in reversed(list(self.daemons.items())):
            if name == "munged":
                daemon.terminate()
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        wait_for(lambda: self.kill() == 0, 10, self.why)

    def _start_munge(self) -> None:
        folder = self.folder / "munge"
        key = folder / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = [f"--{name}-file={folder}/{name}" for name in ("key", "log", "pid", "seed")]
        # --force: the scratch folder is 0700, and munged would have everybody reach its socket
        self._daemon("munged", "munged", "--foreground", "--force", f"--socket={folder}/socket", *files)
        wait_for((folder / "socket").exists, 20, (self.folder / "munged.log").read_text)

    def _daemon(self, name: str, program: str, *arguments: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            path = find(program) or program
            self.daemons[name] = subprocess.Popen(
                [path, *arguments],
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )


def find(program: str) -> str | None:
    """Path of a program; daemons live in sbin, which users seldom have on their PATH."""
    return shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def wait_for(ready: Callable[[], bool], timeout_s: float, why: Callable[[], str]) -> None:
    """Poll until ready; an AssertionError that says why when it takes too long."""
    deadline_s = time.monotonic() + timeout_s
    while not ready():
        if time.monotonic() > deadline_s:
            raise AssertionError(f"not ready after {timeout_s:g} s\n{why()}")
        time.sleep(0.2)


def command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def environment_of(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])
    except OSError:
        return 0


def free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def missing_programs() -> list[str]:
    return [program for program in (*DAEMONS, *CLIENTS) if find(program) is None]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without its programs these tests are left out, and named at the end; in CI they fail instead."""
    if missing_programs():
        mine = [item for item in items if Path(__file__).parent in item.path.parents]
        leave_out(config, items, mine, missing="Slurm", install=INSTALL)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A cluster of four idle nodes for the whole session."""
    assert not missing_programs(), f"{missing_programs()} not found: {INSTALL}"
    folder = tmp_path_factory.mktemp("slurm")
    folder.chmod(0o755)
    cluster = Slurm(folder, free_ports(1 + NUM_NODES))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


# ------------------------------------------------------------------------------------------------ a run


STEPS = 40


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run small enough for two ranks that share two cores with the tests, and long enough to be killed in."""
    from shards.pack import PackOptions, pack

    folder = tmp_path_factory.mktemp("packed") / "films"
    pack(ROOT / "configs" / "clips", folder, PackOptions(short_side=96, max_frames=48, stride=2), None)
    return [
        f"data.shards={folder}",
        f"train.steps={STEPS}",
        "schedule.warmup_steps=2",
        "train.global_batch=4",
        "train.micro_batch=1",
        "checkpoint.every_steps=4",
        "eval.every_steps=0",
        "track.wandb='off'",
        "track.log_every_steps=1",
    ]


@dataclass
class Uninterrupted:
    """A job that `tubelet submit` made and nobody touches: what every other one must come to."""

    slurm: Slurm
    run: Path
    job: str
    said: dict[str, object]

    def finished(self) -> Path:
        """The run folder, once the job is done."""
        self.slurm.wait_for(lambda: self.slurm.job(self.job)["JobState"] in ("COMPLETED", "FAILED"), 300, self.log)
        facts = self.slurm.job(self.job)
        assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "0"), self.log()
        return self.run

    def log(self) -> str:
        """What the job said."""
        return (self.run / "logs" / f"slurm-{self.job}.log").read_text() + self.slurm.why()


@pytest.fixture(scope="session")
def uninterrupted(slurm: Slurm, settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Uninterrupted:
    """Submitted, not waited for. On two nodes, in a stand-in for a container, after a line of shell."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    image = folder / "image.sif"
    image.touch()
    apptainer = folder / "apptainer"  # records how it was called, then runs the command outside of any container
    apptainer.write_text(
        f'#!/bin/sh\necho "$PROLOGUE: $@" >> {folder}/calls\nwhile [ "$1" != {image} ]; do shift; done\n'
    )
    with apptainer.open("a") as file:
        file.write('shift\nexec "$@"\n')
    apptainer.chmod(0o755)
    run = folder / "run"
    words = [
        *(sys.executable, "-m", "launch.cli", "submit", str(ROOT / "configs" / "demo.yaml"), f"run.dir={run}"),
        *(*settings, f"launch.container={image}", f"launch.prologue=export PATH={folder}:$PATH PROLOGUE=before"),
        *("--nodes=2", "--time=20", "--sbatch=--ntasks-per-node=1", "--sbatch=--nodelist=node0,node1", "--json"),
    ]
    said = json.loads(slurm.run(*words, cwd=ROOT))
    return Uninterrupted(slurm, run, said["job"], said)
