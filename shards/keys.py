"""From the name of a sample, of its source or of its group to the samples of a data set.

packed:  a key        `train-000000017` ends with a number that rises with the row: found by halving
         a source     content.jsonl says which samples a packed file became
         a group      its crc32 is in the records, the description in the tar confirms it
         the rest     every description is read: one or two requests per sample
tars made by others   SPLIT.names.gz lists all names
"""

from __future__ import annotations

import bisect
import io
import json
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import numpy as np

from shards import storage
from shards.content import read_content
from shards.errors import UserError
from shards.foreignset import PRESET
from shards.layout import PARTS_NAME, group_number
from shards.manifest import load_manifest, manifest_url, shard_url
from shards.names import read_names
from shards.reader import SplitReader
from shards.rejected import read_rejected
from shards.tarscan import STEM
from shards.tarstream import BLOCK_BYTES, member_name

OUR_KEY = re.compile(r"(?P<split>[A-Za-z0-9_]+)-(?:(?P<part>.+)-)?(?P<number>\d{9,})")
ROWS_AT_A_TIME = 1 << 20
NEAR_BYTES = 16 << 10
"""A sample's description lies behind its video."""
NUM_READERS = 32
ROWS_IN_FLIGHT = 2048
NUM_SHOWN = 8


@dataclass(frozen=True, order=True)
class Found:
    """One sample that a word names."""

    split: str
    sample: int
    key: str


def find_samples(
    url: str, words: Sequence[str], on_scan: Callable[[int, int], None] | None = None
) -> dict[str, list[Found]]:
    """Word -> the samples that it names, in all splits. Raises UserError, naming them, if a word names none.

    `on_scan` is told (samples read, of how many) where every description has to be read.
    """
    manifest = load_manifest(url)
    folder = storage.parent(manifest_url(url))
    splits = [_Names(SplitReader(folder, manifest, name), folder) for name in sorted(manifest.splits)]
    looks = _by_list(splits, words) if manifest.preset == PRESET else _in_packed(splits, words, on_scan)
    found: dict[str, list[Found]] = {word: [] for word in words}
    for word, sample in looks:
        found[word].append(sample)
    unknown = [word for word in words if not found[word]]
    if unknown:
        more = f" and {len(unknown) - NUM_SHOWN} more" if len(unknown) > NUM_SHOWN else ""
        rejected = {row.path: f"; {row.path} was rejected ({row.detail})" for row in read_rejected(folder)}
        more += "".join(rejected.get(word, "") for word in unknown[:NUM_SHOWN])
        raise UserError(
            f"{url} holds no sample, source or group named {', '.join(map(repr, unknown[:NUM_SHOWN]))}{more}; each "
            "name must be one of the data set: correct it (nothing was changed)"
        )
    return {word: sorted(set(samples)) for word, samples in found.items()}


def _by_list(splits: Sequence[_Names], words: Sequence[str]) -> Iterator[tuple[str, Found]]:
    for split in splits:
        yield from split.by_list(set(words))


def _in_packed(
    splits: Sequence[_Names], words: Sequence[str], on_scan: Callable[[int, int], None] | None
) -> Iterator[tuple[str, Found]]:
    missing = set(words)
    for split in splits:
        for way in (split.by_number, split.by_source, split.by_group):
            for word, sample in way(set(words)):
                missing.discard(word)
                yield word, sample
    ours = {split.name for split in splits}
    missing = {word for word in missing if not ((key := OUR_KEY.fullmatch(word)) and key["split"] in ours)}
    num_done, num_total = 0, sum(map(len, splits))
    for split in splits if missing else ():
        for num_read, hits in split.by_reading(missing):
            yield from hits
            if on_scan is not None:
                on_scan(num_done + num_read, num_total)
        num_done += len(split)


