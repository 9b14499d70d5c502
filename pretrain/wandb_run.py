"""The wandb run of a run folder: one id over all attempts. Owner of wandb.

Two kinds of points go into it, each on an axis of its own: those of the training by step, those of the system by
seconds. wandb drops a point whose own step number does not rise, so that number is a plain count of points here.
Whatever goes wrong is counted and survived: metrics.jsonl has everything.
"""

from __future__ import annotations

import json
import logging
import netrc
import os
import secrets
import shlex
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pretrain.redact import without_secrets
from pretrain.sections import TrackConfig
from shards.storage import write_atomic

log = logging.getLogger(__name__)

FINISH_DEADLINE_S = 60.0
INIT_DEADLINE_S = 60.0
STEP_AXIS = "step"
SYSTEM_AXIS = "system/seconds"
CODE = ("shards", "pretrain", "launch")

Point = dict[str, Any]


@dataclass(frozen=True)
class _State:
    """What the run folder remembers of its wandb run (wandb/tubelet.json).

    wandb keeps what it was sent in memory for minutes. Only after a clean end is it surely in its file, so only then
    do `step`, `seconds` and `num_points` move on; the file of an attempt that was killed is set aside, and the next
    attempt sends its rows again.
    """

    run_id: str
    step: int = 0
    """Steps whose rows are surely with wandb."""
    seconds: float = -1.0
    """System points up to this value of their axis are surely with wandb."""
    num_points: int = 0
    pictures: tuple[str, ...] = ()
    """Files that wandb has."""
    open: str | None = None
    """Folder of the attempt that did not end cleanly (or is at work)."""


class WandbRun:
    """One wandb run per run folder, over all attempts. No method raises."""

    def __init__(self, run_dir: Path, settings: TrackConfig) -> None:
        self.num_failures = 0
        self._run_dir, self._settings = run_dir, settings
        self._folder = run_dir / "wandb"
        self._run: Any = None
        self._defined: set[str] = set()
        self._sent = self._state = read_state(run_dir)

    @property
    def sent_step(self) -> int:
        """Steps whose rows need not be sent again."""
        return self._sent.step

    def open(self, config: Mapping[str, Any]) -> bool:
        """Start or go on with the run. Without a key, or where the server does not answer, it is kept offline."""
        is_online = self._settings.wandb == "online"
        if is_online and not _has_key():
            log.warning("track.wandb is online, but there is no key (wandb login, or WANDB_API_KEY): kept offline")
            is_online = False
        modes: tuple[Literal["online", "offline"], ...] = ("online", "offline") if is_online else ("offline",)
        for mode in modes:
            try:
                if self._state.open and self._state.open.startswith("offline-run-"):
                    set_aside(self._folder / self._state.open)
                self._run = self._init(mode, config)
                if mode == "online":
                    self._learn_from_server()
                self._remember(replace(self._state, open=Path(self._run.dir).parent.name))
                if self._settings.wandb_code:
                    self._save_code()
                return True
            except Exception as error:  # whatever a vendor's client raises, training goes on
                self._run = None
                self._failed(error)
        return False

    def _init(self, mode: str, config: Mapping[str, Any]) -> Any:
        import wandb

        library: Any = wandb
        self._folder.mkdir(exist_ok=True)
        self._wait_for_a_free_name()
        # C14: no host, user, command line, package list or terminal output; code and pictures only when asked
        settings = library.Settings(
            host="",
            program="tubelet",
            console="off",
            silent=True,
            disable_git=True,
            disable_code=True,
            disable_job_creation=True,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_disable_stats=True,
            x_save_requirements=False,
            init_timeout=INIT_DEADLINE_S,
        )
        run = library.init(
            project=self._settings.project,
            name=self._run_dir.resolve().name,
            id=self._state.run_id,
            dir=str(self._run_dir),
            mode=mode,
            resume="allow" if mode == "online" else None,
            config=without_secrets(config),
            settings=settings,
        )
        run.define_metric(STEP_AXIS)
        run.define_metric(SYSTEM_AXIS)
        return run

    def _wait_for_a_free_name(self) -> None:
        """wandb names its folders by the second, and a roll-back can begin anew within one."""
        while any(self._folder.glob(f"*run-{time.strftime('%Y%m%d_%H%M%S')}-{self._state.run_id}")):
            time.sleep(0.1)

    def _learn_from_server(self) -> None:
        """The server knows how far it got, also before a kill."""
        summary: Any = self._run.summary
        self._sent = replace(
            self._sent,
            step=max(self._sent.step, int(summary.get(STEP_AXIS) or 0)),
            seconds=max(self._sent.seconds, float(summary.get(SYSTEM_AXIS) or -1.0)),
            num_points=max(self._sent.num_points, int(self._run.starting_step)),
        )

    def send_training(self, points: Mapping[int, Point], up_to_step: int) -> None:
        """Points by step (steps done); afterwards everything up to `up_to_step` counts as sent."""
        if up_to_step > self._sent.step:
            for step in sorted(points):
                if step > self._sent.step:
                    self._log(STEP_AXIS, {STEP_AXIS: step, **points[step]})
            if self._run is not None:
                self._sent = replace(self._sent, step=up_to_step)

    def send_system(self, points: Sequence[tuple[float, Point]]) -> None:
        """Points as (seconds since the run began, values), in their order."""
        for seconds, values in points:
            if seconds > self._sent.seconds:
                self._log(SYSTEM_AXIS, {SYSTEM_AXIS: seconds, **values})
                self._sent = replace(self._sent, seconds=seconds)

    def _log(self, axis: str, point: Point) -> None:
        if self._run is None:
            return
        try:
            for name in sorted(point.keys() - self._defined - {STEP_AXIS, SYSTEM_AXIS}):
                # by name, not "*": of several patterns that fit wandb takes any
                self._run.define_metric(name, step_metric=axis)
                self._defined.add(name)
            self._run.log(point, step=self._sent.num_points)
            self._sent = replace(self._sent, num_points=self._sent.num_points + 1)
        except Exception as error:
            self._run = None
            self._failed(error)

    def _send_pictures(self) -> None:
        import wandb

        for file in sorted((self._run_dir / "pictures").glob("*.png")):
            if file.name not in self._sent.pictures:
                self._run.log({f"pictures/{file.stem}": wandb.Image(str(file))}, step=self._sent.num_points)
                pictures = (*self._sent.pictures, file.name)
                self._sent = replace(self._sent, num_points=self._sent.num_points + 1, pictures=pictures)

    def _save_code(self) -> None:
        """The product's own source files, as they are now."""
        root, copy = Path(__file__).parents[1], Path(self._run.dir) / "code"
        for package in CODE:
            for file in (root / package).rglob("*.py"):
                place = copy / file.relative_to(root)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, place)
        self._run.save(str(copy / "**" / "*.py"), base_path=str(copy.parent), policy="now")

    def close(self) -> None:
        """Wait until wandb has written what it was sent, but not for ever; then remember it."""
        if self._run is not None:
            thread = threading.Thread(target=self._finish, name="wandb finish", daemon=True)
            thread.start()
            thread.join(FINISH_DEADLINE_S)
            if thread.is_alive():
                self._failed(TimeoutError(f"wandb did not finish within {FINISH_DEADLINE_S:.0f} s"))
            self._run = None

    def _finish(self) -> None:
        try:
            import wandb

            if self._settings.wandb_pictures:
                self._send_pictures()
            self._run.finish()
            wandb.teardown()  # finish alone returns before the file is closed
            self._remember(replace(self._sent, open=None))
        except Exception as error:
            self._failed(error)

    def _remember(self, state: _State) -> None:
        self._state = state
        write_state(self._run_dir, state)

    def _failed(self, error: BaseException) -> None:
        if not self.num_failures:
            text = without_secrets(f"{type(error).__name__}: {error}")
            log.warning("wandb: %s; training goes on, metrics.jsonl has every row", text)
        self.num_failures += 1


