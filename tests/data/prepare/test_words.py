"""Words inside longer recordings: each gives a clip, and no sentence of the test is trained on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from make_videos import write_video
from no_worker import in_this_process

from avppc.clip import SAMPLES_PER_FRAME
from avppc.data.config import IndexConfig, PrepareConfig
from avppc.data.packed.dataset import PackedDataset
from avppc.data.prepare import index, prepare
from avppc.data.video.decode import decode_clip

SMALL = {"size": (48, 64), "options": {"preset": "ultrafast"}}
HEADER = "clip\tstart_frame\tend_frame\tword"
NO_SHARES = {"val_share": 0.0, "test_share": 0.0}
FRAMES = 9  # of a clip: small ones are quick


def table(path: Path, *rows: str, header: str = HEADER) -> Path:
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def refusals(out: Path) -> list[tuple[str, str]]:
    return [
        (entry["path"], entry["reason"]) for entry in map(json.loads, (out / "refused.jsonl").read_text().splitlines())
    ]


def clips_of(out: Path) -> dict[str, list[tuple[str, str | None]]]:
    """Source and word of each clip of each split."""
    found = {}
    for split in json.loads((out / "index.json").read_text())["splits"]:
        with PackedDataset(out, split) as dataset:
            words = [None if label < 0 else dataset.words[label] for label in dataset.labels.tolist()]
            found[split] = list(zip(dataset.sources, words, strict=True))
    return found


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for command in (prepare, index):
        monkeypatch.setattr(command, "handle_units", in_this_process)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Two recordings of 60 frames, in a folder."""
    folder = tmp_path_factory.mktemp("videos")
    for number, name in enumerate(("ann", "bob")):
        write_video(folder / f"{name}.mp4", frames=60, seed=number, **SMALL)
    return folder


class TestClips:
    def test_each_word_gives_the_clip_around_its_middle(self, videos, tmp_path):
        listed = table(
            tmp_path / "words.tsv",
            "ann\t0\t10\tsil",
            "ann\t10\t15.5\tone",  # its middle, 12.75, is that of frames 8.25 to 17.25
            "ann\t15.5\t21.25\ttwo",
            "bob\t30\t31\tone",
            "ann\t1\t2\tthree",  # begins too early for a clip around it
            "ann\t58\t60.5\tthree",  # ends too late
        )
        out = tmp_path / "out"
        flags = {"words": listed, "frames": FRAMES, "val_share": 0.0, "test_share": 0.0, "sentence_clips": "none"}
        assert prepare.execute(PrepareConfig(videos, out, workers=1, **flags)) == 0
        expected = [("ann.mp4", "three", 0), ("ann.mp4#8", "one", 8), ("ann.mp4#14", "two", 14)]
        expected += [("ann.mp4#51", "three", 51), ("bob.mp4#26", "one", 26)]
        assert clips_of(out) == {"train": [(source, word) for source, word, _ in expected]}
        with PackedDataset(out) as dataset:
            assert dataset.words == ("one", "three", "two")
            for row, (source, _, start) in enumerate(expected):
                clip = decode_clip(videos / source.split("#")[0], start_frame=start, num_frames=FRAMES)
                batch = dataset.batch(torch.tensor([row]))
                assert torch.equal(batch.video[0], clip.video)
                assert torch.equal(batch.audio[0], clip.audio)
        notes = [json.loads(line) for line in (out / "notes.jsonl").read_text().splitlines()]
        assert [note["path"] for note in notes] == ["ann.mp4"]
        assert notes[0]["note"].startswith("word not in the middle of its clip: early by 3 frames")

    def test_context_beside_the_word_is_held_and_silent(self, videos, tmp_path):
        listed = table(tmp_path / "words.tsv", "ann\t20.5\t23.5\tone")
        out = tmp_path / "out"
        flags = {"words": listed, "frames": FRAMES, "val_share": 0.0, "test_share": 0.0, "sentence_clips": "none"}
        prepare.execute(PrepareConfig(videos, out, workers=1, word_context=1, **flags))
        with PackedDataset(out) as dataset:
            row = dataset.sources.index("ann.mp4#18")  # of frames 18 to 26, 19 to 24 are kept: 20 to 23 and one more
            clip = dataset.batch(torch.tensor([row]))
        whole = decode_clip(videos / "ann.mp4", start_frame=18, num_frames=FRAMES)
        assert torch.equal(clip.video[0], whole.video[[1, 1, 2, 3, 4, 5, 6, 6, 6]])
        heard = slice(SAMPLES_PER_FRAME, 7 * SAMPLES_PER_FRAME)
        assert torch.equal(clip.audio[0, heard], whole.audio[heard])
        assert clip.audio[0, : heard.start].abs().max() == clip.audio[0, heard.stop :].abs().max() == 0
        assert whole.audio[: heard.start].abs().max() > 0

    @pytest.mark.parametrize(
        ("which", "starts"),
        [("none", []), ("rest", [0, 9, 43]), ("all", [0, 9, 18, 27, 36, 45])],
    )
    def test_clips_without_label_of_training_sentences(self, videos, tmp_path, which, starts):
        rows = (f"{name}\t{middle - 1}\t{middle + 1}\tone" for name in ("ann", "bob") for middle in (25, 38))
        listed = table(tmp_path / "words.tsv", *rows)
        out = tmp_path / "out"
        flags = {"words": listed, "frames": FRAMES, "stride": FRAMES, "val_share": 0.0, "test_names": ("bob",)}
        prepare.execute(PrepareConfig(videos, out, workers=1, sentence_clips=which, **flags))
        found = clips_of(out)
        assert found["test"] == [("bob.mp4#21", "one"), ("bob.mp4#34", "one")]
        without = [source for source, word in found["train"] if word is None]
        assert without == ["ann.mp4" if start == 0 else f"ann.mp4#{start}" for start in starts]
        assert len(found["train"]) == len(starts) + 2


