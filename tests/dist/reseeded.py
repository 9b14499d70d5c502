"""A rank whose model starts from other random weights: `reseeded.py NUMBER CONFIG …`; 1 is the config's own seed."""

from __future__ import annotations

import sys
from typing import Any

from pretrain import setup
from pretrain.train import main

number, original = int(sys.argv[1]), setup.Pretraining


def reseeded(*arguments: Any, seed: int, **named: Any) -> Any:
    return original(*arguments, seed=seed + 1000 * (number - 1), **named)


setup.Pretraining = reseeded
main(sys.argv[2:])
