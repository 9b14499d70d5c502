"""The command `tubelet`. Imports what a command needs inside it, so that `tubelet --help` needs neither torch nor
DeepSpeed; and the one place that prints a `UserError`."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from shards.errors import UserError

app = typer.Typer(
    name="tubelet",
    help="Pretrain video Transformers without labels. Start with: tubelet pack VIDEOS data/NAME",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value …", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
USER_MISTAKE = 2
NEXT = "next: "
NARROWEST = 20


def main() -> NoReturn:
    """Run a command; a mistake of the user is one plain message, everything else keeps its traceback."""
    try:
        app(standalone_mode=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_MISTAKE)
    sys.exit(0)


def show(result: dict[str, Any], as_json: bool, *lines: str) -> None:
    """A result for a machine or for a person; the last line for a person is the next command to type."""
    if as_json:
        print(json.dumps(result, indent=1), flush=True)
        return
    text = "\n".join(lines)
    print(fold(text, shutil.get_terminal_size().columns) if sys.stdout.isatty() else text, flush=True)


def fold(text: str, width: int) -> str:
    """Break lines at blanks to fit a terminal, what follows indented; a command to type stays in one piece."""
    folded: list[str] = []
    for line in text.split("\n"):
        if len(line) <= width or line.startswith(NEXT):
            folded.append(line)
            continue
        indent = " " * (len(line) - len(line.lstrip()) + 2)
        folded += textwrap.wrap(
            line,
            max(width, NARROWEST),
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join(folded)


def hint(*words: object) -> str:
    """The next command to type, quoted for the shell."""
    return f"{NEXT}tubelet {shlex.join(map(str, words))}"


# ------------------------------------------------------------------------------------------------ data


@app.command()
def pack(
    src: Annotated[
        Path, typer.Argument(help="Folder of videos, or a manifest (CSV or JSONL: path,label,split,group).")
    ],
    dst: Annotated[Path, typer.Argument(help="Folder to make, for example data/mine.")],
    preset: Annotated[
        Literal["train", "copy"], typer.Option(help="train: encode for fast clips. copy: keep the bytes.")
    ] = "train",
    short_side: Annotated[int, typer.Option(min=16, help="Short side in pixels; never enlarged.")] = 256,
    max_frames: Annotated[int, typer.Option(min=2, help="Frames of a sample: about twice the training span.")] = 128,
    max_rate: Annotated[float, typer.Option(min=1, help="Frames per second at most.")] = 30.0,
    stride: Annotated[int, typer.Option(min=1, help="Training stride that decoding is made fast for.")] = 4,
    val_fraction: Annotated[float, typer.Option(min=0, max=0.9, help="Share held out where no split is given.")] = 0.1,
    min_frames: Annotated[int, typer.Option(min=2, help="Videos with fewer frames are rejected.")] = 16,
    workers: Annotated[int, typer.Option(min=0, help="Files at a time. 0: all cores.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Videos -> shards that can be streamed: probe, encode, pack into WebDataset tars."""
    from launch.progress import packing_progress
    from shards.pack import PackOptions
    from shards.pack import pack as pack_videos

    options = PackOptions(
        preset=preset,
        short_side=short_side,
        max_frames=max_frames,
        max_rate=max_rate,
        stride=stride,
        val_fraction=val_fraction,
        min_frames=min_frames,
        workers=workers,
    )
    with packing_progress(quiet=as_json) as progress:
        summary = pack_videos(src, dst, options, progress)
    show(
        {"folder": str(dst), "manifest": json.loads(summary.manifest.to_json()), "rejected": summary.rejected},
        as_json,
        *summary.lines(),
        hint("pretrain", "configs/laptop.yaml", f"data.shards={dst}"),
    )


@app.command()
def verify(
    url: Annotated[str, typer.Argument(help="Packed folder or manifest URL.")],
    as_json: AsJson = False,
) -> None:
    """Prove that every shard is readable and equals its manifest. Exit code 1 if not."""
    from launch.progress import shard_lines
    from shards.verify import verify as verify_shards

    problems = verify_shards(url, shard_lines(quiet=as_json))
    lines = [str(problem) for problem in problems] or [f"{url}: every shard and every sample is what was packed"]
    if not problems:
        lines.append(hint("pretrain", "configs/laptop.yaml", f"data.shards={url}"))
    show({"url": url, "problems": [str(problem) for problem in problems]}, as_json, *lines)
    if problems:
        raise typer.Exit(1)


# ------------------------------------------------------------------------------------------------ runs