class TestSplits:
    def test_the_table_says_the_splits_and_is_checked(self, videos, tmp_path):
        header = f"{HEADER}\tsplit\tspeaker"
        rows = ["ann\t20\t22\tone\ttrain\tx", "ann\t40\t42\tone\ttest\tx", "bob\t20\t22\tone\tTRAIN\tx"]
        listed = table(tmp_path / "words.tsv", *rows, header=header)
        flags = {"words": listed, "frames": FRAMES, "sentence_clips": "none", "workers": 1}
        assert prepare.execute(PrepareConfig(videos, tmp_path / "out", **flags)) == 3
        assert clips_of(tmp_path / "out") == {"train": [("bob.mp4#17", "one")]}
        [(path, reason)] = refusals(tmp_path / "out")
        assert path == "ann.mp4"
        assert reason == "in several splits: test, train; words.tsv, line 2; words.tsv, line 3"

    def test_a_speaker_in_two_splits_is_an_error_where_speakers_are_kept_apart(self, videos, tmp_path):
        header = f"{HEADER}\tsplit\tspeaker"
        rows = ["ann\t20\t22\tone\ttrain\tx", "bob\t20\t22\tone\ttest\tx"]
        config = PrepareConfig(videos, tmp_path / "out", words=table(tmp_path / "w.tsv", *rows, header=header))
        assert prepare.execute(replace(config, frames=FRAMES, workers=1)) == 0
        with pytest.raises(ValueError, match="1 speakers are in two splits, such as 'x' in test, train"):
            prepare.execute(replace(config, split_by="speaker"))

    def test_a_split_that_stays_empty_is_told_with_a_seed_that_fills_it(self, videos, tmp_path):
        listed = table(tmp_path / "w.tsv", *(f"{name}\t20\t22\tone" for name in ("ann", "bob")))
        config = PrepareConfig(videos, tmp_path / "out", words=listed, val_share=0.0, frames=FRAMES, workers=1)
        with pytest.raises(ValueError, match=r"none of the 2 sentences falls to split 'test'.*--split-seed") as error:
            prepare.execute(config)
        seed = int(str(error.value).split("--split-seed ")[1].split(",")[0])
        prepare.execute(replace(config, split_seed=seed))
        assert clips_of(tmp_path / "out").keys() == {"train", "test"}


class TestGridsOwnLayout:
    """s1/bbaf2n.mpg and align/bbaf2n.align, in 1/25000 s."""

    ALIGN = "0 10000 sil\n10000 16000 bin\n16000 22500 blue\n22500 23000 sp\n23000 30250 at\n"

    @pytest.mark.parametrize("place", ["align/{}.align", "s1/align/{}.align", "alignments/s1/{}.align"])
    def test_it_is_found_by_itself(self, tmp_path, place):
        data = tmp_path / "grid"
        (data / "s1").mkdir(parents=True)
        write_video(data / "s1" / "bbaf2n.mpg", frames=60, video_codec="mpeg1video", audio_codec="mp2", size=(48, 64))
        write_video(data / "s1" / "bbaf3s.mpg", frames=60, video_codec="mpeg1video", audio_codec="mp2", size=(48, 64))
        for name in ("bbaf2n", "bbaf3s"):
            path = data / place.format(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self.ALIGN)
        rows = ("10\t16\tbin", "16\t22.5\tblue", "23\t30.25\tat")
        listed = table(tmp_path / "words.tsv", *(f"{name}\t{row}" for name in ("bbaf2n", "bbaf3s") for row in rows))
        flags = {"frames": FRAMES, "test_names": ("bbaf2n",), "val_share": 0.0, "workers": 1}
        prepare.execute(PrepareConfig(data, tmp_path / "by-itself", **flags))
        prepare.execute(PrepareConfig(data, tmp_path / "by-table", words=listed, **flags))
        assert clips_of(tmp_path / "by-itself") == clips_of(tmp_path / "by-table")
        with PackedDataset(tmp_path / "by-itself", "test") as one, PackedDataset(tmp_path / "by-table", "test") as two:
            assert one.sources == ("s1/bbaf2n.mpg#9", "s1/bbaf2n.mpg#15", "s1/bbaf2n.mpg#22")
            assert one.words == ("at", "bin", "blue")
            numbers = torch.arange(3)
            for name in ("video", "audio", "labels"):
                assert torch.equal(getattr(one.batch(numbers), name), getattr(two.batch(numbers), name))


