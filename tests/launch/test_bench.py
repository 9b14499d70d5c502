"""Measurements are made of what training does, and advice is given only where the figures carry it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from launch import bench_loader, bench_window, cli
from launch.bench import Advice, Spread, advice_lines, cpu_s, cpu_used_s, gain, load_lines
from launch.bench_clips import Census
from launch.bench_decode import Cost, DecodeResult, Trial, bench_decode
from launch.bench_loader import LoaderResult
from launch.bench_window import GIVEN, Need, Setting, Speed, Window, needed, settings_for
from pretrain.config import Config, load_config
from shards.errors import UserError
from shards.pack import PackOptions, pack
from shards.reader import open_split

ROOT = Path(__file__).resolve().parents[2]
LAPTOP = ROOT / "configs" / "laptop.yaml"
FILMS = ROOT / "configs" / "clips"


@pytest.fixture(scope="module")
def packed_films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled films for stride 4, small, nothing held out."""
    folder = tmp_path_factory.mktemp("bench") / "set"
    pack(FILMS, folder, PackOptions(short_side=48, max_frames=80, stride=4, val_fraction=0.0, workers=1), None)
    return folder


def config_for(shards: Path | str, *overrides: str) -> Config:
    return load_config(LAPTOP, [f"data.shards={shards}", "data.size=48", *overrides])


# ------------------------------------------------------------------------------------------------ figures


