from __future__ import annotations

import hashlib
import json
import os
from fractions import Fraction

import pytest
import torch
from make_videos import copy_cut, write_video
from no_worker import in_this_process

from avppc.cli import main
from avppc.data.config import IndexConfig, PrepareConfig
from avppc.data.packed.dataset import PackedDataset
from avppc.data.prepare import index, prepare, worker
from avppc.data.video.decode import decode_clip, decode_clips
from avppc.data.video.inspect import inspect_video

SMALL = {"size": (48, 64), "options": {"preset": "ultrafast"}}


def entries(path) -> dict[str, dict]:
    return {entry["path"]: entry for entry in map(json.loads, path.read_text().splitlines())}


class TestProbe:
    @pytest.mark.parametrize(
        ("name", "options", "expected", "notes", "problems"),
        [
            ("a.mp4", {}, {"duration_seconds": 1.16, "fps": 25.0, "frames": 29, "video_codec": "h264"}, [], []),
            ("b.mp4", {"fps": 30, "frames": 60}, {"duration_seconds": 2.0, "fps": 30.0}, ["frame rate 30"], []),
            ("c.mp4", {"fps": Fraction(30_000, 1001), "frames": 40}, {"fps": 29.97003}, ["frame rate 29.97"], []),
            ("d.mp4", {"rate": 44_100, "layout": "stereo"}, {"sample_rate_hz": 44_100, "channels": 2}, [], []),
            ("e.mp4", {"options": {"g": "10", "preset": "ultrafast"}}, {"key_frames": 3}, [], []),
            ("f.mp4", {"frames": 20}, {"duration_seconds": 0.8}, [], ["too short"]),
            ("g.mp4", {"audio_start": 0.5}, {"audio_codec": "aac"}, ["sound starts late"], []),
            ("h.mp4", {"audio_seconds": 0.5}, {}, ["sound ends early"], []),
            ("i.mp4", {"skipped": range(5, 10)}, {}, ["uneven frames"], ["frames missing"]),
            ("j.webm", {"video_codec": "libvpx-vp9", "audio_codec": "libopus", "rate": 48_000, "options": {}},
             {"video_codec": "vp9", "audio_codec": "opus", "streams": {"video": 1, "audio": 1}}, [], []),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )  # fmt: skip
    def test_facts(self, tmp_path, name, options, expected, notes, problems):
        facts = inspect_video(write_video(tmp_path / name, **{**SMALL, **options})).as_json()
        assert {key: facts[key] for key in expected} == expected
        assert sorted(note.split(":")[0] for note in facts["notes"]) == notes
        assert [problem.split(":")[0] for problem in facts["problems"]] == problems
        assert (facts["width"], facts["height"], facts["pixel_format"]) == (64, 48, "yuv420p")

    def test_hidden_frames_are_not_counted(self, tmp_path):
        source = write_video(tmp_path / "long.mp4", frames=100, size=(64, 64), options={"g": "25"})
        facts = inspect_video(copy_cut(source, tmp_path / "cut.mp4", 1.32))
        assert facts.frames == len(list(decode_clips(tmp_path / "cut.mp4", num_frames=1, stride=1))) == 100 - 33
        assert facts.notes[0] == "hidden frames: an edit list leaves some out"

    def test_times_agree_with_the_decoder(self, tmp_path):
        path = write_video(tmp_path / "late.mp4", audio_start=0.2, **SMALL)
        facts = inspect_video(path)
        silent = decode_clip(path).notes[0]
        assert silent == f"sound padded with zeros: 0 to {1000 * facts.audio_start_seconds:.0f} ms of the clip"


@pytest.fixture
def folder(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    write_video(data / "a.mp4", **SMALL)
    write_video(data / "b.mp4", frames=70, seed=1, **SMALL)
    (data / "bad.mp4").write_bytes(b"not a video at all" * 100)
    write_video(data / "mute.mp4", audio_codec=None, **SMALL)
    os.symlink("/etc/hostname", data / "link.mp4")
    return data


class TestIndex:
    def test_manifest_and_what_is_kept(self, folder, capsys):
        manifest = folder / "manifest.jsonl"
        manifest.write_text(json.dumps({"path": "b.mp4", "speaker": "ann", "said": "hello"}) + "\n")
        assert index.execute(IndexConfig(folder, workers=1)) == 3
        found = entries(manifest)
        assert {path: entry["problems"] for path, entry in found.items()} == {
            "a.mp4": [],
            "b.mp4": [],
            "bad.mp4": ["damaged or not a video: Invalid data found when processing input"],
            "link.mp4": ["a link that leaves the data's folder is not followed"],
            "mute.mp4": ["no audio stream"],
        }
        assert (found["b.mp4"]["speaker"], found["b.mp4"]["said"]) == ("ann", "hello")
        assert found["b.mp4"]["duration_seconds"] == 2.8
        printed = capsys.readouterr().out
        assert "4 videos" in printed
        assert "4 read" in printed
        assert "without problems: 2" in printed
        assert "1  no audio stream" in printed

    def test_again_reads_only_what_has_changed(self, folder, capsys):
        index.execute(IndexConfig(folder, workers=1))
        before = entries(folder / "manifest.jsonl")
        capsys.readouterr()
        write_video(folder / "mute.mp4", **SMALL)
        assert index.execute(IndexConfig(folder, workers=1)) == 3
        assert "1 read" in capsys.readouterr().out
        after = entries(folder / "manifest.jsonl")
        assert after["mute.mp4"]["problems"] == []
        assert {path: after[path] for path in after if path != "mute.mp4"} == {
            path: before[path] for path in before if path != "mute.mp4"
        }

    def test_crash_and_hang_are_listed(self, folder, monkeypatch):
        import troubled_worker

        (folder / "c-crash.mp4").write_bytes(b"x")
        (folder / "d-hang.mp4").write_bytes(b"x")
        with monkeypatch.context() as patch:
            patch.setattr(index, "InspectJob", troubled_worker.TroubledInspection)
            index.execute(IndexConfig(folder, workers=1, timeout_seconds=1.0))
        found = entries(folder / "manifest.jsonl")
        assert found["c-crash.mp4"]["problems"] == ["it crashes the decoder (signal 11, SIGSEGV)"]
        assert found["d-hang.mp4"]["problems"] == ["the decoder gives nothing for 1 s"]
        assert found["a.mp4"]["problems"] == []
        index.execute(IndexConfig(folder, workers=1))  # what may be no fault of the video is tried again
        found = entries(folder / "manifest.jsonl")
        assert found["c-crash.mp4"]["problems"] == ["it crashes the decoder (signal 11, SIGSEGV)"]
        assert found["d-hang.mp4"]["problems"][0].startswith("damaged or not a video")

    def test_manifest_leads_prepare(self, folder, tmp_path):
        """index -> (edited by hand) -> prepare --paths."""
        manifest = tmp_path / "chosen.jsonl"
        assert main(["index", "--data", str(folder), "--out", str(manifest), "--workers", "1"]) == 3
        lines = [entry | {"speaker": 5} for entry in entries(manifest).values() if not entry["problems"]]
        manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
        out = tmp_path / "out"
        flags = ["--data", str(folder), "--out", str(out), "--paths", str(manifest), "--workers", "1"]
        assert main(["prepare", *flags]) == 0
        with PackedDataset(out) as dataset:
            assert dataset.sources == ("a.mp4", "b.mp4", "b.mp4#29")
            assert dataset.speakers.tolist() == [5, 5, 5]

    def test_no_videos(self, tmp_path, capsys):
        assert index.execute(IndexConfig(tmp_path)) == 1
        assert not (tmp_path / "manifest.jsonl").exists()
        assert "has no videos" in capsys.readouterr().err

    def test_videos_that_are_all_refused_unopened_are_listed(self, tmp_path, capsys):
        data = tmp_path / "data"
        data.mkdir()
        (tmp_path / "a.mp4").write_bytes(b"elsewhere")
        (data / "a.mp4").symlink_to(tmp_path / "a.mp4")
        assert index.execute(IndexConfig(data)) == 3
        assert entries(data / "manifest.jsonl")["a.mp4"]["problems"] == [
            "a link that leaves the data's folder is not followed"
        ]
        assert "problems: 1" in capsys.readouterr().out


class TestShares:
    @pytest.fixture(autouse=True)
    def no_launcher(self, monkeypatch):
        for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"):
            monkeypatch.delenv(name, raising=False)

    def test_shares_write_what_one_process_writes(self, folder, tmp_path, capsys):
        (folder / "more").mkdir()
        for number in range(3):
            write_video(folder / "more" / f"{number}.mp4", seed=number, **SMALL)
        known = json.dumps({"path": "b.mp4", "said": "hello", "speaker": "ann"}) + "\n"
        one, shared = tmp_path / "one.jsonl", tmp_path / "shared.jsonl"
        for path in (one, shared):
            path.write_text(known)
        index.execute(IndexConfig(folder, out=one, workers=1))
        capsys.readouterr()
        for number in (2, 0):
            assert index.execute(IndexConfig(folder, out=shared, workers=1, shard=f"{number}/3")) == 3
            assert shared.read_text() == known
            assert "are for other shares" in capsys.readouterr().out
        assert index.execute(IndexConfig(folder, out=shared, workers=1, shard="1/3")) == 3
        assert "other shares" not in capsys.readouterr().out
        assert shared.read_text() == one.read_text()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "one.jsonl", "shared.jsonl"]

    def test_the_launcher_tells_the_share(self, folder, monkeypatch, capsys):
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "2")
        index.execute(IndexConfig(folder, workers=1))
        assert "; 2 read" in capsys.readouterr().out
        assert not (folder / "manifest.jsonl").exists()
        with pytest.raises(ValueError, match='shard must be "i/n"'):
            IndexConfig(folder, shard="2/2")

    def test_a_killed_share_goes_on_and_old_parts_are_not_believed(self, folder, capsys):
        index.execute(IndexConfig(folder, workers=1, shard="0/2"))
        capsys.readouterr()
        index.execute(IndexConfig(folder, workers=1, shard="0/2"))
        assert "; 0 read" in capsys.readouterr().out
        write_video(folder / "a.mp4", frames=40, **SMALL)  # share 0's
        index.execute(IndexConfig(folder, workers=1, shard="1/2"))
        assert not (folder / "manifest.jsonl").exists()
        index.execute(IndexConfig(folder, workers=1, shard="0/2"))
        assert entries(folder / "manifest.jsonl")["a.mp4"]["frames"] == 40

    def test_what_cannot_be_read_does_not_keep_the_manifest_from_being_written(self, folder, monkeypatch):
        def unreadable(path):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(index, "handle_units", in_this_process)
        monkeypatch.setattr(index, "sha256_of", unreadable)
        for shard in ("0/2", "1/2"):
            index.execute(IndexConfig(folder, shard=shard))
        found = entries(folder / "manifest.jsonl")["a.mp4"]
        assert found["problems"] == ["cannot be read: Permission denied"]
        assert "usable" not in found  # the next run tries again


