"""The command `tubelet`. Imports what a command needs inside it, so that `tubelet --help` needs neither torch nor
DeepSpeed; and the one place that prints a `UserError`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from launch import data_cli
from launch.screen import NEXT, AsJson, Overrides, complain, hint, show
from shards.errors import UserError

app = typer.Typer(
    name="tubelet",
    help="Pretrain video Transformers without labels. Start with: tubelet pack VIDEOS data/NAME",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.add_typer(data_cli.app)
USER_MISTAKE = 2


def main() -> NoReturn:
    """Run a command; a mistake of the user is one plain message, everything else keeps its traceback."""
    try:
        app(standalone_mode=True)
    except UserError as error:
        complain(f"error: {error}")
        sys.exit(USER_MISTAKE)
    sys.exit(0)


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
def plan(
    path: Annotated[Path, typer.Argument(help="Config, for example configs/laptop.yaml.", metavar="CONFIG")],
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")],
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of each machine.")],
    overrides: Overrides = None,
    gpu: Annotated[str, typer.Option(help="h100, h200, a100 or l40s.")] = "h100",
    mfu: Annotated[float | None, typer.Option(help="Share of the peak that was measured. Default: assumed.")] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Parameters, operations, activations by layer.")] = False,
    as_json: AsJson = False,
) -> None:
    """Memory, network, storage, time and cost of a run on so many GPUs; which stage and micro batch; no GPU needed."""
    from launch.plan import ASSUMED_MFU, make_plan
    from launch.plan_page import page

    made = make_plan(path, overrides or [], nodes=nodes, gpus=gpus, gpu=gpu, mfu=mfu or ASSUMED_MFU)
    show(made.to_json(), as_json, *page(made, layers=layers))


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
def doctor(
    path: Annotated[Path, typer.Argument(help="Config, for example configs/laptop.yaml.", metavar="CONFIG")],
    overrides: Overrides = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Processes. Default: the GPUs of this node, else 1.")] = None,
    change: Annotated[
        bool, typer.Option("--change", help="The run will be resumed with changed steps, schedule or weights.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Is this machine, or this Slurm allocation, fit for the run? Exit codes: 0 fit, 2 a check failed."""
    from launch.doctor import doctor as examine
    from launch.doctor import exit_code, report_lines

    report = examine(path, overrides or [], ranks, allow_change=change)
    words = [*(overrides or []), *["--change"] * change]
    show(report, as_json, *report_lines(report, path, words, ranks))
    raise typer.Exit(exit_code(report))


@app.command()
def submit(
    path: Annotated[Path, typer.Argument(help="Config, for example configs/laptop.yaml.", metavar="CONFIG")],
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes.")] = 1,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="GPUs, and ranks, of each node. Default: two CPU ranks.")
    ] = None,
    time: Annotated[str | None, typer.Option(help="Limit of one start, as 24:00:00. The run goes on after it.")] = None,
    partition: Annotated[str | None, typer.Option(help="Default: the cluster's.")] = None,
    sbatch: Annotated[
        list[str] | None, typer.Option(metavar="OPTION", help="Any option of sbatch: --sbatch=--cpus-per-task=12")
    ] = None,
    change: Annotated[
        bool, typer.Option("--change", help="Let a resumed run change steps, schedule, weights (recorded).")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be run.")] = False,
    as_json: AsJson = False,
) -> None:
    """Submit slurm/pretrain.sh with a copy of code and config, so that later edits do not change the job."""
    from launch.submit import Wanted
    from launch.submit import submit as submit_job

    wanted = Wanted(nodes, gpus, time, partition, tuple(sbatch or ()))
    result = submit_job(path, overrides or [], wanted, allow_change=change, dry_run=dry_run)
    following = hint("plan", path, "--nodes", nodes, "--gpus", gpus or 1) if dry_run else hint("status", result.run_dir)
    show(result.to_json(), as_json, *result.lines(), following)


@app.command()
def status(run: Annotated[Path, typer.Argument(help="Run folder.")], as_json: AsJson = False) -> None:
    """Job, step, rate, time left, newest checkpoint, restarts: of a run at work, dead or not begun."""
    from launch.status import status as look

    result = look(run)
    show(result.to_json(), as_json, *result.lines())


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
def report(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    wandb: Annotated[
        bool, typer.Option("--wandb", help="Also make the wandb run anew, offline, from what checkpoints cover.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """One self-contained HTML page: curves, rates, restarts, goodput, pictures, the audit where one can be made."""
    from launch.report import check_run_folder
    from launch.report import report as write_report
    from launch.run_folder import read_run
    from pretrain.attempt import newest_attempt, read_outcome
    from pretrain.track import rebuild_wandb
    from pretrain.witness import audit_run

    check_run_folder(run)
    result, why_no_audit = None, ""
    try:
        result = audit_run(run)
    except UserError as error:
        why_no_audit = str(error)
    page = write_report(run, result, why_no_audit=why_no_audit)
    time = read_run(run).goodput
    rebuilt = rebuild_wandb(run) if wandb else None
    lines = [f"report: {page}"] + [f"without an audit: {why_no_audit}"] * bool(why_no_audit)
    if rebuilt is not None:
        lines.append("wandb: one offline file of all that checkpoints cover; older ones are in wandb/set-aside")
        if newest_attempt(run) and read_outcome(run) is None:
            lines.append("the newest start has no outcome: if it is at work, give this command again after its end")
    show(
        {
            "report": str(page),
            "audit": None if result is None else result.exit_code,
            "why_no_audit": why_no_audit,
            "goodput": time.to_json(),
            "wandb": rebuilt,
        },
        as_json,
        *lines,
        hint("export", run, run / "export") if rebuilt is None else f"{NEXT}{rebuilt}",
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
