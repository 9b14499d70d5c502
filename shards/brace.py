"""Many URLs in one word, as shells and WebDataset write them: `s3://bucket/train-{000000..000099}.tar`."""

from __future__ import annotations

import re

from shards.errors import UserError

MAX_URLS = 10_000_000
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?")


def expand(pattern: str) -> list[str]:
    """Every word a pattern stands for, in its order; the word itself where it has no braces.

    `{000..099}` counts (zeros are kept, `{0..9..3}` counts in threes), `{a,b}` lists, braces nest. What is neither
    (`{abc}`) stands for itself. Raises UserError for a brace that is never closed, and beyond `MAX_URLS` words.
    """
    words = _expand(pattern, pattern)
    if len(words) > MAX_URLS:
        raise _too_many(pattern)
    return words


def is_pattern(url: str) -> bool:
    """Whether `expand` would make something else of it."""
    return "{" in url and expand(url) != [url]


def _expand(text: str, pattern: str) -> list[str]:
    start = text.find("{")
    if start < 0:
        return [text]
    end = _closing(text, start, pattern)
    inside, heads = text[start + 1 : end], text[:start]
    tails = _expand(text[end + 1 :], pattern)
    parts = _split(inside)
    counted = _RANGE.fullmatch(inside)
    if counted is not None:
        middles = _count(counted, pattern)
    elif len(parts) > 1:
        middles = [word for part in parts for word in _expand(part, pattern)]
    else:
        middles = [f"{{{word}}}" for word in _expand(inside, pattern)]
    if len(middles) * len(tails) > MAX_URLS:
        raise _too_many(pattern)
    return [f"{heads}{middle}{tail}" for middle in middles for tail in tails]


def _closing(text: str, start: int, pattern: str) -> int:
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "{") - (text[place] == "}")
        if depth == 0:
            return place
    raise UserError(f"{pattern} opens a brace that it does not close; write {{000..099}} or {{a,b}}: close it")


def _split(inside: str) -> list[str]:
    """At the commas that no inner brace holds."""
    parts, depth = [""], 0
    for letter in inside:
        depth += (letter == "{") - (letter == "}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _count(found: re.Match[str], pattern: str) -> list[str]:
    first, last, by = found.groups()
    one, other = int(first), int(last)
    step = abs(int(by or 1))
    if step == 0 or abs(other - one) // step >= MAX_URLS:
        raise _too_many(pattern)
    is_padded = any(len(text.lstrip("-")) > 1 and text.lstrip("-").startswith("0") for text in (first, last))
    width = max(len(first), len(last)) if is_padded else 0
    numbers = range(one, other + 1, step) if other >= one else range(one, other - 1, -step)
    return [f"{number:0{width}d}" for number in numbers]


def _too_many(pattern: str) -> UserError:
    return UserError(f"{pattern} stands for too many files; it must be at most {MAX_URLS}: correct the range")
