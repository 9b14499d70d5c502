"""The commands of `tubelet` about data: pack, index, stats, forget, verify, bench. Part of `launch/cli.py`, and like
there a command imports what it needs inside itself."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from launch.screen import AsJson, Overrides, hint, show
from shards.errors import UserError

app = typer.Typer()


@app.command()
def pack(
    src: Annotated[
        Path, typer.Argument(help="Folder of videos, or a manifest (CSV or JSONL: path,label,split,group).")
    ],
    dst: Annotated[str, typer.Argument(help="Folder or URL to make, for example data/mine or s3://BUCKET/mine.")],
    preset: Annotated[
        Literal["train", "copy"], typer.Option(help="train: encode for fast clips. copy: keep the bytes.")
    ] = "train",
    short_side: Annotated[int, typer.Option(min=32, help="Short side in pixels; never enlarged.")] = 256,
    max_frames: Annotated[int, typer.Option(min=2, help="Frames of a sample: about twice the training span.")] = 128,
    max_rate: Annotated[float, typer.Option(min=1, help="Frames per second at most.")] = 30.0,
    stride: Annotated[
        int | None,
        typer.Option(min=1, help="Training stride that decoding is made fast for. Default: 4.", show_default=False),
    ] = None,
    for_rate: Annotated[
        float | None,
        typer.Option(help="Instead of --stride: frames per second that training asks for, whatever the source has."),
    ] = None,
    val_fraction: Annotated[float, typer.Option(min=0, max=0.9, help="Share held out where no split is given.")] = 0.1,
    min_frames: Annotated[int, typer.Option(min=2, help="Videos with fewer frames are rejected.")] = 16,
    shard_bytes: Annotated[int, typer.Option(min=1000, help="Size of a tar, about.")] = 256_000_000,
    workers: Annotated[int, typer.Option(min=0, help="Files at a time. 0: all cores.")] = 0,
    share: Annotated[
        str | None,
        typer.Option(
            "--slice",
            metavar="I/N",
            help="Pack one share only, counted from 0: 0/16 to 15/16; then `tubelet index --merge DST`. `slurm` or "
            "`slurm/16` takes the number from a job array.",
        ),
    ] = None,
    append: Annotated[bool, typer.Option("--append", help="Add to the data set at DST.")] = False,
    work: Annotated[
        Path | None, typer.Option(help="Where DST is a URL: local folder to work in. Default: the current one.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Videos -> shards that can be streamed: probe, encode, pack into WebDataset tars.

    Interrupted, the same command goes on where it was.
    """
    from launch.node import parse_slice, task_cores
    from launch.progress import packing_progress
    from shards.pack import PackOptions
    from shards.pack import pack as pack_videos

    if stride is not None and for_rate is not None:
        raise UserError(f"--stride is {stride} and --for-rate is {for_rate:g}; they exclude each other: leave one out")
    options = PackOptions(
        preset=preset,
        short_side=short_side,
        max_frames=max_frames,
        max_rate=max_rate,
        stride=4 if stride is None else stride,
        for_rate=for_rate,
        val_fraction=val_fraction,
        min_frames=min_frames,
        shard_bytes=shard_bytes,
        workers=workers or task_cores(os.environ),
    )
    part = None if share is None else parse_slice(share, os.environ)
    with packing_progress(quiet=as_json) as progress:
        summary = pack_videos(src, dst, options, progress, share=part, append=append, work=work)
    train = [hint("pretrain", "configs/laptop.yaml", f"data.shards={dst}")]
    join = ["once every slice is packed:", hint("index", dst, "--merge")]
    show(
        {"folder": dst, "manifest": json.loads(summary.manifest.to_json()), "rejected": summary.rejected},
        as_json,
        *summary.lines(),
        *(train if part is None else join),
    )


