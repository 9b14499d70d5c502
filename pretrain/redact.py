"""What may leave the process in writing (C14): URLs without user info, query and fragment."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast
from urllib.parse import urlsplit, urlunsplit

_URL = re.compile(r"\b[a-z][a-z0-9+.-]*://\S+", re.IGNORECASE)


def without_secrets(value: Any) -> Any:
    """A copy of plain data (a config, a metrics row, a message) in which every URL is bare. Tuples become lists."""
    if isinstance(value, str):
        return _URL.sub(lambda match: _bare(match.group()), value)
    if isinstance(value, Mapping):
        return {key: without_secrets(item) for key, item in cast(Mapping[str, Any], value).items()}
    if isinstance(value, list | tuple):
        return [without_secrets(item) for item in cast(list[Any], value)]
    return value


def _bare(url: str) -> str:
    try:
        parts = urlsplit(url)
    except ValueError:  # a malformed host; what follows the scheme might be a password
        return url.partition("://")[0] + "://…"
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
