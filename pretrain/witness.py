"""`tubelet audit RUN`: gathers what should have happened, from order and index, and has `audit.py` compare."""

from __future__ import annotations

from pathlib import Path

from pretrain import checkpoint
from pretrain.audit import Witness, audit
from pretrain.config import Config, parse
from pretrain.data.source import open_dataset
from pretrain.journal import read_growth
from pretrain.verdict import AuditResult
from shards.errors import UserError


def audit_run(run_dir: Path) -> AuditResult:
    """Audit the lineage of the run's newest whole checkpoint.

    Raises UserError where there is nothing to audit: no checkpoint yet, or shards that are gone or changed.
    """
    found = checkpoint.newest(run_dir)
    if found is None:
        raise UserError(f"{run_dir} has no checkpoint; an audit needs one: train until checkpoint.every_steps")
    config = config_of(found)
    dataset = open_dataset(config.data, seed=config.run.seed)
    cursor = found.facts.cursor
    dataset.go_on(cursor, int(cursor["position"]), read_growth(run_dir / "journal"))
    witness = Witness(
        num_steps=found.facts.step,
        global_batch=config.train.global_batch,
        clips_per_video=config.data.clips_per_video,
        data=dataset,
    )
    return audit(run_dir, found.lineage, witness)


def config_of(found: checkpoint.Checkpoint) -> Config:
    """The config a checkpoint was trained with."""
    config, problems = parse(found.facts.config)
    if config is None:
        told = "; ".join(problems)
        raise UserError(f"the config in {found.folder} is not readable ({told}): use the tubelet that wrote it")
    return config
