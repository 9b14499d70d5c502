from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from launch.report import report
from launch.report_trust import MAX_ATTEMPTS, MAX_EVENTS
from pretrain.verdict import AuditResult
from shards.errors import UserError
from tests.browser.whole_run import TITLES, write_whole_run

EXACT = AuditResult(0, ("audit of step 20: EXACT", "  1 < 2 & so on"), {"clips": 640}, {})
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Tags must be closed in order; remembers text, headings, links out."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + "\n" if self.open[-1:] != ["style"] else ""


def page_of(run_dir: Path, audit: AuditResult | None = None) -> Page:
    path = report(run_dir, audit)
    assert path == run_dir / "report.html"
    return Page(path.read_text())


def write_rows(run_dir: Path, rows: list[dict[str, Any]]) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps({"time": 1.79e9, **row}) + "\n" for row in rows)


def write_attempt(run_dir: Path, number: int, outcome: dict[str, Any] | None = None) -> None:
    folder = run_dir / "attempts"
    folder.mkdir(exist_ok=True)
    (folder / f"{number:04d}.json").write_text(json.dumps({"attempt": number, "time": 1.79e9, "world_size": 2}))
    if outcome is not None:
        (folder / f"{number:04d}.outcome.json").write_text(json.dumps(outcome))


