from __future__ import annotations

from pathlib import Path

import pytest

from shards.errors import UserError
from shards.sources import list_sources


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def rows(path: Path) -> list[tuple[str, str | None, str | None, str]]:
    return [(source.name, source.label, source.split, source.group) for source in list_sources(path).sources]


def test_class_folders(tmp_path: Path) -> None:
    touch(tmp_path, "run/a.mp4", "run/deep/b.MKV", "sit/c.webm", "d.avi", "README.txt", ".hidden/e.mp4", "run/.f.mp4")
    assert rows(tmp_path) == [
        ("d.avi", None, None, "d.avi"),
        ("run/a.mp4", "run", None, "run/a.mp4"),
        ("run/deep/b.MKV", "run", None, "run/deep/b.MKV"),
        ("sit/c.webm", "sit", None, "sit/c.webm"),
    ]
    assert list_sources(tmp_path).num_ignored_files == 1


def test_split_folders(tmp_path: Path) -> None:
    touch(tmp_path, "train/run/a.mp4", "train/b.mp4", "val/sit/c.mp4", "validation/sit/d.mp4", "test/run/e.mp4")
    assert [(name, label, split) for name, label, split, _ in rows(tmp_path)] == [
        ("test/run/e.mp4", "run", "test"),
        ("train/b.mp4", None, "train"),
        ("train/run/a.mp4", "run", "train"),
        ("val/sit/c.mp4", "sit", "val"),
        ("validation/sit/d.mp4", "sit", "val"),
    ]


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    touch(tmp_path, "train/a.mp4", "car/b.mp4")
    assert [(label, split) for _, label, split, _ in rows(tmp_path)] == [("car", None), ("train", None)]


def test_links_are_followed_once(tmp_path: Path) -> None:
    touch(tmp_path, "real/a.mp4", "data/b.mp4")
    (tmp_path / "data" / "cls").symlink_to(tmp_path / "real")
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "data")
    assert [name for name, *_ in rows(tmp_path / "data")] == ["b.mp4", "cls/a.mp4"]


def test_the_destination_inside_the_source_is_left_out(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", "out.partial/staging/1/000000.mp4")
    listing = list_sources(tmp_path, exclude=(tmp_path / "out", tmp_path / "out.partial"))
    assert [source.name for source in listing.sources] == ["a.mp4"]


def test_one_video(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4")
    assert rows(tmp_path / "a.mp4") == [("a.mp4", None, None, "a.mp4")]


def test_a_csv_list(tmp_path: Path) -> None:
    (tmp_path / "films.csv").write_text(
        "\ufeffpath,label,split,group,fold\nb.mp4,run,val,film1,3\n ./deep/a.mp4 ,,,,\n", encoding="utf-8"
    )
    assert rows(tmp_path / "films.csv") == [
        ("b.mp4", "run", "val", "film1"),
        ("deep/a.mp4", None, None, "deep/a.mp4"),
    ]
    listing = list_sources(tmp_path / "films.csv")
    assert listing.ignored_columns == ("fold",)
    assert listing.sources[0].path == tmp_path / "b.mp4"


def test_a_jsonl_list_with_paths_from_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    path = tmp_path / "lists" / "films.jsonl"
    path.write_text(f'{{"path": "{tmp_path}/x/a.mp4", "label": 3}}\n\n{{"path": "../x/y/b.mp4", "group": null}}\n')
    assert rows(path) == [("a.mp4", "3", None, "a.mp4"), ("y/b.mp4", None, None, "y/b.mp4")]
    assert list_sources(path).sources[0].path.resolve() == tmp_path / "x" / "a.mp4"


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        (
            "a.csv",
            "file,label\nx.mp4,run\n",
            r"columns \['file', 'label'\]; it must have a header with the column path",
        ),
        ("a.csv", "", "must have a header"),
        ("a.csv", "path,label\n", "lists no file"),
        ("a.csv", "path,label\n,run\n", "line 2 has no path"),
        ("a.csv", "path\nx.mp4\n./x.mp4\n", "line 3 lists ./x.mp4 again"),
        ("a.csv", "path,split\nx.mp4,my/split\n", "split 'my/split'"),
        ("a.csv", "path\ns3://bucket/x.mp4\n", "must be local"),
        ("a.jsonl", '{"path": "x.mp4"}\nx\n', "line 2 is no JSON"),
        ("a.jsonl", '{"file": "x.mp4"}\n', "line 1 has no path"),
        ("a.jsonl", '["x.mp4"]\n', "line 1 has no path"),
        ("a.jsonl", '{"path": 3}\n', "line 1 has no path"),
    ],
)
def test_a_bad_list_is_named_with_its_line(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=words):
        list_sources(tmp_path / name)


def test_a_list_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xff\xfe\x00path")
    with pytest.raises(UserError, match="UTF-8"):
        list_sources(tmp_path / "a.csv")


def test_nothing_to_pack(tmp_path: Path) -> None:
    touch(tmp_path, "full/notes.txt", "notes.txt")
    (tmp_path / "empty").mkdir()
    for name, words in (
        ("empty", r"holds no video file \(0 other files\)"),
        ("full", r"holds no video file \(1 other files\)"),
        ("gone", "does not exist"),
        ("notes.txt", "is not packed"),
    ):
        with pytest.raises(UserError, match=words):
            list_sources(tmp_path / name)
