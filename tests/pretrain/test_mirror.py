"""The second home of a run: killed at every seam, damaged in every file, claimed by two; a folder serves as URL.

Over a real S3 server with faults in between: tests/s3/test_mirror.py.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pretrain import checkpoint
from pretrain.attempt import Superseded, newest_attempt, take_attempt
from pretrain.checkpoint import Checkpoint, kept_steps, newest
from pretrain.identity import known_run_id, run_id
from pretrain.mirror import Mirror, MirrorReport, Stopped
from pretrain.mirrored import Place, seal
from pretrain.restore import alone
from pretrain.witness import audit_run
from shards import storage
from shards.errors import UserError
from tests.dist import ranks
from tests.pretrain.saved_run import SavedRun, content, flip, truncate

KILLED = 9


@pytest.fixture
def run(tmp_path: Path) -> SavedRun:
    """One start that saved twice."""
    run = SavedRun(tmp_path / "run")
    run.start()
    run.save(100)
    run.save(200)
    return run


@pytest.fixture
def mirror(run: SavedRun, tmp_path: Path) -> Mirror:
    return Mirror(str(tmp_path / "mirror"), run.folder)


def place_of(mirror: Mirror, step: int) -> Path:
    """The folder of the newest mirrored checkpoint of a step."""
    return max(Path(mirror.url, "checkpoints").glob(f"step-{step:06d}-*"))


def restored(mirror: Mirror, folder: Path) -> tuple[int | None, dict[str, bytes]]:
    return Mirror(mirror.url, folder).restore(), content(folder)


def without_checkpoints(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if not name.startswith("checkpoints/")}


# ------------------------------------------------------------------------------------------ there and back


def test_what_is_restored_is_what_was_there(run: SavedRun, mirror: Mirror, tmp_path: Path) -> None:
    before = content(run.folder / "checkpoints" / "step-000200")
    report = mirror.send(200)
    sent = content(Path(mirror.url))
    assert report.num_files == len(sent) - 1  # all but `owner`
    assert report.num_bytes == sum(len(data) for name, data in sent.items() if name != "owner")
    step, found = restored(mirror, tmp_path / "new")
    assert step == 200
    assert content(tmp_path / "new" / "checkpoints" / "step-000200") == before
    assert (tmp_path / "new" / "checkpoints" / "latest").read_text() == "step-000200\n"
    assert without_checkpoints(found) == without_checkpoints(content(run.folder))
    assert {name.split("/")[0] for name in found} >= {"ledger", "journal", "attempts", "config.yaml", "run_id"}
    assert not list((tmp_path / "new").rglob("*.tmp"))
    assert take_attempt(tmp_path / "new", ["node-a"]) == 2


def test_what_is_there_is_not_sent_again(run: SavedRun, mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror.send(200)
    before = {path: path.stat().st_mtime_ns for path in Path(mirror.url).rglob("*")}
    assert mirror.send(200) == MirrorReport(0, 0, pytest.approx(0, abs=60))
    assert Mirror(mirror.url, run.folder).send(200).num_files == 0
    assert {path: path.stat().st_mtime_ns for path in Path(mirror.url).rglob("*")} == before
    flip(place_of(mirror, 200) / "rank-00001.safetensors")
    os.remove(Path(mirror.url, "ledger", "a0001-s00000100-r00000.rows"))
    assert Mirror(mirror.url, run.folder).send(200).num_files == 2  # the next start mends what it finds damaged
    looked_at: list[str] = []
    real = storage.list_files
    monkeypatch.setattr(storage, "list_files", lambda url: looked_at.append(url) or real(url))
    run.save(300)
    assert mirror.send(300).num_files == 2 + 3 + 3  # tensors; a link and its segments; run.json, manifest, latest
    assert not any(url.endswith("ledger") for url in looked_at)


def test_a_run_without_a_mirrored_checkpoint_starts_from_zero(run: SavedRun, mirror: Mirror, tmp_path: Path) -> None:
    assert restored(mirror, tmp_path / "new") == (None, {})
    assert not (tmp_path / "new").exists()
    assert mirror.newest_step() is None
    assert mirror.steps() == []


def test_a_run_folder_with_checkpoints_is_not_touched(run: SavedRun, mirror: Mirror) -> None:
    mirror.send(200)
    before = content(run.folder)
    with pytest.raises(UserError, match=r"it has checkpoints, and a restore never overwrites"):
        mirror.restore()
    assert content(run.folder) == before


def test_a_local_file_that_differs_is_not_overwritten(run: SavedRun, mirror: Mirror) -> None:
    mirror.send(200)
    shutil.rmtree(run.folder / "checkpoints")
    (run.folder / "config.yaml").write_text("of the next start")
    longer = run.folder / "journal" / "a0001-r00000.jsonl"
    longer.write_text(longer.read_text() + '{"position": 9, "wanted": 1, "substitute": 2, "reason": "x"}\n')
    row = run.folder / "ledger" / "a0001-s00000100-r00001.rows"
    flip(row)
    before = content(run.folder)
    with pytest.raises(UserError, match=r"r00001\.rows differs from the file of that name in checkpoint\.mirror"):
        mirror.restore()
    assert without_checkpoints(content(run.folder)) == without_checkpoints(before)
    assert checkpoint.candidates(run.folder) == []
    flip(row)
    assert mirror.restore() == 200
    assert b'"position": 9' in longer.read_bytes()
    assert (run.folder / "config.yaml").read_text() == "of the next start"


def test_half_a_journal_line_stays_at_home(run: SavedRun, mirror: Mirror, tmp_path: Path) -> None:
    (run.folder / "journal" / "decisions.jsonl").write_text('{"kind": "skipped"}\n{"kind": "rol')
    mirror.send(200)
    restored(mirror, tmp_path / "new")
    assert (tmp_path / "new" / "journal" / "decisions.jsonl").read_text() == '{"kind": "skipped"}\n'


def test_starts_that_restore_at_the_same_time(
    run: SavedRun, mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All have found the folder empty before the first begins."""
    mirror.send(200)
    all_here = threading.Barrier(4)

    @contextmanager
    def alone_after_all_came(run_dir: Path) -> Iterator[None]:
        all_here.wait(30)
        with alone(run_dir):
            yield

    monkeypatch.setattr("pretrain.mirror.alone", alone_after_all_came)
    with ThreadPoolExecutor(4) as pool:
        starts = [pool.submit(Mirror(mirror.url, tmp_path / "new").restore) for _ in range(4)]
        assert [start.result() for start in starts] == [200] * 4
    found = newest(tmp_path / "new")
    assert found is not None
    assert found.facts.step == 200


