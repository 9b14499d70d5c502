from __future__ import annotations

import hashlib
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.batch import ClipBatch
from pretrain.ledger import (
    ROW_DTYPE,
    SUBSTITUTED,
    Ledger,
    LineageHead,
    Segment,
    commit_lineage,
    row_crc,
    walk_lineage,
)


def make_batch(step: int, position: list[int], sample: list[int], wanted: list[int] | None = None) -> ClipBatch:
    num = len(position)
    empty = torch.zeros(num)
    return ClipBatch(
        step=step,
        micro_step=0,
        planes_BTN=torch.zeros(num, 1, 1, dtype=torch.uint8),
        height_B=empty,
        width_B=empty,
        crop_B4=torch.zeros(num, 4),
        flip_B=empty.bool(),
        color_B=empty.byte(),
        frame_numbers_BT=torch.zeros(num, 1, dtype=torch.int32),
        position_B=torch.tensor(position, dtype=torch.int64),
        epoch_B=torch.zeros(num, dtype=torch.int64),
        draw_B=torch.zeros(num, dtype=torch.int64),
        wanted_B=torch.tensor(wanted if wanted is not None else sample, dtype=torch.int64),
        sample_B=torch.tensor(sample, dtype=torch.int64),
        checksum_B=torch.tensor([1000 + s for s in sample], dtype=torch.int64),
        weight_B=empty,
    )


def test_row_crc_is_crc32_of_the_fields_before_it() -> None:
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 256, (50, ROW_DTYPE.itemsize), dtype=np.uint8).view(ROW_DTYPE)[:, 0]
    expected = [zlib.crc32(row.tobytes()[:-4]) for row in rows]
    assert row_crc(rows).tolist() == expected
    assert row_crc(rows[:0]).shape == (0,)


def test_ledger_writes_one_row_per_real_clip(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, attempt=3, rank=2)
    ledger.record(20, [make_batch(20, [40, 41], [5, 6]), make_batch(20, [42, -1], [7, -1])])
    ledger.record(21, [make_batch(21, [43], [9], wanted=[8])])
    file = tmp_path / "a0003-s00000020-r00002.rows"
    assert file.stat().st_size == 4 * ROW_DTYPE.itemsize  # flushed before the seal: a kill loses none
    segment = ledger.seal()
    assert segment == Segment(file.name, 4, hashlib.sha256(file.read_bytes()).hexdigest())
    rows = np.fromfile(file, ROW_DTYPE)
    assert rows["step"].tolist() == [20, 20, 20, 21]
    assert rows["position"].tolist() == [40, 41, 42, 43]
    assert rows["wanted"].tolist() == [5, 6, 7, 8]
    assert rows["sample"].tolist() == [5, 6, 7, 9]
    assert rows["checksum"].tolist() == [1005, 1006, 1007, 1009]
    assert rows["reason"].tolist() == [0, 0, 0, SUBSTITUTED]
    assert (rows["crc"] == row_crc(rows)).all()


def test_ledger_opens_a_segment_per_interval(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, attempt=0, rank=0)
    assert ledger.seal() is None
    ledger.record(0, [make_batch(0, [0], [3])])
    ledger.seal()
    assert ledger.seal() is None
    ledger.record(1, [make_batch(1, [-1], [-1])])  # a rank with nothing but fillers
    assert ledger.seal() == Segment("a0000-s00000001-r00000.rows", 0, hashlib.sha256(b"").hexdigest())


def test_ledger_never_writes_into_a_file_of_another_process(tmp_path: Path) -> None:
    Ledger(tmp_path, attempt=0, rank=0).record(0, [make_batch(0, [0], [3])])
    with pytest.raises(FileExistsError):
        Ledger(tmp_path, attempt=0, rank=0).record(0, [make_batch(0, [0], [3])])


# ---- lineage


def two_links(folder: Path) -> tuple[LineageHead, LineageHead]:
    first = commit_lineage(folder, 20, 0, [Segment("b", 1, "y"), Segment("a", 2, "x")], None)
    return first, commit_lineage(folder, 40, 1, [Segment("c", 3, "z")], first)


def test_lineage_is_walked_from_the_head_back(tmp_path: Path) -> None:
    first, second = two_links(tmp_path)
    assert first.file == "lineage-s00000020-a0000.json"
    links = list(walk_lineage(tmp_path, second))
    assert [head for head, _ in links] == [second, first]
    assert [(link.step, link.attempt) for _, link in links] == [(40, 1), (20, 0)]
    assert [segment.file for segment in links[1][1].segments] == ["a", "b"]  # whatever order ranks answered in
    assert list(walk_lineage(tmp_path, first)) == links[1:]


def test_lineage_that_was_touched_is_refused_by_name(tmp_path: Path) -> None:
    first, second = two_links(tmp_path)
    file = tmp_path / first.file
    kept = file.read_bytes()
    file.write_bytes(kept.replace(b'"x"', b'"q"'))
    with pytest.raises(ValueError, match=r"lineage-s00000020-a0000.json was changed"):
        list(walk_lineage(tmp_path, second))
    file.unlink()
    with pytest.raises(ValueError, match=r"lineage-s00000020-a0000.json is missing"):
        list(walk_lineage(tmp_path, second))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "lineage-x.json"),
        (b"{}", "not a lineage file"),
        (b'{"format": 99}', "format 99"),
        (b'{"format": 1, "step": -1, "attempt": 0, "previous": null, "segments": []}', "negative"),
    ],
)
def test_lineage_of_another_kind_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "lineage-x.json").write_bytes(content)
    head = LineageHead("lineage-x.json", hashlib.sha256(content).hexdigest())
    with pytest.raises(ValueError, match=words):
        list(walk_lineage(tmp_path, head))


def test_lineage_never_leaves_its_folder_or_runs_backwards(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="plain file name"):
        list(walk_lineage(tmp_path, LineageHead("../lineage-x.json", "")))
    _, second = two_links(tmp_path)
    bad = commit_lineage(tmp_path, 30, 2, [], second)
    with pytest.raises(ValueError, match="after the step 30"):
        list(walk_lineage(tmp_path, bad))