# ---------------------------------------------------------------------------------------------- the folder


def begin_anew(run_dir: Path) -> list[Path]:
    """Set every file of the run's wandb run aside, so that one new file can replace them. Returns where they went.

    The id stays, unless wandb's server may have points under it: it takes none back, and a deleted run's id is never
    free again. Then the run gets a new id.
    """
    folders = [folder for kind in ("run-*", "offline-run-*") for folder in (run_dir / "wandb").glob(kind)]
    is_with_server = any(folder.name.startswith("run-") or list(folder.glob("*.wandb.synced")) for folder in folders)
    state = read_state(run_dir)
    write_state(run_dir, _State(secrets.token_hex(4) if is_with_server else state.run_id))
    return [set_aside(folder) for folder in folders]


def set_aside(folder: Path) -> Path:
    """Keep `wandb sync` from a file whose rows are sent again: it looks into wandb/*/ only."""
    place = folder.parent / "set-aside" / folder.name
    if folder.is_dir():
        place.parent.mkdir(exist_ok=True)
        number = 1
        while place.exists():
            number += 1
            place = place.with_name(f"{folder.name}.{number}")
        folder.rename(place)
    return place


def sync_line(run_dir: Path) -> str:
    """What uploads the offline files of a run; empty where there is none."""
    offline = sorted((run_dir / "wandb").glob("offline-run-*"))
    return "wandb sync " + " ".join(shlex.quote(str(folder)) for folder in offline) if offline else ""


def read_state(run_dir: Path) -> _State:
    """What is known of the run's wandb run; a new id where nothing is."""
    try:
        state = _State(**json.loads((run_dir / "wandb" / "tubelet.json").read_bytes()))
    except (OSError, ValueError, TypeError):
        return _State(secrets.token_hex(4))
    return replace(state, pictures=tuple(state.pictures))


def write_state(run_dir: Path, state: _State) -> None:
    """Replace wandb/tubelet.json."""
    (run_dir / "wandb").mkdir(exist_ok=True)
    write_atomic(run_dir / "wandb" / "tubelet.json", json.dumps(asdict(state)).encode() + b"\n")


def _has_key() -> bool:
    """Whether wandb would find a key of its own accord; it would ask on the terminal otherwise."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
