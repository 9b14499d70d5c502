"""What all ranks know together, once per step and one step late: stop or go on, and what became of a save (C9).

One small reduction over gloo, begun in one step and read in the next: no step waits for it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from pretrain.agree import Agreement
from pretrain.saver import Saver, Settled
from pretrain.stop import Stop, StopFlag

FINISH_POLL_S = 0.02


class Rounds:
    """Every rank calls the same methods in the same order."""

    def __init__(self, agreement: Agreement, flag: StopFlag, saver: Saver) -> None:
        self._agreement, self._flag, self._saver = agreement, flag, saver
        self._settled: list[Settled] = []
        self._pending = agreement.start_maxima(self._values())

    def next(self) -> Stop:
        """What all ranks knew one step ago; starts the next round. Call once per step."""
        stop = self._take(self._pending.result())
        self._pending = self._agreement.start_maxima(self._values())
        return stop

    def finish_save(self) -> None:
        """Wait until the save in flight, if there is one, is committed or given up."""
        while self._saver.step_in_flight is not None:
            self.next()
            time.sleep(FINISH_POLL_S)
        self._saver.join()

    def settled(self) -> list[Settled]:
        """What became of saves since the last call."""
        settled, self._settled = self._settled, []
        return settled

    def close(self) -> None:
        """Finish the round under way, so that no rank leaves while another waits for it."""
        self._pending.result()

    def _values(self) -> list[int]:
        return [self._flag.read(), *self._saver.news()]

    def _take(self, agreed: Sequence[int]) -> Stop:
        settled = self._saver.settle(agreed[1:])
        if settled is not None:
            self._settled.append(settled)
        return Stop(agreed[0])
