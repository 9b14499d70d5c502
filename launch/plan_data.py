"""What a plan knows of the data, and what training asks of storage and of the processors that decode."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.config import Config
from shards import storage
from shards.brace import expand
from shards.errors import UserError
from shards.layout import MANIFEST_NAME, Manifest

ASSUMED_SAMPLE_BYTES = 1_000_000
"""Of a clip of ten seconds at a short side of 256, as `tubelet pack` makes it: 0.5 to 1.9 MB in tests/bench."""
ASSUMED_PIXELS = 256 * 456
DECODE_MS = (9.0, 19.0)
"""Processor time of a clip of 16 frames at 224 pixels: decoding packed films alone, and with everything a CPU does for
a clip (tests/bench/RESULTS.md, one core of a 2.1 GHz Xeon)."""
READ_ATTEMPT_S, READ_DEADLINE_S = 5.0, 15.0
MAX_NODE_BYTES_PER_S = 12.5e9
"""What a network card of 100 Gb/s brings into a node."""
MAX_REQUESTS_PER_S = 5_500 * 256
"""S3 answers 5,500 reads per second and prefix; packed tars lie under up to 256 prefixes."""


@dataclass(frozen=True)
class DataFacts:
    """Sizes of the samples of a data set."""

    sample_bytes: float
    """Mean over the split, tar headers included."""
    max_pixels: int
    """Width x height of the largest video."""
    num_samples: int | None
    """None where the data could not be read."""
    why_assumed: str = ""
    """Why these are assumptions and no facts."""


@dataclass(frozen=True)
class Storage:
    """What all ranks together read while they train at full speed, without a cache."""

    bytes_per_s: float
    requests_per_s: float
    node_bytes_per_s: float


def look_at_data(config: Config) -> DataFacts:
    """Facts from the manifests of `data.shards`, or assumptions where one cannot be read within seconds."""
    try:
        found = [
            (source.weight, _manifest(folder)) for source in config.data.sources for folder in _folders(source.url)
        ]
        splits = [(weight, manifest.splits[config.data.split]) for weight, manifest in found]
    except (UserError, OSError) as error:
        first = str(error).partition(";")[0]
        return DataFacts(ASSUMED_SAMPLE_BYTES, ASSUMED_PIXELS, None, f"data.shards could not be read: {first}")
    except KeyError:
        why = f"data.shards has no split {config.data.split}"
        return DataFacts(ASSUMED_SAMPLE_BYTES, ASSUMED_PIXELS, None, why)
    means = [sum(shard.num_bytes for shard in split.shards) / max(1, split.num_samples) for _, split in splits]
    weights = [float(split.num_samples) if weight is None else weight for weight, split in splits]
    return DataFacts(
        sample_bytes=sum(mean * weight for mean, weight in zip(means, weights, strict=True)) / (sum(weights) or 1.0),
        max_pixels=max(split.max_pixels for _, split in splits),
        num_samples=sum(split.num_samples for _, split in splits),
    )


def _folders(url: str) -> list[str]:
    """The folders of manifests that a URL or a pattern stands for; of tars the one that they lie in.

    `shards.source` knows more about patterns, but brings decoders that a login node may lack.
    """
    return list(dict.fromkeys(storage.parent(one) if one.endswith(".tar") else one for one in expand(url)))


def _manifest(folder: str) -> Manifest:
    """As `shards.manifest.load_manifest`, but a login node that cannot reach the store is not kept waiting."""
    where = folder if folder.endswith(".json") else storage.join(folder, MANIFEST_NAME)
    return Manifest.from_json(storage.read_bytes(where, attempt_s=READ_ATTEMPT_S, deadline_s=READ_DEADLINE_S), where)


def storage_of(config: Config, facts: DataFacts, clips_per_s: float, nodes: int) -> Storage:
    """Rates that `clips_per_s` need. Requests per sample were measured as 1 over `data.run_length`."""
    samples_per_s = clips_per_s / config.data.clips_per_video
    bytes_per_s = samples_per_s * facts.sample_bytes
    return Storage(bytes_per_s, samples_per_s / config.data.run_length, bytes_per_s / nodes)


def refuse_too_much(config: Config, facts: DataFacts, storage: Storage) -> None:
    """Raise UserError for rates that no network or object store delivers; a cache serves all epochs but the first.

    Sizes that are only assumed refuse nothing.
    """
    if config.data.cache is not None:
        return
    if storage.node_bytes_per_s > MAX_NODE_BYTES_PER_S and facts.num_samples is not None:
        raise UserError(
            f"each node would read {storage.node_bytes_per_s / 1e9:.1f} GB/s; it must be at most "
            f"{MAX_NODE_BYTES_PER_S / 1e9:g} GB/s, what a card of 100 Gb/s brings: set data.cache.dir and "
            "data.cache.max_bytes, draw more clips of each video (data.clips_per_video), or pack smaller videos"
        )
    if storage.requests_per_s > MAX_REQUESTS_PER_S:
        needed = -(-storage.requests_per_s * config.data.run_length // MAX_REQUESTS_PER_S)
        raise UserError(
            f"data.run_length is {config.data.run_length}; it must keep requests below {MAX_REQUESTS_PER_S:,} per "
            f"second, and there would be {storage.requests_per_s:,.0f}: set data.run_length={needed:.0f} or more"
        )


def cores_needed(clips_per_s: float, frames: int) -> tuple[float, float]:
    """Processor cores that decode so many clips: fewest and most, by the two figures that were measured."""
    low_ms, high_ms = (ms * frames / 16 for ms in DECODE_MS)
    return clips_per_s * low_ms / 1000, clips_per_s * high_ms / 1000
