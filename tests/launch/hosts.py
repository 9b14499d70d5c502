"""Two "hosts" on this machine: a real sshd on two loopback addresses, with keys, port and configuration of its own.

Needs no root, and touches nobody's ~/.ssh: ssh is told where to look by a script of that name, first on the PATH.
With them, a run that is handed from launcher to launcher by killing each.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ADDRESSES = ("127.0.0.2", "127.0.0.3")
PROGRAMS = ("sshd", "ssh", "ssh-keygen", "pdsh")
INSTALL = "apt-get install -y --no-install-recommends openssh-server pdsh"

FORMS = {"ssh": "deepspeed --hostfile ", "no ssh": "deepspeed --no_ssh ", "torchrun": "torchrun --nnodes "}
"""How the README's lines begin."""

RANK = b"\0-u\0-m\0pretrain.train\0"

_SSHD = """\
Port {port}
ListenAddress {addresses[0]}
ListenAddress {addresses[1]}
HostKey {folder}/host-key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
UsePAM no
PasswordAuthentication no
PidFile none
"""

_SSH = """\
#!/bin/sh
exec {ssh} -F none -o IdentityFile={folder}/key -o IdentitiesOnly=yes -o StrictHostKeyChecking=accept-new \\
    -o UserKnownHostsFile={folder}/known-hosts "$@"
"""


def find(program: str) -> str | None:
    """Path of a program; daemons live in sbin, which users seldom have on their PATH."""
    return shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def missing_programs() -> list[str]:
    return [program for program in PROGRAMS if find(program) is None]


@dataclass
class Hosts:
    """The two hosts, and the home of who types the commands."""

    folder: Path
    port: int = 0
    sshd: subprocess.Popen[bytes] | None = None

    @property
    def env(self) -> dict[str, str]:
        path = f"{self.folder}/bin:{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
        return {**os.environ, "HOME": str(self.folder), "PATH": path, "OMP_NUM_THREADS": "1"}

    def start(self) -> None:
        for name in ("host-key", "key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / name], check=True)
        self.port = free_port(ADDRESSES)
        config = self.folder / "sshd_config"
        config.write_text(_SSHD.format(port=self.port, addresses=ADDRESSES, folder=self.folder))
        ssh = self.folder / "bin" / "ssh"
        ssh.parent.mkdir()
        ssh.write_text(_SSH.format(ssh=find("ssh"), folder=self.folder))
        ssh.chmod(0o755)
        (self.folder / "HOSTS").write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
        (self.folder / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\n")
        if os.geteuid() == 0:  # where root's sshd keeps its unprivileged half; a service file would make it
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        with (self.folder / "sshd.log").open("wb") as log:
            self.sshd = subprocess.Popen([find("sshd") or "sshd", "-D", "-e", "-f", config], stderr=log)
        wait_for(lambda: all(listens(address, self.port) for address in ADDRESSES), 20, self.why)

    def stop(self) -> None:
        if self.sshd is not None:
            self.sshd.terminate()
            self.sshd.wait()

    def why(self) -> str:
        """What sshd said, for a failing test."""
        return (self.folder / "sshd.log").read_text(errors="replace")


class Start:
    """A start of a run by one of the README's lines: typed once for ssh, else once per host."""

    def __init__(self, hosts: Hosts, form: str, config: str, run_dir: Path, cwd: Path = ROOT) -> None:
        self.run_dir = run_dir
        self.log = run_dir.with_suffix(f".{form.replace(' ', '-')}.log")
        port = free_port(("127.0.0.1", *ADDRESSES))
        self.launchers: list[subprocess.Popen[bytes]] = []
        for node in range(1 if form == "ssh" else len(ADDRESSES)):
            command = [*adapted(readme_line(FORMS[form]), hosts, node, port), config, f"run.dir={run_dir}"]
            with self.log.open("ab") as log:
                self.launchers.append(
                    subprocess.Popen(command, cwd=cwd, env=hosts.env, stdout=log, stderr=log, start_new_session=True)
                )

    def codes(self, timeout_s: float = 120) -> list[int]:
        """Wait for the launchers; what they returned."""
        return [launcher.wait(timeout_s) for launcher in self.launchers]

    def ranks(self) -> list[int]:
        """Process ids of the living ranks, in the order in which their launchers know them."""
        pids = [pid for pid in self.processes() if RANK in read(pid, "cmdline")]
        return sorted(pids, key=lambda pid: int(variable(pid, "RANK") or -1))

    def processes(self, *words: bytes) -> list[int]:
        """Living processes of this start: those whose command line names its run folder, and all the words."""
        mine = f"run.dir={self.run_dir}".encode()
        pids = [int(folder.name) for folder in Path("/proc").glob("[0-9]*")]
        return [pid for pid in pids if all(word in read(pid, "cmdline") for word in (mine, *words))]

    def kill(self) -> None:
        """Everything, from outside."""
        while pids := self.processes():
            send(pids, signal.SIGKILL)
            time.sleep(0.05)
        self.codes()

    def why(self) -> str:
        """What it printed last, for a failing test."""
        return self.log.read_text(errors="replace")[-3000:]


def readme_line(beginning: str) -> str:
    """The README's command that begins like this."""
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    [line] = [line for line in text.splitlines() if line.startswith(beginning)]
    return line


def adapted(line: str, hosts: Hosts, node: int, port: int) -> list[str]:
    """The README's command up to its config, for these hosts and ports, as node number `node` types it."""
    values = {
        "--hostfile": str(hosts.folder / "HOSTS"),
        "--master_addr": ADDRESSES[0],
        "--master-addr": ADDRESSES[0],
        "--master-port": str(port),
        "--node_rank": str(node),
        "--node-rank": str(node),
        "--nproc-per-node": "1",
    }
    words = shlex.split(re.split(r"\S+\.yaml", line)[0])
    words = [values.get(before, word) for before, word in pairwise(["", *words])]
    if words[0] == "deepspeed":
        words[1:1] = ["--master_port", str(port), "--ssh_port", str(hosts.port)]
    return words


def parent(pid: int) -> int:
    """Process id of the parent."""
    return int(read(pid, "stat").rpartition(b")")[2].split()[1])


def variable(pid: int, name: str) -> str:
    """A variable of a process's environment; empty where it has none."""
    found = re.search(rf"(?:^|\0){name}=([^\0]*)", read(pid, "environ").decode(errors="replace"))
    return found[1] if found else ""


def read(pid: int, name: str) -> bytes:
    """A file of /proc; empty where the process has ended."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def send(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def free_port(addresses: Sequence[str]) -> int:
    """A port that is free on the first address, and most probably on the others."""
    with socket.socket() as probe:
        probe.bind((addresses[0], 0))
        return int(probe.getsockname()[1])


def listens(address: str, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((address, port)) == 0


def wait_for(ready: Callable[[], bool], timeout_s: float, why: Callable[[], str]) -> None:
    """Poll until ready; an AssertionError that says why when it takes too long."""
    deadline_s = time.monotonic() + timeout_s
    while not ready():
        if time.monotonic() > deadline_s:
            raise AssertionError(f"not ready after {timeout_s:g} s\n{why()}")
        time.sleep(0.02)