def train_row(attempt: int, step: int) -> dict[str, Any]:
    return {
        "kind": "train", "attempt": attempt, "step": step, "loss": 1.0, "loss/masked_frame": 0.9,
        "masked_frame/tube": 0.8, "masked_frame/frame": 1.0, "loss/frame_order": 1.9, "frame_order/accuracy": 0.25,
        "frame_order/chance": 0.1429, "frame_order/gated": 0.05, "lr": 1e-3, "grad_norm": None, "step_s": 0.5,
        "clips_per_s": 24.5, "data_wait_fraction": 0.031, "mfu": None, "memory_bytes": 900e6, "gpu_memory_bytes": None,
        "data_wait_mean_fraction": 0.02, "slowest_rank": 0 if step == 3 else 1, "decode_ms": 12.5, "bytes_read": 4e6,
        "requests": 32, "cache_hits": 0, "retries": 0, "hedges": 0, "throttled": 0, "substituted/io": int(step == 12),
    }  # fmt: skip


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Two attempts: the first killed at step 14, the second goes on from 10 and finishes."""
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "config.yaml").write_text(
        "data: {shards: data/demo}\nmodel: {size: nano}\ntrain: {steps: 20}\n"
        "objective: {masked_frame: {weight: 1.0}, frame_order: {weight: 0.1}}\n"
    )
    (folder / "environment.json").write_text('{"versions": {"torch": "2.13.0"}, "num_cpus": 2}')
    evaluation = {"loss/masked_frame": 0.61, "masked_frame/zero": 0.93, "masked_frame/copy": 1.12}
    write_rows(folder, [{"kind": "start", "attempt": 1, "step": 0}, *(train_row(1, step) for step in range(1, 15))])
    write_rows(folder, [{"kind": "save", "attempt": 1, "step": 10, "seconds": 0.4}])
    write_rows(folder, [{"kind": "start", "attempt": 2, "step": 10}, *(train_row(2, step) for step in range(11, 21))])
    write_rows(folder, [{"kind": "eval", "attempt": 2, "step": step, **evaluation} for step in (15, 20)])
    write_rows(folder, [{"kind": "save", "attempt": 2, "step": 20, "seconds": 0.4}])
    write_attempt(folder, 1)
    write_attempt(folder, 2, {"outcome": "finished", "step": 20, "reason": "all 20 steps are done", "time": 1.79e9})
    (folder / "pictures").mkdir()
    Image.new("RGB", (8, 8), "red").save(folder / "pictures" / "step-20.png")
    return folder


def test_page_tells_the_run(run_dir: Path) -> None:
    page = page_of(run_dir, EXACT)
    for words in (
        "A nano Transformer learning masked frame and frame order from data/demo. Last start:",
        "finished",
        "0.61",
        "predicting zero 0.93 · copying 1.12",
        "right, chance 14.3\N{NO-BREAK SPACE}%",
        "waiting for data 3.1\N{NO-BREAK SPACE}%, mostly for rank 1",
        "2 checkpoints",
        "640 clips checked",
        "1 < 2 & so on",
        "2 ranks · steps 0 to 14 · 4 steps done again",
        "killed without a word",
        "all 20 steps are done",
        "copying the nearest visible token",
        "Frame order: right answers",
        "versions.torch",
    ):
        assert words in page.text, words
    charts = {attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"}
    assert {"Masked frame: loss", "Learning rate", "Clips per second", "Memory", "Seconds per step"} <= charts
    assert {"Waiting for data", "Decoding: milliseconds per clip", "Bytes read, per row"} <= charts
    assert {"Requests, per row", "Samples replaced, per row"} <= charts
    assert not {"Storage trouble, per row", "Other incidents, per row"} & charts  # there was none
    assert "Model FLOPs utilisation" not in charts  # unknown hardware: null, so no chart
    assert "Gradient norm" not in charts


def test_page_is_self_contained(run_dir: Path) -> None:
    page = page_of(run_dir, EXACT)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(sources) == 1
    assert all(str(source).startswith("data:image/png;base64,") for source in sources)
    html = (run_dir / "report.html").read_text()
    assert not re.search(r"(?:src|href)=\"(?!data:)|url\(|@import|https?://", html)


def test_nothing_from_outside_becomes_markup_or_leaks(run_dir: Path) -> None:
    evil = "<script>alert('x')</script>\"'&{0}%s"
    canary = "canary0123456789"
    url = f"s3://me:{canary}@bucket/{evil}?key={canary}"
    (run_dir / "config.yaml").write_text(json.dumps({"data": {"shards": url}, "model": {"size": evil}, evil: [evil]}))
    (run_dir / "environment.json").write_text(json.dumps({evil: evil, "from": url}))
    write_rows(run_dir, [{"kind": "event", "attempt": 2, "step": 15, "event": evil, "reason": f"{evil} {url}"}])
    write_attempt(run_dir, 3, {"outcome": evil, "step": 20, "reason": f"{evil} {url}", "time": 1.79e9})
    write_rows(
        run_dir, [{"kind": "start", "attempt": 3, "step": 20}, {**train_row(3, 21), f"loss/{evil}": 1, f"{evil}/x": 2}]
    )
    (run_dir / "pictures" / "step-20.png").rename(run_dir / "pictures" / "<b onload=x>'\".png")
    folder = run_dir.rename(run_dir.with_name("<b>'\"{x}"))
    page = page_of(folder, AuditResult(1, (evil,), {}, {}))
    assert not {"script", "b onload=x"} & {tag for tag, _ in page.tags}
    assert not any("onload" in attributes for _, attributes in page.tags)
    assert "alert('x')" in page.text
    assert f"start 2: {evil}" in page.text
    assert canary not in (folder / "report.html").read_text()


@pytest.mark.parametrize("missing", ["config.yaml", "environment.json", "metrics.jsonl", "attempts", "pictures"])
def test_missing_pieces_leave_a_page(run_dir: Path, missing: str) -> None:
    path = run_dir / missing
    path.rename(run_dir.with_name("elsewhere"))
    words = {
        "config.yaml": "There is no readable config.yaml.",
        "environment.json": "There is no readable environment.json.",
        "metrics.jsonl": "No loss was logged yet.",
        "attempts": "steps 0 to 14",  # from the metrics
        "pictures": "No picture was drawn yet.",
    }
    assert words[missing] in page_of(run_dir).text


def test_run_that_just_began(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("train: {steps: 20}\n")
    page = page_of(tmp_path)
    for words in ("It has not been started.", "No audit was made for this page.", "No attempt is on record."):
        assert words in page.text


def test_page_says_why_there_is_no_audit(run_dir: Path) -> None:
    report(run_dir, why_no_audit="s3://me:canary@bucket/<data> is gone")
    html = (run_dir / "report.html").read_text()
    assert "No audit was made for this page: s3://bucket/&lt;data&gt; is gone</p>" in html


def test_damaged_files_leave_a_page(run_dir: Path) -> None:
    (run_dir / "config.yaml").write_text("{ not yaml")
    (run_dir / "environment.json").write_text("[1]")
    (run_dir / "attempts" / "0002.outcome.json").write_text("{")
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('[1, 2]\n{"kind": "train"}\n{"kind": "tra')
    assert "There is no readable config.yaml." in page_of(run_dir).text


def test_violated_audit_is_seen_at_once(run_dir: Path) -> None:
    page = page_of(run_dir, AuditResult(1, ("audit of step 20: VIOLATED",), {"clips": 639}, {}))
    assert [attributes["class"] for tag, attributes in page.tags if "bad" in str(attributes.get("class"))] == [
        "tile bad",
        "audit bad",
    ]


def test_many_attempts_and_pictures_are_cut_and_counted(run_dir: Path) -> None:
    for number in range(3, 31):
        write_attempt(run_dir, number, {"outcome": "failed", "step": 20, "reason": "again", "time": 1.79e9})
    for number in range(11):
        Image.new("RGB", (8, 8)).save(run_dir / "pictures" / f"{number}.png")
    page = page_of(run_dir)
    assert sum(tag == "li" for tag, _ in page.tags) == MAX_ATTEMPTS
    assert f"{30 - MAX_ATTEMPTS} earlier starts are not shown." in page.text
    assert sum(tag == "img" for tag, _ in page.tags) == 8
    assert "4 more in" in page.text


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_whole_run(tmp_path_factory.mktemp("runs") / "whole")


def test_whole_run_is_told_whole(whole: Path) -> None:
    page = page_of(whole, EXACT)
    assert {attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"} == TITLES
    for words in (
        "Rank 5 on n2 computes longest in 100\N{NO-BREAK SPACE}% of the newest rows",
        "copied to the mirror: 23, step not applied: 1, save failed: 1, rolled back: 1",
        "start 4: rolled back to step 850, over steps 900 to 909 (9.1 sigma above its mean)",
        "start 3: save failed (No space left on device)",
        "4 of 6 starts lost work",
        "would lose least (Young and Daly); checkpoint.every_steps is 50.",
        "of the time was training that counts (ETTR).",
        "is training that counts",
        "rolled back",
    ):
        assert words in page.text, words


def test_many_events_are_cut_and_counted(run_dir: Path) -> None:
    rows = [{"kind": "event", "attempt": 2, "step": step, "event": "skipped", "reason": "x"} for step in range(1, 101)]
    write_rows(run_dir, rows)
    page = page_of(run_dir)
    assert "step not applied: 100" in page.text
    assert page.text.count("start 2: step not applied (x)") == MAX_EVENTS


def test_ranks_that_are_not_told_apart_leave_no_plot(run_dir: Path) -> None:
    """More ranks than a row lists: the slowest is named all the same."""
    rows = [{**train_row(2, step), "slowest_compute_rank": 70, "slowest_compute_ratio": 1.5} for step in range(11, 21)]
    write_rows(run_dir, rows)
    page = page_of(run_dir)
    assert "Rank 70 computes longest in 100\N{NO-BREAK SPACE}% of the newest rows" in page.text
    assert "the slowest needs 1.5\N{MULTIPLICATION SIGN} the median rank's time" in page.text
    assert "Seconds per step, rank by rank" not in page.text


def test_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run folder"):
        report(tmp_path)


def test_report_works_on_a_login_node(run_dir: Path) -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'deepspeed', 'webdataset', 'wandb')))\n"
        "from pathlib import Path; from launch.report import report; report(Path(sys.argv[1]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run_dir)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (run_dir / "report.html").exists()