def test_cpu_clock_of_another_process() -> None:
    """It counts what that process computes, in all its threads, and not how long it waits."""
    code = (
        "import sys, threading, time\n"
        "def burn():\n"
        "    end = time.thread_time() + 0.15\n"
        "    while time.thread_time() < end: pass\n"
        "threads = [threading.Thread(target=burn) for _ in range(2)]\n"
        "[thread.start() for thread in threads]; [thread.join() for thread in threads]\n"
        "print(time.process_time(), flush=True)\n"
        "sys.stdin.readline()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    told_s = float(process.stdout.readline())
    time.sleep(0.3)
    seen_s = cpu_s([process.pid])[process.pid]
    process.kill()
    process.wait()
    assert told_s >= 0.3
    assert told_s <= seen_s < told_s + 0.1
    assert cpu_s([process.pid]) == {}  # gone: not counted, no error


def test_cpu_of_a_process_that_began_meanwhile_counts_whole() -> None:
    assert cpu_used_s({1: 5.0, 2: 1.0}, {1: 6.5, 3: 0.25}) == 1.75


@pytest.mark.parametrize(
    ("new", "old", "times"),
    [
        ((20.0, 22.0, 21.0), (10.0, 10.5, 9.5), 2.1),
        ((11.0, 11.2, 11.1), (10.0, 10.1, 10.2), None),  # too little
        ((20.0, 10.4, 21.0), (10.0, 10.5, 9.5), None),  # the spreads touch
        ((5.0,), (10.0,), None),
    ],
)
def test_a_gain_counts_only_beyond_the_spread(new: Any, old: Any, times: float | None) -> None:
    assert gain(Spread(new), Spread(old)) == (None if times is None else pytest.approx(times))


def test_advice_fits_80_columns_but_what_is_typed_stays_whole() -> None:
    change = "tubelet pack SRC DST --preset train --stride 4 " + 60 * "x"
    lines = advice_lines([Advice(change, 30 * "figures ")], "")
    assert lines[1] == f"  {change}"
    assert all(len(line) <= 80 for line in lines[2:])
    assert advice_lines([], "all is well") == ["change    nothing: all is well"]


def test_a_busy_machine_is_told() -> None:
    assert load_lines(0.2) == []
    assert load_lines(4.25) == ["note      other work wanted 4.2x the cores there are: speeds came out too low"]


# ------------------------------------------------------------------------------------------------ decode


def cost(*clips_per_s: float) -> Cost:
    return Cost(Spread(clips_per_s), 10.0, 20.0, 8)


def decode_result(
    *overrides: str, costs: dict[str, Cost] | None = None, trial: Trial | None = None, **census: Any
) -> DecodeResult:
    plain: dict[str, Any] = {
        "num_videos": 100, "num_too_short": 0, "skipping": 1.0, "irregular": 0.0, "misfit_grid": 0, "stride": 4,
        "lowered": 0.0, "span": 61, "num_frames": 122, "short_side": 256, "bytes_per_clip": 1e5,
    }  # fmt: skip
    data = config_for("data/mine", *overrides).data
    return DecodeResult(
        data, 1000, Census(**{**plain, **census}), costs or {data.decoder: cost(50, 51)}, trial, {}, 0.0
    )


def test_no_advice_where_nothing_is_gained() -> None:
    costs = {"pyav": cost(50, 51), "decord": cost(20, 21)}
    same = Trial(cost(10, 12), cost(11, 13), 1.0)
    result = decode_result(costs=costs, trial=same, skipping=0.0, irregular=1.0)
    assert result.advice() == []
    assert "change    nothing: no other decoder or packing that was measured is faster" in result.lines()


def test_advice_names_the_misfit_and_what_was_measured() -> None:
    trial = Trial(cost(10, 11), cost(40, 44), 1.2)
    (advice,) = decode_result(trial=trial, skipping=0.25, misfit_grid=4, stride=3).advice()
    assert advice.change == "tubelet pack SRC DST --preset train --stride 3"
    assert advice.because == (
        "grid 4 does not fit stride 3 in 75% of the samples; 8 packed anew decode 4.0x faster, with 1.2x the bytes"
    )
    (advice,) = decode_result(trial=trial, skipping=0.5, irregular=0.5).advice()
    assert "50% of the samples have no grid" in advice.because
    (advice,) = decode_result(trial=trial, short_side=1080).advice()
    assert "the short side is 1080 pixels, clips are 48" in advice.because


def test_advice_on_decoder_and_length() -> None:
    (advice,) = decode_result("data.decoder=decord", costs={"decord": cost(20, 21), "pyav": cost(62, 65)}).advice()
    assert (advice.change, advice.because) == ("data.decoder=pyav", "pyav measures 3.1x faster here")
    (advice,) = decode_result(costs={"pyav": cost(20, 21), "decord": cost(62, 65)}).advice()
    assert "it can hang" in advice.because
    (advice,) = decode_result(num_frames=1000).advice()
    assert "--max-frames 122" in advice.change
    assert "6% of the frames" in advice.because
    assert decode_result("data.clips_per_video=8", num_frames=1000).advice() == []


def test_cost_per_clip_counts_all_clips_of_a_video() -> None:
    times_RV = np.array([[10.0, 30.0], [20.0, 20.0]])
    found = Cost.of(times_RV, 2)
    assert found.clips_per_s.values == (100.0, 100.0)
    assert (found.ms_median, found.num_videos) == (10.0, 2)
    times_RV[0, 1] = np.nan  # killed at the deadline, once
    assert Cost.of(times_RV, 2).clips_per_s.values == (200.0, 100.0)


def test_decoding_is_measured_on_the_clips_of_training(packed_films: Path) -> None:
    result = bench_decode(config_for(packed_films, "data.workers=0"), seconds=1)
    assert result.census.skipping == 1.0
    assert result.trial is None  # nothing to gain by packing anew
    assert next(iter(result.costs)) == "pyav"
    for found in result.costs.values():
        assert len(found.clips_per_s.values) == 5
        assert 0 < found.clips_per_s.low <= found.clips_per_s.high
        assert 0 < found.ms_median <= found.ms_p90
    assert result.failures == {}
    assert json.loads(json.dumps(result.to_json()))["decoders"].keys() == result.costs.keys()
    assert [line for line in result.lines() if len(line) > 80 and not line.startswith("data  ")] == []


def test_videos_off_the_grid_are_packed_anew_for_comparison(packed_films: Path) -> None:
    result = bench_decode(config_for(packed_films, "data.stride=3"), seconds=1)
    assert (result.census.skipping, result.census.misfit_grid, result.census.stride) == (0.0, 4, 3)
    assert result.trial is not None
    assert result.trial.before.num_videos == result.trial.after.num_videos >= 1
    assert 0.3 < result.trial.bytes_ratio < 3


def test_what_does_not_decode_is_counted_and_left_out(packed_films: Path, tmp_path: Path) -> None:
    """One sample's bytes are overwritten: its checksum says so; the others are measured."""
    broken = Path(shutil.copytree(packed_films, tmp_path / "broken"))
    reader = open_split(str(broken), "train")
    record = reader.records[0]
    with (broken / reader.split.shards[int(record["shard"])].name).open("r+b") as file:
        file.seek(int(record["offset"]) + 200)
        file.write(os.urandom(200))
    result = bench_decode(config_for(broken), seconds=1)
    assert result.failures == {"checksum": 1}
    assert any(line == f"unusable  1 checksum (index: {result.census.num_videos} looked at)" for line in result.lines())


def test_no_clip_at_all_is_a_mistake_of_the_user(packed_films: Path) -> None:
    with pytest.raises(UserError, match=r"data\.frames is 200; none of the first"):
        bench_decode(config_for(packed_films, "data.frames=200"), seconds=1)


# ------------------------------------------------------------------------------------------------ loader


def window(clips_per_s: float, *, cores: float = 1.0, **changes: Any) -> Window:
    plain: dict[str, Any] = {
        "first_batch_s": 0.5, "seconds": 1.0, "num_clips": clips_per_s, "cpu_s": cores, "decode_s": 10.0,
        "bytes_read": 10**6, "num_requests": clips_per_s, "num_retries": 0, "num_throttled": 0, "num_cache_hits": 0,
        "substituted": {},
    }  # fmt: skip
    return Window(**{**plain, **changes})


def loader_result(
    rates: dict[int, tuple[float, ...]], *overrides: str, longer: tuple[float, ...] = (), step_s: float | None = None,
    cores: float = 1.0, is_remote: bool = False, **changes: Any,
) -> LoaderResult:  # fmt: skip
    config = config_for(
        "s3://bucket/mine" if is_remote else "data/mine", "train.steps=8", "schedule.warmup_steps=0", *overrides
    )
    speeds = [
        Speed(
            Setting(f"workers={workers}", config.data.model_copy(update={"workers": workers})),
            tuple(window(rate, cores=cores, **changes) for rate in found),
        )
        for workers, found in rates.items()
    ]
    if longer:
        data = config.data.model_copy(update={"run_length": 16})
        speeds.append(Speed(Setting("run_length=16", data), tuple(window(rate) for rate in longer)))
    need = Need(8, 4, step_s, GIVEN)
    return LoaderResult(config, 1000, 10**9, is_remote, need, tuple(speeds), 0.0)


def changes_of(result: LoaderResult) -> list[str]:
    return [advice.change.split("   ")[0] for advice in result.advice()]


def test_workers_are_advised_by_what_they_gave() -> None:
    assert changes_of(loader_result({0: (30, 31), 1: (29, 30), 2: (58, 60)})) == ["data.workers=2"]
    assert changes_of(loader_result({0: (30, 31), 1: (29, 30), 2: (28, 60)})) == []  # within the spread
    assert changes_of(loader_result({0: (90, 91), 1: (29, 30)})) == []  # without workers a decoder could hang training
    more = loader_result({0: (30, 31), 1: (60, 61), 2: (59, 60), 8: (58, 60)}, "data.workers=8")
    assert changes_of(more) == ["data.workers=1"]


def test_longer_runs_are_advised_where_they_were_measured_to_help() -> None:
    rates: dict[int, tuple[float, ...]] = {0: (10, 11), 1: (10, 11), 2: (10, 11)}
    assert changes_of(loader_result(rates, longer=(90, 95), is_remote=True)) == ["data.run_length=16"]
    assert changes_of(loader_result(rates, longer=(10, 12), is_remote=True)) == []


def test_a_cache_is_advised_for_remote_data_that_is_read_again_and_fits() -> None:
    rates: dict[int, tuple[float, ...]] = {1: (10, 11)}
    (change,) = changes_of(loader_result(rates, "train.steps=1000", is_remote=True))
    assert change == "data.cache='{dir: FOLDER, max_bytes: 1000000000}'"
    assert changes_of(loader_result(rates, "train.steps=1000")) == []
    assert load_config(LAPTOP, [change.replace("'", "")]).data.cache is not None  # it can be typed as it stands


def test_the_wait_is_told_for_a_known_step() -> None:
    slow = loader_result({1: (10, 10)}, step_s=0.4)  # 8 clips a step: 20 a second are needed
    assert slow.to_json()["data_wait_fraction"] == pytest.approx(0.5)
    assert any(line.startswith("wait      50% of the time at 0.40 s per step") for line in slow.lines())
    assert "that is 2.0 cores of decoding" in slow.advice()[0].because
    fast = loader_result({1: (40, 40)}, step_s=0.4)
    assert fast.to_json()["data_wait_fraction"] == 0.0
    unknown = loader_result({1: (40, 40)})
    assert unknown.to_json()["data_wait_fraction"] is None
    assert any(line == "wait      none as long as a step of 8 clips takes 0.20 s or more" for line in unknown.lines())
    assert all(len(line) <= 80 for result in (slow, unknown) for line in result.lines())


def test_who_sets_the_pace() -> None:
    for decode_s, words in ((1.9, "pace      set by decoding"), (0.2, "pace      set by reads: the decoders wait")):
        result = loader_result({2: (100,)}, "data.workers=2", decode_s=decode_s)
        assert any(line.startswith(words) for line in result.lines())


def test_trouble_is_named() -> None:
    (advice,) = loader_result({1: (100,)}, num_throttled=7).advice()
    assert "7.0% of the requests were refused" in advice.because
    (advice,) = loader_result({1: (100,)}, substituted={"io": 2, "died": 1}).advice()
    assert advice.because == "samples had to be replaced: 1 died, 2 io"
    assert not loader_result({1: (100,)}, substituted={"withdrawn": 2}).advice(), "as somebody wanted it"


def test_what_training_needs_comes_from_the_last_run_or_the_command_line(tmp_path: Path) -> None:
    config = config_for("data/mine", f"run.dir={tmp_path}")  # 32 clips, micro batch 8
    assert needed(config, step_s=None, ranks=None) == Need(8, 4, None, GIVEN)
    assert needed(config, step_s=0.5, ranks=2) == Need(16, 2, 0.5, GIVEN)
    rows: list[dict[str, Any]] = [{"kind": "start", "step": 0, "attempt": 1, "world_size": 2}]
    rows += [{"kind": "train", "step": step, "attempt": 1, "step_s": 0.1 * step} for step in (1, 2, 9)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = needed(config, step_s=None, ranks=None)
    assert (found.share, found.ranks, found.step_s) == (16, 2, 0.2)
    assert found.clips_per_s == pytest.approx(80)
    assert needed(config, step_s=None, ranks=4).step_s is None  # measured on other ranks
    assert needed(config, step_s=3.0, ranks=None).step_s == 3.0


def test_settings_are_the_configs_and_the_usual_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_window, "num_cores", lambda: 12)
    data = config_for("data/mine", "data.workers=3").data
    names = [setting.name for setting in settings_for(data, is_remote=False)]
    assert names == ["workers=0", "workers=1", "workers=2", "workers=3", "workers=12"]
    assert [setting.name for setting in settings_for(data, is_remote=True)] == [*names, "run_length=16"]
    assert sum(setting.data == data for setting in settings_for(data, is_remote=True)) == 1


def test_the_real_loader_is_measured(packed_films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_window, "NUM_REPEATS", 2)
    monkeypatch.setattr(bench_window, "SHORTEST_WINDOW_S", 0.1)
    monkeypatch.setattr(bench_window, "num_cores", lambda: 2)
    seen: list[tuple[int, int]] = []
    config = config_for(packed_films, f"run.dir={tmp_path}", "data.workers=1")
    result = bench_loader.bench_loader(config, seconds=1, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(number, 6) for number in range(1, 7)]
    assert [speed.setting.name for speed in result.speeds] == ["workers=0", "workers=1", "workers=2"]
    assert result.ours.setting.data.workers == 1
    for speed in result.speeds:
        assert speed.clips_per_s.low > 0
        assert speed.first_batch_s.low > 0
        assert 0 < speed.cores_busy <= 2 * (os.cpu_count() or 1)
    assert result.num_samples > 3
    assert json.loads(json.dumps(result.to_json()))["settings"]["workers=2"]["cpu_s_per_clip"] > 0
    assert [line for line in result.lines() if len(line) > 80 and not line.startswith("data  ")] == []


# ------------------------------------------------------------------------------------------------ command


def test_the_command_ends_with_the_next_one(packed_films: Path) -> None:
    words = [str(LAPTOP), f"data.shards={packed_films}", "data.size=48"]
    done = CliRunner().invoke(cli.app, ["bench", "decode", *words, "--seconds", "1"])
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1] == "next: tubelet bench loader " + " ".join(words)
    as_json = CliRunner().invoke(cli.app, ["bench", "decode", *words, "--seconds", "1", "--json"])
    assert json.loads(as_json.stdout)["index"]["skipping"] == 1.0
