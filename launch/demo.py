"""The whole system once, on real video, in minutes: every step is a command of `tubelet`, shown before it runs.

    films ─ pack ─ pretrain ─ SIGKILL ─ pretrain ─ audit ─ export ─ probe ─ reconstruct ─ report

Run by `make demo` from the project folder. It starts afresh each time: the folders of `OWN` are removed, no other.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NoReturn, cast

from shards.errors import UserError

FILMS = Path("configs/clips")
CONFIG = Path("configs/demo.yaml")
DATA = Path("data/demo")
CUT = Path("data/demo-cut")
PIECES = Path("data/demo-pieces")
RUN = Path("runs/demo")
OWN = (RUN, DATA, CUT, PIECES, *(folder.with_name(f"{folder.name}.partial") for folder in (DATA, CUT)))
"""Every folder that a demo makes; packing makes the last two, and leaves them where it is interrupted."""

VIDEO = FILMS / "city_320x180_h264.mp4"

PIECE_FRAMES = 32
HOLD_OUT_EVERY = 5
START_LIMIT_S = 600.0


def main() -> None:
    """Run all of it; the first command that fails ends the demo with its exit code."""
    started_s = time.monotonic()
    if not CONFIG.exists():
        raise UserError(f"{CONFIG} is not here; the demo must run in the project folder: cd there, then make demo")
    start_afresh()
    tell(f"1  Pack three films into shards, cut into pieces of about {PIECE_FRAMES} frames.")
    tubelet("pack", FILMS, CUT, "--max-frames", PIECE_FRAMES, "--short-side", 180)
    hold_out(CUT, PIECES)
    tell(f"   One piece in {HOLD_OUT_EVERY} is held out: {PIECES}/val. Labels are the films.")
    tubelet("pack", PIECES, DATA, "--preset", "copy")

    train = ("pretrain", CONFIG, "--ranks", 2)
    tell("2  Pretrain on two CPU ranks. After a checkpoint, SIGKILL to all of it.")
    killed_at = kill_after_checkpoint(train)
    tell(f"   Killed at step {killed_at}. The same command goes on from the checkpoint:")
    tubelet(*train)

    tell("3  Prove what was seen: every sample exactly once per epoch?")
    tubelet("audit", RUN)
    tell("4  Export to a folder that transformers opens, and use it.")
    tubelet("export", RUN, RUN / "export")
    tell("   Labels are the films, so this checks the plumbing, not the model:")
    tubelet("probe", RUN / "export", DATA)
    tubelet("reconstruct", RUN / "export", VIDEO, RUN / "pictures" / "city.mp4")
    tubelet("report", RUN)
    summary(killed_at, time.monotonic() - started_s)


def start_afresh() -> None:
    """Remove what an earlier demo left, and say so. A link in the place of a folder goes, what it names stays."""
    old = [path for path in OWN if path.is_symlink() or path.is_dir()]
    if old:
        tell(f"An earlier demo is removed: {', '.join(map(str, old))}. Starting afresh.")
    for path in old:
        if path.is_symlink():
            path.unlink()
        else:
            shutil.rmtree(path)


def hold_out(packed: Path, pieces: Path) -> None:
    """Take the pieces out of their tars again, into SPLIT/FILM/START.mp4, so that every film has some in both splits.

    Pack itself would hold out whole films, which is right for real data and too much to ask of three.
    """
    found: dict[str, dict[float, bytes]] = {}
    for tar in sorted(packed.glob("*.tar")):
        with tarfile.open(tar) as members:
            for name in members.getnames():
                if name.endswith(".json"):
                    facts = json.loads(_bytes(members, name))
                    video = _bytes(members, f"{name.removesuffix('.json')}.mp4")
                    found.setdefault(facts["source"].partition("_")[0], {})[facts["start_s"]] = video
    for film, videos in found.items():
        for number, start_s in enumerate(sorted(videos)):
            folder = pieces / ("val" if number % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 2 else "train") / film
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{start_s:05.2f}s.mp4").write_bytes(videos[start_s])


def _bytes(members: tarfile.TarFile, name: str) -> bytes:
    file = cast(IO[bytes], members.extractfile(name))  # None only for what is no file; pack writes files
    return file.read()


def tubelet(*words: object) -> None:
    """Show and run one command of tubelet; anything but 0 ends the demo."""
    code = subprocess.run(command(words), check=False).returncode
    if code:
        fail(words, code)


def kill_after_checkpoint(words: Sequence[object]) -> int:
    """Start the command in a process group of its own; SIGKILL the group some steps after the first checkpoint.

    Returns the step it was killed at. Nothing in the run knows that this will happen.
    """
    process = subprocess.Popen(command(words), start_new_session=True)
    deadline_s = time.monotonic() + START_LIMIT_S
    try:
        while True:
            saved, step = newest_step("save"), newest_step("train")
            if saved and step > saved:
                return step
            if process.poll() is not None:
                fail(words, process.returncode or 1)
            if time.monotonic() > deadline_s:
                raise UserError(f"no checkpoint within {START_LIMIT_S:g} s: mend what {RUN}/logs says, then make demo")
            time.sleep(0.05)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def newest_step(kind: str) -> int:
    """Step of the newest row of a kind in metrics.jsonl, 0 where there is none."""
    return max((row["step"] for row in metrics() if row["kind"] == kind), default=0)


def metrics() -> list[dict[str, Any]]:
    """Rows of metrics.jsonl; a last line that is still being written is left out."""
    try:
        text = (RUN / "metrics.jsonl").read_text()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def summary(killed_at: int, seconds: float) -> None:
    """What was done and where it lies; the last line is the next command to type."""
    rows = [row for row in metrics() if row["kind"] == "eval"]
    first, last = rows[0], rows[-1]
    zero, copy = last["masked_frame/zero"], last["masked_frame/copy"]
    tell(f"Done in {seconds / 60:.1f} minutes.")
    print(f"   killed at step {killed_at}, resumed, finished; the audit is exact")
    print(f"   held-out loss (step {first['step']} -> {last['step']}):")
    print(f"      this model           {first['loss/masked_frame']:.3f} -> {last['loss/masked_frame']:.3f}")
    print(f"      predicting zero      {zero:.3f}")
    print(f"      copying a neighbour  {copy:.3f}")
    print(f"   export     {RUN}/export        (transformers opens it)")
    print(f"   pictures   {RUN}/pictures")
    print(f"   report     {RUN}/report.html")
    print("Next, with your own videos:")
    print(shlex.join([str(_program()), "pack", "VIDEOS", "data/mine"]), flush=True)


def command(words: Sequence[object]) -> list[str]:
    """The command line, printed as a user would type it."""
    typed = [str(word) for word in words]
    print(f"\n$ tubelet {shlex.join(typed)}", flush=True)
    return [sys.executable, "-m", "launch.cli", *typed]


def _program() -> Path:
    """The command as it can be typed from here: inside .venv unless that is active."""
    found = Path(sys.executable).with_name("tubelet")
    active = shutil.which("tubelet")
    if active is not None and Path(active) == found:
        return Path("tubelet")
    return found.relative_to(Path.cwd()) if found.is_relative_to(Path.cwd()) else found


def tell(text: str) -> None:
    """A line of the story, set off from what the commands print."""
    print(f"\n{text}", flush=True)


def fail(words: Sequence[object], code: int) -> NoReturn:
    """End the demo as its command ended."""
    print(f"\nThe demo stops: `tubelet {shlex.join(map(str, words))}` ended with {code}.", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
