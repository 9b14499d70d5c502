"""The sections of a config, one per component: which keys there are, their types, defaults and meaning.

A component is handed its own section and nothing else. Rules between keys: `rules.py`; the rest: `config.py`.
"""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


class Section(BaseModel):
    """One section of the YAML file. Frozen; unknown keys are refused; field docstrings are the help texts."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


LocalPath = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path or URL. No shell expands a ~ that follows an equals sign, so this does."""


class RunConfig(Section):
    """Where the run lives and what makes its randomness."""

    dir: LocalPath
    """Run folder: a POSIX path that all nodes see. Default: runs/NAME-OF-THE-CONFIG."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of order, crops, masks and initial weights."""


class SourceConfig(Section):
    """One of several data sets that are mixed."""

    url: LocalPath
    weight: float | None = Field(default=None, gt=0)


class MixConfig(Section):
    """Other weights from some cycle of 4,096 positions on."""

    cycle: int = Field(ge=1)
    weights: tuple[float, ...]


class CacheConfig(Section):
    """Samples kept on the disk of each node, shared by its ranks. Never changes which samples come, or their order."""

    dir: LocalPath
    """A folder on a disk of the node."""
    max_bytes: int = Field(gt=0)
    """The longest unused samples go when it is full."""


class DataConfig(Section):
    """Which videos, which frames of them, and how they reach the model."""

    shards: LocalPath | tuple[SourceConfig, ...]
    """Packed data: a folder, a manifest URL, a brace pattern of folders or indexed tars, or a list of {url, weight}
    to mix (weight: share of the positions; all without one: by size)."""
    split: str = "train"
    """Split of `data.shards` to train on."""
    eval_shards: LocalPath | None = None
    """Packed data set for the held-out loss. Default: `data.shards`, of several the first that holds something out."""
    eval_split: str = "val"
    """Split that is held out from training."""
    frames: int = Field(default=16, ge=2)
    """Frames of a clip (even: a tubelet is two frames)."""
    stride: int = Field(default=4, ge=1)
    """Take every n-th frame; drops to the largest that fits where a video is too short (counted)."""
    rate_hz: float | None = Field(default=None, gt=0)
    """Take frames this many times per second, whatever the rate of the source. Excludes data.stride."""
    size: int = Field(default=224, ge=16)
    """Height and width of a clip in pixels (a multiple of 16)."""
    clips_per_video: int = Field(default=1, ge=1)
    """Clips drawn from each video that is read; the global batch counts clips."""
    run_length: int = Field(default=1, ge=1)
    """Neighbours in a tar that follow each other in the order, so that one read fetches them all. Packing has shuffled
    them. Raise it where requests are slow or cost money; train.micro_batch x accumulation should be a multiple."""
    where: str = ""
    """Train on the samples for which this holds, like: duration_s >= 2 and short_side >= 128 and motion > 1."""
    mix: tuple[MixConfig, ...] = ()
    """Other weights for the sources of data.shards later in the run: a list of {cycle, weights}."""
    short: Literal["reject", "loop"] = "reject"
    """A video with fewer frames than `data.frames`: replaced and counted, or played again from its start."""
    crop_scales: tuple[float, ...] = (1.0, 0.875, 0.75, 0.66)
    """Sides of the random crop as shares of the short side (VideoMAE's multi-scale crop)."""
    flip: bool = False
    """Mirror half of the clips. VideoMAE does not: left and right matter in some data sets."""
    decoder: Literal["pyav", "decord"] = "pyav"
    """Library that decodes. PyAV skips frames nobody needs and cannot hang for ever."""
    workers: int = Field(default=2, ge=0)
    """Decoder processes per rank. 0 decodes in the training process: for debugging."""
    prefetch_steps: int = Field(default=2, ge=1)
    """Global batches that may be under way ahead of training."""
    cache: CacheConfig | None = None
    hedge_s: float = Field(default=2.0, ge=0)
    """A read from object storage that is late by this much gets a second one beside it; 0 never."""
    decode_deadline_s: float = Field(default=30.0, gt=0)
    """A decoder that needs longer is killed and its clip replaced."""
    bad_sample_limit: float = Field(default=0.01, ge=0, le=1)
    """Share of the data set that may prove unusable before the run stops and names the samples."""

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """`shards` as a list, one entry where it is one data set."""
        return (SourceConfig(url=self.shards),) if isinstance(self.shards, str) else self.shards


