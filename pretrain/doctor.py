"""Is this machine, or allocation, fit to train? `python -m pretrain.doctor CONFIG [section.key=value …] [--json]`

One rank per GPU, started as the trainer is; `tubelet doctor` does that. Rank 0 prints the report and writes it into the
run folder (checkup.py). Exit codes: 0 fit (perhaps with warnings), 2 a check failed. Nothing of a run is touched.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from pretrain.patience import Hurry, Limits

NOT_FIT = 2


def main(arguments: Sequence[str] | None = None, limits: Limits | None = None) -> NoReturn:
    """One rank from start to end. Ends without cleaning up: work that hangs may have been left in a thread."""
    words = [word for word in (sys.argv[1:] if arguments is None else arguments) if not word.startswith("--local_rank")]
    limits = limits or Limits()
    hurry = Hurry(limits.grace_s)
    code = NOT_FIT
    try:
        from pretrain.checkup import take_part  # after Hurry, which must not wait for torch

        code = take_part(words, limits, hurry)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
