from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path

import pytest

from avppc.data.scan import scan


def touch(root, *paths) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"x")


def places(found) -> list[tuple]:
    return [(video.path, video.split, video.label, video.speaker) for video in found.videos]


def test_lrw_layout(tmp_path):
    touch(
        tmp_path,
        "ZOO/train/ZOO_00001.mp4",
        "ABOUT/train/ABOUT_00002.mp4",
        "ABOUT/train/ABOUT_00001.mp4",
        "ABOUT/val/ABOUT_00001.MP4",
        "HOUSE/test/HOUSE_00001.mp4",
        "ABOUT/train/ABOUT_00001.txt",
        "ABOUT/train/._ABOUT_00001.mp4",
        "_UNLABELED/train/x.mp4",
        "_UNLABELED/a/b/c/d.webm",
        "README",
    )
    found = scan(tmp_path)
    assert found.words == ("ABOUT", "HOUSE", "ZOO")
    assert places(found) == [
        ("ABOUT/train/ABOUT_00001.mp4", "train", 0, -1),
        ("ABOUT/train/ABOUT_00002.mp4", "train", 0, -1),
        ("ABOUT/val/ABOUT_00001.MP4", "val", 0, -1),
        ("HOUSE/test/HOUSE_00001.mp4", "test", 1, -1),
        ("ZOO/train/ZOO_00001.mp4", "train", 2, -1),
        ("_UNLABELED/a/b/c/d.webm", "train", -1, -1),
        ("_UNLABELED/train/x.mp4", "train", -1, -1),
    ]
    assert found.refused == []
    assert found.others == {".mp4": 1, "README": 1}


class TestManifest:
    def write(self, root, *entries) -> None:
        lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
        (root / "manifest.jsonl").write_text("\n".join(lines) + "\n")

    def test_speakers(self, tmp_path):
        touch(tmp_path, "A/train/1.mp4", "A/train/2.mp4", "A/train/3.mp4", "A/train/4.mp4")
        self.write(
            tmp_path,
            {"path": "A/train/1.mp4", "word": "A", "speaker": 12, "face": 3},
            {"path": "A/train/3.mp4", "face": 7},
            "",
            {"path": "A/train/4.mp4"},
        )
        assert [video.speaker for video in scan(tmp_path).videos] == [12, -1, 7, -1]

    def test_named_speakers_are_numbered_in_order(self, tmp_path):
        touch(tmp_path, "1.mp4", "2.mp4", "3.mp4")
        self.write(
            tmp_path,
            {"path": "1.mp4", "speaker": "zoe"},
            {"path": "2.mp4", "speaker": "ann"},
            {"path": "3.mp4", "speaker": "zoe"},
        )
        assert [video.speaker for video in scan(tmp_path).videos] == [1, 0, 1]

    def test_listed_but_missing(self, tmp_path):
        touch(tmp_path, "1.mp4")
        self.write(tmp_path, {"path": "1.mp4"}, {"path": "2.mp4"})
        assert scan(tmp_path).refused == [("2.mp4", "listed in manifest.jsonl, but there is no such video")]

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ({"path": "../secret.mp4"}, "must lie below"),
            ({"path": "a/../../secret.mp4"}, "must lie below"),
            ({"path": "/etc/passwd"}, "must lie below"),
            ({"path": "..\\secret.mp4"}, "must lie below"),
            ({"path": "a\0.mp4"}, "must lie below"),
            ({"path": ""}, "must lie below"),
            ({"path": 3}, 'an object with a "path"'),
            ([1], 'an object with a "path"'),
            ("{", "Expecting property name"),
            ({"path": "a.mp4", "speaker": -2}, "speaker must be at least 0"),
            ({"path": "a.mp4", "speaker": 1.5}, "speaker must be a number or a name"),
        ],
    )
    def test_bad_lines_are_named(self, tmp_path, line, message):
        touch(tmp_path, "a.mp4")
        self.write(tmp_path, {"path": "a.mp4"}, line)
        with pytest.raises(ValueError, match=rf"manifest\.jsonl, line 2: .*{message}"):
            scan(tmp_path)


