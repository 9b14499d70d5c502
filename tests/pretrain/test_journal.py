from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from pretrain.journal import GROWTH_NAME, Journal, JournalRow
from shards.errors import UserError
from shards.growth import Growth


def test_journal_rows_are_found_by_the_next_attempt(tmp_path: Path) -> None:
    folder = tmp_path / "journal"
    journal = Journal(folder, attempt=0, rank=1)
    assert journal.find(7) is None
    journal.add(JournalRow(7, wanted=3, substitute=9, reason="damaged"))
    assert journal.find(7) == JournalRow(7, 3, 9, "damaged")
    assert Journal(folder, attempt=1, rank=0).find(7) == JournalRow(7, 3, 9, "damaged")
    assert [file.name for file in folder.iterdir()] == ["a0000-r00001.jsonl"]


def test_journal_row_is_on_disk_when_add_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bytes] = []
    file = tmp_path / "a0000-r00000.jsonl"
    monkeypatch.setattr("pretrain.journal.os.fsync", lambda _descriptor: synced.append(file.read_bytes()))  # pyright: ignore
    Journal(tmp_path).add(JournalRow(1, 2, 3, "short"))
    assert json.loads(synced[0]) == {"position": 1, "wanted": 2, "substitute": 3, "reason": "short"}


def test_journal_leaves_out_only_a_torn_last_line(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.add(JournalRow(1, 2, 3, "short"))
    journal.add(JournalRow(2, 5, 6, "short"))
    file = tmp_path / "a0000-r00000.jsonl"
    file.write_bytes(file.read_bytes()[:-1])  # even a row that only lacks its line end was never fsynced whole
    again = Journal(tmp_path, attempt=1)
    assert again.find(1) is not None
    assert again.find(2) is None
    file.write_bytes(b'{"position": 1, "want\n' + file.read_bytes())
    with pytest.raises(UserError, match=r"journal line 1 of .*a0000-r00000.jsonl"):
        Journal(tmp_path, attempt=2)


def test_journal_digest_counts_distinct_rows_before_a_position(tmp_path: Path) -> None:
    first, second = Journal(tmp_path / "a", rank=0), Journal(tmp_path / "a", rank=1)
    nothing = first.digest(100)
    first.add(JournalRow(5, 1, 2, "short"))
    second.add(JournalRow(5, 1, 2, "short"))  # two ranks may own clips of one position
    second.add(JournalRow(8, 3, 4, "slow"))
    memory = Journal(None)
    for row in (JournalRow(8, 3, 4, "slow"), JournalRow(5, 1, 2, "short")):
        memory.add(row)
    assert first.digest(9) == second.digest(9) == memory.digest(9)  # other ranks' rows, any order
    assert first.digest(8) == memory.digest(8) != first.digest(9)
    assert first.digest(5) == nothing
    memory.add(JournalRow(5, 1, 7, "short"))
    assert memory.digest(8) != first.digest(8)


def test_journal_takes_rows_from_several_threads(tmp_path: Path) -> None:
    journal = Journal(tmp_path)

    def add(start: int) -> None:
        for position in range(start, start + 20):
            journal.add(JournalRow(position, position, position + 1, "slow"))

    threads = [threading.Thread(target=add, args=(start,)) for start in (0, 10, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = (tmp_path / "a0000-r00000.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["position"] for line in lines) == list(range(40))


def test_growth_is_found_by_the_next_attempt_and_is_no_row_of_a_sample(tmp_path: Path) -> None:
    journal = Journal(tmp_path, attempt=1)
    assert journal.growth() == []
    journal.add_growth([])
    assert not (tmp_path / GROWTH_NAME).exists()
    steps = [Growth(0, 30, "a" * 64, 12), Growth(1, 44, "b" * 64, 7)]
    journal.add_growth(steps[:1])
    journal.add_growth(steps[1:])
    later = Journal(tmp_path, attempt=2)
    assert later.growth() == steps
    assert later.rows() == later.of_all_ranks() == []
    file = tmp_path / GROWTH_NAME
    file.write_bytes(file.read_bytes()[:-3])
    assert later.growth() == steps[:1]
    file.write_text('{"source": 0}\n')
    with pytest.raises(UserError, match=r"journal line 1 of .*growth.jsonl"):
        later.growth()
