"""Metrics: one JSON line per row in metrics.jsonl, always; the same rows to wandb when asked. Owner of wandb.

    row ─ metrics.jsonl, at once
        └ waits until a checkpoint covers its step ─ wandb (own axis `step`, one run id per run folder)

Only the first rank writes. Neither a full disk nor trouble with wandb stops training: both are counted, told once, and
what wandb missed is fed to it by the next attempt. No torch is imported: the report reads metrics on a login node.
"""

from __future__ import annotations

import json
import logging
import math
import netrc
import os
import secrets
import shlex
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import yaml

from pretrain.redact import without_secrets
from pretrain.sections import TrackConfig
from shards.storage import write_atomic

log = logging.getLogger(__name__)

FILE = "metrics.jsonl"
FINISH_DEADLINE_S = 60.0
INIT_DEADLINE_S = 60.0
_NOT_MEASURED = ("kind", "attempt", "time", "step", "not_finite")

Row = dict[str, Any]


class Tracker:
    """Where a run's numbers go. On other ranks than the first every method does nothing."""

    def __init__(
        self, run_dir: Path, attempt: int, settings: TrackConfig, *, is_first: bool = True, resumed_from: int = 0
    ) -> None:
        """Begin attempt `attempt`, which goes on from step `resumed_from`; wandb gets what it missed up to there."""
        self.num_unwritten = 0
        """Rows that could not be written to metrics.jsonl."""
        self._run_dir, self._attempt, self._is_first = run_dir, attempt, is_first
        self._pending: list[Row] = []
        self._wandb = _Wandb(run_dir, settings) if is_first and settings.wandb != "off" else None
        if self._wandb is not None:
            self._wandb.open()
            rows = [row for row in read_metrics(run_dir) if row["kind"] != "start"]
            self._pending = [row for row in rows if row["step"] > self._wandb.sent_step]
            self.publish(resumed_from)
            self._pending = []  # beyond the checkpoint: will be measured again

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row; it needs `kind` and `step` (steps done). Numbers that are not finite become null, named."""
        if not self._is_first:
            return
        whole = _plain({"attempt": self._attempt, "time": time.time(), **row})
        try:
            _append_line(self._run_dir / FILE, json.dumps(whole, allow_nan=False).encode())
        except OSError as error:
            if not self.num_unwritten:
                log.warning("%s cannot be written (%s); training goes on, rows are lost", FILE, error.strerror)
            self.num_unwritten += 1
        if self._wandb is not None and whole["kind"] != "start":
            self._pending.append(whole)

    def saved(self, step: int, seconds: float) -> None:
        """A checkpoint of `step` is committed: note it, and publish what it covers."""
        self.write({"kind": "save", "step": step, "seconds": seconds})
        self.publish(step)

    def publish(self, up_to_step: int) -> None:
        """Send to wandb the rows up to a step that a checkpoint covers: they will not be made again."""
        if self._wandb is not None:
            self._wandb.send([row for row in self._pending if row["step"] <= up_to_step], up_to_step)
            self._pending = [row for row in self._pending if row["step"] > up_to_step]

    def close(self) -> None:
        """End of an attempt. Prints how to upload an offline run."""
        if self._wandb is not None:
            self._wandb.close()

    @property
    def num_wandb_failures(self) -> int:
        """Times wandb refused or failed."""
        return 0 if self._wandb is None else self._wandb.num_failures


# ---------------------------------------------------------------------------------------------- metrics.jsonl


def read_rows(run_dir: Path) -> list[Row]:
    """Every whole row of metrics.jsonl in the order of writing; lines torn by a kill are left out."""
    rows: list[Row] = []
    try:
        lines = (run_dir / FILE).read_bytes().split(b"\n")
    except FileNotFoundError:
        return rows
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and {"kind", "step", "attempt"} <= cast(Row, row).keys():
            rows.append(cast(Row, row))
    return rows


def read_metrics(run_dir: Path) -> list[Row]:
    """The rows that count, by step: what an attempt measured beyond the step where a later one took over is dropped,
    and of two rows of one kind and step the later attempt's is kept. `start` rows are all kept.
    """
    rows = read_rows(run_dir)
    taken_over = {row["attempt"]: row["step"] for row in rows if row["kind"] == "start"}
    kept: dict[tuple[str, int, int], Row] = {}
    for row in sorted(rows, key=lambda row: row["attempt"]):
        later = [step for attempt, step in taken_over.items() if attempt > row["attempt"]]
        is_event = row["kind"] == "start"
        if is_event or row["step"] <= min(later, default=row["step"]):
            kept[row["kind"], row["step"], row["attempt"] if is_event else -1] = row
    return sorted(kept.values(), key=lambda row: (row["step"], row["attempt"]))


def read_config(run_dir: Path) -> dict[str, Any]:
    """The run folder's config.yaml as plain data; empty where there is none or it cannot be read."""
    try:
        config = yaml.safe_load((run_dir / "config.yaml").read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return {}
    return cast(dict[str, Any], config) if isinstance(config, dict) else {}


def _append_line(file: Path, data: bytes) -> None:
    """One line, on a line of its own even where an earlier write was torn."""
    with file.open("ab+") as opened:
        end = opened.seek(0, os.SEEK_END)
        if end:
            opened.seek(end - 1)
            data = data if opened.read(1) == b"\n" else b"\n" + data
        opened.write(data + b"\n")


def _plain(row: Row) -> Row:
    """Strict JSON: NaN and infinities become null, and `not_finite` names them."""
    bad = [name for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
    return without_secrets({**row, **dict.fromkeys(bad), **({"not_finite": bad} if bad else {})})


# ---------------------------------------------------------------------------------------------- wandb


@dataclass(frozen=True)
class _State:
    """What the run folder remembers of its wandb run (wandb/tubelet.json).

    wandb keeps what it was sent in memory for minutes. Only after a clean end is it surely in its file, so only then
    does `step` move on; the file of an attempt that was killed is set aside, and the next attempt sends its rows again.
    """

    run_id: str
    step: int = 0
    """Steps whose rows are surely with wandb."""
    open: str | None = None
    """Folder of the attempt that did not end cleanly (or is at work)."""


class _Wandb:
    """One wandb run per run folder, over all attempts. Whatever goes wrong here is counted and survived."""

    def __init__(self, run_dir: Path, settings: TrackConfig) -> None:
        self.num_failures = 0
        self._run_dir, self._settings = run_dir, settings
        self._state_file = run_dir / "wandb" / "tubelet.json"
        self._run: Any = None
        try:
            self._state = _State(**json.loads(self._state_file.read_bytes()))
        except (OSError, ValueError, TypeError):
            self._state = _State(secrets.token_hex(4))
        self.sent_step = self._state.step
        """Steps whose rows need not be sent again."""

    def open(self) -> None:
        """Start or go on with the run. Without a key, or where the server does not answer, it is kept offline."""
        is_online = self._settings.wandb == "online"
        if is_online and not _has_key():
            log.warning("track.wandb is online, but there is no key (wandb login, or WANDB_API_KEY): kept offline")
            is_online = False
        for mode in ("online", "offline") if is_online else ("offline",):
            try:
                self._set_aside()
                self._run = self._init(mode)
                if mode == "online":  # the server knows how far it got
                    self.sent_step = max(self.sent_step, int(self._run.starting_step) - 1)
                self._remember(self._state.step, Path(self._run.dir).parent.name)
                return
            except Exception as error:  # whatever a vendor's client raises, training goes on
                self._run = None
                self._failed(error)

    def _set_aside(self) -> None:
        """Keep `wandb sync` from the half-written file of a killed attempt; all its rows are sent again."""
        folder = self._state_file.parent / (self._state.open or "")
        if self._state.open and self._state.open.startswith("offline-run-") and folder.is_dir():
            folder.rename(folder.with_name(f"abandoned-{folder.name}"))

    def _init(self, mode: str) -> Any:
        import wandb

        library: Any = wandb
        self._state_file.parent.mkdir(exist_ok=True)
        # C14: no host, user, command line, code, package list or terminal output
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
            config=without_secrets(read_config(self._run_dir)),
            settings=settings,
        )
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run

    def send(self, rows: list[Row], up_to_step: int) -> None:
        """One history point per step: train values by name, others as kind/name."""
        if self._run is None or up_to_step <= self.sent_step:
            return
        points: dict[int, Row] = {}
        for row in sorted(rows, key=lambda row: row["step"]):
            prefix = "" if row["kind"] == "train" else f"{row['kind']}/"
            values = {f"{prefix}{key}": row[key] for key in row if key not in _NOT_MEASURED and row[key] is not None}
            points.setdefault(row["step"], {"step": row["step"]}).update(values)
        try:
            for step, point in points.items():
                self._run.log(point, step=step)
            self.sent_step = up_to_step
        except Exception as error:
            self._run = None
            self._failed(error)

    def close(self) -> None:
        """Wait until wandb has written what it was sent, but not for ever; then remember it."""
        if self._run is not None:
            thread = threading.Thread(target=self._finish, name="wandb finish", daemon=True)
            thread.start()
            thread.join(FINISH_DEADLINE_S)
            if thread.is_alive():
                self._failed(TimeoutError(f"wandb did not finish within {FINISH_DEADLINE_S:.0f} s"))
            self._run = None
        if offline := sorted((self._run_dir / "wandb").glob("offline-run-*")):
            print("wandb sync " + " ".join(shlex.quote(str(folder)) for folder in offline), flush=True)

    def _finish(self) -> None:
        try:
            import wandb

            self._run.finish()
            wandb.teardown()  # finish alone returns before the file is closed
            self._remember(self.sent_step, None)
        except Exception as error:
            self._failed(error)

    def _remember(self, step: int, folder: str | None) -> None:
        self._state = _State(self._state.run_id, step, folder)
        write_atomic(self._state_file, json.dumps(asdict(self._state)).encode() + b"\n")

    def _failed(self, error: BaseException) -> None:
        if not self.num_failures:
            text = without_secrets(f"{type(error).__name__}: {error}")
            log.warning("wandb: %s; training goes on, metrics.jsonl has every row", text)
        self.num_failures += 1


def _has_key() -> bool:
    """Whether wandb would find a key of its own accord; it would ask on the terminal otherwise."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