# ------------------------------------------------------------------------------------------ killed and stopped


def count_writes(monkeypatch: pytest.MonkeyPatch, at_write: Callable[[int, str], None]) -> None:
    """Calls at_write(number, moment) before and after each change of the mirror; moment is "before" or "after"."""
    number = 0
    lock = threading.Lock()
    for name in ("upload", "write_bytes", "remove"):
        real = getattr(storage, name)

        def wrapped(*arguments: Any, _real: Any = real, **named: Any) -> None:
            nonlocal number
            with lock:
                number += 1
                mine = number
            at_write(mine, "before")
            _real(*arguments, **named)
            at_write(mine, "after")

        monkeypatch.setattr(storage, name, wrapped)


def in_child(work: Callable[[], object]) -> int:
    """Exit code of a forked child that does the work: 0, KILLED, or 1 for an error."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def seams(work: Callable[[], object], between: Callable[[], None]) -> Iterator[int]:
    """Do the work in a child that is killed before, then after, its first write, its second, …, until it gets through.

    `between` is called before each try.
    """
    for number in range(1, 100):
        for moment in ("before", "after"):
            between()

            def kill(mine: int, now: str, at: tuple[int, str] = (number, moment)) -> None:
                if (mine, now) == at:
                    os._exit(KILLED)

            def killed() -> None:
                patch = pytest.MonkeyPatch()
                count_writes(patch, kill)
                work()

            code = in_child(killed)
            assert code in (0, KILLED)
            yield number
            if code == 0:
                return


def test_killed_anywhere_in_a_send(run: SavedRun, mirror: Mirror, tmp_path: Path) -> None:
    """`latest` names a whole checkpoint at every moment, the one before or the new one; a new send gets through."""
    mirror.send(100)
    shutil.copytree(mirror.url, tmp_path / "first")

    def reset() -> None:
        shutil.rmtree(mirror.url)
        shutil.copytree(tmp_path / "first", mirror.url)
        shutil.rmtree(tmp_path / "new", ignore_errors=True)

    last, steps = 0, []
    for number in seams(lambda: Mirror(mirror.url, run.folder).send(200), reset):
        step, found = restored(mirror, tmp_path / "new")
        steps.append(step)
        assert step == mirror.newest_step()
        tensors = content(run.folder / "checkpoints" / f"step-{step:06d}")
        assert {name: found[f"checkpoints/step-{step:06d}/{name}"] for name in tensors} == tensors
        if number % 3 == 0:
            Mirror(mirror.url, run.folder).send(200)
            assert mirror.newest_step() == 200
        last = number
    assert last == 2 + 3 + 3 + 1  # every file of the second checkpoint was a seam, and the try that got through
    assert steps == [100] * (len(steps) - 2) + [200] * 2  # it moves with the very last write


def test_killed_in_the_first_send_ever(run: SavedRun, mirror: Mirror, tmp_path: Path) -> None:
    """Then the run restores from nothing, or from that checkpoint once its manifest is there."""
    steps = []
    for _ in seams(lambda: mirror.send(100), lambda: shutil.rmtree(mirror.url, ignore_errors=True)):
        steps.append(restored(mirror, tmp_path / "new")[0])
        shutil.rmtree(tmp_path / "new", ignore_errors=True)
    num_whole = 3  # after the manifest's write, before and after the pointer's
    assert steps == [None] * (len(steps) - num_whole - 1) + [100] * (num_whole + 1)


def test_killed_anywhere_in_a_restore(run: SavedRun, mirror: Mirror, tmp_path: Path) -> None:
    """A checkpoint is there once all that it stands on is."""
    mirror.send(200)
    new = tmp_path / "new"
    expected = without_checkpoints(content(run.folder))
    for name in ("rename", "replace", "unlink"):
        for number in range(1, 100):
            shutil.rmtree(new, ignore_errors=True)

            def killed(name: str = name, number: int = number) -> None:
                left = number
                real = getattr(Path, name)

                def wrapped(*arguments: Any, **named: Any) -> Any:
                    nonlocal left
                    left -= 1
                    return os._exit(KILLED) if not left else real(*arguments, **named)

                setattr(Path, name, wrapped)
                Mirror(mirror.url, new).restore()

            code = in_child(killed)
            assert code in (0, KILLED)
            if checkpoint.candidates(new):
                assert without_checkpoints(content(new)) == expected
            else:
                assert Mirror(mirror.url, new).restore() == 200
            found = newest(new)
            assert found is not None
            assert found.facts.step == 200
            if code == 0:
                assert number > (1 if name == "rename" else 0)
                break


def test_a_stop_is_heard_between_files(run: SavedRun, mirror: Mirror, tmp_path: Path) -> None:
    mirror.send(100)
    for num_files in range(2 + 3 + 1):  # tensors, ledger, and before `latest`
        left = iter(range(num_files))
        with pytest.raises(Stopped):
            mirror.send(200, lambda left=left: next(left, None) is None)
        assert mirror.newest_step() == 100
    assert mirror.send(200).num_files == 1, "all but `latest` was there"
    with pytest.raises(Stopped):
        Mirror(mirror.url, tmp_path / "other").restore(lambda: True)
    assert checkpoint.candidates(tmp_path / "other") == []


# ------------------------------------------------------------------------------------------ damage


def remove(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGES = [truncate, flip, remove, empty]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["manifest.json", "run.json", "rank-00000.safetensors", "rank-00001.safetensors"])
def test_a_damaged_checkpoint_is_passed_over(
    name: str, damage: Callable[[Path], None], run: SavedRun, mirror: Mirror, tmp_path: Path
) -> None:
    mirror.send(100)
    before = without_checkpoints(content(run.folder))
    run.save(300)
    mirror.send(300)
    damage(place_of(mirror, 300) / name)
    step, found = restored(mirror, tmp_path / "new")
    assert step == 100
    journal = "journal/a0001-r00000.jsonl"
    assert found[journal] == before[journal]
    assert not any("s00000300" in file for file in found), "rows of a checkpoint that was not restored"
    assert not list((tmp_path / "new").rglob("*.tmp"))
    damage(place_of(mirror, 100) / name)
    second = "" if (name, damage) == ("manifest.json", remove) else "step-000100.*"  # without manifest it is none
    with pytest.raises(UserError, match=rf"(?s)none of them is whole:.*step-000300.*{second}start anew: run.dir=NEW"):
        restored(mirror, tmp_path / "other")


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["lineage-s00000200-a0001.json", "a0001-s00000200-r00001.rows"])
def test_a_damaged_ledger_is_passed_over(
    name: str, damage: Callable[[Path], None], mirror: Mirror, tmp_path: Path
) -> None:
    mirror.send(100)
    mirror.send(200)
    damage(Path(mirror.url, "ledger", name))
    assert restored(mirror, tmp_path / "new")[0] == 100


@pytest.mark.parametrize("damage", DAMAGES)
def test_all_stand_on_the_first_ledger_file(damage: Callable[[Path], None], mirror: Mirror, tmp_path: Path) -> None:
    mirror.send(100)
    mirror.send(200)
    damage(Path(mirror.url, "ledger", "a0001-s00000100-r00000.rows"))
    with pytest.raises(UserError, match=r"none of them is whole:(?s:.*)a0001-s00000100-r00000\.rows"):
        restored(mirror, tmp_path / "new")
    assert checkpoint.candidates(tmp_path / "new") == []


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_pointer_or_owner(
    damage: Callable[[Path], None], run: SavedRun, mirror: Mirror, tmp_path: Path
) -> None:
    """The checkpoints speak for themselves."""
    mirror.send(100)
    mirror.send(200)
    damage(Path(mirror.url, "latest"))
    assert mirror.newest_step() is None
    assert restored(mirror, tmp_path / "new")[0] == 200
    mirror.keep([])
    assert mirror.steps() == [200, 100], "what `latest` names is not known: nothing may go"
    mirror.send(200)
    assert mirror.newest_step() == 200
    damage(Path(mirror.url, "owner"))
    assert restored(mirror, tmp_path / "newer")[0] == 200
    if damage is remove:
        mirror.send(200)
    else:
        with pytest.raises(UserError, match=r"owner is damaged .* delete it if that is the run in"):
            mirror.send(200)


def test_a_whole_checkpoint_under_the_name_of_another(mirror: Mirror, tmp_path: Path) -> None:
    mirror.send(100)
    mirror.send(200)
    shutil.copytree(place_of(mirror, 100), place_of(mirror, 200), dirs_exist_ok=True)
    step, found = restored(mirror, tmp_path / "new")
    assert step == 100
    assert not any("step-000200" in name for name in found)


def test_a_pointer_to_nothing(mirror: Mirror, tmp_path: Path) -> None:
    mirror.send(100)
    mirror.send(200)
    shutil.rmtree(place_of(mirror, 200))
    assert restored(mirror, tmp_path / "new")[0] == 100


def test_a_local_checkpoint_that_is_broken_is_not_mirrored(run: SavedRun, mirror: Mirror) -> None:
    mirror.send(100)
    flip(run.folder / "checkpoints" / "step-000200" / "rank-00000.safetensors")
    with pytest.raises(OSError, match=r"rank-00000\.safetensors is not what was committed"):
        mirror.send(200)
    flip(run.folder / "checkpoints" / "step-000200" / "rank-00000.safetensors")
    truncate(run.folder / "ledger" / "lineage-s00000200-a0001.json")
    with pytest.raises(OSError, match=r"lineage-s00000200-a0001\.json was changed"):
        mirror.send(200)
    with pytest.raises(FileNotFoundError):
        mirror.send(300)
    assert mirror.newest_step() == 100


def test_a_store_that_garbles_is_seen(mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror.send(100)
    real = storage.upload

    def garbled(path: Path, url: str) -> None:
        real(path, url)
        if url.endswith("rank-00001.safetensors"):
            flip(Path(url))

    monkeypatch.setattr(storage, "upload", garbled)
    with pytest.raises(OSError, match=r"rank-00001\.safetensors is not what was sent"):
        mirror.send(200)
    assert mirror.newest_step() == 100


def test_a_bit_that_flips_on_the_way_costs_no_checkpoint(
    mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror.send(200)
    real, flips = storage.read_range, iter([1])

    def flipped(url: str, *arguments: Any, **named: Any) -> bytes:
        data = real(url, *arguments, **named)
        return bytes(len(data)) if url.endswith("rank-00000.safetensors") and next(flips, 0) else data

    monkeypatch.setattr(storage, "read_range", flipped)
    assert restored(mirror, tmp_path / "new")[0] == 200


def test_names_that_lead_elsewhere_are_refused(run: SavedRun, mirror: Mirror, tmp_path: Path) -> None:
    for name in ("../x", "journal/../x", "/etc/x", "journal/a/b", "checkpoints/latest", "journal/.x", "metrics.jsonl"):
        mirror.send(200)
        (place_of(mirror, 200) / "run.json").write_bytes(seal({"files": {"run_id": run_id(run.folder), name: "x"}}))
        with pytest.raises(UserError, match="none of its files"):
            restored(mirror, tmp_path / "new")
    assert not (tmp_path / "x").exists()


# ------------------------------------------------------------------------------------------ retention


def test_retention(run: SavedRun, mirror: Mirror, tmp_path: Path) -> None:
    for step in (300, 400, 500):
        run.save(step)
    for step in (100, 200, 300, 500):  # 400 was passed over while another one was on its way
        mirror.send(step)
        mirror.keep(kept_steps(mirror.steps(), 2, 200))
    assert mirror.steps() == [500, 300, 200]
    assert mirror.newest_step() == 500
    mirror.send(400)  # one of every 200 for ever: sent when there is time
    assert mirror.newest_step() == 500
    assert mirror.steps() == [500, 400, 300, 200]
    mirror.keep([])
    assert mirror.steps() == [500]
    assert restored(mirror, tmp_path / "new")[0] == 500


def test_killed_anywhere_in_keep(run: SavedRun, mirror: Mirror, tmp_path: Path) -> None:
    """Half a checkpoint is none, and goes with the next call."""
    mirror.send(100)
    mirror.send(200)
    shutil.copytree(mirror.url, tmp_path / "first")

    def reset() -> None:
        shutil.rmtree(mirror.url)
        shutil.copytree(tmp_path / "first", mirror.url)

    seen = []
    for _ in seams(lambda: mirror.keep([]), reset):
        seen.append(mirror.steps())
        mirror.keep([])
        assert len(list(Path(mirror.url).rglob("step-*/*"))) == 4
    assert seen == [[200, 100]] + [[200]] * 8


def test_what_was_given_up_goes_and_is_not_restored(run: SavedRun, mirror: Mirror, tmp_path: Path) -> None:
    """Step 200 is rolled back; the next attempt saves 150, then another 200."""
    mirror.send(100)
    mirror.send(200)
    first = place_of(mirror, 200)
    run.go_back_to(100)
    run.start()
    run.save(150)
    second = Mirror(mirror.url, run.folder)
    second.send(150)
    assert second.newest_step() == 150
    assert second.steps() == [150, 100]
    shutil.rmtree(place_of(mirror, 150))
    assert restored(mirror, tmp_path / "new")[0] == 100, "the way of 200 was given up"
    Mirror(mirror.url, run.folder).send(150)
    run.save(200)
    second.send(200)
    assert second.steps() == [200, 150, 100]
    second.keep([200, 100])
    assert not list(first.glob("*"))
    assert second.steps() == [200, 100]
    restored(mirror, tmp_path / "newer")
    found = newest(tmp_path / "newer")
    assert found is not None
    assert (found.facts.step, found.facts.attempt) == (200, 2)


# ------------------------------------------------------------------------------------------ whose it is


def test_another_run_is_refused(run: SavedRun, mirror: Mirror, tmp_path: Path) -> None:
    mirror.send(200)
    other = SavedRun(tmp_path / "other")
    other.start()
    other.save(100)
    before = content(Path(mirror.url))
    both = rf"belongs to run {run_id(run.folder)}, and .*other is run {run_id(other.folder)}: give every run a mirror"
    for work in (lambda: Mirror(mirror.url, other.folder).send(100), lambda: Mirror(mirror.url, other.folder).keep([])):
        with pytest.raises(UserError, match=both):
            work()
    shutil.rmtree(other.folder / "checkpoints")
    with pytest.raises(UserError, match=both):
        Mirror(mirror.url, other.folder).restore()
    assert content(Path(mirror.url)) == before


def test_an_older_attempt_writes_nothing_more(run: SavedRun, mirror: Mirror, tmp_path: Path) -> None:
    mirror.send(200)
    number = run.start()
    run.save(300)
    with pytest.raises(Superseded):
        mirror.send(300)
    Mirror(mirror.url, run.folder, number).send(300)
    with pytest.raises(Superseded):
        mirror.keep([])
    assert mirror.newest_step() == 300


def test_an_older_attempt_on_the_old_disk_writes_nothing_more(run: SavedRun, mirror: Mirror, tmp_path: Path) -> None:
    """The run was restored elsewhere and goes on there; the first start still lives and knows nothing of it."""
    mirror.send(200)
    new = SavedRun(tmp_path / "new")
    restored(mirror, new.folder)
    assert known_run_id(new.folder) == run_id(run.folder)
    new.go_back_to(200)
    assert new.start() == 2
    new.save(250)
    Mirror(mirror.url, new.folder).send(250)
    run.save(300)
    for work in (lambda: mirror.send(300), lambda: mirror.keep([])):
        with pytest.raises(Superseded, match=r"attempt 1 of run .* found attempt 2 of another start at work"):
            work()
    assert mirror.newest_step() == 250


def test_one_attempt_number_on_two_disks(run: SavedRun, mirror: Mirror, tmp_path: Path) -> None:
    """Attempt 2 was restored elsewhere before the old disk's attempt 2 had sent anything: the second to send stops."""
    mirror.send(200)
    new = SavedRun(tmp_path / "new")
    restored(mirror, new.folder)
    new.go_back_to(200)
    assert new.start() == run.start() == 2
    new.save(250)
    run.save(250)
    Mirror(mirror.url, new.folder).send(250)
    with pytest.raises(Superseded, match=r"attempt 2 of run .* found attempt 2 of another start"):
        Mirror(mirror.url, run.folder).send(250)


