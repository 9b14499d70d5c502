"""A large local file becomes one S3 object: parts sent at the same time, the object visible only when all are there."""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from shards import s3
from shards.loop import on_loop
from shards.retry import bare, persist

PART_BYTES = 16 * 2**20
MOST_PARTS = 10_000
"""What S3 takes. Larger parts are used where a file would need more."""
PARTS_AT_A_TIME = 4

_log = logging.getLogger(__name__)


def in_parts(path: Path, url: str, attempt_s: float, deadline_s: float) -> None:
    """Send a file of more than PART_BYTES; at most PARTS_AT_A_TIME parts are in memory."""
    num_bytes = path.stat().st_size
    part_bytes = max(PART_BYTES, -(-num_bytes // MOST_PARTS))
    upload = persist(url, lambda limit_s: on_loop(s3.begin_upload(url), limit_s), attempt_s, deadline_s)
    descriptor = os.open(path, os.O_RDONLY)

    def send(number: int) -> str:
        data = os.pread(descriptor, part_bytes, (number - 1) * part_bytes)
        return persist(
            url, lambda limit_s: on_loop(s3.put_part(url, upload, number, data), limit_s), attempt_s, deadline_s
        )

    try:
        with ThreadPoolExecutor(PARTS_AT_A_TIME, thread_name_prefix="upload") as pool:
            futures = [pool.submit(send, number) for number in range(1, -(-num_bytes // part_bytes) + 1)]
            try:
                tags = [future.result() for future in futures]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        _finish(url, upload, tags, num_bytes, attempt_s, deadline_s)
    except BaseException:
        _abort(url, upload, attempt_s)
        raise
    finally:
        os.close(descriptor)


def _finish(url: str, upload: str, tags: list[str], num_bytes: int, attempt_s: float, deadline_s: float) -> None:
    try:
        persist(url, lambda limit_s: on_loop(s3.finish_upload(url, upload, tags), limit_s), attempt_s, deadline_s)
    except FileNotFoundError:
        # The upload is unknown: an earlier attempt finished it and its answer was lost. Then the object is there.
        facts = persist(url, lambda limit_s: on_loop(s3.facts(url), limit_s), attempt_s, deadline_s)
        if facts[0] != num_bytes:
            raise
    size, _ = persist(url, lambda limit_s: on_loop(s3.facts(url), limit_s), attempt_s, deadline_s)
    if size != num_bytes:
        raise OSError(f"{bare(url)} has {size} bytes after the upload of {num_bytes}")


def _abort(url: str, upload: str, attempt_s: float) -> None:
    """Best effort: the error that led here matters more, and the bucket's own rule removes what is left."""
    try:
        on_loop(s3.abort_upload(url, upload), attempt_s)
    except Exception as error:
        _log.warning("%s: parts of a failed upload are left behind: %s", bare(url), bare(repr(error)))
