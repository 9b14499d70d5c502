"""S3 and what speaks like it: one request at a time, its answer checked, its refusals told apart.

s3fs makes the client (credentials and endpoint from the usual AWS variables and files); the requests are ours, because
s3fs asks again by itself, hides which fault it was, and cannot compare etags. All requests of a process run on the one
event loop of fsspec; any number of threads may wait for them.
"""

from __future__ import annotations

import base64
import hashlib
import os
import threading
import time
from dataclasses import dataclass
from typing import Any, cast

from shards.errors import UserError
from shards.retry import (
    ChangedObjectError,
    ExpiredError,
    ObjectEndsError,
    RefusedError,
    ShortReadError,
    ThrottledError,
    bare,
    count,
    is_throttled,
)

MAX_CONNECTIONS = 256
"""64 reads at the same time, their second ones, and uploads beside them."""
CONNECT_S = 10.0
SILENCE_S = 120.0
"""A connection without a byte for this long is dead, also where an attempt may take longer."""
BLOCK_BYTES = 2**20
PAGE_KEYS = 1000
RENEW_EVERY_S = 1.0
EXPIRED_CODES = ("ExpiredToken", "ExpiredTokenException", "InvalidToken", "RequestExpired", "TokenRefreshRequired")
STALE_CODES = ("InvalidAccessKeyId", "SignatureDoesNotMatch")
"""A wrong key: a mistake at the first request, a rotated key once others were answered."""
MISSING_CODES = ("NoSuchKey", "NoSuchBucket", "NoSuchVersion")
PASSING_CODES = ("RequestTimeout", "OperationAborted", "BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch")
"""Status 400 to 499, but worth asking again."""
PASSING_STATUS = (408, 409, 425, 429)


@dataclass(frozen=True)
class Part:
    """Bytes of an object, and of which object."""

    data: bytes
    object_bytes: int
    tag: str


@dataclass(eq=False)
class Client:
    """An S3 file system of s3fs and when it was made. Held while requests run: without references s3fs closes it."""

    filesystem: Any
    made_s: float
    answered: bool = False

    async def connect(self) -> Any:
        """The aiobotocore client; made at the first call, later the same one."""
        return await self.filesystem.set_session()


_clients: dict[int, Client] = {}
_lock = threading.Lock()


def client() -> Client:
    """This process's client."""
    with _lock:
        process = os.getpid()
        if process not in _clients:
            _clients[process] = Client(_filesystem(), time.monotonic())
        return _clients[process]


def split(url: str) -> tuple[str, str]:
    """Bucket and key; the key of a bucket itself is empty."""
    bucket, _, key = url.removeprefix("s3://").partition("/")
    if not bucket:
        raise UserError(f"{url} names no bucket; it must look like s3://BUCKET/FOLDER")
    return bucket, key


async def get(url: str, offset: int, size: int | None, tag: str) -> Part:
    """`size` bytes from `offset` on, or the whole object where size is None; one request."""
    place: dict[str, Any] = {}
    if size is not None:
        place["Range"] = f"bytes={offset}-{offset + size - 1}"
    if tag:
        place["IfMatch"] = f'"{tag}"'
    parts: list[bytes] = []
    count(num_reads=1)
    try:
        held = client()  # held until the body is read
        answer = await _request(held, url, "get_object", **place)
        async with answer["Body"] as body:
            if tag and _tag(answer) != tag:
                raise ChangedObjectError(f"{bare(url)}: its etag is {_tag(answer)}, it was {tag} when first seen")
            expected = _expected_size(url, answer, offset, size)
            while part := await body.read(BLOCK_BYTES):
                parts.append(part)
    finally:
        num_bytes = sum(len(part) for part in parts)
        count(num_bytes=num_bytes)
    if num_bytes != expected:
        raise ShortReadError(f"{bare(url)}: {num_bytes} bytes came from offset {offset}, {expected} were asked for")
    data = parts[0] if len(parts) == 1 else b"".join(parts)
    return Part(data, expected if size is None else _total_bytes(answer), _tag(answer))


async def facts(url: str) -> tuple[int, str]:
    """Size in bytes and etag.

    Asked with GET: the refusal of a HEAD has no body, so that expired credentials look like a missing permission.
    """
    count(num_reads=1)
    held = client()
    try:
        answer = await _request(held, url, "get_object", Range="bytes=0-0")
    except ObjectEndsError:  # an empty object has no first byte
        answer = await _request(held, url, "head_object")
        return int(answer["ContentLength"]), _tag(answer)
    async with answer["Body"] as body:
        count(num_bytes=len(await body.read()))
    return _total_bytes(answer), _tag(answer)


async def list_page(url: str, prefix: str, token: str) -> tuple[list[tuple[str, int, str]], str]:
    """Up to PAGE_KEYS objects below a prefix as (key, size, etag); the token of the next page, "" after the last."""
    count(num_reads=1)
    more: dict[str, Any] = {"ContinuationToken": token} if token else {}
    answer = await _request(client(), url, "list_objects_v2", key=False, Prefix=prefix, MaxKeys=PAGE_KEYS, **more)
    rows = [(str(row["Key"]), int(row["Size"]), _tag(row)) for row in answer.get("Contents", [])]
    return rows, str(answer.get("NextContinuationToken", "")) if answer.get("IsTruncated") else ""


async def put(url: str, data: bytes) -> None:
    """A whole object in one request."""
    await _request(client(), url, "put_object", Body=data, ContentMD5=_md5(data))