def test_a_number_taken_by_an_attempt_that_sent_nothing_whole_is_not_taken_again(
    run: SavedRun, mirror: Mirror, tmp_path: Path
) -> None:
    """Its ledger files may be in the mirror under that number."""
    mirror.send(200)
    run.start()
    run.save(300)
    with pytest.raises(Stopped):
        Mirror(mirror.url, run.folder).send(300, lambda: True)
    assert restored(mirror, tmp_path / "new")[0] == 200
    assert newest_attempt(tmp_path / "new") == 2


def test_a_mirror_inside_the_run_folder_is_refused(run: SavedRun) -> None:
    for url in (f"{run.folder}", f"{run.folder}/checkpoints/../mirror", f"file://{run.folder}/x"):
        with pytest.raises(UserError, match="it must lie outside the run folder"):
            Mirror(url, run.folder)
    Mirror(f"{run.folder}-mirror", run.folder)


def test_the_run_id_is_made_once(tmp_path: Path) -> None:
    found: list[str] = []
    starts = [threading.Thread(target=lambda: found.append(run_id(tmp_path / "run"))) for _ in range(8)]
    for start in starts:
        start.start()
    for start in starts:
        start.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run_id"]
    (tmp_path / "run" / "run_id").write_text("")
    with pytest.raises(UserError, match=r"run_id is empty; it must hold the id of the run"):
        run_id(tmp_path / "run")