class MaskedFrameConfig(Section):
    """Reconstruct hidden tubes and hidden whole frames."""

    weight: float = Field(default=1.0, gt=0)
    """Weight of this loss in the sum."""
    mask_ratio: float = Field(default=0.9, gt=0, lt=1)
    """Share of the cells of a frame that a tube mask hides; the number of visible tokens follows from it."""
    num_frames_masked: tuple[int, ...] | None = None
    """Whole time slots (two frames) hidden per clip, one value drawn per clip. Default: every value up to half of
    the slots that keeps the number of visible tokens exact. [0] is VideoMAE."""


class FrameOrderConfig(Section):
    """Say which time slot each shuffled slot came from."""

    weight: float = Field(default=0.1, gt=0)
    """Weight of this loss in the sum."""
    mask_ratio: float = Field(default=0.9, gt=0, lt=1)
    """Share of the cells of a frame hidden in the second encoder pass."""
    num_moved: int | None = Field(default=None, ge=2)
    """Slots put out of place. Default: all of them."""
    min_motion: float = Field(default=1.0, ge=0)
    """Slots that differ less from a neighbour (mean grey levels of 255) are not asked about (counted)."""


class ObjectiveConfig(Section):
    """What is learned. At least one; all of them in one forward pass per micro batch."""

    masked_frame: MaskedFrameConfig | None = None
    frame_order: FrameOrderConfig | None = None


class ModelConfig(Section):
    """The video Transformer."""

    size: Literal["nano", "tiny", "small", "base", "large", "huge", "giant"] = "base"
    """Width, depth and decoder of the VideoMAE family (pretrain/model/sizes.py)."""


class TrainConfig(Section):
    """Length, batch and arithmetic of training."""

    steps: int = Field(ge=1)
    """Global batches in the whole run."""
    global_batch: int = Field(ge=1)
    """Clips per optimizer step over all ranks. Never changes within a run."""
    micro_batch: int = Field(default=8, ge=1)
    """Clips per rank and forward pass. Accumulation follows from it: global / (micro x ranks)."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of the forward and backward pass. Master weights, moments and gradient sums are always fp32."""
    init_from: LocalPath | None = None
    """Run folder, checkpoint or export whose weights a new run starts from (not its position or optimizer)."""
    deterministic: bool | None = None
    """Bit-identical resume. Default: on for CPU, off for GPUs (costs speed there)."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    clip_norm: float = Field(default=0.0, ge=0)
    """Largest norm of the whole gradient; 0 does not clip (VideoMAE)."""


class ZeroConfig(Section):
    """How DeepSpeed shards states over ranks."""

    stage: Literal[0, 1, 2, 3] = 1
    """0 shards nothing, 1 optimizer states, 2 also gradients, 3 also parameters."""
    offload: bool = False
    """Keep optimizer states in CPU memory (stages 1 to 3)."""


class OptimConfig(Section):
    """The optimizer: torch's own."""

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: float = Field(gt=0)
    """Learning rate after warm-up, for the global batch as it is (VideoMAE: 1.5e-4 x batch / 256)."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    """Not applied to biases, norms, tokens."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Of sgd."""


