"""Clips that are still in their videos: the same ones, bit for bit, that `avppc prepare` packs."""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from blob_faces import BlobFinder, write_face_video
from make_videos import write_video
from no_worker import PoolHere, in_this_process

from avppc.clip import SPLITS
from avppc.data.config import PrepareConfig, VideoConfig
from avppc.data.on_the_fly import dali, listing, videos
from avppc.data.on_the_fly.videos import ListedDataset
from avppc.data.packed.dataset import PackedDataset
from avppc.data.packed.loader import ClipLoader, EpochSampler
from avppc.data.prepare import prepare, worker
from avppc.data.prepare.pool import TIMED_OUT, WorkerPool
from avppc.data.source import DataSource
from avppc.data.video.decode import decode_clip
from avppc.data.video.source import DecodeError

SMALL = {"size": (48, 64), "options": {"preset": "ultrafast", "g": "25"}}
FRAMES = 9  # of a clip: small ones are quick


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Where the lists of all these tests are."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def here(monkeypatch, cache):
    """Lists, packs and decodes in this process."""
    monkeypatch.setenv("AVPPC_CACHE", str(cache))
    monkeypatch.setattr(prepare, "handle_units", in_this_process)
    monkeypatch.setattr(listing, "handle_units", in_this_process)
    monkeypatch.setattr(videos, "WorkerPool", PoolHere)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """LRW's layout, long videos without labels, and some that cannot be used."""
    data = tmp_path_factory.mktemp("videos")
    for word in ("ABOUT", "HOUSE"):
        for split in SPLITS:
            (data / word / split).mkdir(parents=True)
            write_video(data / word / split / f"{word}_00001.mp4", frames=11, seed=len(word + split), **SMALL)
    rest = data / "_UNLABELED"
    rest.mkdir()
    # Sound that has to be converted: looked up, it begins at another part of a sample than decoded from the start.
    write_video(rest / "long.mp4", frames=160, seed=5, rate=44_100, layout="stereo", **SMALL)
    write_video(rest / "hole.mp4", frames=70, skipped=range(31, 37), seed=6, **SMALL)
    write_video(rest / "fps-30.mp4", fps=30, frames=15, seed=7, **SMALL)
    write_video(rest / "short.mp4", frames=8, **SMALL)
    (rest / "text.mp4").write_text("no video\n" * 100)
    (data / "manifest.jsonl").write_text(json.dumps({"path": "HOUSE/train/HOUSE_00001.mp4", "speaker": 17}) + "\n")
    return data


@pytest.fixture(scope="module")
def packed(folder, tmp_path_factory):
    """The folder, packed."""
    out = tmp_path_factory.mktemp("packed") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "handle_units", in_this_process)
        pack(folder, out)
    return out


def pack(data: Path, out: Path, **settings: object) -> None:
    prepare.execute(PrepareConfig(data, out, **{"frames": FRAMES, **settings}))


def source_of(data: Path, loader: str = "auto", kept: dict[str, str] | None = None, **settings: object) -> DataSource:
    return DataSource(data, loader, VideoConfig(**{"frames": FRAMES, **settings}), workers=2, kept=kept)


