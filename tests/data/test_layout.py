from __future__ import annotations

from pathlib import Path

import pytest

from avppc.data.scan import SPLIT_NAMES, find_places

ROOT = Path("/data")


def places(*paths: str, layout: str = "auto") -> dict[str, tuple]:
    return {path: (place.word, place.split) for path, place in find_places(paths, ROOT, layout).items()}


def test_words_have_splits_below_them():
    assert places("A/train/x.mp4", "A/test/y.mp4", "B/val/z.mp4", "talk.mp4", "c/d/e.mp4") == {
        "A/train/x.mp4": ("A", "train"),
        "A/test/y.mp4": ("A", "test"),
        "B/val/z.mp4": ("B", "val"),
        "talk.mp4": (None, "train"),
        "c/d/e.mp4": (None, "train"),
    }


@pytest.mark.parametrize(("name", "split"), [*SPLIT_NAMES.items(), ("Train", "train"), ("VAL", "val"), ("Dev", "val")])
def test_other_names_of_the_splits(name, split):
    word, tree = f"A/{name}/x.mp4", f"{name}/id/x.mp4"
    assert places(word, "B/train/x.mp4")[word] == ("A", split)
    assert places(tree)[tree] == (None, split)


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("talk.mkv", "train"),
        ("2024/a/interview.mov", "train"),
        ("testimony/train_station/a.mp4", "train"),  # whole names only
        ("a/test.mp4", "train"),  # a file's name says nothing
        ("test/a.mp4", "test"),
        ("test/id/00001.mp4", "test"),  # LRS3
        ("trainval/id/00001.mp4", "train"),
        ("pretrain/id/00001.mp4", "train"),
        ("lrs3/test/id/00001.mp4", "test"),
        ("a/b/c/val/x.mp4", "val"),
        ("a/b/train/c/d/x.mp4", "train"),
        ("train/id/test/x.mp4", "test"),  # the stricter one
        ("test/train/x.mp4", "test"),
        ("val/train/x.mp4", "val"),
        ("_UNLABELED/lrs3/test/id/x.mp4", "test"),
        ("_UNLABELED/a/b.mp4", "train"),
    ],
)
def test_trees_have_splits_and_no_words(path, split):
    assert places(path) == {path: (None, split)}


class TestWordOrCorpus:
    def test_a_single_folder_is_a_word_only_when_its_files_say_so(self):
        assert places("CORPUS/train/long.mp4")["CORPUS/train/long.mp4"] == (None, "train")
        assert places("CORPUS/test/long.mp4")["CORPUS/test/long.mp4"] == (None, "test")
        assert places("ABOUT/val/ABOUT_00001.mp4")["ABOUT/val/ABOUT_00001.mp4"] == ("ABOUT", "val")

    def test_folders_with_videos_further_down_are_no_words(self):
        found = places("A/train/x.mp4", "B/train/x.mp4", "CORPUS/train/x.mp4", "CORPUS/train/id/y.mp4")
        assert [word for word, _ in found.values()] == ["A", "B", None, None]

    def test_a_split_is_a_word_only_when_its_files_say_so(self):
        found = places("A/train/x.mp4", "B/train/x.mp4", "test/train/x.mp4", "Train/train/Train_1.mp4")
        assert list(found.values()) == [("A", "train"), ("B", "train"), (None, "test"), ("Train", "train")]

    def test_the_user_knows_best(self):
        paths = ["CORPUS/train/x.mp4", "CORPUS/train/id/y.mp4", "other/test/x.mp4"]
        assert [word for word, _ in places(*paths, layout="words").values()] == ["CORPUS", None, "other"]
        lrw = ["A/train/A_1.mp4", "B/test/B_1.mp4"]
        assert list(places(*lrw, layout="tree").values()) == [(None, "train"), (None, "test")]

    def test_words_where_there_are_none(self):
        with pytest.raises(ValueError, match=r"needs videos in /data/WORD/.* test/id/1\.mp4 lies elsewhere"):
            places("test/id/1.mp4", layout="words")
        assert places(layout="words") == {}


class TestFurtherDown:
    LRW = "lipread_mp4/ABOUT/test/ABOUT_00001.mp4"

    def test_it_is_told_with_the_folder_to_pass(self):
        with pytest.raises(
            ValueError, match=r"LRW's layout further down .* pass --data /data/lipread_mp4 for its words"
        ):
            places(self.LRW, "notes/a.mp4")

    def test_it_may_be_taken_without_labels(self):
        assert places(self.LRW, layout="tree") == {self.LRW: (None, "test")}

    def test_deep_folders_named_as_splits_are_no_such_thing(self):
        """Whoever has a/b/train/talk.mp4 has no words anywhere: there is nothing to pass instead."""
        assert places("a/b/train/talk.mp4", "a/b/c/test/x.mp4") == {
            "a/b/train/talk.mp4": (None, "train"),
            "a/b/c/test/x.mp4": (None, "test"),
        }

    def test_beside_words_it_keeps_its_split(self):
        assert places(self.LRW, "A/train/A_1.mp4")[self.LRW] == (None, "test")
