"""Which tars a URL means: a folder, a tar, or a brace pattern of either."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

from shards import storage
from shards.brace import expand
from shards.errors import UserError
from shards.layout import PARTS_NAME
from shards.tarscan import Tar

NUM_LOOKUPS = 32
NUM_SHOWN = 5
SUFFIX = ".tar"
PACKED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def list_tars(url: str) -> list[Tar]:
    """The tars of a URL with their sizes and tags: in the order of the pattern, those of a folder by name.

    Local ones have absolute paths. Raises UserError, naming them, for what is missing, listed twice or no tar.
    """
    words = expand(url)
    for word in words:
        _check_bare(word)
    folders = {word for word in words if not word.endswith(SUFFIX)}
    urls = [tar for word in words for tar in ([_absolute(word)] if word not in folders else _folder(word))]
    twice = sorted({tar for tar in urls if urls.count(tar) > 1}) if len(set(urls)) < len(urls) else []
    if twice:
        raise UserError(f"{url} names {_some(twice)} more than once; every tar must be named once: correct it")
    with ThreadPoolExecutor(NUM_LOOKUPS, thread_name_prefix="look") as pool:
        found = list(pool.map(_look, urls))
    missing = [tar for tar, facts in zip(urls, found, strict=True) if facts is None]
    if missing:
        raise UserError(f"{_some(missing)} cannot be found; every tar must be there: check the pattern")
    return [tar for tar in found if tar is not None]


def is_local(tars: list[Tar]) -> bool:
    """Whether all of them are files of this machine."""
    return all(storage.local_path(tar.url) is not None for tar in tars)


def _folder(url: str) -> list[str]:
    path = storage.local_path(url)
    if path is None:
        names = [facts.name for facts in storage.list_files(url)]
    elif path.is_dir():
        names = [entry.name for entry in path.iterdir()]
    elif path.exists():
        raise UserError(f"{url} is a file that is no tar; give a folder of .tar files, a tar, or a brace pattern")
    else:
        raise UserError(f"{url} does not exist; check the path")
    tars = sorted(name for name in names if name.endswith(SUFFIX) and "/" not in name and not name.startswith("."))
    if not tars:
        packed = sorted(name for name in names if name.endswith(PACKED_SUFFIXES))
        hint = f" ({_some(packed)}: compressed tars must be unpacked)" if packed else ""
        if any(name.split("/")[0] == PARTS_NAME for name in names):
            hint = " (but packed parts: --merge joins them)"
        raise UserError(f"{url} holds no .tar file{hint}; name the folder that holds the tars")
    return [storage.join(url if path is None else str(path.absolute()), name) for name in tars]


def _absolute(url: str) -> str:
    path = storage.local_path(url)
    return url if path is None else str(Path(path).absolute())


def _look(url: str) -> Tar | None:
    try:
        return Tar(url, *storage.size_and_tag(url))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{url} cannot be read: {error}; check the URL and the permissions") from error


def _check_bare(url: str) -> None:
    """The URL is written down in the manifest: it must hold no secret."""
    parts = urlsplit(url)
    if parts.scheme and parts.netloc and ("@" in parts.netloc or parts.query):
        bare = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        raise UserError(
            f"{bare} was given with a user name or a query; an index stores URLs, so they must be bare: put "
            "credentials into the environment (AWS_ACCESS_KEY_ID ...)"
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NUM_SHOWN} more" if len(names) > NUM_SHOWN else ""
    return ", ".join(names[:NUM_SHOWN]) + more