class ScheduleConfig(Section):
    """Learning rate over the run: linear warm-up, then cosine. Both count positions, so the batch may change."""

    warmup_steps: int = Field(default=0, ge=0)
    final_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the last step."""


class CheckpointConfig(Section):
    """When states are saved and how many saves are kept."""

    every_steps: int = Field(default=200, ge=1)
    keep: int = Field(default=2, ge=2)
    """Newest checkpoints kept. At least 2: should the newest prove broken, the one before it serves."""
    keep_every_steps: int = Field(default=0, ge=0)
    """Checkpoints of multiples of this step are kept for ever; 0 keeps none. A multiple of every_steps."""
    background: bool = True
    """Write while training goes on, from a copy in host memory. false waits for the disk."""
    mirror: LocalPath | None = None
    """URL that each checkpoint is copied to, with ledger and journal; an empty run folder restores from it."""
    max_age_s: float = Field(default=7200.0, gt=0)
    """While saves fail (disk full, read-only, slow), training goes on for this long after the first that failed."""


class FailureConfig(Section):
    """What a run does about numbers that go wrong: skip a step, roll back and step over it, give up."""

    max_skips: int = Field(default=3, ge=1)
    """Steps with a loss or gradient that is not finite are not applied; this many of them roll back."""
    skip_window_steps: int = Field(default=100, ge=1)
    """... if they lie within this many steps."""
    spike_sigma: float = Field(default=0.0, ge=0)
    """A loss this many standard deviations above its mean rolls back; 0 never. 10 is rarely wrong."""
    spike_window_steps: int = Field(default=128, ge=8)
    """Steps the mean and the deviation are taken over; before that many, no loss is called a spike."""
    max_rollbacks: int = Field(default=3, ge=0)
    """One more than this ends the run: a person is needed."""


class EvalConfig(Section):
    """Held-out loss with fixed masks. Moves no cursor."""

    every_steps: int = Field(default=0, ge=0)
    """0 never evaluates."""
    num_clips: int = Field(default=64, ge=1)
    """Clips of the held-out split, the same ones every time; several of a video where it has fewer videos."""


def _off(value: Any) -> Any:
    """YAML reads a bare `off` as false."""
    return "off" if value is False else value


class TrackConfig(Section):
    """What is written down. metrics.jsonl always."""

    wandb: Annotated[Literal["off", "offline", "online"], BeforeValidator(_off)] = "off"
    """Fed from metrics.jsonl. online without a key falls back to offline and prints the line that syncs."""
    project: str = "tubelet"
    """wandb project."""
    wandb_pictures: bool = False
    """Send the run folder's pictures to wandb, at the end of a start."""
    wandb_code: bool = False
    """Send this program's own source files to wandb, at every start."""
    log_every_steps: int = Field(default=10, ge=1)


class LaunchConfig(Section):
    """How Slurm runs it: what `tubelet submit` and slurm/pretrain.sh need beside nodes and time."""

    min_nodes: int = Field(default=1, ge=1)
    """Nodes the run may shrink to when some are excluded or lost."""
    container: LocalPath | None = None
    """Image to run the ranks in: a .sif file (apptainer), or what pyxis takes as --container-image."""
    prologue: str = ""
    """A line of shell run before the ranks on the first node, like: module load cuda"""
    interface: str | None = None
    """Network interface of gloo and NCCL. Default: the one that carries the route to the first node."""


class LimitsConfig(Section):
    """How long each kind of waiting may last, in seconds. Those up to collective_timeout_s must rise in this order."""

    read_attempt_s: float = Field(default=30.0, gt=0)
    """One request to storage."""
    read_deadline_s: float = Field(default=300.0, gt=0)
    """All attempts at one sample."""
    wait_limit_s: float = Field(default=600.0, gt=0)
    """The training loop waiting for a batch."""
    step_limit_s: float = Field(default=900.0, gt=0)
    """One optimizer step."""
    collective_timeout_s: float = Field(default=1800.0, gt=0)
    """One collective between ranks."""
    setup_limit_s: float | None = Field(default=None, gt=0)
    """From the meeting of the ranks to the first step: indices, model, restore. Default: 0.9 x collective_timeout_s."""
    first_step_limit_s: float | None = Field(default=None, gt=0)
    """The first step of a start, which compiles and warms up. Default: 0.9 x collective_timeout_s."""
    save_limit_s: float | None = Field(default=None, gt=0)
    """What a save does while training waits. Default: 0.9 x collective_timeout_s."""
    eval_limit_s: float | None = Field(default=None, gt=0)
    """One evaluation. Default: 0.9 x collective_timeout_s."""

    def of_section(self, name: Literal["setup", "first_step", "step", "save", "eval"]) -> float:
        """How long one section of a rank's work may take, in seconds."""
        limit_s: float | None = getattr(self, f"{name}_limit_s")
        return 0.9 * self.collective_timeout_s if limit_s is None else limit_s