def assert_same(listed: ListedDataset, packed: PackedDataset) -> None:
    assert listed.sources == packed.sources
    assert (listed.words, listed.shape, len(listed)) == (packed.words, packed.shape, len(packed))
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(listed)))
    ours, theirs = listed.batch(order), packed.batch(order)
    for name in ("video", "audio", "labels", "clip_ids", "speakers"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


class TestTheClipsOfPrepare:
    def test_bit_for_bit(self, folder, packed):
        source = source_of(folder, "pyav")
        assert source.splits() == {"train": 11, "val": 2, "test": 2}
        for split in SPLITS:
            assert_same(source.open(split), PackedDataset(packed, split))
        assert source.listing.refused() == [
            (entry["path"], entry["reason"])
            for entry in map(json.loads, (packed / "refused.jsonl").read_text().splitlines())
        ]
        own = source.listing.config.out
        for name in ("refused.jsonl", "notes.jsonl"):
            lines = [sorted((place / name).read_text().splitlines()) for place in (own, packed)]
            assert lines[0] == lines[1]

    def test_a_clip_that_cannot_be_looked_up_is_decoded_from_the_start(self, folder, monkeypatch):
        """Else the sound of some clips would be off by a unit or so, which this test must be able to see."""
        path = folder / "_UNLABELED" / "long.mp4"
        looked_up, exact = (
            decode_clip(path, start_frame=145, num_frames=FRAMES, may_seek=may) for may in (True, False)
        )
        assert not torch.equal(looked_up.audio, exact.audio)
        dataset = source_of(folder).open("train")
        job = videos.ClipJob(dataset.clips.config)
        tasks = {task.start_frame: task for task in map(dataset._task, range(len(dataset))) if task.start_frame}
        assert np.array_equal(job.decode(tasks[145])[1], exact.audio.numpy())
        sought = []
        monkeypatch.setattr(videos, "decode_clip", lambda *args, **more: sought.append(more["may_seek"]) or exact)
        job.decode(tasks[116])
        assert sought == [False]  # it is remembered of a video

    @pytest.mark.parametrize(
        "settings",
        [
            {"stride": 40, "frames": 10, "crop": "window", "crop_rows": (4, 40), "crop_columns": (10, 46)},
            {"stride": 0, "layout": "tree", "crop": "centre", "centre_fraction": 0.6},
        ],
        ids=str,
    )
    def test_with_other_settings(self, folder, tmp_path, settings):
        pack(folder, tmp_path / "packed", **settings)
        source = source_of(folder, **settings)
        assert_same(source.open("train"), PackedDataset(tmp_path / "packed", "train"))

    def test_boxes_of_the_manifest(self, tmp_path):
        (tmp_path / "videos").mkdir()
        write_video(tmp_path / "videos" / "a.mp4", frames=10, **SMALL)
        write_video(tmp_path / "videos" / "b.mp4", frames=10, seed=1, **SMALL)
        lines = [{"path": "a.mp4", "box": [3, 4, 33, 34]}, {"path": "b.mp4", "box": [20, 9, 50, 39]}]
        (tmp_path / "videos" / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        pack(tmp_path / "videos", tmp_path / "packed", crop="box")
        dataset = source_of(tmp_path / "videos", crop="box").open("train")
        assert_same(dataset, PackedDataset(tmp_path / "packed", "train"))
        assert [clip.crop.columns for clip in dataset.video_clips()] == [(3, 33), (20, 50)]  # for DALI

    @pytest.mark.parametrize("word_context", [None, 2])
    def test_words_inside_videos(self, tmp_path, word_context):
        data = tmp_path / "videos"
        data.mkdir()
        for number, name in enumerate(("ann", "bob")):
            write_video(data / f"{name}.mp4", frames=70, seed=number, **SMALL)
        rows = ["clip\tstart_frame\tend_frame\tword\tsplit"]
        rows += [f"ann\t{start}\t{start + 6}\t{word}\ttrain" for start, word in ((3, "one"), (20, "two"), (64, "one"))]
        rows += [f"bob\t{start}\t{start + 6}\t{word}\ttest" for start, word in ((10, "one"), (40, "two"))]
        (tmp_path / "words.tsv").write_text("\n".join(rows) + "\n")
        settings = {"words": tmp_path / "words.tsv", "stride": 9, "word_context": word_context}
        pack(data, tmp_path / "packed", **settings)
        source = source_of(data, **settings)
        for split in ("train", "test"):
            dataset = source.open(split)
            assert_same(dataset, PackedDataset(tmp_path / "packed", split))
            assert dataset.words == ("one", "two")
            assert set(dataset.labels.tolist()) >= {0, 1}

    def test_mouths_are_followed_once(self, tmp_path, monkeypatch):
        """The track is found when the videos are listed, and kept: decoding looks for no face."""
        data = tmp_path / "videos"
        data.mkdir()
        for name, shift in (("a.mp4", 0), ("b.mp4", 12)):
            write_face_video(data / name, [(70 + shift + number % 9, 60, number % 5, 1.0) for number in range(40)])
        for module in (worker, prepare):
            monkeypatch.setattr(module, "make_finder", lambda name: BlobFinder())
        pack(data, tmp_path / "packed", crop="cascade")
        source = source_of(data, crop="cascade")
        dataset = source.open("train")
        monkeypatch.setattr(worker, "make_finder", None)
        monkeypatch.setattr(prepare, "make_finder", lambda name: None)
        assert_same(dataset, PackedDataset(tmp_path / "packed", "train"))
        assert_same(source_of(data, crop="cascade").open("train"), dataset)
        for tracks in (dataset.clips.config.out / "tracks").iterdir():
            tracks.unlink()
        monkeypatch.setattr(worker, "make_finder", lambda name: BlobFinder())
        again = source_of(data, crop="cascade").open("train")  # lists them anew
        assert_same(again, dataset)
        assert again.sha256 == dataset.sha256


class TestTheList:
    def test_nothing_is_decoded_twice(self, folder, monkeypatch):
        first = source_of(folder)
        checksums = first.sha256(), first.split_sha256("train")
        monkeypatch.setattr(listing, "handle_units", None)
        second = source_of(folder)
        assert (second.sha256(), second.split_sha256("train")) == checksums

    def test_a_kill_or_damage_costs_what_it_touched(self, folder, monkeypatch):
        first = source_of(folder)
        path = first.listing.config.out / "list.jsonl"
        lines = path.read_bytes().splitlines()
        assert len(lines) > 3
        path.write_bytes(b"\n".join([lines[0].replace(b'"stamp"', b'"stomp"'), *lines[1:-1], lines[-1][:-20]]))
        read = []

        def handle(job, units, *more):
            read.extend(video.path for unit in units for video in unit.videos)
            return in_this_process(job, units, *more)

        monkeypatch.setattr(listing, "handle_units", handle)
        second = source_of(folder)
        assert second.sha256() == first.sha256()
        assert sorted(read) == sorted(
            entry["path"] for line in (lines[0], lines[-1]) for entry in json.loads(line)["videos"]
        )

    def test_what_may_pass_is_tried_again(self, folder, monkeypatch):
        source = source_of(folder)
        entries = listing._read(source.listing.config.out / "list.jsonl")
        video = next(video for video in source.listing.found.videos if video.path == "_UNLABELED/long.mp4")
        entry = entries[video.path]
        assert listing._holds(source.listing.config, entry, video)
        for reason in ("cannot be read: Input/output error", "changed while it was read", f"{TIMED_OUT} 120 s"):
            assert not listing._holds(source.listing.config, {**entry, "refused": [[video.path, reason]]}, video)

    def test_the_checksum_is_of_content_and_settings(self, folder, tmp_path):
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)  # other times of change
        for path in copy.rglob("*.mp4"):
            os.utime(path)
        here, there = source_of(folder), source_of(copy)
        assert here.sha256() == there.sha256()
        assert source_of(folder, stride=30).split_sha256("train") != here.split_sha256("train")
        write_video(copy / "ABOUT" / "test" / "ABOUT_00001.mp4", seed=99, frames=11, **SMALL)
        changed = source_of(copy)
        assert changed.sha256() != here.sha256()
        assert changed.split_sha256("train") == here.split_sha256("train")

    def test_videos_of_a_run_are_kept(self, folder, tmp_path):
        data = tmp_path / "data"
        shutil.copytree(folder, data)
        first = source_of(data)
        kept, refused = first.record("train")
        assert "_UNLABELED/text.mp4" in dict(refused)
        write_video(data / "_UNLABELED" / "new.mp4", seed=9, frames=11, **SMALL)
        os.utime(data / "_UNLABELED" / "long.mp4")  # touched, its content is the same
        again = source_of(data, kept=kept)
        assert again.split_sha256("train") == first.split_sha256("train")
        assert "_UNLABELED/new.mp4" in source_of(data).open("train").sources
        write_video(data / "_UNLABELED" / "fps-30.mp4", seed=70, frames=11, **SMALL)
        (data / "_UNLABELED" / "long.mp4").unlink()
        (data / "_UNLABELED" / "hole.mp4").write_bytes(b"")
        with pytest.raises(
            ValueError, match=r"3 of 5 videos of .*data on which the run was begun have changed: "
        ) as error:
            _ = source_of(data, kept=kept).listing
        for text in ("fps-30.mp4 (its SHA-256 was", "hole.mp4 (the file is empty)", "long.mp4 (gone)", "another --out"):
            assert text in str(error.value)

    def test_nothing_to_list(self, tmp_path):
        with pytest.raises(ValueError, match="has no videos"):
            _ = DataSource(tmp_path, "pyav").listing
        write_video(tmp_path / "short.mp4", frames=5, **SMALL)
        with pytest.raises(ValueError, match=r"split 'train' of .* has no clips; available: none"):
            source_of(tmp_path).open("train")


class TestDecoding:
    def test_a_file_that_changes_is_named(self, tmp_path):
        data = tmp_path / "data"
        (data / "_UNLABELED").mkdir(parents=True)
        for number, name in enumerate(("a", "fps-30", "z")):
            write_video(data / "_UNLABELED" / f"{name}.mp4", frames=10, seed=number, **SMALL)
        dataset = source_of(data).open("train")
        rows = torch.arange(len(dataset))
        whole = dataset.batch(rows)
        path = data / "_UNLABELED" / "fps-30.mp4"
        os.utime(path)  # the same content
        assert torch.equal(dataset.batch(rows).video, whole.video)
        write_video(path, seed=3, frames=11, **SMALL)
        with pytest.raises(DecodeError, match=r"fps-30\.mp4: changed since its clips were listed \([\d,]+ bytes then"):
            dataset.batch(rows)
        path.unlink()
        with pytest.raises(DecodeError, match=r"fps-30\.mp4: cannot be read: No such file"):
            dataset.batch(rows)
        batch, good, failed = dataset.batch_of_good(rows)
        bad = dataset.sources.index("_UNLABELED/fps-30.mp4")
        assert list(failed) == [bad]
        assert good == [row for row in rows.tolist() if row != bad]
        assert torch.equal(batch.clip_ids, dataset.clip_ids[good])
        assert torch.equal(batch.video, whole.video[good])

    def test_the_order_is_the_samplers_and_a_resume_is_exact(self, folder, packed, monkeypatch):
        """Two processes, whose results come as they come."""
        monkeypatch.setattr(videos, "WorkerPool", WorkerPool)
        listed = source_of(folder).open("train")

        def make(dataset):
            return ClipLoader(dataset, EpochSampler(len(dataset), 4, seed=3))

        with listed, make(PackedDataset(packed, "train")) as expected, make(listed) as first:
            before = [next(first) for _ in range(2)]
            state = first.state()
            with make(listed) as second:
                second.load_state(state)
                for batch in (*before, *(next(second) for _ in range(3))):
                    theirs = next(expected)
                    for name in ("video", "audio", "labels", "clip_ids", "speakers"):
                        assert torch.equal(getattr(batch, name), getattr(theirs, name))
        with pytest.raises(ValueError, match="indices must be from 0 to 10, got 11 to 11"):
            listed.batch(torch.tensor([11]))


class TestWhichLoader:
    def test_packed_or_not_is_seen(self, folder, packed, tmp_path):
        assert not source_of(folder).is_packed
        assert DataSource(packed).is_packed
        assert DataSource(Path("s3://bucket/set")).is_packed
        with pytest.raises(ValueError, match=r"loader 'pyav' decodes videos, and .* is a packed data set"):
            DataSource(packed, "pyav").open("train")
        with pytest.raises(ValueError, match=r"is not a packed data set: it has no index\.json"):
            DataSource(folder, "packed").open("train")
        with pytest.raises(ValueError, match="is not a packed data set"):
            DataSource(tmp_path / "nothing").open("train")
        source = source_of(packed, stride=3)
        with pytest.raises(ValueError, match=r"settings of videos are for a folder of videos, and .* is a packed"):
            source.check(tmp_path / "out")

    def test_dali_takes_all_of_the_videos_or_none(self, folder, monkeypatch, caplog):
        """It has no H.264 on the CPU; one video that is turned, say, is enough to leave all to PyAV."""
        monkeypatch.setattr(dali, "load_dali", lambda: None)
        source = source_of(folder)
        dataset = source.open("train")
        assert "this is h264 (ABOUT/train/ABOUT_00001.mp4)" in str(
            dali.listed_problem(dataset.clips, torch.device("cpu"))
        )
        monkeypatch.setattr(dali, "nvdec_problem", lambda *facts: None)
        gpu, sampler = torch.device("cuda", 0), EpochSampler(len(dataset), 2, seed=0)
        assert dali.listed_problem(dataset.clips, gpu) is None
        with source.stream(dataset, sampler, gpu) as loader:
            assert isinstance(loader, dali.DaliLoader)
            assert loader.clips[1].path == folder / "HOUSE" / "train" / "HOUSE_00001.mp4"
        with source.stream(dataset, sampler, torch.device("cpu")) as loader:
            assert isinstance(loader, ClipLoader)  # "auto" asks DALI for a GPU alone
        dataset.clips.entries[3]["facts"][4].append("rotation: turned by 90 degrees")
        problem = "shows pictures as they are stored, this has rotation: turned by 90 degrees (_UNLABELED/hole.mp4)"
        monkeypatch.setattr("avppc.data.packed.loader.check_device", lambda name, device: device)
        with caplog.at_level(logging.INFO, "avppc"), source.stream(dataset, sampler, gpu) as loader:
            assert isinstance(loader, ClipLoader)
        assert f"decoding with pyav (not DALI: it {problem})" in caplog.text
        with pytest.raises(
            ValueError, match=r"loader 'dali' cannot decode the videos of .*_UNLABELED/hole\.mp4\); give"
        ):
            replace(source, loader="dali").stream(dataset, sampler, gpu)

    @pytest.mark.parametrize(
        ("settings", "reason"), [({"crop": "mesh"}, "follows no mouths"), ({"word_context": 1}, "neighbouring words")]
    )
    def test_what_dali_cannot_do_at_all(self, folder, settings, reason):
        clips = source_of(folder).listing.split("train")
        changed = replace(clips, config=replace(clips.config, **settings))
        assert reason in str(dali.listed_problem(changed, torch.device("cuda", 0)))

    def test_dali_that_is_asked_for_and_not_there(self, folder, monkeypatch):
        def gone():
            raise ImportError("it is not there")

        monkeypatch.setattr(dali, "load_dali", gone)
        source = source_of(folder, "dali")
        dataset = source.open("train")
        with pytest.raises(ImportError, match="it is not there"):
            source.stream(dataset, EpochSampler(len(dataset), 2, seed=0), torch.device("cpu"))
