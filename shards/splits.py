"""Which sample goes into which split: as given, else by a hash of the group's name that nothing else can change."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shards.sources import Source

HASH_RANGE = 2**64


@dataclass(frozen=True)
class SplitRule:
    """The split of every source, and the rule in words."""

    split_of: dict[str, str]
    """Source name -> split."""
    text: str
    warnings: tuple[str, ...]


def choose_splits(
    sources: Sequence[Source], val_fraction: float, settled: Mapping[str, tuple[str, ...]] | None = None
) -> SplitRule:
    """Keep given splits; put the others into train or val by group.

    A group goes to val where the hash of its name falls below `val_fraction`: adding files moves no other. So that a
    small data set has both parts, the group with the lowest hash goes to val if none does, and the one with the
    highest to train. A group with a file whose split is given follows that file.

    `settled` is for what is added to a data set: group -> the splits that it is in there already. Such a group stays
    where it is; the others go by their hash alone.
    """
    given: dict[str, set[str]] = {}
    for source in sources:
        if source.group in (settled or {}):
            given.setdefault(source.group, set()).update((settled or {})[source.group])
        elif source.split is not None:
            given.setdefault(source.group, set()).add(source.split)
    free = sorted({source.group for source in sources} - given.keys(), key=_position)
    chosen = {group: "val" if _position(group) < val_fraction * HASH_RANGE else "train" for group in free}
    if settled is None:
        used = {split for splits in given.values() for split in splits} | set(chosen.values())
        if val_fraction > 0 and "val" not in used and len(free) + len(given) >= 2 and free:
            chosen[free[0]] = "val"
        if "train" not in used and free:
            chosen[free[-1]] = "train"
    followed = {group: sorted(splits)[0] for group, splits in given.items()}
    split_of = {source.name: source.split or chosen.get(source.group) or followed[source.group] for source in sources}
    return SplitRule(split_of, _words(sources, chosen, val_fraction), _leaks(given))


def leaking(sources: Sequence[Source], settled: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """Files given to another split than their group is in already: source name -> what is wrong with that."""
    return {
        source.name: f"given to {source.split}, but its group {source.group!r} is in {settled[source.group][0]} already"
        for source in sources
        if source.split is not None and source.split not in settled.get(source.group, (source.split,))
    }


def _position(group: str) -> int:
    return int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big")


def _words(sources: Sequence[Source], chosen: dict[str, str], val_fraction: float) -> str:
    if not chosen:
        return "splits: as given"
    num_val = sum(split == "val" for split in chosen.values())
    unit = "source file" if all(source.group == source.name for source in sources) else "group"
    text = (
        f"splits: by {unit}, fixed by a hash of its name, {val_fraction:.0%} to val: "
        f"{len(chosen) - num_val} train, {num_val} val"
    )
    if len(chosen) == 1:
        text += " (one alone cannot be split: add another or give splits)"
    return text + ("; the others as given" if any(source.split for source in sources) else "")


def _leaks(given: dict[str, set[str]]) -> tuple[str, ...]:
    both = sorted(group for group, splits in given.items() if len(splits) > 1)
    if not both:
        return ()
    return (f"{len(both)} groups are in more than one given split (for example {both[0]!r}): held-out data leaks",)
