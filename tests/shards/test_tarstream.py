"""Tars read front to back: against `tarfile` where it is right, and where it ends quietly."""

from __future__ import annotations

import hashlib
import io
import random
import tarfile
from pathlib import Path

import pytest

import shards.tarstream
from shards import storage
from shards.tarstream import BrokenTarError, Member, TarStream, member_name

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def write_tar(path: Path, members: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def read(path: Path) -> tuple[list[tuple[Member, bytes]], str]:
    with TarStream(str(path), path.stat().st_size) as stream:
        members = [(member, b"".join(map(bytes, stream.body()))) for member in stream]
        return members, stream.sha256


def files(num: int, longest: int, seed: int = 0) -> dict[str, bytes]:
    rng = random.Random(seed)
    return {f"folder.x/{n:03d}.mp4": rng.randbytes(rng.randint(0, longest)) for n in range(num)}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("block", [512, 1536, 1 << 20])
def test_members_places_and_bytes_are_those_of_tarfile(
    form: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards.tarstream, "READ_BYTES", block)
    data = files(12, 5000)
    if form != "ustar":
        data |= {"x" * 300 + "/é long.mp4": b"long", "ü.mp4": b"short"}
    path = write_tar(tmp_path / "a.tar", data, FORMATS[form])
    members, sha256 = read(path)
    assert {member.name: body for member, body in members} == data
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    with tarfile.open(path) as tar:
        theirs = [(info.name, info.offset_data, info.size) for info in tar]
    assert [(member.name, member.offset, member.size) for member, _ in members] == theirs
    for name, offset, _ in theirs:
        assert member_name(lambda at, size: storage.read_range(str(path), at, size), offset) == name


def test_bodies_may_be_passed_over(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", files(9, 3000))
    with TarStream(str(path), path.stat().st_size) as stream:
        names = [member.name for member in stream]
        assert stream.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert names == list(files(9, 3000))


def test_every_cut_is_seen(tmp_path: Path) -> None:
    """Wherever the tar ends too early, at a block or within one: never a shorter list of members."""
    path = write_tar(tmp_path / "a.tar", files(3, 900))
    data = path.read_bytes()
    end = max(n for n in range(len(data)) if data[n]) + 1  # what follows is the end marker and its padding
    whole = -(-end // 512) * 512
    cut = tmp_path / "cut.tar"
    for size in [*range(0, whole, 256), end, whole, whole + 1, whole + 511]:
        cut.write_bytes(data[:size])
        with pytest.raises(BrokenTarError, match=r"cut.tar .* cut off"):
            read(cut)
    cut.write_bytes(data[: whole + 512])
    assert len(read(cut)[0]) == 3


def test_an_object_shorter_than_it_was_is_seen(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", files(3, 900))
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-512])
    with TarStream(str(path), size) as stream, pytest.raises(BrokenTarError, match="cannot be read"):
        list(stream)


def test_joined_and_damaged_tars_are_refused(tmp_path: Path) -> None:
    one = write_tar(tmp_path / "one.tar", files(2, 900)).read_bytes()
    (tmp_path / "joined.tar").write_bytes(one + one)
    with pytest.raises(BrokenTarError, match="bytes follow its end marker"):
        read(tmp_path / "joined.tar")
    damaged = bytearray(one)
    damaged[10] ^= 1
    (tmp_path / "damaged.tar").write_bytes(damaged)
    with pytest.raises(BrokenTarError, match="no member begins at byte 0"):
        read(tmp_path / "damaged.tar")
    (tmp_path / "text.tar").write_bytes(b"<html>" + b"x" * 2000)
    with pytest.raises(BrokenTarError, match="no member begins at byte 0"):
        read(tmp_path / "text.tar")


def test_compressed_tars_are_named_as_such(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("x" * 90), io.BytesIO(random.Random(0).randbytes(2000)))
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes().ljust(512, b"\0"))
    with pytest.raises(BrokenTarError, match=r"compressed \(gzip\)"):
        read(tmp_path / "a.tar")


def test_kinds(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in {"d": tarfile.DIRTYPE, "s.mp4": tarfile.SYMTYPE, "h.mp4": tarfile.LNKTYPE}.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "f.mp4"
            tar.addfile(info)
        info = tarfile.TarInfo("f.mp4")
        info.size = 5
        tar.addfile(info, io.BytesIO(b"12345"))
    assert [(member.name, member.kind) for member, _ in read(path)[0]] == [
        ("d", "other"),
        ("s.mp4", "link"),
        ("h.mp4", "link"),
        ("f.mp4", "file"),
    ]


@pytest.mark.parametrize("num_extents", [2, 20, 60])
def test_sparse_members_are_told_and_passed_over(num_extents: int, tmp_path: Path) -> None:
    """Old GNU sparse: extents beyond the fourth stand in blocks of their own, before the bytes."""
    pieces = b"x" * 512 * num_extents
    info = tarfile.TarInfo("hole.mp4")
    info.type, info.size = tarfile.GNUTYPE_SPARSE, len(pieces)
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    extents = [f"{n * 4096:011o}\0".encode() + f"{512:011o}\0".encode() for n in range(num_extents)]
    header[386:482] = b"".join(extents[:4]).ljust(96, b"\0")
    more = extents[4:]
    header[482] = bool(more)
    header[483:495] = f"{num_extents * 4096:011o}\0".encode()
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    blocks = b""
    while more:
        blocks += b"".join(more[:21]).ljust(504, b"\0") + bytes([len(more) > 21]) + bytes(7)
        more = more[21:]
    rest = write_tar(tmp_path / "rest.tar", {"after.mp4": b"12345"}).read_bytes()
    path = tmp_path / "a.tar"
    path.write_bytes(bytes(header) + blocks + pieces + rest)
    with tarfile.open(path) as tar:
        assert [found.name for found in tar] == ["hole.mp4", "after.mp4"]
    (hole, body), (after, data) = read(path)[0]
    assert (hole.kind, body, after.name, data) == ("sparse", pieces, "after.mp4", b"12345")


def test_sizes_beyond_octal_are_read(tmp_path: Path) -> None:
    """12 GiB in base 256, in a sparse file: the member after it is found."""
    size = 12 << 30
    path = tmp_path / "a.tar"
    info = tarfile.TarInfo("big.mp4")
    info.size = size
    with path.open("wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(512 + size + 1024)
    with TarStream(str(path), path.stat().st_size) as stream:
        member = next(iter(stream))
    assert (member.size, member.offset) == (size, 512)
