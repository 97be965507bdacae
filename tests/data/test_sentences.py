"""Which video has which words, who speaks, and in which split it is; no video is opened for it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from hostile import examples
from hypothesis import given
from hypothesis import strategies as st

from avppc.data.config import IndexConfig
from avppc.data.scan import Scan, folder_of_speaker, scan
from avppc.data.sentences import Sentences, draw_splits, find_sentences, sentence_of

HEADER = "clip,start_frame,end_frame,word"
NO_SHARES = {"val_share": 0.0, "test_share": 0.0}


def make_files(root: Path, names: Iterable[str], content: str = "") -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def table(path: Path, *rows: str, header: str = HEADER) -> Path:
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def found_by(data: Path, **settings) -> tuple[Scan, Sentences]:
    config = IndexConfig(data, **settings)
    found = find_sentences(scan(data, config.paths, layout="tree" if config.words else config.layout), config)
    assert found is not None
    return found


def words_in(found: Scan) -> dict[str, list[str] | None]:
    return {
        video.path: None if video.words is None else [found.words[word.label] for word in video.words]
        for video in found.videos
    }


class TestTables:
    @pytest.mark.parametrize(
        ("clip", "path"),
        [
            ("a/one.mp4", "a/one.mp4"),
            ("a/one", "a/one.mp4"),
            ("a\\one.mp4", "a/one.mp4"),
            ("./a/one", "a/one.mp4"),
            ("one", "a/one.mp4"),
            ("one.avi", "a/one.mp4"),  # as it was called before it was converted
            ("b/two", "c/b/two.mkv"),
            ("c/b/two", "c/b/two.mkv"),
            ("v1.2", "v1.2.mp4"),
        ],
    )
    def test_how_a_video_may_be_called(self, tmp_path, clip, path):
        data = make_files(tmp_path / "data", ["a/one.mp4", "c/b/two.mkv", "d/two.mkv", "v1.2.mp4"])
        found, sentences = found_by(data, words=table(tmp_path / "w.csv", f"{clip},1,2,yes"), **NO_SHARES)
        assert {path: words for path, words in words_in(found).items() if words} == {path: ["yes"]}
        assert sentences.refused == []

    def test_names_that_fit_no_video_or_several_are_told(self, tmp_path):
        data = make_files(tmp_path / "data", ["a/one.mp4", "b/one.mp4", "three.mp4"])
        rows = ["one,1,2,x", "one,5,6,x", "none,1,2,x", "three,1,2,yes", "a/o,1,2,x"]
        found, sentences = found_by(data, words=table(tmp_path / "w.csv", *rows), **NO_SHARES)
        assert words_in(found) == {"a/one.mp4": None, "b/one.mp4": None, "three.mp4": ["yes"]}
        expected = [
            ("a/o", "there is no such video: 1 words of it, the first in w.csv, line 6"),
            ("none", "there is no such video: 1 words of it, the first in w.csv, line 4"),
            (
                "one",
                "several videos have this name (a/one.mp4, b/one.mp4, ...): 2 words of it, the first in w.csv, line 2",
            ),
        ]
        assert sorted(sentences.refused) == sorted(found.refused) == expected

    def test_a_table_may_say_more_than_the_videos_that_are_picked(self, tmp_path):
        data = make_files(tmp_path / "data", ["one.mp4", "two.mp4", "three.mp4"])
        (tmp_path / "list.txt").write_text("one.mp4\n")
        words = table(tmp_path / "w.csv", "one,1,2,yes", "two,1,2,no", "three,1,2,no", "three,5,6,no")
        found, sentences = found_by(data, words=words, paths=tmp_path / "list.txt", **NO_SHARES)
        assert words_in(found) == {"one.mp4": ["yes"]}
        assert (sentences.refused, sentences.unused) == ([], 2)

    def test_the_speaker_tells_videos_of_one_name_apart(self, tmp_path):
        data = make_files(tmp_path / "data", ["s1/bbaf2n.mpg", "s2/bbaf2n.mpg"])
        rows = ["bbaf2n,1,2,x,s1", "bbaf2n,1,2,y,s2"]
        found, _ = found_by(data, words=table(tmp_path / "w.csv", *rows, header=f"{HEADER},speaker"), **NO_SHARES)
        assert words_in(found) == {"s1/bbaf2n.mpg": ["x"], "s2/bbaf2n.mpg": ["y"]}

    def test_a_table_that_fits_nothing_is_an_error(self, tmp_path):
        data = make_files(tmp_path / "data", ["a.mp4"])
        with pytest.raises(ValueError, match=r"no word of it is in a video below .*data, as b: there is no such video"):
            found_by(data, words=table(tmp_path / "w.csv", "b,1,2,x"), **NO_SHARES)
        with pytest.raises(ValueError, match=r"there is no table or folder of words .*none\.csv"):
            found_by(data, words=tmp_path / "none.csv")

    def test_doubled_and_contradicting_rows(self, tmp_path):
        data = make_files(tmp_path / "data", ["a.mp4", "b.mp4"])
        rows = [
            *("a,20,30,two", "a,10,20,one", "a,20,30,two", "a,29,40,three"),  # one row twice, a small overlap
            *("b,0,10,good", "b,10,20,one", "b,14,24,two", "b,30,40,x", "b,30,40,y"),  # two of which one is wrong
        ]
        found, sentences = found_by(data, words=table(tmp_path / "w.csv", *rows), **NO_SHARES)
        assert words_in(found) == {"a.mp4": ["one", "two", "three"], "b.mp4": ["good"]}
        assert sentences.duplicates == 1
        told = [("one", 7), ("two", 8), ("x", 9), ("y", 10)]
        assert sentences.refused == [
            ("b.mp4", f"word that lies over another one: {word!r}, w.csv, line {line}") for word, line in told
        ]

    def test_words_with_too_few_training_examples_are_left_out(self, tmp_path):
        data = make_files(tmp_path / "data", ["a.mp4", "b.mp4", "c.mp4"])
        rows = ["a,0,1,often", "a,1,2,often", "a,2,3,once", "b,0,1,often", "b,1,2,never", "c,0,1,never"]
        settings = {"words": table(tmp_path / "w.csv", *rows), "val_share": 0.0, "test_names": ("b", "c")}
        found, sentences = found_by(data, **settings)
        assert words_in(found) == {"a.mp4": ["often", "often", "once"], "b.mp4": ["often"]}
        assert found.words == ("often", "once")
        assert sentences.rare == {"never": 2}
        assert sentences.refused == [("c.mp4", "no word is known of it, and it is in split 'test': not trained on")]
        found, sentences = found_by(data, **settings, words_least=2)
        assert words_in(found) == {"a.mp4": ["often", "often"], "b.mp4": ["often"]}
        with pytest.raises(ValueError, match="no word has 3 training examples, as words_least asks, 2 at most"):
            found_by(data, **settings, words_least=3)


class TestFilesOfWords:
    ALIGN = "0 1000 bin\n"

    def test_each_goes_to_the_video_of_its_speaker(self, tmp_path):
        data = make_files(tmp_path, ["s1/bbaf2n.mpg", "s2/bbaf2n.mpg", "s2/bbaf3s.mpg", "s3/bbaf4p.mpg"])
        make_files(data, ["alignments/s1/bbaf2n.align", "alignments/s4/bbaf4p.align"], "0 1000 one\n")
        make_files(data, ["alignments/s2/bbaf2n.align", "alignments/s2/bbaf3s.align"], "0 1000 two\n")
        found, sentences = found_by(data, **NO_SHARES)
        assert words_in(found) == {
            "s1/bbaf2n.mpg": ["one"],
            "s2/bbaf2n.mpg": ["two"],
            "s2/bbaf3s.mpg": ["two"],
            "s3/bbaf4p.mpg": None,  # that file is of speaker 4
        }
        assert [(video.speaker_name, video.speaker) for video in found.videos] == [
            ("s1", 0),
            ("s2", 1),
            ("s2", 1),
            ("s3", 2),
        ]
        assert sentences.unused == 1
        assert sentences.refused == []
        assert sentences.source == f"4 GRID's .align files below {data}"

    def test_what_may_belong_to_several_is_refused(self, tmp_path):
        data = make_files(tmp_path, ["s1/bbaf2n.mpg", "s2/bbaf2n.mpg", "s1/bbaf3s.mpg", "s1/bbaf4p.mpg"])
        make_files(data, ["align/bbaf2n.align", "s1/bbaf4p.align", "a/bbaf3s.align", "b/bbaf3s.align"], self.ALIGN)
        found, sentences = found_by(data, **NO_SHARES)
        assert [path for path, words in words_in(found).items() if words] == ["s1/bbaf4p.mpg"]
        assert sentences.refused == [
            ("align/bbaf2n.align", "several videos may have these words: s1/bbaf2n.mpg, s2/bbaf2n.mpg"),
            ("s1/bbaf3s.mpg", "several files have words of it: a/bbaf3s.align, b/bbaf3s.align"),
        ]

    def test_a_damaged_one_does_not_keep_the_others_out(self, tmp_path):
        data = make_files(tmp_path, ["a.mp4", "b.mp4", "a.align"], self.ALIGN)
        make_files(data, ["b.align"], "hello\n")
        found, sentences = found_by(data, **NO_SHARES)
        assert words_in(found) == {"a.mp4": ["bin"], "b.mp4": None}
        assert sentences.refused[0][1].startswith("words that cannot be read: b.align, line 1: must be")

    def test_a_folder_elsewhere(self, tmp_path):
        data = make_files(tmp_path / "data", ["s1/bbaf2n.mpg"])
        words = make_files(tmp_path / "words", ["s1/bbaf2n.align", ".hidden.align"], self.ALIGN)
        assert words_in(found_by(data, words=words, **NO_SHARES)[0]) == {"s1/bbaf2n.mpg": ["bin"]}
        (tmp_path / "empty").mkdir()
        with pytest.raises(ValueError, match=r"empty has no .align or .TextGrid file, words"):
            found_by(data, words=tmp_path / "empty")

    def test_two_kinds_are_one_too_many(self, tmp_path):
        data = make_files(tmp_path, ["a.mp4", "a.align", "a.TextGrid"])
        with pytest.raises(ValueError, match=r"has both .align and .TextGrid files.*layout 'tree' takes the videos"):
            found_by(data)
        assert find_sentences(scan(data), IndexConfig(data, layout="tree")) is None

    def test_settings_of_words_where_there_are_none(self, tmp_path):
        data = make_files(tmp_path, ["A/train/A_1.mp4", "A/train/A_1.align", "B/test/B_1.mp4"])
        assert find_sentences(scan(data), IndexConfig(data)) is None  # words in folders go first
        with pytest.raises(ValueError, match="split_by is about words inside longer videos, and there are none"):
            find_sentences(scan(data), IndexConfig(data, split_by="speaker"))


@pytest.mark.parametrize(
    ("path", "speaker"),
    [
        ("s1/bbaf2n.mpg", "s1"),
        ("grid/s34/video/mpg_6000/lwbz9p.mpg", "s34"),
        ("s1/holiday.mpg", ""),
        ("bbaf2n.mpg", ""),
        ("mp4/id00012/21Uxsk56VDQ/00001.mp4", "id00012"),
        ("dev/mp4/id00012/a-b_c56VDQ0/00001.mp4", "id00012"),
        ("trainval/0Fi83BHQsMA/50001.mp4", "0Fi83BHQsMA"),
        ("0Fi83BHQsMA/50001.mp4", "0Fi83BHQsMA"),
        ("2024/holiday/00001.mp4", ""),
        ("00001.mp4", ""),
    ],
)
def test_folders_that_name_the_speaker(tmp_path, path, speaker):
    assert folder_of_speaker(path) == speaker
    [video] = scan(make_files(tmp_path, [path])).videos
    assert (video.speaker_name, video.speaker) == (speaker, 0 if speaker else -1)


class TestSplits:
    @examples(60)
    @given(
        names=st.sets(st.text(min_size=1), min_size=1, max_size=40),
        more=st.sets(st.text(min_size=1), max_size=40),
        seed=st.integers(0, 99),
        by=st.sampled_from(["sentence", "speaker"]),
    )
    def test_a_name_and_the_seed_say_all(self, names, more, seed, by):
        def splits(names: set[str]) -> dict[str, str]:
            config = IndexConfig(Path("data"), split_by=by, split_seed=seed, val_share=0.3, test_share=0.3)
            try:
                return draw_splits(names, config)
            except ValueError:
                return {}

        few, many = splits(names), splits(names | more)
        assert not few or few.items() <= many.items()

    def test_shares_are_kept(self):
        config = IndexConfig(Path("data"), val_share=0.1, test_share=0.2)
        found = [*draw_splits({f"name {number}" for number in range(5000)}, config).values()]
        assert found.count("val") == pytest.approx(500, abs=80)  # four standard deviations
        assert found.count("test") == pytest.approx(1000, abs=115)
        others = draw_splits({f"name {number}" for number in range(5000)}, replace(config, split_seed=1))
        assert [*others.values()] != found

    def test_names_go_where_they_are_told(self):
        config = IndexConfig(Path("data"), split_by="speaker", test_names=("s1", "s20"), val_names=("s3",))
        found = draw_splits({f"s{number}" for number in range(1, 35)}, config)
        assert {name for name, split in found.items() if split == "test"} == {"s1", "s20"}
        assert {name for name, split in found.items() if split == "val"} == {"s3"}
        with pytest.raises(ValueError, match=r"test_names must be among the 2 speakers \(s1, s3, ...\), got 's20'"):
            draw_splits({"s1", "s3"}, config)

    @pytest.mark.parametrize(
        ("path", "name"),
        [("s1/bbaf2n.mpg", "bbaf2n"), ("a/b/Über.mp4", "Über"), ("id1/film/00001.mp4", "id1/film/00001")],
    )
    def test_what_a_sentence_is_called(self, path, name):
        assert sentence_of(path) == name

    def speakers(self, tmp_path: Path) -> Path:
        """Nine speakers of twenty sentences, the same ones in part; of each one recording has no words."""
        names = [f"s{speaker}/bbaf{digit}{end}" for speaker in range(1, 10) for digit in "012345" for end in "nps"]
        data = make_files(tmp_path, [f"{name}.mpg" for name in names])
        make_files(data, [f"{name}.align" for name in names if not name.endswith("5s")], "0 1000 bin\n")
        return data

    def test_no_speaker_is_in_two_splits(self, tmp_path):
        found, sentences = found_by(self.speakers(tmp_path), split_by="speaker", test_share=0.4, val_share=0.2)
        splits = {video.speaker_name: set() for video in found.videos}
        for video in found.videos:
            splits[video.speaker_name].add(video.split)
        assert len(splits) == 9
        assert all(len(of_one) == 1 for of_one in splits.values())
        assert sentences.shared["speakers"] == 0
        assert sentences.shared["sentences"] == 17
        # What has no words is for training, and of a speaker who is not for training it is not used at all.
        unlabelled = [video for video in found.videos if video.words is None]
        assert {video.split for video in unlabelled} == {"train"}
        trained = {name for name, of_one in splits.items() if of_one == {"train"}}
        assert {video.speaker_name for video in unlabelled} == trained
        assert len(sentences.refused) == 9 - len(trained)

    def test_no_sentence_is_in_two_splits_whoever_says_it(self, tmp_path):
        found, sentences = found_by(self.speakers(tmp_path), val_share=0.2, test_share=0.4)
        splits: dict[str, set[str]] = {}
        for video in found.videos:
            splits.setdefault(Path(video.path).stem, set()).add(video.split)
        assert all(len(of_one) == 1 for of_one in splits.values())
        assert set.union(*splits.values()) == {"train", "val", "test"}
        assert sentences.shared == {"sentences": 0, "speakers": 9}

    def test_speakers_that_nobody_knows(self, tmp_path):
        data = make_files(tmp_path / "data", ["a.mp4", "b.mp4"])
        rows = table(tmp_path / "w.csv", "a,1,2,x", "b,1,2,x")
        with pytest.raises(
            ValueError, match=r"needs the speaker of each video with words; 2 have none, such as a\.mp4"
        ):
            found_by(data, words=rows, split_by="speaker")
        (data / "manifest.jsonl").write_text(
            "".join(
                json.dumps({"path": f"{name}.mp4", "speaker": number}) + "\n" for name, number in (("a", 7), ("b", 9))
            )
        )
        found, _ = found_by(data, words=rows, split_by="speaker", test_names=("9",), val_share=0.0)
        assert [(video.split, video.speaker) for video in found.videos] == [("train", 7), ("test", 9)]

    def test_a_video_of_two_speakers_is_refused(self, tmp_path):
        data = make_files(tmp_path / "data", ["a.mp4", "b.mp4"])
        rows = ["a,1,2,x,ann", "a,3,4,x,bob", "b,1,2,x,ann"]
        found, sentences = found_by(
            data, words=table(tmp_path / "w.csv", *rows, header=f"{HEADER},speaker"), **NO_SHARES
        )
        assert words_in(found) == {"b.mp4": ["x"]}
        assert sentences.refused == [("a.mp4", "several speakers of it: ann, bob; w.csv, line 2; w.csv, line 3")]

    def test_folders_say_the_splits_where_they_are_named_so(self, tmp_path):
        data = make_files(tmp_path, ["train/a.mp4", "dev/b.mp4", "test/c.mp4", "test/d.mp4"])
        make_files(data, ["train/a.align", "dev/b.align", "test/c.align"], "0 1000 bin\n")
        found, sentences = found_by(data)
        assert [(video.path, video.split) for video in found.videos] == [
            ("dev/b.mp4", "val"),
            ("test/c.mp4", "test"),
            ("train/a.mp4", "train"),
        ]
        assert sentences.splits_from == "the folders"
        assert [path for path, _ in sentences.refused] == ["test/d.mp4"]

    @pytest.mark.parametrize("split", ["", "tset"])
    def test_a_table_that_does_not_say_the_split_of_a_video(self, tmp_path, split):
        data = make_files(tmp_path / "data", ["a.mp4", "b.mp4"])
        rows = ["a,1,2,x,train", f"b,1,2,x,{split}"]
        found, sentences = found_by(data, words=table(tmp_path / "w.csv", *rows, header=f"{HEADER},split"))
        assert words_in(found) == {"a.mp4": ["x"]}
        assert sentences.refused == [("b.mp4", f"no split of it is known (train, val, test): {split!r}, w.csv, line 3")]
