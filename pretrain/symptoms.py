"""What one rank measures in a check-up: every function gives small plain facts, or raises. Judged in diagnosis.py.

run folder ─ clock ─ sums over ranks ─ samples ─ mirror ─ memory
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import shutil
import time
import zlib
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

import pretrain
import shards
from pretrain.attempt import node_name
from pretrain.config import Config
from pretrain.data.loader import NUM_READERS
from pretrain.data.source import check_fit, open_dataset
from pretrain.redact import without_secrets
from pretrain.rollcall import Answer, RollCall
from pretrain.world import World
from shards import storage
from shards.errors import SampleError
from shards.storage import join, write_atomic

PACKAGES = ("tubelet", "torch", "deepspeed", "numpy", "av", "safetensors")
REDUCED_BYTES = (64 << 10, 4 << 20, 64 << 20)
NUM_REPEATS = 5
GROUP_TIMEOUT_S = 600.0
"""Longer than any phase: what ends a check that hangs is the phase, which names the rank, and not an abort."""
NUM_SAMPLES = 48
"""Per rank."""
READING_S = 20.0
SEE_LIMIT_S = 10.0
"""For a file that another node wrote: network file systems remember for some seconds what was not there."""
NUM_REPLACED = 20
READ_ATTEMPT_S, READ_DEADLINE_S = 10.0, 30.0
"""Shorter than in training: a store that needs retries for minutes is not fit."""
TOKEN, SHARED, POINTER = "token", "shared", "pointer"


def machine(config: Config) -> Answer:
    """Where this rank runs, with which versions, code and config."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "missing"
    versions["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    versions["code"] = _code_hash()
    versions["config"] = hashlib.sha256(config.model_dump_json().encode()).hexdigest()[:8]
    return {"node": node_name(), "versions": versions}


def _code_hash() -> str:
    """Of the sources that ranks run: a checkout has the same version number whatever is in it."""
    digest = hashlib.sha256()
    for package in (pretrain, shards):
        top = Path(str(package.__file__)).parent
        for file in sorted(top.rglob("*.py")):
            digest.update(file.relative_to(top).as_posix().encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:8]


# ------------------------------------------------------------------------------------------------ the run folder


def make_private(run_dir: Path) -> None:
    """The run folder, for its owner only (C14); one that is there stays as it is."""
    if not run_dir.is_dir():
        run_dir.mkdir(parents=True, exist_ok=True)
        run_dir.chmod(0o700)


def begin_folder(folder: Path, token: str) -> Answer:
    """Rank 0 makes the folder of this check-up inside the run folder, and what the others must find there."""
    make_private(folder.parent)
    folder.mkdir()
    try:
        write_atomic(folder / TOKEN, token.encode())
        write_atomic(folder / POINTER, _pointer(0))
    except OSError:  # the disk is full
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return {}


def write_folder(folder: Path, token: str, rank: int) -> Answer:
    """Read what rank 0 wrote, create what only one may create, and write a file of this rank: fsync, then rename."""
    if not _soon(lambda: (folder / TOKEN).read_text() == token):  # not the folder of rank 0, which is not my fault
        return {"token": False, "created": False, "fsync_s": 0.0}
    created = False
    try:
        os.close(os.open(folder / SHARED, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        created = True
    except FileExistsError:
        created = False
    begun_s = time.perf_counter()
    write_atomic(folder / f"rank-{rank}", f"{token} {rank}".encode())
    return {"token": True, "created": created, "fsync_s": time.perf_counter() - begun_s}


def see_folder(folder: Path, token: str, rank: int, others: list[int]) -> Answer:
    """Whether what the others wrote is there; rank 0 replaces a file meanwhile, and the others read it whole."""
    torn = 0
    for number in range(NUM_REPLACED):
        if rank == 0:
            write_atomic(folder / POINTER, _pointer(number))
        else:
            torn += not _is_whole(folder / POINTER)
    neighbour = next((other for other in others if other > rank), others[0])
    is_there = _soon(lambda: {f"rank-{other}" for other in others} <= set(os.listdir(folder)))
    is_read = _soon(lambda: (folder / f"rank-{neighbour}").read_text() == f"{token} {neighbour}")
    return {"missing": not (is_there and is_read), "torn": torn}


def end_folder(folder: Path) -> Answer:
    """Clear up; how much is free, and how many checkpoints are there already."""
    for file in folder.iterdir():
        file.unlink(missing_ok=True)
    folder.rmdir()
    facts = os.statvfs(folder.parent)
    kept = list((folder.parent / "checkpoints").glob("step-*[0-9]/manifest.json"))
    return {"free_bytes": facts.f_bavail * facts.f_frsize, "num_kept": len(kept)}


def _soon(is_true: Callable[[], bool]) -> bool:
    """Whether it becomes true within SEE_LIMIT_S; a file that is not there yet is not."""
    end_s = time.monotonic() + SEE_LIMIT_S
    while True:
        try:
            if is_true():
                return True
        except (FileNotFoundError, NotADirectoryError):
            pass
        if time.monotonic() > end_s:
            return False
        time.sleep(0.05)


def _pointer(number: int) -> bytes:
    """4 kB that say themselves whether they are whole."""
    body = str(number).encode() * 2048
    return b"%08x" % zlib.crc32(body) + body


def _is_whole(file: Path) -> bool:
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        return False
    return data[:8] == b"%08x" % zlib.crc32(data[8:])


# ------------------------------------------------------------------------------------------------ sums over ranks


def contribution(rank: int, numel: int) -> torch.Tensor:
    """What a rank adds: small whole numbers, so that their sum is exact in fp32 for thousands of ranks."""
    return torch.full((numel,), float(rank % 251)) + torch.arange(numel) % 61


def expected_sum(world_size: int, numel: int) -> torch.Tensor:
    """The sum of all contributions."""
    return float(sum(rank % 251 for rank in range(world_size))) + world_size * (torch.arange(numel) % 61).float()


def reduce_sums(call: RollCall, device: torch.device) -> Answer:
    """All-reduce of a few sizes: numbers that came out wrong, and the median seconds by size in bytes."""
    world = call.world
    if world.size == 1:
        return {"num_wrong": 0, "seconds": {}}
    if device.type == "cuda":
        torch.cuda.set_device(device)  # of this thread
    dist = call.open_group("nccl" if device.type == "cuda" else "gloo", GROUP_TIMEOUT_S)
    seconds: dict[str, float] = {}
    num_wrong = 0
    for num_bytes in REDUCED_BYTES:
        mine = contribution(world.rank, num_bytes // 4).to(device)
        right = expected_sum(world.size, num_bytes // 4).to(device)
        times_s: list[float] = []
        for _ in range(1 + NUM_REPEATS):
            summed = mine.clone()
            _wait_for(device)
            begun_s = time.perf_counter()
            dist.all_reduce(summed)
            _wait_for(device)
            times_s.append(time.perf_counter() - begun_s)
            num_wrong = max(num_wrong, int((summed != right).sum()))
        seconds[str(num_bytes)] = median(times_s[1:])  # the first one connects
    return {"num_wrong": num_wrong, "seconds": seconds}


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ------------------------------------------------------------------------------------------------ data and mirror


def read_samples(config: Config, token: str, world: World) -> Answer:
    """Samples at random places of the run, through the reader that training uses, checksums compared."""
    limits = config.limits.model_copy(update={"read_attempt_s": READ_ATTEMPT_S, "read_deadline_s": READ_DEADLINE_S})
    dataset = open_dataset(config.data, seed=config.run.seed, limits=limits)
    train = config.train
    check_fit(
        config.data,
        dataset,
        global_batch=train.global_batch,
        micro_batch=train.micro_batch,
        world_size=world.size,
        has_cursor=True,
    )
    num_positions = train.steps * train.global_batch // config.data.clips_per_video
    rng = np.random.default_rng([zlib.crc32(token.encode()), world.rank])
    _, samples = dataset.places(rng.integers(0, max(1, num_positions), NUM_SAMPLES))
    wanted = [sample for sample in dict.fromkeys(samples.tolist()) if not dataset.is_withdrawn(sample)]
    begun_s = time.perf_counter()
    readers = ThreadPoolExecutor(NUM_READERS)
    calls = {readers.submit(dataset.read_group, [sample]): sample for sample in wanted}
    done, late = wait(calls, READING_S, FIRST_EXCEPTION)
    seconds = time.perf_counter() - begun_s
    for call in late:
        call.cancel()
    num_bytes, bad = 0, list[str]()
    for call in done:
        (found,) = call.result()
        if isinstance(found, SampleError):
            bad.append(without_secrets(f"{dataset.name(calls[call])} ({found.reason})"))
        else:
            num_bytes += len(found)
    return {
        "num_read": len(done),
        "num_bytes": num_bytes,
        "num_cached": dataset.cache_counters[0],
        "seconds": seconds,
        "bad": bad[:10],
    }


def write_mirror(url: str, token: str, rank: int) -> Answer:
    """A small object goes there, comes back the same, and is deleted."""
    name = join(url, f"doctor-{token}-{rank}")
    data = f"tubelet doctor {token} {rank}".encode()
    limits = {"attempt_s": READ_ATTEMPT_S, "deadline_s": READ_DEADLINE_S}
    begun_s = time.perf_counter()
    storage.write_bytes(name, data, **limits)
    try:
        if storage.read_bytes(name, **limits) != data:
            raise OSError("what was read back is not what was written")
    finally:
        storage.remove(name, **limits)
    if storage.exists(name, **limits):
        raise OSError("what was deleted is still there")
    return {"seconds": time.perf_counter() - begun_s}


# ------------------------------------------------------------------------------------------------ memory


def compute_device(world: World) -> torch.device:
    """The device this rank would train on."""
    return torch.device("cuda", world.local_rank) if torch.cuda.is_available() else torch.device("cpu")


def device_memory(world: World, device: torch.device) -> Answer:
    """Memory of this rank's device and its share of the host's, in bytes."""
    host_bytes = host_memory_bytes() // max(1, world.local_size)
    if device.type == "cuda":
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        facts = {"device": torch.cuda.get_device_name(device), "free_bytes": free_bytes, "total_bytes": total_bytes}
        return {**facts, "is_card": True, "host_bytes": host_bytes}
    facts = {"device": "its share of the host", "free_bytes": host_bytes, "total_bytes": host_bytes}
    return {**facts, "is_card": False, "host_bytes": host_bytes}


def host_memory_bytes(root: Path = Path("/"), slurm: Any = os.environ) -> int:
    """What the processes of this job on this node may use: the machine's, less what control groups or Slurm allow."""
    facts = (root / "proc/meminfo").read_text().splitlines()
    known = [int(line.split()[1]) * 1024 for line in facts if line.startswith("MemTotal:")]
    if slurm.get("SLURM_MEM_PER_NODE", "0").isdigit():
        known.append(int(slurm.get("SLURM_MEM_PER_NODE", "0")) << 20)
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" or "memory" in controllers.split(","):
            is_v2 = number == "0"
            top = root / "sys/fs/cgroup" / ("" if is_v2 else "memory")
            folder = top / path.lstrip("/")
            for place in (folder, *folder.parents):
                if place == top.parent:
                    break
                limit = place / ("memory.max" if is_v2 else "memory.limit_in_bytes")
                if limit.is_file() and (text := limit.read_text().strip()).isdigit():
                    known.append(int(text))
    return min(number for number in known if number > 0)
