"""What an audit found, and how it is told: to scripts as a code and counts, to people in lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

EXACT, VIOLATED, EXACT_BUT_LISTED = 0, 1, 3
NUM_SHOWN = 8

_COUNTS = ("clips", "rows", "epochs", "segments", "commits", "withheld", "attempts")
_KINDS = {
    "lineage": "the chain of commits is broken",
    "journal": "the journal cannot be read",
    "file": "ledger files missing or changed",
    "damaged": "rows damaged",
    "misplaced": "rows in the wrong place",
    "repeated": "clips consumed more than once",
    "missing": "clips never consumed",
    "order": "wrong sample asked for",
    "substitute": "wrong sample delivered",
    "withheld": "clips consumed in steps that were not to be applied",
    "bytes": "wrong bytes decoded",
    "epoch": "epochs not complete",
}


@dataclass(frozen=True)
class AuditResult:
    """The verdict for scripts (`exit_code`, `counts`) and for people (`lines`)."""

    exit_code: int
    """0 exact; 3 exact but for what the journal lists as replaced or withheld; 1 violated."""
    lines: tuple[str, ...]
    counts: dict[str, int]
    substituted: dict[str, int]
    """Clips replaced, by reason."""

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


@dataclass
class Findings:
    """What an audit counts on its way."""

    counts: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(_COUNTS, 0)))
    substituted: Counter[str] = field(default_factory=Counter[str])
    """Clips replaced, by reason."""
    _wrong: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    _num_wrong: Counter[str] = field(default_factory=Counter[str])
    _listed: list[str] = field(default_factory=list[str])

    def wrong(self, kind: str, text: str, num: int = 1) -> None:
        """Count a violation; only the first few of a kind keep their text."""
        self._num_wrong[kind] += num
        shown = self._wrong.setdefault(kind, [])
        if len(shown) < NUM_SHOWN:
            shown.append(text)

    def note(self, text: str) -> None:
        """What the journal allows is told, the first few of it."""
        if len(self._listed) < NUM_SHOWN:
            self._listed.append(text)

    def result(self, num_steps: int, num_clips: int, num_samples: int) -> AuditResult:
        """The verdict on so many steps, the clips that were due in them, and a data set of so many samples."""
        counts = self.counts
        counts.update(substituted=self.substituted.total())
        counts.update({f"wrong_{kind}": num for kind, num in self._num_wrong.items()})
        has_list = bool(self.substituted or counts["withheld"])
        code = VIOLATED if self._num_wrong else EXACT_BUT_LISTED if has_list else EXACT
        lines = tuple(self._lines(code, num_steps, num_clips, num_samples))
        return AuditResult(code, lines, dict(counts), dict(self.substituted))

    def _lines(self, code: int, steps: int, due: int, num_samples: int) -> Iterator[str]:
        counts = self.counts
        verdict = {EXACT: "EXACT", EXACT_BUT_LISTED: "EXACT but for what is listed", VIOLATED: "VIOLATED"}[code]
        yield f"audit of step {steps}: {verdict}"
        if code == VIOLATED:
            yield f"  {counts['clips']} of {due} clips due in steps 0..{steps - 1} are in the ledger; wrong:"
            for kind, texts in self._wrong.items():
                texts = [text for text in texts if text]
                yield f"  {_KINDS[kind]}: {self._num_wrong[kind]}"
                yield from (f"    {text}" for text in texts)
                if self._num_wrong[kind] > len(texts):
                    yield f"    … and {self._num_wrong[kind] - len(texts)} more"
        else:
            due -= counts["withheld"]
            yield f"  {due} clips of steps 0..{steps - 1}: each consumed once, in the order that the seed gives"
            yield f"  {counts['epochs']} whole epochs: each of {num_samples} samples exactly once"
            yield f"  {counts['rows']} checksums: the bytes that were decoded are those of the manifest"
            yield (
                f"  {counts['segments']} ledger files of {counts['commits']} checkpoints by {counts['attempts']} "
                "attempts: as they were committed"
            )
        if self.substituted:
            by_reason = ", ".join(f"{reason} {num}" for reason, num in sorted(self.substituted.items()))
            yield f"  {self.substituted.total()} clips replaced as the journal says ({by_reason})"
        if counts["withheld"]:
            yield f"  {counts['withheld']} clips withheld: their steps were not applied, as the journal says"
        yield from (f"    {text}" for text in self._listed)
        if len(self._listed) == NUM_SHOWN:
            yield "    all of them: journal/"
        if counts["abandoned_files"]:
            torn = f", {counts['torn_tails']} with a torn end" if counts["torn_tails"] else ""
            yield (
                f"  besides: {counts['abandoned_rows']} rows in {counts['abandoned_files']} files that this checkpoint "
                f"does not stand on{torn} (work after the last save of an attempt: legal, done again)"
            )