@app.command()
def index(
    url: Annotated[
        str, typer.Argument(help="Folder of tars, a tar, a pattern like s3://b/x-{000..099}.tar; --merge: a data set.")
    ],
    merge: Annotated[
        bool, typer.Option("--merge", help="Join what lies in URL/parts (made by pack --slice) into one data set.")
    ] = False,
    to: Annotated[
        Path | None, typer.Option(help="Folder for the index. Default: that of local tars.", show_default=False)
    ] = None,
    probe: Annotated[
        Literal["header", "packets", "decode"],
        typer.Option(help="How surely frames are known: the container's word, packets counted, every frame decoded."),
    ] = "packets",
    split: Annotated[str, typer.Option(help="Split that the samples belong to.")] = "train",
    val_fraction: Annotated[float, typer.Option(min=0, max=0.9, help="Share of the groups held out as val.")] = 0.0,
    workers: Annotated[int, typer.Option(min=0, help="Tars at a time. 0: two per core.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Use WebDataset tars made by others where they are; with --merge, join the parts of a packed data set."""
    if merge:
        from shards.merge import merge as join_parts

        joined = join_parts(url)
        result = {"url": url, "manifest": json.loads(joined.manifest.to_json())}
        show(result, as_json, *joined.lines(), hint("pretrain", "configs/laptop.yaml", f"data.shards={url}"))
        return
    from launch.progress import index_progress
    from shards.foreign import IndexOptions, index_foreign

    options = IndexOptions(to=to, probe=probe, split=split, val_fraction=val_fraction, workers=workers)
    with index_progress(quiet=as_json) as progress:
        summary = index_foreign(url, options, progress)
    show(summary.to_json(), as_json, *summary.lines(), hint("stats", summary.folder))


@app.command()
def stats(
    url: Annotated[str, typer.Argument(help="Packed or indexed folder, or manifest URL.")],
    picture: Annotated[
        Path | None, typer.Option(help="Write charts as well: OUT.html or OUT.svg.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What a data set holds: hours, sizes, rates, labels, and how they are spread."""
    from launch.stats import picture as draw
    from shards.stats import stats as count

    result = count(url)
    lines = result.lines()
    if picture is not None:
        draw(result, picture)
        lines.append(f"picture: {picture}")
    show(result.to_json(), as_json, *lines, hint("pretrain", "configs/laptop.yaml", f"data.shards={url}"))


@app.command()
def forget(
    url: Annotated[str, typer.Argument(help="Packed or indexed folder, or manifest URL.")],
    names: Annotated[list[str], typer.Argument(metavar="KEY...", help="Samples, source files, or groups.")],
    runs: Annotated[
        list[Path] | None,
        typer.Option(help="Run, or folder of runs, to look for traces in. Default: runs.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Withdraw samples (consent, takedown) and name the checkpoints that have seen them."""
    from launch.forget import forget as withdraw
    from launch.progress import counted_progress

    with counted_progress("reading descriptions", quiet=as_json) as progress:
        result = withdraw(url, names, runs, progress)
    show(result.to_json(), as_json, *result.lines(), hint("stats", url))


@app.command()
def verify(
    url: Annotated[str, typer.Argument(help="Packed folder or manifest URL.")],
    repair: Annotated[
        bool, typer.Option("--repair", help="Take what is damaged out of the index; make a lost index again.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Prove that every shard is readable and equals its manifest. Exit code 1 if not."""
    from launch.progress import shard_lines

    if repair:
        from shards.repair import repair as repair_shards

        done = repair_shards(url, shard_lines(quiet=as_json))
        result = {"url": url, "before": done.before.hash, "after": done.after.hash, "lost": len(done.lost)}
        show(result, as_json, *done.lines(), hint("verify", url))
        return
    from shards.verify import verify as verify_shards

    problems = verify_shards(url, shard_lines(quiet=as_json))
    lines = [str(problem) for problem in problems] or [f"{url}: every shard and every sample is what was packed"]
    if not problems:
        lines.append(hint("pretrain", "configs/laptop.yaml", f"data.shards={url}"))
    show({"url": url, "problems": [str(problem) for problem in problems]}, as_json, *lines)
    if problems:
        raise typer.Exit(1)


bench = typer.Typer(
    help="Measure this machine with the data of a config, and say what to change.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(bench, name="bench")

BenchConfig = Annotated[Path, typer.Argument(help="Config, for example configs/laptop.yaml.", metavar="CONFIG")]
BenchSeconds = Annotated[float, typer.Option(min=1, help="About how long to measure.")]


@bench.command()
def decode(
    path: BenchConfig,
    overrides: Overrides = None,
    seconds: BenchSeconds = 20.0,
    as_json: AsJson = False,
) -> None:
    """What a clip costs the decoders: CPU time, skipping, bytes; a few videos packed anew for comparison."""
    from launch.bench_decode import bench_decode
    from launch.progress import counted_progress
    from pretrain.config import load_config

    config = load_config(path, overrides or [])
    with counted_progress("decoding", quiet=as_json) as progress:
        result = bench_decode(config, seconds=seconds, progress=progress)
    show(result.to_json(), as_json, *result.lines(), hint("bench", "loader", path, *(overrides or [])))


@bench.command()
def loader(
    path: BenchConfig,
    overrides: Overrides = None,
    seconds: BenchSeconds = 20.0,
    step_s: Annotated[
        float | None,
        typer.Option(
            min=1e-6, help="Seconds of a training step. Default: of the last run in run.dir.", show_default=False
        ),
    ] = None,
    ranks: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Ranks that share a global batch. Default: of that run, else one micro batch each.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Clips per second of the real loader, with the config's workers and others; would training wait for data?"""
    from launch.bench_loader import bench_loader
    from launch.progress import counted_progress
    from pretrain.config import load_config

    config = load_config(path, overrides or [])
    with counted_progress("loading", quiet=as_json) as progress:
        result = bench_loader(config, seconds=seconds, step_s=step_s, ranks=ranks, progress=progress)
    show(result.to_json(), as_json, *result.lines(), hint("pretrain", path, *(overrides or [])))
