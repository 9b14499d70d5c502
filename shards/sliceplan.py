"""Slices: the shares of one packing that the tasks of a job array make, each a part of the data set of its own.

DST/parts/plan.json            what all slices must agree on; written by the first
DST/parts/0003-of-0016/        slice 3/16, a packed folder
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import Any, cast

from shards import storage
from shards.errors import UserError
from shards.layout import MANIFEST_NAME, PARTS_NAME
from shards.options import PackOptions
from shards.slice import Slice
from shards.sources import Listing

PLAN_NAME = "plan.json"


def check_plan(url: str, share: Slice, listing: Listing, options: PackOptions) -> None:
    """Write down what is packed, or compare it with what the slices before this one wrote. Raises UserError."""
    where = storage.join(url, f"{PARTS_NAME}/{PLAN_NAME}")
    rows = [[source.name, source.label, source.split, source.group] for source in listing.sources]
    plan: dict[str, Any] = {
        "slices": share.count,
        "files": len(rows),
        "names": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
        **{name: value for name, value in asdict(options).items() if name != "workers"},
    }
    text = json.dumps(plan, indent=1) + "\n"
    plan = json.loads(text)
    if not storage.exists(where):
        _check_empty(url)
        storage.write_bytes(where, text.encode())
    try:
        agreed = cast("dict[str, Any]", json.loads(storage.read_bytes(where)))
    except ValueError as error:
        raise UserError(f"{where} is damaged ({error}); remove it, then every slice checks it again") from error
    for name in dict.fromkeys((*plan, *agreed)):
        if agreed.get(name) != plan.get(name):
            what = "the list of files" if name == "names" else name
            values = "" if name == "names" else f" ({agreed.get(name)} there, {plan.get(name)} here)"
            raise UserError(
                f"slice {share} differs from the slices before it in {what}{values}; all must be packed alike: give "
                f"the same files and options, or remove {storage.join(url, PARTS_NAME)} and begin again"
            )


def _check_empty(url: str) -> None:
    """Slices that begin at the same moment make `parts` meanwhile; it also stays where a damaged plan was removed."""
    local = storage.local_path(url)
    names = {path.name for path in local.iterdir()} if local is not None and local.is_dir() else set[str]()
    is_taken = bool(names - {PARTS_NAME})
    if is_taken or storage.exists(storage.join(url, MANIFEST_NAME)):
        raise UserError(
            f"{url} exists and is not empty; slices begin a data set: choose another folder (to add to one: --append)"
        )