def test_places_sort_by_attempt_then_step() -> None:
    names = ["step-000300-a0001-" + "f" * 16, "step-000200-a0002-" + "0" * 16, "step-1000000-a0002-" + "0" * 16]
    places = [Place.named(name) for name in names]
    assert [place is not None and place.folder for place in places] == [f"checkpoints/{name}" for name in names]
    assert sorted(filter(None, reversed(places))) == places
    assert Place.named("step-000200.tmp") is None


# ------------------------------------------------------------------------------------------ a run that trained


@pytest.mark.slow
def test_the_audit_of_a_restored_run_says_the_same(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    """A run that really trained; each of its checkpoints is mirrored, and restored on its own."""
    ranks.train(tiny_config(**{"train.steps": 4}), 1)
    run_dir = tmp_path / "run"
    mirror = Mirror(str(tmp_path / "mirror"), run_dir)
    for folder in reversed(checkpoint.candidates(run_dir)):
        mirror.send(checkpoint.step_of(folder))
    expected = audit_run(run_dir)
    assert expected.exit_code == 0
    assert Mirror(mirror.url, tmp_path / "new").restore() == 4
    assert audit_run(tmp_path / "new") == expected
    saved = Checkpoint(run_dir / "checkpoints" / "step-000004").facts
    assert Checkpoint(tmp_path / "new" / "checkpoints" / "step-000004").facts == saved
    shutil.rmtree(place_of(mirror, 4))
    assert Mirror(mirror.url, tmp_path / "older").restore() == 2
    result = audit_run(tmp_path / "older")
    assert result.exit_code == 0, "\n".join(result.lines)
    assert result.counts["abandoned_files"] == 0
    segment = json.loads(next((tmp_path / "older" / "ledger").glob("lineage-*a0001.json")).read_text())["segments"][0]
    (tmp_path / "older" / "ledger" / segment["file"]).unlink()
    assert audit_run(tmp_path / "older").exit_code == 1
