"""One rank of a RankPool: reads jobs from stdin, answers through a pipe of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import traceback
from pathlib import Path


def main() -> None:
    answers = os.fdopen(int(os.environ["ANSWERS"]), "w")
    import torch

    from pretrain.engine import join_ranks
    from pretrain.world import world_from_environment

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    join_ranks(world_from_environment(), 300)
    spec = importlib.util.spec_from_file_location("jobs", Path(__file__).with_name("jobs.py"))
    assert spec is not None
    assert spec.loader is not None
    jobs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(jobs)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"result": getattr(jobs, request["job"])(**request["arguments"])}
        except Exception:
            answer = {"error": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


main()
