"""Saving and resuming as all ranks do it together (C8). The files themselves: `checkpoint.py`."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from pretrain import checkpoint
from pretrain.agree import Agreement
from pretrain.checkpoint import BrokenCheckpoint, Checkpoint, Facts, candidates, step_of
from pretrain.config import Config, differences, parse
from pretrain.data.loader import ClipLoader
from pretrain.data.source import specs
from pretrain.decisions import Decisions
from pretrain.engine import Engine
from pretrain.ledger import Ledger
from pretrain.load import load_state
from pretrain.redact import without_secrets
from pretrain.saver import Saver
from pretrain.world import World
from shards.errors import UserError
from shards.layout import Manifest
from shards.source import load_manifests

log = logging.getLogger(__name__)


@dataclass
class Recovery:
    """Everything that goes into a checkpoint, and the two things done with it."""

    run_dir: Path
    config: Config
    attempt: int
    world: World
    agreement: Agreement
    engine: Engine
    loader: ClipLoader
    ledger: Ledger
    saver: Saver
    decisions: Decisions
    versions: dict[str, str]
    changes: tuple[str, ...] = ()

    def resume(self, *, allow_change: bool) -> int:
        """Restore the newest whole checkpoint, if the run has one. Returns the step to go on from.

        Which one is decided by all ranks: each verifies a share of the files, and one broken file rules it out.
        """
        chosen = self._choose()
        if chosen is None:
            if any(back.to for back in self.decisions.rollbacks):
                raise checkpoint.none_whole(self.run_dir, ["what the run was rolled back to is gone"])
            return 0
        facts = chosen.facts
        self.changes = (*facts.changes, *compare(facts, self.config, self.run_dir, allow_change=allow_change))
        self.engine.states.restore(chosen.read, facts.optimizer_steps)
        self.loader.load_state_dict(facts.cursor)
        self.saver.resumed_from(chosen.lineage, (chosen.folder / "manifest.json").stat().st_mtime)
        self.agreement.wait()
        log.info("resumed from %s (step %d)", chosen.folder, facts.step)
        return facts.step

    def reserve(self) -> None:
        """Before training starts: take the memory that saves copy into."""
        self.saver.reserve(self.engine.states.slices())

    def begin_save(self, step: int) -> None:
        """Begin the checkpoint of `step`, after it, on every rank: all copy what they own and go on."""
        self.saver.begin(
            step, self.engine.states.slices(), self.ledger.cut(), self._facts(step) if self.world.is_first else None
        )

    def _facts(self, step: int) -> Facts:
        return Facts(
            step=step,
            optimizer_steps=self.engine.states.optimizer_steps,
            attempt=self.attempt,
            cursor=self.loader.state_dict(),
            config=without_secrets(self.config.model_dump(mode="json")),
            shapes=self.engine.states.shapes(),
            versions=self.versions,
            changes=list(self.changes),
        )

    def step_before(self, first: int) -> int | None:
        """Step of the checkpoint that a roll-back over steps from `first` on goes to; None where none is whole.

        The newest whole one from before; where all are later (only skipped steps lie between: nothing in them is
        wrong), the oldest; 0 where nothing was ever saved. Rank 0 decides.
        """
        step = -1
        if self.world.is_first:
            steps = [step_of(folder) for folder in candidates(self.run_dir)]
            before, after = [s for s in steps if s <= first], [s for s in steps if s > first]
            wanted = (s for s in (*before, *reversed(after)) if self._is_whole(s))
            step = next(wanted, -1 if steps else 0)
        step = self.agreement.from_first(step)
        return None if step < 0 else step

    def _is_whole(self, step: int) -> bool:
        try:
            opened = Checkpoint(self.run_dir / "checkpoints" / checkpoint.NAME.format(step))
        except BrokenCheckpoint:
            return False
        return not opened.broken_files(opened.files)

    def _choose(self) -> Checkpoint | None:
        """Newest first; rank 0 names a candidate, every rank checks its share of it, all must agree."""
        folders = checkpoint.candidates(self.run_dir) if self.world.is_first else []
        problems: list[str] = []
        for index in range(self.agreement.from_first(len(folders))):
            step = self.agreement.from_first(int(folders[index].name.split("-")[1]) if folders else 0)
            opened: Checkpoint | None = None
            try:
                opened = Checkpoint(self.run_dir / "checkpoints" / checkpoint.NAME.format(step))
                mine = sorted(opened.files)[self.world.rank :: self.world.size]
                found = opened.broken_files(mine)
            except BrokenCheckpoint as error:
                found = [str(error)]
            if self.agreement.all_true(not found):
                return opened
            problems += found
            for problem in found:
                log.warning("checkpoint of step %d is not whole: %s", step, problem)
        if self.agreement.from_first(len(folders)):
            raise checkpoint.none_whole(self.run_dir, problems or ["(see the logs of the other ranks)"])
        return None


def delete_void(run_dir: Path, decisions: Decisions) -> None:
    """Delete the checkpoints that hold what was rolled back; rank 0 only, at the roll-back and again at each start."""
    for folder in candidates(run_dir):
        try:
            facts = Checkpoint(folder).facts
        except BrokenCheckpoint:
            continue
        if decisions.is_void(facts.step, facts.attempt):
            log.warning("%s was rolled back: deleted", folder)
            checkpoint.discard(folder)


def refuse_other_config(run_dir: Path, config: Config, *, allow_change: bool) -> None:
    """Compare with the newest manifest that can be read, before anything is started or written."""
    facts = newest_facts(run_dir)
    if facts is not None:
        compare(facts, config, run_dir, allow_change=allow_change)


def refuse_other_data(run_dir: Path, config: Config) -> list[Manifest]:
    """The data set is there and is the one of the run, and there are steps left to do: asked before a start counts.

    Returns what the data set says of itself.
    """
    manifests, facts = load_manifests(specs(config.data)), newest_facts(run_dir)
    if facts is None:
        return manifests
    one = facts.cursor["manifest_hash"]
    known = [{manifest.hash, *(version.hash for version in manifest.history)} for manifest in manifests]
    saved = [steps[-1][1] for steps in facts.cursor.get("sources", [[[0, one, None]]])]
    if len(saved) != len(known) or any(hash_ not in hashes for hash_, hashes in zip(saved, known, strict=True)):
        raise UserError(
            f"data.shards is {config.data.shards}; it is another data set than that of {run_dir} (manifest "
            f"{manifests[0].hash[:12]} instead of {saved[0][:12]}): name the right one, or use "
            f"run.dir=NEW train.init_from={run_dir}"
        )
    if facts.step > config.train.steps:
        raise UserError(
            f"train.steps is {config.train.steps}; it must be at least {facts.step}, the step of {run_dir}: set more, "
            "with --change"
        )
    return manifests


def newest_facts(run_dir: Path) -> Facts | None:
    """What the newest checkpoint whose manifest can be read says; its tensors are not looked at."""
    for folder in checkpoint.candidates(run_dir):
        try:
            return Checkpoint(folder).facts
        except BrokenCheckpoint:
            continue
    return None


def compare(facts: Facts, config: Config, run_dir: Path, *, allow_change: bool) -> list[str]:
    """C8: free keys may differ, some with --change, the others never. Returns what is to be recorded.

    Raises `UserError` with all problems at once.
    """
    saved, found = parse(facts.config)
    if saved is None:
        raise UserError(
            f"the config in the checkpoint of step {facts.step} is not readable ({'; '.join(found)}): use the tubelet "
            "that wrote it"
        )
    recorded: list[str] = []
    refused: list[str] = []
    for key, old, new, rule in differences(saved, config):
        line = f"{key} was {old} and is {new}"
        if rule == "recorded" and allow_change:
            recorded.append(f"step {facts.step}: {line}")
        elif rule == "recorded":
            refused.append(f"{line}; add --change to go on with the new value")
        elif rule == "refused":
            refused.append(f"{line}; that makes another run: use run.dir=NEW train.init_from={run_dir}")
    if refused:
        raise UserError(f"{run_dir} holds a run with another config:\n  " + "\n  ".join(refused))
    return recorded


def load_initial(model: torch.nn.Module, path: Path) -> list[str]:
    """Weights for a new run from a run folder, a checkpoint or an export (`train.init_from`).

    Returns the names that keep their random start (new heads). Raises `UserError` where a weight has another shape
    than the model's, or none fits.
    """
    tensors = load_state(path) if (path / "config.json").is_file() else checkpoint.load_parameters(path)[0]
    wanted = dict(model.named_parameters())
    wrong = [
        f"{name} has shape {list(tensors[name].shape)}, the model's is {list(parameter.shape)}"
        for name, parameter in wanted.items()
        if name in tensors and tensors[name].shape != parameter.shape
    ]
    if wrong:
        raise UserError(
            f"train.init_from is {path}; it must fit model.size and data, and {len(wrong)} weights do not, the first: "
            f"{wrong[0]}: name another folder, or use the model.size and data.* of that run"
        )
    if not any(name in tensors for name in wanted):
        raise UserError(f"train.init_from is {path}; it has no weight of this model: check the folder and model.size")
    model.load_state_dict({name: tensor for name, tensor in tensors.items() if name in wanted}, strict=False)
    return [name for name in wanted if name not in tensors]
