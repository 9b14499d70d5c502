"""What a command prints: its result as lines or JSON, folded to the terminal, and the next command to type."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import textwrap
from typing import Annotated, Any

import typer

Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value …", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
NEXT = "next: "
NARROWEST = 20


def show(result: dict[str, Any], as_json: bool, *lines: str) -> None:
    """A result for a machine or for a person; the last line for a person is the next command to type."""
    if as_json:
        print(json.dumps(result, indent=1), flush=True)
        return
    text = "\n".join(lines)
    print(fold(text, shutil.get_terminal_size().columns) if sys.stdout.isatty() else text, flush=True)


def complain(text: str) -> None:
    """What went wrong, on stderr."""
    print(fold(text, shutil.get_terminal_size().columns) if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


def fold(text: str, width: int) -> str:
    """Break lines at blanks to fit a terminal, what follows indented; a command to type stays in one piece."""
    folded: list[str] = []
    for line in text.split("\n"):
        if len(line) <= width or line.startswith(NEXT):
            folded.append(line)
            continue
        indent = " " * (len(line) - len(line.lstrip()) + 2)
        folded += textwrap.wrap(
            line,
            max(width, NARROWEST),
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join(folded)


def hint(*words: object) -> str:
    """The next command to type, quoted for the shell."""
    return f"{NEXT}tubelet {shlex.join(map(str, words))}"