class TestLinks:
    def test_links_that_leave_the_root_are_refused(self, tmp_path):
        root = tmp_path / "root"
        touch(tmp_path, "outside/secret.mp4", "root/A/train/1.mp4", "root/A/train/text.txt")
        os.symlink(tmp_path / "outside/secret.mp4", root / "A/train/2.mp4")
        os.symlink("1.mp4", root / "A/train/3.mp4")
        os.symlink("../../../outside/secret.mp4", root / "A/train/4.mp4")
        os.symlink("nothing.mp4", root / "A/train/5.mp4")
        os.symlink(tmp_path / "outside", root / "B")
        os.symlink(".", root / "loop")
        found = scan(root)
        assert [video.path for video in found.videos] == ["A/train/1.mp4", "A/train/3.mp4"]
        assert found.refused == [
            ("A/train/2.mp4", "a link that leaves the data's folder is not followed"),
            ("A/train/4.mp4", "a link that leaves the data's folder is not followed"),
            ("A/train/5.mp4", "a link to nothing"),
            ("B", "a link to a folder is not followed"),
            ("loop", "a link to a folder is not followed"),
        ]

    def test_links_that_go_round_are_links_to_nothing(self, tmp_path):
        touch(tmp_path, "1.mp4")
        os.symlink("2.mp4", tmp_path / "2.mp4")
        os.symlink("4.mp4", tmp_path / "3.mp4")
        os.symlink("3.mp4", tmp_path / "4.mp4")
        os.symlink("folder", tmp_path / "folder")
        found = scan(tmp_path)
        assert [video.path for video in found.videos] == ["1.mp4"]
        assert found.refused == [(f"{number}.mp4", "a link to nothing") for number in (2, 3, 4)]
        (tmp_path / "list.txt").write_text("1.mp4\n2.mp4\n")
        assert scan(tmp_path, tmp_path / "list.txt").refused == [("2.mp4", "not a regular file")]

    def test_pipes_are_not_opened(self, tmp_path):
        os.mkfifo(tmp_path / "pipe.mp4")
        assert scan(tmp_path).refused == [("pipe.mp4", "not a regular file")]

    @pytest.mark.skipif(sys.platform != "linux", reason="only Linux has file names that are not UTF-8")
    def test_names_that_are_not_utf8(self, tmp_path):
        with open(os.fsencode(tmp_path) + b"/caf\xe9.mp4", "wb") as file:
            file.write(b"x")
        assert scan(tmp_path).refused == [("caf\\udce9.mp4", "its name is not valid UTF-8")]


def test_hidden_folders_are_left_alone_and_counted(tmp_path):
    touch(tmp_path, ".git/train/x.mp4", "A/.cache/train/y.mp4", "A/train/A_1.mp4", "B/train/B_1.mp4")
    found = scan(tmp_path)
    assert found.words == ("A", "B")
    assert [video.path for video in found.videos] == ["A/train/A_1.mp4", "B/train/B_1.mp4"]
    assert found.others == {"hidden folders": 2}


@pytest.mark.parametrize(
    "suffix", [".asf", ".3g2", ".f4v", ".vob", ".mxf", ".dv", ".DIVX", ".ogm", ".qt", ".mod", ".tod"]
)
def test_names_of_videos(tmp_path, suffix):
    touch(tmp_path, f"a{suffix}")
    assert [video.path for video in scan(tmp_path).videos] == [f"a{suffix}"]


def test_held_out_videos_without_a_word_are_refused_beside_words(tmp_path):
    """They have no label to be tested by, and are not trained on unasked."""
    touch(
        tmp_path, "A/train/1.mp4", "B/train/1.mp4", "_UNLABELED/lrs3/test/id/1.mp4", "_UNLABELED/lrs3/trainval/id/1.mp4"
    )
    found = scan(tmp_path)
    assert places(found)[2:] == [("_UNLABELED/lrs3/trainval/id/1.mp4", "train", -1, -1)]
    assert found.refused == [
        ("_UNLABELED/lrs3/test/id/1.mp4", "no word is known of it, and its folders say 'test': not trained on")
    ]
    assert [video.split for video in scan(tmp_path, layout="tree").videos] == ["train", "train", "test", "train"]


def test_root_must_be_a_folder(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        scan(tmp_path / "none")


def test_a_folder_or_file_that_may_not_be_read_is_listed_and_the_others_taken(tmp_path, monkeypatch):
    for name in ("A/train/a.mp4", "locked/b.mp4", "lost+found/c.mp4", "gone.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    scandir, lstat = os.scandir, os.lstat

    def refuse(path):
        if Path(path).name == "locked":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        if Path(path) == tmp_path:
            entries = list(scandir(path))
            (tmp_path / "gone.mp4").unlink()
            return entries
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found = scan(tmp_path)
    assert [video.path for video in found.videos] == ["A/train/a.mp4"]
    assert found.refused == [
        ("gone.mp4", "cannot be read: No such file or directory"),
        ("locked", "a folder that cannot be read: Permission denied"),
    ]
    assert found.others == {"lost+found": 1}

    def refuse_file(path):
        if Path(path).name == "b.mp4":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return lstat(path)

    monkeypatch.setattr(os, "lstat", refuse_file)
    (tmp_path / "list.txt").write_text("A/train/a.mp4\nlocked/b.mp4\n")
    found = scan(tmp_path, tmp_path / "list.txt")
    assert [video.path for video in found.videos] == ["A/train/a.mp4"]
    assert found.refused == [("locked/b.mp4", "cannot be read: Permission denied")]
    monkeypatch.setattr(os, "scandir", lambda path: refuse("locked"))
    with pytest.raises(PermissionError):
        scan(tmp_path)
