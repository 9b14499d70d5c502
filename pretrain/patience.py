"""How long a check-up waits, and how long still once a launcher has told this rank to end. No torch."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass
from types import FrameType


@dataclass(frozen=True)
class Limits:
    """How long a check-up waits, in seconds."""

    come_up_s: float = 180.0
    """For all ranks to be there: Python and torch may have to be read over a slow network."""
    phase_s: float = 60.0
    """For one phase of work."""
    slack_s: float = 10.0
    """For the answers to come in after that, and for ranks to say goodbye."""
    grace_s: float = 15.0
    """Between SIGTERM and the end. Launchers send it when one rank has died, and kill the others half a minute later:
    time enough to say which one it was."""


class Hurry:
    """SIGTERM, noticed from the very start of a rank on: importing torch takes seconds in which a rank may die."""

    def __init__(self, grace_s: float) -> None:
        self.until_s = float("inf")
        """When to have ended, on the monotonic clock."""
        self._grace_s = grace_s
        signal.signal(signal.SIGTERM, self._notice)

    def __bool__(self) -> bool:
        return self.until_s < float("inf")

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self.until_s = min(self.until_s, time.monotonic() + self._grace_s)