@app.command()
def config(
    path: Annotated[str | None, typer.Argument(help="A config; without one, the defaults.", metavar="CONFIG")] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Every key: value, where it comes from, meaning."""
    from launch.configs import describe

    changes = overrides or []
    if path is not None and "=" in path and not Path(path).is_file():  # no config: the first override
        path, changes = None, [path, *changes]
    rows = describe(None if path is None else Path(path), changes)
    show({row.key: row.value for row in rows}, as_json, *(row.line() for row in rows))


@app.command()
def pretrain(
    path: Annotated[Path, typer.Argument(help="Config, for example configs/laptop.yaml.", metavar="CONFIG")],
    overrides: Overrides = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Processes. Default: the GPUs of this node, else 1.")] = None,
    change: Annotated[
        bool, typer.Option("--change", help="Let a resumed run change steps, schedule, weights (recorded).")
    ] = False,
) -> None:
    """Train, or go on with, the run that the config describes. Exit codes: 0 finished, 75 again, 93 ask a person."""
    from launch.local import pretrain as start

    raise typer.Exit(start(path, overrides or [], ranks, allow_change=change))


@app.command()
def audit(run: Annotated[Path, typer.Argument(help="Run folder.")], as_json: AsJson = False) -> None:
    """Prove from the ledger what was seen. Exit codes: 0 exact, 3 exact but for listed exceptions, 1 violated."""
    from launch.report import check_run_folder
    from pretrain.witness import audit_run

    check_run_folder(run)
    result = audit_run(run)
    show(result.to_json(), as_json, *result.lines, hint("report", run))
    raise typer.Exit(result.exit_code)


@app.command()
def replay(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    step: Annotated[int, typer.Option(min=0, help="Step to rebuild, counted from 0.")],
    as_json: AsJson = False,
) -> None:
    """Rebuild the batch of one step on this machine's CPU, compare it with the ledger, and draw it."""
    from launch.report import check_run_folder
    from pretrain.replay import replay_step

    check_run_folder(run)
    result = replay_step(run, step)
    show(result.to_json(), as_json, *result.lines(), hint("audit", run))
    if not result.matches:
        raise typer.Exit(1)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="Run folder.")], as_json: AsJson = False) -> None:
    """One self-contained HTML page: curves, rates, restarts, pictures, the audit where one can be made."""
    from launch.report import check_run_folder
    from launch.report import report as write_report
    from pretrain.witness import audit_run

    check_run_folder(run)
    result, why_no_audit = None, ""
    try:
        result = audit_run(run)
    except UserError as error:
        why_no_audit = str(error)
    page = write_report(run, result, why_no_audit=why_no_audit)
    lines = [f"report: {page}"] + [f"without an audit: {why_no_audit}"] * bool(why_no_audit)
    show(
        {"report": str(page), "audit": None if result is None else result.exit_code, "why_no_audit": why_no_audit},
        as_json,
        *lines,
        hint("export", run, run / "export"),
    )


# ------------------------------------------------------------------------------------------------ exports


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Run folder or checkpoint folder.")],
    dst: Annotated[Path, typer.Argument(help="Folder to make, for example runs/NAME/export.")],
    biases: Annotated[
        Literal["v5", "v4"], typer.Option(help="Names of the q and v biases: of transformers 5 or 4.")
    ] = "v5",
    as_json: AsJson = False,
) -> None:
    """Checkpoint -> a folder that transformers opens; refuses to finish unless it computes what we compute."""
    from pretrain.export import export as export_run

    result = export_run(run, dst, biases=biases)
    show(result.to_json(), as_json, *result.lines(), hint("probe", dst, "DATA"))


@app.command()
def reconstruct(
    export_dir: Annotated[Path, typer.Argument(metavar="EXPORT", help="Exported folder.")],
    video: Annotated[Path, typer.Argument(help="A video.")],
    out: Annotated[Path, typer.Argument(metavar="OUT.mp4", help="Video to write.")],
    seed: Annotated[int, typer.Option(help="Another seed hides other parts.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Original, masked and filled-in side by side as a video."""
    from launch.progress import packing_progress
    from pretrain.downstream.reconstruct import reconstruct as write_video

    with packing_progress(quiet=as_json) as progress:
        result = write_video(export_dir, video, out, seed=seed, progress=progress)
    show(result.to_json(), as_json, *result.lines(), hint("probe", export_dir, "DATA"))


@app.command()
def probe(
    export_dir: Annotated[Path, typer.Argument(metavar="EXPORT", help="Exported folder.")],
    data: Annotated[str, typer.Argument(metavar="DATA", help="Class folder of videos, or packed shards.")],
    as_json: AsJson = False,
) -> None:
    """k nearest neighbours on labelled videos, beside the same network with random weights."""
    from launch.progress import packing_progress
    from pretrain.downstream.knn import probe as run_probe

    with packing_progress(quiet=as_json) as progress:
        result = run_probe(export_dir, data, progress=progress)
    show(result.to_json(), as_json, *result.lines(), hint("reconstruct", export_dir, "VIDEO", "OUT.mp4"))


if __name__ == "__main__":
    main()
