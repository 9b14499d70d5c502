"""A plan for a person: 80 columns, what is assumed marked as such, the next command last."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from launch.plan import BLOCK_S, Plan
from launch.plan_choice import Option
from launch.plan_data import DECODE_MS, MAX_NODE_BYTES_PER_S
from launch.plan_gpus import GB
from launch.plan_simulate import HORIZON_S, HOUR_S, LLAMA, RATES
from launch.screen import fold, hint
from pretrain.memory import RESERVE_BYTES, arithmetic
from pretrain.network import Layer

MB, MEGA, GIGA, TERA = 1e6, 1e6, 1e9, 1e12
WIDTH = 80


def page(plan: Plan, *, layers: bool = False) -> list[str]:
    """The lines of `tubelet plan`."""
    lines = [*_run(plan)]
    if layers:
        lines += ["", *_layers(plan)]
    for part in (_memory, _advice, _network, _data, _time, _failures):
        lines += ["", *part(plan)]
    return [*fold("\n".join(lines), WIDTH).split("\n"), "", _next(plan)]


def _run(plan: Plan) -> Iterator[str]:
    network, gpu = plan.network, plan.gpu
    train, data = plan.config.train, plan.config.data
    gpus = f"{plan.nodes} {_of(plan.nodes, 'node')} x {plan.gpus} {gpu.name}"
    yield f"{plan.path} on {gpus} = {plan.world_size} {_of(plan.world_size, 'GPU')}"
    parts = ", ".join(f"{name} {_count(numel)}" for name, numel in network.parts().items())
    yield f"parameters  {network.num_parameters:,} = {parts}"
    yield f"operations  {network.training_flops / GIGA:,.1f} GFLOP per clip, forward and backward"
    yield (
        f"steps       {train.steps:,} of {train.global_batch:,} clips of {data.frames} x {data.size} x {data.size}, "
        f"{train.precision}"
    )


def _layers(plan: Plan) -> Iterator[str]:
    mode = arithmetic(plan.config.train.precision, plan.choice.option.stage)
    yield f"{'layer':<38}{'parameters':>13}{'GFLOP/clip':>13}{'kept MB/clip':>14}"

    def row(name: str, layers: Sequence[Layer]) -> str:
        numel = sum(layer.num_parameters for layer in layers)
        flops = sum(layer.training_flops for layer in layers)
        kept = sum(layer.kept.num_bytes(mode) for layer in layers)
        return f"{name:<38}{numel:>13,}{flops / GIGA:>13.3f}{kept / MB:>14.2f}"

    for _, group in groupby(plan.network.layers, key=lambda layer: layer.name.rpartition(".blocks.")[0] or layer.name):
        layers = list(group)
        short = layers[0].name.removeprefix("objectives.")
        yield row(f"{short}-{len(layers) - 1} ({len(layers)})" if len(layers) > 1 else short, layers)
    yield row("all", plan.network.layers)


def _memory(plan: Plan) -> Iterator[str]:
    choice = plan.choice
    recompute = "recomputed" if choice.option.recompute else "kept"
    yield f"memory per GPU in GB, micro batch {choice.micro_batch}, activations {recompute}"
    heads = ("params", "grads", "optim", "buckets", "activ.", "batch", "total")
    yield f"{'stage':<11}{''.join(f'{head:>8}' for head in heads)}  fits up to"
    yield from (_memory_row(option, plan) for option in choice.rows)
    yield "total: at the end of a forward pass, or at the update if that is more, with"
    yield f"{RESERVE_BYTES / GB:.0f} GB assumed for CUDA and NCCL. A card has {plan.gpu.memory_bytes / GB:.0f} GB."
    copies = choice.option.memory.copies * plan.gpus / GB
    yield f"A node's own memory: {copies:,.1f} GB for the copies that saves write from,"
    hosts = [option.memory.states.host * plan.gpus / GB for option in choice.rows if option.offload]
    yield f"{min(hosts):,.1f} to {max(hosts):,.1f} GB for offload (not measured on a card)."


def _memory_row(option: Option, plan: Plan) -> str:
    states, memory = option.memory.states, option.memory
    parts = (
        states.parameters,
        states.gradients,
        states.optimizer,
        states.buckets,
        memory.activations,
        memory.batch,
        memory.total,
    )
    most = option.max_micro_batch or "none"
    mark = " <" if option.stage == plan.choice.option.stage and option.offload == plan.choice.option.offload else ""
    return f"{option.name:<11}{''.join(f'{part / GB:>8.2f}' for part in parts)}  {most:>7}{mark}"


def _advice(plan: Plan) -> Iterator[str]:
    choice = plan.choice
    split = f"{choice.num_micro_steps} x {choice.micro_batch} clips per GPU and step"
    fillers = f", {choice.num_fillers} fillers of weight 0" if choice.num_fillers else ""
    yield f"recommended  stage {choice.option.name}, {split}{fillers}"
    if plan.changes:
        yield "  add: " + " ".join(plan.changes)
    else:
        yield "  the config says so already"


def _network(plan: Plan) -> Iterator[str]:
    link = plan.gpu.link_bytes_per_s(plan.nodes) / GB
    where = "in the node" if plan.nodes == 1 else "assumed"
    yield f"network: GB that a GPU sends per step, in rings at {link:g} GB/s ({where})"
    share = (plan.world_size - 1) / plan.world_size
    for stage, traffic in plan.traffic.items():
        gradients = (2 * traffic.all_reduce + traffic.reduce_scatter) * share / GB
        parameters = traffic.all_gather * share / GB
        yield (
            f"  stage {stage}   gradients {gradients:6.2f}   parameters {parameters:6.2f}   all "
            f"{gradients + parameters:6.2f} = {1000 * (gradients + parameters) / link:8.1f} ms"
        )


def _data(plan: Plan) -> Iterator[str]:
    data, storage, time = plan.data, plan.storage, plan.time
    low, high = plan.cores
    yield f"data: {time.clips_per_s:,.0f} clips/s in all, {time.clips_per_s / plan.nodes:,.0f} per node"
    per_gpu = f"{low / plan.gpus:.1f} to {high / plan.gpus:.1f} per GPU"
    yield f"  decode   {low:,.0f} to {high:,.0f} cores per node, {per_gpu}"
    yield f"           ({DECODE_MS[0]:g} to {DECODE_MS[1]:g} ms a clip of 16 frames, measured on a 2.1 GHz core); where"
    yield "           there are fewer, each step takes longer in proportion"
    yield (
        f"  storage  {storage.bytes_per_s / GB:,.2f} GB/s, {storage.requests_per_s:,.0f} requests/s in all, "
        f"{storage.node_bytes_per_s / GB:,.2f} GB/s per node"
    )
    if data.num_samples is None:
        yield f"           assumed: {data.sample_bytes / MB:.1f} MB per video"
        yield f"           ({data.why_assumed})"
        if storage.node_bytes_per_s > MAX_NODE_BYTES_PER_S:
            limit = f"{MAX_NODE_BYTES_PER_S / GB:g} GB/s"
            yield f"           that is more than {limit}, a card of 100 Gb/s: set data.cache.dir, data.cache.max_bytes"
    else:
        epochs = plan.config.train.steps * plan.config.train.global_batch / plan.config.data.clips_per_video
        yield (
            f"           {data.num_samples:,} videos of {data.sample_bytes / MB:.2f} MB in the mean, "
            f"{epochs / max(1, data.num_samples):,.1f} epochs"
        )
    if plan.config.data.cache is not None:
        yield "           in the first epoch; later ones come from data.cache as far as it holds them"


def _time(plan: Plan) -> Iterator[str]:
    time, gpu = plan.time, plan.gpu
    peak = gpu.peak_flops[plan.config.train.precision] / TERA
    yield f"time: {time.hours:,.1f} hours; {time.wall_hours:,.1f} with saves and failures"
    yield f"  a step {time.step_s:.3g} s: {time.compute_s:.3g} computing, {time.send_s:.2g} sending (nothing overlaps)"
    yield (
        f"  {time.wall_hours * plan.world_size:,.0f} GPU hours, {time.kwh:,.0f} kWh at {gpu.power_w} W a board, "
        f"{time.dollars:,.0f} dollars"
    )
    yield f"  assumed: MFU {time.mfu:.0%} of {peak:,.0f} TFLOP/s (--mfu what you measured), at least"
    yield f"  {1000 * BLOCK_S:g} ms for each block and micro batch;"
    yield f"  {gpu.dollars_per_hour:.2f} dollars a GPU hour; boards at full power, nothing else counted"


def _failures(plan: Plan) -> Iterator[str]:
    checkpoints = plan.checkpoints
    saving = checkpoints.saving
    background = "in the background" if plan.config.checkpoint.background else "training waits"
    every_s = checkpoints.every_steps * plan.time.step_s
    yield (
        f"checkpoints: {checkpoints.num_bytes / GB:,.2f} GB every {checkpoints.every_steps:,} steps = "
        f"{_duration(every_s)} (Young/Daly)"
    )
    yield f"  training stalls {saving.stall_s:.2g} s, durable after {saving.write_s:.2g} s ({background})"
    yield f"  assumed: {checkpoints.write_bytes_per_s / GB:.0f} GB/s from all nodes together; one failure in"
    yield f"  {_duration(checkpoints.mtbf_s)} on {plan.world_size} GPUs, as often as {LLAMA.name} had them"
    yield ""
    days = HORIZON_S / HOUR_S / 24
    restart = f"{saving.restart_s / 60:.0f} min a restart"
    yield f"effective training time: a save every {_duration(saving.interval_s)}, {restart}"
    yield f"(assumed), {days:.0f} days simulated on clusters that fail as often as"
    yield from (f"  {rate.name:<9} {rate.source}" for rate in RATES)
    yield f"{'GPUs':>8}" + "".join(f"{rate.name:>12}" for rate in RATES)
    for size, by_rate in plan.ettr_by_size.items():
        yield f"{size:>8,}" + "".join(f"{by_rate[rate.name]:>12.1%}" for rate in RATES)


def _next(plan: Plan) -> str:
    words = [plan.path, *plan.overrides, *plan.changes]
    if plan.nodes == 1:
        return hint("doctor", *words)
    workers = plan.config.data.workers
    for change in plan.changes:
        if change.startswith("data.workers="):
            workers = int(change.partition("=")[2])
    cores = f"--sbatch=--cpus-per-task={workers + 1}"  # the rank itself has one
    return hint("submit", *words, "--nodes", plan.nodes, "--gpus", plan.gpus, cores)


def _count(numel: int) -> str:
    return f"{numel / MEGA:,.1f} M" if numel >= MEGA else f"{numel:,}"


def _of(number: int, noun: str) -> str:
    return noun if number == 1 else f"{noun}s"


def _duration(seconds: float) -> str:
    for unit, length_s in (("days", 24 * HOUR_S), ("hours", HOUR_S), ("min", 60.0)):
        if seconds >= 2 * length_s:
            return f"{seconds / length_s:,.1f} {unit}"
    return f"{seconds:.1f} s"