class TestPrepareBelievesTheManifest:
    def test_what_gives_no_clip_is_left_out(self, folder, tmp_path, monkeypatch):
        write_video(folder / "short.mp4", frames=20, **SMALL)
        write_video(folder / "hole.mp4", frames=70, skipped=range(5, 10), **SMALL)
        index.execute(IndexConfig(folder, workers=1))
        opened = []
        decode = worker.decode_clips
        monkeypatch.setattr(
            worker, "decode_clips", lambda path, **options: opened.append(path.name) or decode(path, **options)
        )
        monkeypatch.setattr(prepare, "handle_units", in_this_process)
        out = tmp_path / "out"
        assert prepare.execute(PrepareConfig(folder, out, workers=1)) == 3
        # One hole spoils a clip, not the video.
        assert opened == ["a.mp4", "b.mp4", "hole.mp4"]
        refused = entries(out / "refused.jsonl")
        found = "left out: `avppc index` has found: "
        assert refused["short.mp4"]["reason"] == found + "too short: 0.80 s, 1.16 s are needed"
        assert refused["mute.mp4"]["reason"] == found + "no audio stream"
        assert refused["bad.mp4"]["reason"].startswith(found + "damaged or not a video")
        assert refused["hole.mp4"]["reason"].startswith("frames missing")
        with PackedDataset(out) as dataset:
            assert dataset.sources == ("a.mp4", "b.mp4", "b.mp4#29", "hole.mp4#29")

    def test_what_has_changed_or_is_judged_otherwise_is_tried(self, folder, tmp_path):
        write_video(folder / "short.mp4", frames=20, **SMALL)
        index.execute(IndexConfig(folder, workers=1))
        (folder / "bad.mp4").write_bytes((folder / "a.mp4").read_bytes())  # another size
        out = tmp_path / "out"
        prepare.execute(PrepareConfig(folder, out, workers=1, frames=15, stride=0))
        with PackedDataset(out) as dataset:
            assert dataset.sources == ("a.mp4", "b.mp4", "bad.mp4", "short.mp4")

    def test_a_file_that_changed_after_indexing_is_refused_by_name(self, folder, tmp_path):
        """A bit that no decoder can know to be wrong; size and time of the file stay."""
        path = folder / "a.mp4"
        index.execute(IndexConfig(folder, workers=1))
        status, whole = path.stat(), path.read_bytes()
        damaged = bytearray(whole)
        damaged[len(whole) // 2] ^= 4
        path.write_bytes(damaged)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        out = tmp_path / "out"
        config = PrepareConfig(folder, out, workers=1)
        prepare.execute(config)
        reason = entries(out / "refused.jsonl")["a.mp4"]["reason"]
        digests = [hashlib.sha256(content).hexdigest() for content in (damaged, whole)]
        assert reason.startswith(
            "changed since it was listed: its SHA-256 is {}, the manifest says {}".format(*digests)
        )
        # Once the right content is back, the same command takes it, though size and time have not changed.
        path.write_bytes(whole)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        prepare.execute(config)
        with PackedDataset(out) as dataset:
            assert dataset.sources == ("a.mp4", "b.mp4", "b.mp4#29")

    def test_indexing_makes_no_finished_unit_anew(self, folder, tmp_path, capsys):
        for name in ("bad.mp4", "mute.mp4"):
            (folder / name).unlink()
        config = PrepareConfig(folder, tmp_path / "out", workers=1)
        prepare.execute(config)
        index.execute(IndexConfig(folder, workers=1))
        capsys.readouterr()
        prepare.execute(config)
        assert "1 of 1 units were finished before" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ({"sha256": "abc"}, "sha256 must be 64 hexadecimal digits, got 'abc'"),
            ({"sha256": 5}, "sha256 must be 64 hexadecimal digits"),
            ({"usable": False}, "usable must be true, or false beside the bytes"),
            ({"usable": "no"}, "usable must be true"),
        ],
        ids=str,
    )
    def test_damaged_lines(self, folder, line, message):
        (folder / "manifest.jsonl").write_text(json.dumps({"path": "a.mp4"} | line) + "\n")
        with pytest.raises(ValueError, match=f"line 1: {message}"):
            prepare.execute(PrepareConfig(folder, folder.parent / "out"))


