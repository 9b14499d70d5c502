"""A rank that kills its whole process group with SIGKILL at one seam of a save: `die_at.py SEAM STEP CONFIG …`.

The product has no hooks for this; its functions are wrapped from outside.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from pretrain import checkpoint, saver
from pretrain.ledger import Ledger
from pretrain.train import main


def die(*_: Any, **__: Any) -> NoReturn:
    os.killpg(os.getpgrp(), signal.SIGKILL)
    raise AssertionError("unreachable")


def before(owner: Any, name: str, is_time: Callable[..., bool]) -> None:
    original = getattr(owner, name)

    def wrapped(*arguments: Any, **named: Any) -> Any:
        if is_time(*arguments, **named):
            die()
        return original(*arguments, **named)

    setattr(owner, name, wrapped)


seam, step = sys.argv[1], int(sys.argv[2])
if seam == "between step and ledger":
    before(Ledger, "record", lambda _, at, *rest: at == step - 1)
elif seam == "between ledger and rename":
    before(Path, "rename", lambda path, to: path.name.startswith(f"step-{step:06d}") and path.suffix == ".tmp")
elif seam == "between rename and pointer":
    before(checkpoint, "write_atomic", lambda path, data: path.name == "latest" and f"{step:06d}".encode() in data)
elif seam == "inside the write":
    original_write = checkpoint.write_tensors

    def half(path: Path, tensors: Any) -> Any:
        written = original_write(path, tensors)
        if f"step-{step:06d}" in str(path):
            os.truncate(path, path.stat().st_size // 2)
            die()
        return written

    checkpoint.write_tensors = half
elif seam == "after the lineage":
    original_commit = saver.commit_lineage

    def commit(folder: Path, at: int, *rest: Any) -> Any:
        head = original_commit(folder, at, *rest)
        return die() if at == step else head

    saver.commit_lineage = commit
else:
    raise SystemExit(f"no seam {seam!r}")
main(sys.argv[3:])
