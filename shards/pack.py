"""Videos become a packed data set: convert each file in a child, choose splits, shuffle, write tars, index them.

    files ─ staging (one child per core) ─ duplicates, splits ─ tars ─ index, manifest ─ destination (folder or URL)

A kill at any moment costs the files that were just being converted: the same command goes on, and gives the same
bytes. The same files and options give the same bytes, whatever the number of workers. What is made is

    the whole data set                     pack(src, dst, options)
    one share of it, for a job array       pack(src, dst, options, share=Slice(3, 16))     shards/merge.py joins them
    more of it, added to what is there     pack(more, dst, options, append=True)           joined at once
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from shards import storage
from shards.content import find_duplicates
from shards.convert import Outcome, sha256_of_file
from shards.destination import Destination, destination
from shards.errors import UserError
from shards.layout import PACKED_NAME, REJECTED_NAME, Manifest
from shards.manifest import build_manifest, load_manifest
from shards.merge import known_content, merge, settled_groups
from shards.options import PackOptions
from shards.rejected import DUPLICATE, Rejection, rejected_text
from shards.slice import Slice
from shards.sliceplan import check_plan
from shards.sources import Listing, Source, list_sources
from shards.splits import SplitRule, choose_splits, leaking
from shards.staging import PackProgress, Report, convert_all, name_fault, printable, staging_id, working_folder
from shards.summary import PackSummary, find_warnings
from shards.tars import Item, write_tars

__all__ = ["PackOptions", "PackProgress", "PackSummary", "Slice", "pack"]


@dataclass(frozen=True)
class _Work:
    """One packed folder to be made, with all that decides about its bytes."""

    listing: Listing
    """Its files, and what was left aside while looking."""
    staged: dict[str, tuple[str, int]]
    """Source name -> its staging id, its size."""
    part: str = ""
    """Name of this part of a larger data set."""
    title: str = ""
    """The part in words."""
    rule: SplitRule | None = None
    """None: chosen over the files that turn out to be usable."""
    settled: dict[str, tuple[str, ...]] | None = None
    """Group -> the splits that it is in already."""
    known: dict[bytes, str] | None = None
    """sha256 -> the file with these bytes that is in the data set already."""
    base: str = ""
    """Hash of the manifest that this is added to."""


def pack(
    src: Path,
    dst: Path | str,
    options: PackOptions,
    progress: Report | None = None,
    *,
    share: Slice | None = None,
    append: bool = False,
    work: Path | None = None,
) -> PackSummary:
    """Pack a folder of videos, a CSV or JSONL list of them, or one video into the new folder or URL `dst`.

    Args:
        src: The folder, list or video.
        dst: Where the data set is made; with `share` or `append`, its folder parts/ gets one more part.
        options: What samples and tars look like.
        progress: Told how far it is.
        share: Pack this share of the files only; `merge` joins the shares.
        append: `dst` is a data set: add to it. Its samples keep their numbers, its groups their splits.
        work: Folder to work in where `dst` is a URL. Default: the current one.

    Raises UserError for what the user must mend (nothing to pack, nothing readable, `dst` not usable). Files that
    cannot be used are not errors: they are listed with the reason in rejected.jsonl and counted in the summary.
    """
    options.check()
    url = str(dst)
    report = progress or _say_nothing
    if append and share is not None:
        raise UserError(f"--append does not go with --slice {share}; what is added is packed in one go: leave one out")
    try:
        if append:
            return _append(src, url, options, report, work)
        if share is not None:
            return _pack_slice(src, url, options, report, share, work)
        target = destination(url, work, "")
        listing = _list(src, target)
        return _pack_folder(src, _Work(listing, _stage(listing, options)), target, options, report)
    except OSError as error:
        remedy = "choose another, or free some space"
        if storage.local_path(url) is None:
            remedy = f"check the URL and the credentials (AWS_...), make room in {work or 'the current folder'}"
        raise UserError(
            f"{url} cannot be written ({error}); it must be in a place with room that you may write to: {remedy} and "
            "start again (finished files are kept)"
        ) from error


def _pack_slice(
    src: Path, url: str, options: PackOptions, report: Report, share: Slice, work: Path | None
) -> PackSummary:
    target = destination(url, work, share.part)
    listing = _list(src, destination(url, work, ""))
    check_plan(url, share, listing, options)
    title = f"slice {share}"
    if (there := target.manifest()) is not None and not target.work.exists():
        return _already(there, title)
    rule = choose_splits(listing.sources, options.val_fraction)  # over all files: so all slices agree
    mine = replace(listing, sources=listing.sources[share.number :: share.count])
    made = _Work(mine, _stage(mine, options), share.part, title, rule)
    return _pack_folder(src, made, target, options, report)


def _append(src: Path, url: str, options: PackOptions, report: Report, work: Path | None) -> PackSummary:
    whole = destination(url, work, "")
    base = whole.manifest()
    if base is None:
        raise UserError(f"{url} holds no data set; --append adds to one that is there: leave --append out")
    listing = _list(src, whole)
    staged = _stage(listing, options)
    # Named after what it is made of: the same command again finds the same part.
    part = f"more-{_digest(_Work(listing, staged), options)[:12]}"
    target = destination(url, work, part)
    if (there := target.manifest()) is not None and not target.work.exists():
        summary = _already(there, part)
    else:
        settled = settled_groups(url, {source.group for source in listing.sources})
        rule = choose_splits(listing.sources, options.val_fraction, settled)
        made = _Work(listing, staged, part, f"added as {part}", rule, settled, known_content(url), base.hash)
        summary = _pack_folder(src, made, target, options, report)
    joined = merge(url)
    return replace(summary, manifest=joined.manifest, warnings=(*summary.warnings, *joined.warnings))


def _already(there: Manifest, title: str) -> PackSummary:
    return PackSummary(there, 0, 0, 0, {}, "", (), title, is_old=True)


def _list(src: Path, whole: Destination) -> Listing:
    exclude = (whole.place, whole.work) if whole.is_local else (whole.work,)
    return list_sources(src, exclude)


def _stage(listing: Listing, options: PackOptions) -> dict[str, tuple[str, int]]:
    return {source.name: staging_id(source, options) for source in listing.sources if name_fault(source) is None}


def _digest(made: _Work, options: PackOptions) -> str:
    rows = [[source.name, source.label, source.split, source.group] for source in made.listing.sources]
    text = json.dumps([options.digest, made.base, rows, made.staged])
    return hashlib.sha256(text.encode()).hexdigest()


def _pack_folder(src: Path, made: _Work, target: Destination, options: PackOptions, report: Report) -> PackSummary:
    """Make one packed folder and put it in its place; or only what is missing of that, if it was interrupted."""
    inputs = _digest(made, options)
    there, packed = target.manifest(), target.packed()
    if there is not None and packed is not None and packed["inputs"] == inputs:
        if target.work.exists():
            with working_folder(target.work, target.url):
                shutil.rmtree(target.work)
        return _already(there, target.url)
    target.check_free()
    with working_folder(target.work, target.url):
        out = target.work / "out"
        path = out / PACKED_NAME
        packed = json.loads(path.read_text()) if path.exists() else None
        num_reused = len(made.staged)
        if packed is None or packed["inputs"] != inputs:
            packed, num_reused = _make(src, made, out, inputs, options, report, spread=not target.is_local)
        manifest = load_manifest(str(out))
        target.take(out, manifest, report)
        shutil.rmtree(target.work)
    return PackSummary(
        manifest=manifest,
        num_files=packed["num_files"],
        num_ignored_files=made.listing.num_ignored_files,
        num_reused=num_reused,
        rejected=packed["rejected"],
        split_rule=packed["split_rule"],
        warnings=tuple(packed["warnings"]),
        title=made.title,
    )


def _make(
    src: Path, made: _Work, out: Path, inputs: str, options: PackOptions, report: Report, *, spread: bool
) -> tuple[dict[str, Any], int]:
    """Fill `out`, packed.json last. Returns that, and the number of files that were converted before."""
    work = out.parent
    sources = made.listing.sources
    leaks = leaking(sources, made.settled or {})
    fresh = [source for source in sources if source.name not in leaks]
    old = _known_before(fresh, made.known or {}, options)
    fresh = [source for source in fresh if source.name not in old]
    outcomes, num_reused = convert_all(fresh, made.staged, work, options, report)
    rejected = old | {name: outcome for name, outcome in outcomes.items() if outcome.reason}
    rejected |= {name: Outcome(reason="leak", detail=detail) for name, detail in leaks.items()}
    hashes = {name: outcome.sha256 for name, outcome in outcomes.items() if not outcome.reason}
    rejected |= {
        name: Outcome(reason=DUPLICATE, detail=f"has the same bytes as {first}")
        for name, first in find_duplicates(hashes, made.known or {}).items()
    }
    if len(rejected) == len(sources) and (made.rule is None or made.base):  # a slice may well be empty
        shutil.rmtree(work)
        raise _nothing_usable(src, rejected)
    used = [source for source in sources if source.name not in rejected]
    rule = made.rule or choose_splits(used, options.val_fraction)
    items = [
        Item(source, outcomes[source.name].sha256, number, piece)
        for source in used
        for number, piece in enumerate(outcomes[source.name].pieces)
    ]
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    for num_done in write_tars(out, items, rule.split_of, options, part=made.part, spread=spread):
        report(PackProgress("write", num_done, len(items), len(items), len(rejected)))
    manifest = build_manifest(out, options.preset)
    rows = [Rejection(printable(name), row.reason, row.detail, made.part) for name, row in sorted(rejected.items())]
    storage.write_atomic(out / REJECTED_NAME, rejected_text(rows))
    packed: dict[str, Any] = {
        "inputs": inputs,
        "options": {name: value for name, value in asdict(options).items() if name != "workers"},
        "num_files": len(sources),
        "rejected": dict(Counter(outcome.reason for outcome in rejected.values())),
        "split_rule": rule.text,
        "warnings": [*find_warnings(made.listing, rejected, manifest), *rule.warnings],
    }
    storage.write_atomic(out / PACKED_NAME, (json.dumps(packed, indent=1) + "\n").encode())
    return packed, num_reused


def _known_before(sources: list[Source], known: dict[bytes, str], options: PackOptions) -> dict[str, Outcome]:
    """The files whose bytes the data set has already: set aside before anything is converted."""
    if not known:
        return {}

    def look(source: Source) -> tuple[str, Outcome] | None:
        try:
            first = known.get(bytes.fromhex(sha256_of_file(source.path)))
        except OSError:  # it is rejected where it is opened to be converted
            return None
        return (
            None if first is None else (source.name, Outcome(reason=DUPLICATE, detail=f"has the same bytes as {first}"))
        )

    with ThreadPoolExecutor(options.workers or None) as pool:  # hashing leaves the interpreter free
        return dict(found for found in pool.map(look, sources) if found is not None)


def _nothing_usable(src: Path, rejected: dict[str, Outcome]) -> UserError:
    name, outcome = next(iter(rejected.items()))
    reasons = Counter(outcome.reason for outcome in rejected.values())
    counts = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))
    what, remedy = "no usable video", "mend or replace them"
    if DUPLICATE in reasons:  # the first of several alike is used, so these are in the data set already
        what, remedy = "nothing new", "nothing was added; name a folder with other files"
    return UserError(
        f"{src} holds {what}: all {len(rejected)} files were rejected ({counts}; for example "
        f"{printable(name)}: {outcome.reason}, {outcome.detail}); {remedy}"
    )


def _say_nothing(progress: PackProgress) -> None:
    """For callers that show no progress."""
