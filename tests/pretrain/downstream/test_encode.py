"""The mp4 writer."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from pretrain.downstream.encode import write_mp4
from shards.errors import UserError


def test_film_can_be_played_and_looks_as_it_was_written(tmp_path: Path) -> None:
    frames_THWC = np.zeros((7, 65, 97, 3), np.uint8)
    frames_THWC[...] = (196, 106, 40)
    frames_THWC[3:, :, :48] = (20, 200, 90)
    write_mp4(iter(frames_THWC), tmp_path / "new" / "film.mp4", rate=7.5)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["film.mp4"]
    with av.open(str(tmp_path / "new" / "film.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, float(stream.average_rate or 0)) == ("h264", 7.5)
        shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(shown) == 7
    assert shown[0].shape == (66, 98, 3)  # even, as yuv420p asks
    for number, frame_HW3 in enumerate(shown):
        difference = np.abs(frame_HW3[:64, 8:40].astype(int) - frames_THWC[number, :64, 8:40].astype(int))
        assert difference.max() <= 6


def test_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    def frames() -> object:
        yield np.zeros((32, 32, 3), np.uint8)
        raise RuntimeError("the network failed")

    with pytest.raises(RuntimeError, match="the network failed"):
        write_mp4(frames(), tmp_path / "film.mp4", rate=5)  # pyright: ignore
    assert list(tmp_path.iterdir()) == []


def test_output_that_cannot_be_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"must end in \.mp4: use .*film\.mp4"):
        write_mp4(iter(()), tmp_path / "film.avi", rate=5)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_mp4(iter([np.zeros((32, 32, 3), np.uint8)]), tmp_path / "file" / "film.mp4", rate=5)


@pytest.mark.parametrize("name", ["/", ".", ".."])
def test_output_without_a_name_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"must end in \.mp4: use .*NAME\.mp4"):
        write_mp4(iter(()), Path(name), rate=5)
