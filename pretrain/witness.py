"""`tubelet audit RUN`: gathers what should have happened, from order and index, and has `audit.py` compare."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pretrain import checkpoint
from pretrain.audit import AuditResult, Witness, audit
from pretrain.config import Config, parse
from shards.errors import UserError
from shards.order import sample_numbers
from shards.reader import open_split


def audit_run(run_dir: Path) -> AuditResult:
    """Audit the lineage of the run's newest whole checkpoint.

    Raises UserError where there is nothing to audit: no checkpoint yet, or shards that are gone or changed.
    """
    found = checkpoint.newest(run_dir)
    if found is None:
        raise UserError(f"{run_dir} has no checkpoint; an audit needs one: train until checkpoint.every_steps")
    config = config_of(found)
    reader = open_split(config.data.shards, config.data.split)
    if found.facts.cursor["manifest_hash"] != reader.manifest.hash:
        raise UserError(
            f"data.shards is {config.data.shards}; it is not the data set that this run was trained on "
            f"(manifest {reader.manifest.hash[:12]}, the run's is {str(found.facts.cursor['manifest_hash'])[:12]}): "
            "put the right one there"
        )
    witness = Witness(
        num_steps=found.facts.step,
        global_batch=config.train.global_batch,
        clips_per_video=config.data.clips_per_video,
        checksums=np.asarray(reader.records["checksum"]),
        expected=partial(_expected, config.run.seed, len(reader)),
    )
    return audit(run_dir, found.lineage, witness)


def config_of(found: checkpoint.Checkpoint) -> Config:
    """The config a checkpoint was trained with."""
    config, problems = parse(found.facts.config)
    if config is None:
        raise UserError(f"the config in {found.folder} is not readable: {'; '.join(problems)}")
    return config


def _expected(seed: int, num_samples: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
    return sample_numbers(seed, num_samples, positions)[1]