def test_names_that_no_manifest_may_hold_are_refused_and_left_out_of_it(tmp_path, capsys):
    folder = tmp_path / "videos"
    folder.mkdir()
    write_video(folder / "a.mp4", **SMALL)
    for name in (b"b\\c.mp4", b"d\xff.mp4"):
        (folder / os.fsdecode(name)).write_bytes((folder / "a.mp4").read_bytes())
    for _ in range(2):
        assert index.execute(IndexConfig(folder, workers=1)) == 3
        assert "its name has a backslash" in capsys.readouterr().out
        assert entries(folder / "manifest.jsonl").keys() == {"a.mp4"}
    out = tmp_path / "out"
    assert prepare.execute(PrepareConfig(folder, out, workers=1)) == 3
    assert entries(out / "refused.jsonl").keys() == {"b\\c.mp4", "d\\udcff.mp4"}


def test_a_manifest_that_cannot_be_written_is_told_before_anything_is_read(folder, monkeypatch):
    monkeypatch.setattr(index, "_inspect_all", lambda *_: pytest.fail("a video was read"))
    with pytest.raises(OSError, match="none"):
        index.execute(IndexConfig(folder, out=folder / "a.mp4" / "none" / "manifest.jsonl"))


class TestLists:
    def test_only_the_listed_videos_are_taken(self, folder, tmp_path):
        listed = tmp_path / "list.txt"
        listed.write_text("b.mp4\n\nnone.mp4\nlink.mp4\n")
        out = tmp_path / "out"
        assert prepare.execute(PrepareConfig(folder, out, paths=listed, workers=1, stride=0)) == 3
        with PackedDataset(out) as dataset:
            assert dataset.sources == ("b.mp4",)
            assert torch.equal(dataset.batch(torch.tensor([0])).video[0], decode_clip(folder / "b.mp4").video)
        refused = entries(out / "refused.jsonl")
        assert refused["none.mp4"]["reason"] == "listed in list.txt, but there is no such video"
        assert refused["link.mp4"]["reason"] == "a link that leaves the data's folder is not followed"

    def test_names_end_at_the_line_and_nowhere_else(self, folder, tmp_path):
        names = ["a\u2028b.mp4", "c .mp4", "d\x85.mp4"]
        for name in names:
            (folder / name).write_bytes((folder / "a.mp4").read_bytes())
        listed = tmp_path / "list.txt"
        listed.write_bytes("\r\n".join(names).encode())
        prepare.execute(PrepareConfig(folder, tmp_path / "out", paths=listed, workers=1))
        with PackedDataset(tmp_path / "out") as dataset:
            assert sorted(dataset.sources) == sorted(names)

    @pytest.mark.parametrize("path", ["../a.mp4", "/etc/passwd", "x/../../a.mp4", "..\\a.mp4"])
    @pytest.mark.parametrize("kind", ["list.txt", "list.jsonl"])
    def test_path_tricks_are_refused(self, folder, tmp_path, path, kind):
        listed = tmp_path / kind
        lines = ["a.mp4", path]
        listed.write_text("\n".join(json.dumps({"path": line}) if kind.endswith("l") else line for line in lines))
        with pytest.raises(ValueError, match=rf"{kind}, line 2: path must lie below the data's folder"):
            prepare.execute(PrepareConfig(folder, tmp_path / "out", paths=listed))
        assert not (tmp_path / "out").exists()

    def test_a_linked_folder_does_not_lead_out(self, folder, tmp_path):
        outside = tmp_path / "outside"
        outside.mkdir()
        write_video(outside / "secret.mp4", **SMALL)
        os.symlink(outside, folder / "inside")
        listed = tmp_path / "list.txt"
        listed.write_text("a.mp4\ninside/secret.mp4\na.mp4/x.mp4\n")
        out = tmp_path / "out"
        prepare.execute(PrepareConfig(folder, out, paths=listed, workers=1))
        with PackedDataset(out) as dataset:
            assert dataset.sources == ("a.mp4",)
        assert "leaves the data's folder" in entries(out / "refused.jsonl")["inside/secret.mp4"]["reason"]

    def test_missing_list(self, folder, tmp_path):
        with pytest.raises(ValueError, match=r"there is no list of videos .*none\.txt"):
            prepare.execute(PrepareConfig(folder, tmp_path / "out", paths=tmp_path / "none.txt"))
