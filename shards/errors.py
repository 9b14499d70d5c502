"""The two kinds of trouble that are not bugs: a mistake of the user, and a sample that cannot be used."""

from __future__ import annotations


class UserError(Exception):
    """A mistake its reader can mend. The text names what, the value, the rule and the remedy.

    Printed without a traceback by `launch/cli.py` alone; exit code 93 inside a run, 2 on the command line.
    """


class SampleError(Exception):
    """One sample cannot be used. `reason` is a short word for counters and the journal; the text says more."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail

    def bare(self) -> SampleError:
        """The same without its traceback and cause, to keep."""
        return SampleError(self.reason, self.detail)