class TestOtherSettings:
    def test_a_set_made_otherwise_is_not_replaced_unasked(self, videos, tmp_path):
        listed = table(tmp_path / "w.tsv", "ann\t20\t22\tone", "bob\t20\t22\tone")
        config = PrepareConfig(videos, tmp_path / "out", words=listed, frames=FRAMES, workers=1, **NO_SHARES)
        assert prepare.execute(config) == 0
        before = clips_of(tmp_path / "out")
        for other, change in (
            (replace(config, test_names=("bob",)), r"test_names was None, is \['bob'\]"),
            (replace(config, word_context=0), "word_context was None, is 0"),
            (replace(config, words=None, test_share=0.15, val_share=0.07), r"words was '.*w\.tsv', is None"),
        ):
            with pytest.raises(ValueError, match=f"holds a data set made otherwise .*{change}"):
                prepare.execute(other)
        assert clips_of(tmp_path / "out") == before
        table(listed, "ann\t20\t22\tone", "bob\t20\t22\ttwo")  # the file has changed, as a video may
        prepare.execute(config)
        assert clips_of(tmp_path / "out")["train"] != before["train"]

    def test_one_bad_recording_stops_nothing(self, videos, tmp_path):
        data = tmp_path / "data"
        data.mkdir()
        (data / "ann.mp4").write_bytes((videos / "ann.mp4").read_bytes())
        (data / "bob.mp4").write_bytes((videos / "bob.mp4").read_bytes()[:3000])
        write_video(data / "hole.mp4", frames=60, skipped=range(20, 30), **SMALL)
        write_video(data / "short.mp4", frames=5, **SMALL)
        rows = [f"{name}\t{at - 1}\t{at + 1}\tone" for name in ("ann", "bob", "hole", "short") for at in (2, 25, 45)]
        listed = table(tmp_path / "w.tsv", *rows, "ann\t57\t63\tone")
        config = PrepareConfig(data, tmp_path / "out", words=listed, frames=FRAMES, sentence_clips="none", **NO_SHARES)
        assert prepare.execute(config) == 3
        found = [source for source, _ in clips_of(tmp_path / "out")["train"]]
        assert found == ["ann.mp4", "ann.mp4#21", "ann.mp4#41", "hole.mp4", "hole.mp4#41"]
        assert [(path, reason.split(":")[0]) for path, reason in refusals(tmp_path / "out")] == [
            ("ann.mp4#51", "word beyond the end of the video"),
            ("bob.mp4", "damaged or not a video"),
            ("hole.mp4#21", "frames missing"),
            ("short.mp4", "too short"),
        ]


class TestIndex:
    def test_it_says_what_it_understands(self, videos, tmp_path, capsys):
        header = f"{HEADER}\tspeaker"
        rows = ["ann\t1\t9\tone\tx", "ann\t9\t11\ttwo\tx", "bob\t1\t5\tone\ty", "bob\t0\t1\tsp\ty", "eve\t0\t1\tone\ty"]
        listed = table(tmp_path / "w.tsv", *rows, header=header)
        config = IndexConfig(
            videos, out=tmp_path / "m.jsonl", words=listed, workers=1, test_names=("bob",), val_share=0.0
        )
        assert index.execute(config) == 3
        lines = capsys.readouterr().out.splitlines()
        assert lines[:6] == [
            f"the table {listed}: 3 words, 2 different, in 2 videos; 2 speakers",
            "  train       1 sentences,         2 words, 2 different; 1 speaker",
            "  test        1 sentences,         1 words, 1 different; 1 speaker",
            "  splits by sentence (shares, seed 0); in two splits: 0 sentences, 0 speakers",
            "  1 words left out as pauses (--words-ignore)",
            "  1 refusals of words, or of videos for them",
        ]
        assert lines[6] == "    eve: there is no such video: 1 words of it, the first in w.tsv, line 6"

    def test_words_in_folders_and_videos_without_words(self, tmp_path, capsys):
        for name in ("A/train/A_1.mp4", "A/test/A_2.mp4", "B/train/B_1.mp4", "id00012/film/00001.mp4"):
            (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "data" / name).write_bytes(b"none")
        config = IndexConfig(tmp_path / "data", out=tmp_path / "m.jsonl")
        index.execute(config)
        index.execute(replace(config, layout="tree"))
        index.execute(replace(config, data=tmp_path / "data", layout="words"))
        told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("layout")]
        words = "layout: 2 words in folders, as in LRW; train 3, test 1; 1 speaker"
        assert told == [words, "layout: no words; train 3, test 1; 1 speaker", words]