class _Names:
    """The names of one split's samples, from its tars."""

    def __init__(self, reader: SplitReader, folder: str) -> None:
        self.name, self._records, self._shards = reader.name, reader.records, reader.split.shards
        self._folder, self._index = folder, reader.split.index
        self._parts = [_part_of(shard.name) for shard in self._shards]

    def __len__(self) -> int:
        return len(self._records)

    # ------------------------------------------------------------------ four ways

    def by_number(self, words: set[str]) -> Iterator[tuple[str, Found]]:
        """Keys that packing made: within a part, numbers rise with rows."""
        for word in words:
            key = OUR_KEY.fullmatch(word)
            if key is None or key["split"] != self.name:
                continue
            shards = [number for number, part in enumerate(self._parts) if part == (key["part"] or "")]
            first, end = (self._first_row(shards[0]), self._first_row(shards[-1] + 1)) if shards else (0, 0)
            row = bisect.bisect_left(range(first, end), int(key["number"]), key=self._number) + first
            if row < end and self._key(row) == word:
                yield word, Found(self.name, row, word)

    def by_source(self, words: set[str]) -> Iterator[tuple[str, Found]]:
        """Files that were packed."""
        for part in dict.fromkeys(self._parts) if words else ():
            prefix = f"{PARTS_NAME}/{part}/" if part else ""
            shards = {shard.name: number for number, shard in enumerate(self._shards)}
            for content in read_content(storage.join(self._folder, prefix)) or ():
                if content.source in words and content.split == self.name:
                    for tar, offset in content.samples:
                        row = self._row_at(shards.get(prefix + tar), offset)
                        if row is not None:
                            yield content.source, Found(self.name, row, self._key(row))

    def by_group(self, words: set[str]) -> Iterator[tuple[str, Found]]:
        """Names whose crc32 is in the records; another name with the same crc32 is told apart by the tar."""
        numbers = np.array([group_number(word) for word in words], np.uint32)
        for start in range(0, len(self._records) if words else 0, ROWS_AT_A_TIME):
            groups = self._records["group"][start : start + ROWS_AT_A_TIME]
            for row in (np.flatnonzero(np.isin(groups, numbers)) + start).tolist():
                key, names = self._names(row)
                for word in words & names:
                    yield word, Found(self.name, row, key)

    def by_list(self, words: set[str]) -> Iterator[tuple[str, Found]]:
        """Samples of tars made by others."""
        for row, names in enumerate(read_names(self._folder, self._index, len(self))):
            for word in words.intersection(names):
                yield word, Found(self.name, row, names[0])

    def by_reading(self, words: set[str]) -> Iterator[tuple[int, list[tuple[str, Found]]]]:
        """(rows read so far, what was found since) of all descriptions."""
        with ThreadPoolExecutor(NUM_READERS, thread_name_prefix="names") as pool:
            rows = iter(range(len(self)))
            while batch := list(islice(rows, ROWS_IN_FLIGHT)):
                read = zip(batch, pool.map(self._names, batch), strict=True)
                hits = [(word, Found(self.name, row, key)) for row, (key, names) in read for word in words & names]
                yield batch[-1] + 1, hits

    # ------------------------------------------------------------------ rows and bytes

    def _first_row(self, shard: int) -> int:
        return bisect.bisect_left(range(len(self._records)), shard, key=lambda row: int(self._records["shard"][row]))

    def _row_at(self, shard: int | None, offset: int) -> int | None:
        """The row of a place; None where the index has none (a duplicate that was left out)."""
        if shard is None:
            return None
        rows = self._records[self._first_row(shard) : self._first_row(shard + 1)]
        found = np.flatnonzero(rows["offset"] == offset)
        return self._first_row(shard) + int(found[0]) if len(found) else None

    def _key(self, row: int) -> str:
        record = self._records[row]
        shard = int(record["shard"])
        try:
            name = member_name(lambda at, size: self._read(shard, at, size), int(record["offset"]))
        except tarfile.HeaderError as error:
            raise UserError(
                f"{self._shards[shard].name} has no tar header before sample {row} of {self.name}; it must be the "
                "tar that was indexed: copy it again (tubelet verify says what else is wrong)"
            ) from error
        stem = STEM.fullmatch(name)
        return name if stem is None else stem[1]

    def _number(self, row: int) -> int:
        key = OUR_KEY.fullmatch(self._key(row))
        return -1 if key is None else int(key["number"])

    def _names(self, row: int) -> tuple[str, set[str]]:
        """A sample's key, and the source and group of its description."""
        key = self._key(row)
        return key, set(map(str, filter(None, (self._description(row, key).get(name) for name in ("source", "group")))))

    def _description(self, row: int, key: str) -> dict[str, Any]:
        """KEY.json, which packing puts behind the video."""
        record = self._records[row]
        shard, start = int(record["shard"]), int(record["offset"]) + int(record["size"])
        start += -start % BLOCK_BYTES
        size = min(NEAR_BYTES, self._shards[shard].num_bytes - start)
        return _json_in(self._read(shard, start, size), key)

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        return storage.read_range(shard_url(self._folder, self._shards[shard].name), offset, size)


def _part_of(name: str) -> str:
    """The part that a tar came with, "" for none."""
    words = name.split("/")
    return words[1] if words[0] == PARTS_NAME and len(words) > 2 else ""


def _json_in(data: bytes, key: str) -> dict[str, Any]:
    """The description of a sample, at the beginning of this piece of a tar; empty where there is none."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            member = tar.next()
            file = None if member is None or member.name != f"{key}.json" else tar.extractfile(member)
            return {} if file is None else cast("dict[str, Any]", json.loads(file.read()))
    except (tarfile.TarError, ValueError):
        return {}  # no tar any more; verify tells