async def begin_upload(url: str) -> str:
    """Start an object that is sent in parts; its id. Nothing is visible until `finish_upload`."""
    return str((await _request(client(), url, "create_multipart_upload"))["UploadId"])


async def put_part(url: str, upload: str, number: int, data: bytes) -> str:
    """Send part `number` (from 1 on); its etag."""
    answer = await _request(
        client(), url, "upload_part", UploadId=upload, PartNumber=number, Body=data, ContentMD5=_md5(data)
    )
    return str(answer["ETag"])


async def finish_upload(url: str, upload: str, tags: list[str]) -> None:
    """Make the object of these parts appear."""
    parts = [{"PartNumber": number, "ETag": tag} for number, tag in enumerate(tags, start=1)]
    await _request(client(), url, "complete_multipart_upload", UploadId=upload, MultipartUpload={"Parts": parts})


async def abort_upload(url: str, upload: str) -> None:
    """Throw the parts away."""
    await _request(client(), url, "abort_multipart_upload", UploadId=upload)


async def delete(url: str) -> None:
    """Delete an object; one that is not there is fine."""
    await _request(client(), url, "delete_object")


async def _request(held: Client, url: str, method: str, *, key: bool = True, **arguments: Any) -> Any:
    from botocore import exceptions as fault

    bucket, name = split(url)
    place = {"Bucket": bucket, "Key": name} if key else {"Bucket": bucket}
    try:
        answer = await getattr(await held.connect(), method)(**place, **arguments)
    except fault.ClientError as error:
        raise _refusal(held, url, cast(Any, error).response) from None
    except (fault.NoCredentialsError, fault.PartialCredentialsError, fault.ProfileNotFound, fault.ConfigParseError):
        if held.answered:  # a credentials file that is being written anew
            _renew(held)
            raise ExpiredError(f"{bare(url)}: there are no credentials any more") from None
        raise UserError(
            f"{bare(url)} needs S3 credentials and there are none; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
            "AWS_PROFILE with ~/.aws/credentials"
        ) from None
    except (fault.ParamValidationError, fault.EndpointProviderError, ValueError) as error:
        raise UserError(
            f"{bare(url)} cannot be asked for: {bare(str(error))}; check the name and AWS_ENDPOINT_URL"
        ) from None
    held.answered = True
    return answer


def _refusal(held: Client, url: str, response: dict[str, Any]) -> Exception:
    """What a refusal means. Only code, status and message are told: other fields hold keys and signatures."""
    error = cast(dict[str, Any], response.get("Error", {}))
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    code = str(error.get("Code", ""))
    message = str(error.get("Message", ""))
    text = bare(f"{url}: {code} ({status}): {message}")
    if code in EXPIRED_CODES or (status in (400, 401, 403) and "expired" in message.lower()):
        _renew(held)
        return ExpiredError(text)
    if code in STALE_CODES and held.answered:
        _renew(held)
        return ExpiredError(text)
    if status in (429, 503) or is_throttled(f"{code} {message}"):
        count(num_throttled=1)
        return ThrottledError(text)
    if status == 404 or code in MISSING_CODES:
        return FileNotFoundError(text)
    if status == 412:
        return ChangedObjectError(text)
    if status == 416:
        return ObjectEndsError(text)
    if status in (401, 403):
        return PermissionError(text)
    if 300 <= status < 500 and status not in PASSING_STATUS and code not in PASSING_CODES:
        return RefusedError(text)
    return OSError(text)


def _renew(held: Client) -> None:
    """Forget the client whose credentials were refused; the next request reads environment and files again.

    Many requests fail together: one new client answers for all of them, and a new one lives a second at least.
    """
    with _lock:
        process = os.getpid()
        if _clients.get(process) is not held or time.monotonic() - held.made_s < RENEW_EVERY_S:
            return
        _clients[process] = Client(_filesystem(), time.monotonic(), held.answered)
    count(num_renewals=1)


def _filesystem() -> Any:
    import s3fs  # pyright: ignore[reportMissingTypeStubs]

    untyped: Any = s3fs
    return untyped.S3FileSystem(
        skip_instance_cache=True,
        use_listings_cache=False,
        config_kwargs={
            "connect_timeout": CONNECT_S,
            "read_timeout": SILENCE_S,
            "max_pool_connections": MAX_CONNECTIONS,
            "retries": {"total_max_attempts": 1},
            # Newer botocore adds checksums everywhere, and other stores refuse that.
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        },
    )


def _tag(row: dict[str, Any]) -> str:
    return str(row.get("ETag", "")).strip('"')


def _md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def _total_bytes(answer: dict[str, Any]) -> int:
    return int(str(answer["ContentRange"]).rpartition("/")[2])


def _expected_size(url: str, answer: dict[str, Any], offset: int, size: int | None) -> int:
    """Bytes that the body must have; refuses an answer that is not the range before its body is read."""
    length = int(answer["ContentLength"])
    if size is None:
        return length
    if "ContentRange" not in answer:
        raise RefusedError(f"{bare(url)}: the store sends whole objects instead of ranges")
    total = _total_bytes(answer)
    if total < offset + size:
        raise ObjectEndsError(f"{bare(url)} ends at {total} bytes, {offset + size} are needed")
    if length != size:
        raise ShortReadError(f"{bare(url)}: {length} bytes are announced from offset {offset}, {size} were asked for")
    return size
