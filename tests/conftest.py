"""Fixtures that many tests share: packed real clips and a tiny config over them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

from tests.left_out import LEFT_OUT, forget_doubles

ROOT = Path(__file__).resolve().parents[1]
SHARED = ("tests/slurm", "tests/dist", "tests/s3")
"""Folders that share something costly for a whole session, a Slurm, pools of ranks, a gateway: one worker has each."""
LONGEST = (*SHARED, "tests/test_readme.py", "tests/launch/test_hosts.py", "tests/pretrain/test_memory.py")
"""These begin first: two workers end together if what is left for the end is short."""


class ByGroup(LoadScopeScheduling):
    """Two workers share the tests by file, and by folder where a folder shares something. (The marks of pytest-xdist's
    own loadgroup have no effect with pytest 9.)
    """

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByGroup:
    """How the tests are shared."""
    return ByGroup(config, log)


def group_of(nodeid: str) -> str:
    """The file of a test, or the folder that its tests share something in."""
    file = nodeid.partition("::")[0]
    return next((shared for shared in SHARED if file.startswith(f"{shared}/")), file)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first."""

    def place(item: pytest.Item) -> int:
        return next((number for number, longest in enumerate(LONGEST) if item.nodeid.startswith(longest)), len(LONGEST))

    items.sort(key=place)


def pytest_runtest_teardown() -> None:
    """No test leaves a real-time process behind: on two cores it, and all it starts, would stop everything else."""
    assert os.sched_getscheduler(0) not in (os.SCHED_FIFO, os.SCHED_RR), "an encoder changed the scheduling policy"


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker hands on what it left out."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["left_out"] = session.config.stash.get(LEFT_OUT, [])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A worker is done."""
    node.config.stash.setdefault(LEFT_OUT, []).extend(getattr(node, "workeroutput", {}).get("left_out", []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """What was left out, by name."""
    lines = forget_doubles(config.stash.get(LEFT_OUT, []))
    if lines:
        terminalreporter.section("left out")
        for line in lines:
            terminalreporter.write_line(line)


settings.register_profile("tubelet", deadline=None)  # no test is timed: machines are shared
settings.load_profile("tubelet")


@pytest.fixture(scope="session")
def clips() -> Path:
    """The three bundled films."""
    return ROOT / "configs" / "clips"


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory, clips: Path) -> Path:
    """The bundled films as shards: two films to train on, one held out; small frames, labels by film. Read only."""
    from shards.pack import PackOptions, pack

    folder = tmp_path_factory.mktemp("packed")
    listing = folder / "films.csv"
    rows = [f"{film},{film.stem.split('_')[0]},{split_of(film)}" for film in sorted(clips.iterdir())]
    listing.write_text("path,label,split\n" + "\n".join(rows) + "\n")
    pack(listing, folder / "films", PackOptions(short_side=64, max_frames=32, stride=2, workers=2), None)
    return folder / "films"


def split_of(film: Path) -> str:
    return "val" if film.name.startswith("sintel") else "train"


@pytest.fixture
def tiny_config(tmp_path: Path, packed: Path) -> Callable[..., Path]:
    """tiny_config(name, **{"section.key": value}) writes a config that trains in seconds; runs go to tmp_path/NAME."""

    def write(name: str = "run", **changes: Any) -> Path:
        tree: dict[str, Any] = {
            "run": {"dir": str(tmp_path / name), "seed": 3},
            "data": {"shards": str(packed), "frames": 8, "stride": 2, "size": 32, "workers": 1},
            "model": {"size": "nano"},
            "objective": {"masked_frame": {"mask_ratio": 0.5}, "frame_order": {"mask_ratio": 0.5, "min_motion": 0}},
            "train": {"steps": 6, "global_batch": 8, "micro_batch": 2, "precision": "bf16"},
            "zero": {"stage": 2},
            "optim": {"lr": 1e-3},
            "checkpoint": {"every_steps": 2},
            "track": {"log_every_steps": 1},
        }
        for key, value in changes.items():
            section, _, name_ = key.partition(".")
            tree.setdefault(section, {})[name_] = value
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return write
