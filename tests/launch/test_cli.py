"""The command line: what it prints, what it passes on, and what it says to a mistake."""

from __future__ import annotations

import io
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import pretrain.downstream.knn
import pretrain.downstream.reconstruct
import pretrain.witness
from launch import cli, screen
from pretrain.config import load_config
from pretrain.verdict import AuditResult
from shards.errors import UserError


def run(*words: object) -> Result:
    return CliRunner().invoke(cli.app, list(map(str, words)))


def said(result: Result) -> str:
    """The message of a mistake; anything else that went wrong is raised."""
    assert result.exception is not None
    if not isinstance(result.exception, UserError):
        raise result.exception
    return str(result.exception)


def next_command(result: Result) -> list[str]:
    assert result.exit_code == 0, result.output
    last = result.stdout.splitlines()[-1]
    assert last.startswith("next: tubelet ")
    return shlex.split(last.removeprefix("next: "))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run that just began, in a folder whose name a shell would take apart."""
    folder = tmp_path / "my run; $HOME"
    folder.mkdir()
    (folder / "config.yaml").write_text("train: {steps: 20}\n")
    return folder


# ------------------------------------------------------------------------------------------------ hints


def test_next_commands_can_be_typed_as_they_are(packed: Path, tmp_path: Path) -> None:
    data = tmp_path / "it's data"
    shutil.copytree(packed, data)
    words = ["tubelet", "pretrain", "configs/laptop.yaml", f"data.shards={data}"]
    assert next_command(run("verify", data)) == words
    again = tmp_path / "a b"
    done = run("pack", Path("configs/clips").resolve(), again, "--short-side", 32, "--max-frames", 32)
    assert next_command(done) == [*words[:3], f"data.shards={again}"]


def test_hint_of_the_report_is_quoted(run_dir: Path) -> None:
    assert next_command(run("report", run_dir)) == ["tubelet", "export", str(run_dir), str(run_dir / "export")]


# ------------------------------------------------------------------------------------------------ packing


def test_slices_are_packed_and_joined(tmp_path: Path) -> None:
    words = ("pack", Path("configs/clips").resolve(), tmp_path / "data", "--short-side", 32, "--max-frames", 32)
    for number in range(2):
        done = run(*words, "--slice", f"{number}/2", "--shard-bytes", 10_000)
        assert next_command(done) == ["tubelet", "index", str(tmp_path / "data"), "--merge"]
        assert "once every slice is packed:" in done.stdout
    assert next_command(run("index", tmp_path / "data", "--merge"))[1] == "pretrain"
    assert "every shard and every sample is what was packed" in run("verify", tmp_path / "data").stdout
    assert next_command(run("verify", tmp_path / "data", "--repair"))[1] == "verify"
    assert "is packed already" in run(*words, "--slice", "0/2", "--shard-bytes", 10_000).stdout
    assert "--slice is '2/2'; it must be I/N" in said(run(*words, "--slice", "2/2"))


def test_a_stride_and_a_rate_exclude_each_other(tmp_path: Path) -> None:
    done = run("pack", tmp_path, tmp_path / "data", "--stride", 4, "--for-rate", 8)
    assert said(done) == "--stride is 4 and --for-rate is 8; they exclude each other: leave one out"


# ------------------------------------------------------------------------------------------------ width


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


LINES = ("val: " + 12 * "words ", "  note: " + 12 * "words ", "next: tubelet " + 12 * "words ")


def test_results_fit_the_terminal_but_commands_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr("sys.stdout", terminal := Terminal())
    screen.show({}, False, *LINES)
    *folded, last = terminal.getvalue().splitlines()
    assert last == LINES[2]
    assert max(map(len, folded)) <= 40
    assert [line.split("words")[0] for line in folded] == ["val: ", "  ", "  note: ", "    ", "    "]
    assert " ".join(folded).split() == " ".join(LINES[:2]).split()


def test_mistakes_fit_the_terminal_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    screen.complain("error: " + 12 * "words ")
    assert max(map(len, terminal.getvalue().splitlines())) <= 40
    monkeypatch.setattr("sys.stderr", elsewhere := io.StringIO())
    screen.complain("error: " + 12 * "words ")
    assert len(elsewhere.getvalue().splitlines()) == 1


def test_what_is_no_terminal_gets_whole_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr("sys.stdout", pipe := io.StringIO())
    screen.show({}, False, *LINES)
    assert pipe.getvalue().splitlines() == list(LINES)
    monkeypatch.setattr("sys.stdout", terminal := Terminal())
    screen.show({"a": 50 * "words "}, True, *LINES)
    assert json.loads(terminal.getvalue()) == {"a": 50 * "words "}


def test_columns_and_long_words_survive_folding() -> None:
    assert screen.fold("a     b", 40) == "a     b"
    assert screen.fold("at /a/path-that/is-longer/than-the/terminal-is here", 24).splitlines() == [
        "at",
        "  /a/path-that/is-longer/than-the/terminal-is",
        "  here",
    ]


# ------------------------------------------------------------------------------------------------ config


def test_config_takes_overrides_without_a_file() -> None:
    done = run("config", "data.frames=8", "data.shards=s3://bucket//x", "--json")
    assert done.exit_code == 0, done.output
    values = json.loads(done.stdout)
    assert (values["data.frames"], values["data.shards"]) == (8, "s3://bucket//x")


def test_config_takes_a_file_with_an_equals_sign_in_its_name(tmp_path: Path) -> None:
    file = tmp_path / "lr=1.yaml"
    shutil.copy("configs/laptop.yaml", file)
    values = json.loads(run("config", file, "data.frames=8", "--json").stdout)
    assert (values["data.frames"], values["data.size"]) == (8, load_config("configs/laptop.yaml").data.size)


# ------------------------------------------------------------------------------------------------ progress


class Asked(Exception):
    """Carries what a command passed on."""


@pytest.mark.parametrize(("module", "name"), [("knn", "probe"), ("reconstruct", "reconstruct")])
def test_long_commands_show_progress(module: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def record(*words: object, progress: object = None, **others: object) -> None:
        asked.append(progress)
        raise Asked

    monkeypatch.setattr(getattr(pretrain.downstream, module), name, record)
    words = [name, "export", "data", *(["out.mp4"] if name == "reconstruct" else [])]
    assert isinstance(run(*words).exception, Asked)
    assert isinstance(run(*words, "--json").exception, Asked)
    assert callable(asked[0])
    assert asked[1] is None


def test_verify_names_each_shard_as_it_goes(packed: Path) -> None:
    done = run("verify", packed)
    assert sorted(done.stderr.split()[1::2]) == sorted(file.name for file in packed.glob("*.tar"))
    assert run("verify", packed, "--json").stderr == ""


# ------------------------------------------------------------------------------------------------ run folders


@pytest.mark.parametrize("words", [("audit",), ("report",), ("replay", "--step", 0)])
def test_what_is_no_run_folder_is_called_so(words: tuple[object, ...], tmp_path: Path) -> None:
    file = tmp_path / "video.mp4"
    file.touch()
    for path in (tmp_path / "gone", tmp_path, file):
        assert f"{path} is not a run folder" in said(run(*words, path))


def test_report_without_a_checkpoint_says_why_there_is_no_audit(run_dir: Path) -> None:
    done = run("report", run_dir)
    assert done.exit_code == 0, done.output
    assert "has no checkpoint; an audit needs one" in done.stdout
    assert "has no checkpoint; an audit needs one" in (run_dir / "report.html").read_text()
    row = json.loads(run("report", run_dir, "--json").stdout)
    assert row["audit"] is None
    assert "has no checkpoint" in row["why_no_audit"]


def test_report_with_an_audit(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exact(run_dir: Path) -> AuditResult:
        return AuditResult(0, ("audit of step 20: EXACT",), {}, {})

    monkeypatch.setattr(pretrain.witness, "audit_run", exact)
    row = json.loads(run("report", run_dir, "--json").stdout)
    assert (row["audit"], row["why_no_audit"]) == (0, "")
    assert "audit of step 20: EXACT" in (run_dir / "report.html").read_text()
