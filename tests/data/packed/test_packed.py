from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle

import numpy as np
import pytest
import torch
from hand_edited import read_plain
from packed_sets import SHAPE, clip_audio, clip_video, write_packed
from safetensors import safe_open

from avppc.data.packed.dataset import PackedDataset
from avppc.data.packed.index import SHARD_FOLDER, PackedIndex
from avppc.data.packed.loader import ClipLoader, EpochSampler
from avppc.data.packed.shard import ShardWriter


@pytest.fixture
def packed(tmp_path):
    return write_packed(tmp_path / "packed")


def check_batch(batch, numbers) -> None:
    for row, number in enumerate(numbers):
        assert np.array_equal(batch.video[row].numpy(), clip_video(number))
        assert np.array_equal(batch.audio[row].numpy(), clip_audio(number))
        assert batch.clip_ids[row] == 1000 + number
        assert batch.labels[row] == number % 4 - 1
        assert batch.speakers[row] == number % 4


class TestReading:
    def test_batches_hold_the_clips_asked_for(self, packed):
        with PackedDataset(packed) as dataset:
            assert len(dataset) == 23
            numbers = [22, 0, 5, 4, 5, 19, 10]
            check_batch(dataset.batch(torch.tensor(numbers)), numbers)

    def test_whole_set(self, packed):
        dataset = PackedDataset(packed, "train")
        assert dataset.words == ("WORD0", "WORD1", "WORD2")
        assert dataset.sources == tuple(f"W{number}.mp4" for number in range(23))
        assert dataset.labels.tolist() == [number % 4 - 1 for number in range(23)]
        assert dataset.clip_ids.tolist() == list(range(1000, 1023))
        assert dataset.speakers.tolist() == [number % 4 for number in range(23)]
        for tensor in (dataset.labels, dataset.clip_ids, dataset.speakers):
            assert tensor.dtype == torch.int64
        check_batch(dataset.batch(torch.arange(23)), range(23))
        assert "23 clips" in repr(dataset)

    def test_batches_are_apart_from_each_other_and_from_the_file(self, packed):
        dataset = PackedDataset(packed)
        held = [dataset.batch(torch.tensor([number])) for number in range(23)]
        held[0].video.fill_(7)
        view = held[3].video[:, 1]
        del held[2], held[3]
        again = [dataset.batch(torch.tensor([number])) for number in range(23)]
        check_batch(held[1], [1])
        assert np.array_equal(view[0].numpy(), clip_video(3)[1])
        for number, batch in enumerate(again):
            check_batch(batch, [number])

    def test_memory_of_released_batches_is_used_again(self, packed):
        dataset = PackedDataset(packed)
        places = set()
        for number in range(20):
            batch = dataset.batch(torch.tensor([number]))
            places.add(batch.video.data_ptr())
        assert len(places) <= 2

    def test_a_batch_outlives_its_data_set(self, packed):
        dataset = PackedDataset(packed)
        batch = dataset.batch(torch.tensor([4, 2]))
        dataset.close()
        del dataset
        check_batch(batch, [4, 2])

    def test_replacing_a_shard_does_not_touch_an_open_data_set(self, packed):
        dataset = PackedDataset(packed)
        write_packed(packed, clips=4, per_shard=2)
        check_batch(dataset.batch(torch.arange(23)), range(23))
        assert len(PackedDataset(packed)) == 4

    @pytest.mark.parametrize(
        ("indices", "message"),
        [
            (torch.tensor([23]), "from 0 to 22, got 23 to 23"),
            (torch.tensor([0, -1]), "from 0 to 22, got -1 to 0"),
            (torch.tensor([], dtype=torch.int64), "int64 .N., N >= 1"),
            (torch.tensor([1], dtype=torch.int32), "got torch.int32"),
            (torch.tensor([[1]]), r"got torch.int64 \[1, 1\]"),
        ],
    )
    def test_bad_indices(self, packed, indices, message):
        with pytest.raises(ValueError, match=message):
            PackedDataset(packed).batch(indices)

    def test_other_bad_calls(self, packed, tmp_path):
        dataset = PackedDataset(packed)
        with pytest.raises(TypeError, match=r"torch\.Tensor, got list"):
            dataset.batch([1, 2])
        dataset.close()
        with pytest.raises(ValueError, match="closed"):
            dataset.batch(torch.tensor([0]))
        with pytest.raises(ValueError, match=r"split 'val' of .* has no clips; available: 'train'"):
            PackedDataset(packed, "val")
        with pytest.raises(ValueError, match=r"not a packed data set: it has no index\.json"):
            PackedDataset(tmp_path)

    @pytest.mark.parametrize("method", ["spawn", "forkserver"])
    def test_other_processes_open_the_same_shards(self, packed, method):
        dataset = PackedDataset(packed)
        content = pickle.dumps(dataset)
        assert len(content) < 10_000 < dataset.batch(torch.arange(23)).audio.nbytes  # no clip travels
        check_batch(pickle.loads(content).batch(torch.tensor([7, 22])), [7, 22])
        loader = torch.utils.data.DataLoader(
            BatchesOf(dataset, [[3, 1], [20, 9]]), batch_size=None, num_workers=1, multiprocessing_context=method
        )
        for batch, numbers in zip(loader, ([3, 1], [20, 9]), strict=True):
            check_batch(batch, numbers)
        dataset.close()
        with pytest.raises(ValueError, match="closed"):
            pickle.dumps(dataset)

    def test_shards_replaced_meanwhile_are_noticed_by_other_processes(self, packed):
        content = pickle.dumps(PackedDataset(packed))
        write_packed(packed, clips=4, per_shard=2)
        with pytest.raises(ValueError, match=r"train-00000\.safetensors has .* bytes, the index says"):
            pickle.loads(content)


class BatchesOf(torch.utils.data.Dataset):
    """A data set whose items are batches of a packed one."""

    def __init__(self, dataset, batches):
        self.dataset = dataset
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, number):
        return self.dataset.batch(torch.tensor(self.batches[number]))


class TestShardFile:
    def test_safetensors_reads_it(self, packed):
        with safe_open(packed / SHARD_FOLDER / "train-00001.safetensors", "pt") as file:
            assert sorted(file.keys()) == ["audio", "clip_ids", "labels", "speakers", "video"]
            assert np.array_equal(file.get_tensor("video")[2].numpy(), clip_video(7))
            assert np.array_equal(file.get_tensor("audio")[4].numpy(), clip_audio(9))
            assert file.get_tensor("clip_ids").tolist() == [1005, 1006, 1007, 1008, 1009]

    def test_record_tells_the_file(self, packed):
        for record in PackedIndex.read(packed).splits["train"]:
            content = (packed / SHARD_FOLDER / record.file).read_bytes()
            assert len(content) == record.bytes
            assert hashlib.sha256(content).hexdigest() == record.sha256

    def test_nothing_but_shards_is_left(self, packed):
        assert sorted(os.listdir(packed / SHARD_FOLDER)) == [f"train-{n:05}.safetensors" for n in range(5)]

    @pytest.mark.parametrize("kept_bytes", [0, 1000, 6000])
    def test_full_disk_leaves_nothing(self, tmp_path, monkeypatch, kept_bytes):
        writer = ShardWriter(SHAPE, 2)
        for number in range(2):
            values = {"label": 0, "clip_id": number, "speaker": 0}
            writer.add("a.mp4", video=clip_video(number), audio=clip_audio(number), **values)
        written, real_write = 0, os.write

        def write(handle, content):
            nonlocal written
            if written >= kept_bytes:
                raise OSError(errno.ENOSPC, "No space left on device")
            done = real_write(handle, content[: kept_bytes - written])
            written += done
            return done

        monkeypatch.setattr(os, "write", write)
        with pytest.raises(OSError, match="No space left"):
            writer.write(tmp_path / "train-00000.safetensors")
        assert os.listdir(tmp_path) == []

    def test_writer_checks_its_input(self, tmp_path):
        writer = ShardWriter(SHAPE, 1)
        numbers = {"label": 0, "clip_id": 0, "speaker": 0}
        with pytest.raises(
            ValueError, match=r"video of a\.mp4 must be uint8 of shape \(3, 8, 12\), got uint8 of shape"
        ):
            writer.add("a.mp4", video=clip_video(0)[:2], audio=clip_audio(0), **numbers)
        with pytest.raises(ValueError, match=r"audio of a\.mp4 must be int16"):
            writer.add("a.mp4", video=clip_video(0), audio=clip_audio(0).astype(np.float32), **numbers)
        with pytest.raises(ValueError, match="at least one clip"):
            writer.write(tmp_path / "a.safetensors")
        writer.add("a.mp4", video=clip_video(0), audio=clip_audio(0), **numbers)
        with pytest.raises(ValueError, match="full with 1 clips"):
            writer.add("a.mp4", video=clip_video(0), audio=clip_audio(0), **numbers)


def edit_index(packed, change) -> None:
    path = packed / "index.json"
    content = read_plain(path)
    change(content)
    path.write_text(json.dumps(content))


class TestDamage:
    @pytest.mark.parametrize("place", ["header", "labels", "middle", "last"])
    def test_a_flipped_byte_is_refused_by_name(self, packed, place):
        path = packed / SHARD_FOLDER / "train-00002.safetensors"
        data = bytearray(path.read_bytes())
        position = {"header": 30, "labels": 4096, "middle": len(data) // 2, "last": len(data) - 1}[place]
        data[position] ^= 1
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"train-00002\.safetensors is damaged: its SHA-256 is"):
            PackedDataset(packed)

    def test_header_is_checked_without_checksums_too(self, packed):
        path = packed / SHARD_FOLDER / "train-00002.safetensors"
        original = path.read_bytes()
        header = json.loads(original[8 : 8 + int.from_bytes(original[:8], "little")])

        def put(entries, length=None) -> None:
            text = json.dumps(entries).encode() if isinstance(entries, dict) else entries
            text = text.ljust(4088)
            path.write_bytes((length or len(text)).to_bytes(8, "little") + text + original[4096:])

        put(header)
        PackedDataset(packed, verify=False)
        for change, message in [
            ({"video": header["video"] | {"dtype": "I8"}}, "video must be"),
            ({"video": header["video"] | {"shape": [5, 3, 12, 8]}}, "video must be"),
            ({"audio": header["audio"] | {"data_offsets": [0, 1 << 40]}}, "audio must be"),
            ({"labels": header["labels"] | {"data_offsets": [-8, 32]}}, "labels must be"),
            ({"extra": header["labels"]}, "must hold the tensors"),
        ]:
            put(header | change)
            with pytest.raises(ValueError, match=rf"train-00002\.safetensors.*{message}"):
                PackedDataset(packed, verify=False)
        for entries, length, message in [
            (b"{", None, "not JSON"),
            (b"[1]", None, "must hold"),
            (header, 1 << 62, "header would have"),
            (header, 1, "header would have"),
        ]:
            put(entries, length)
            with pytest.raises(ValueError, match=rf"train-00002\.safetensors.*{message}"):
                PackedDataset(packed, verify=False)

    @pytest.mark.parametrize("size", [0, 7, 5000])
    def test_a_truncated_shard_is_refused_by_name(self, packed, size):
        path = packed / SHARD_FOLDER / "train-00004.safetensors"
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(ValueError, match=rf"train-00004\.safetensors has {size} bytes, the index says"):
            PackedDataset(packed, verify=False)

    @pytest.mark.parametrize(
        "name",
        ["../index.json", "/etc/passwd", "a/../../b.safetensors", "..safetensors", "", "x\x00.safetensors", ".."],
    )
    def test_path_tricks_are_refused(self, packed, name):
        def change(content):
            content["splits"]["train"][1]["file"] = name

        edit_index(packed, change)
        with pytest.raises(ValueError, match=r"index\.json: .* is not a shard's name"):
            PackedDataset(packed, verify=False)

    @pytest.mark.parametrize("what", ["shard", "folder"])
    def test_links_that_leave_the_set_are_refused(self, packed, tmp_path, what):
        path = packed / SHARD_FOLDER / ("train-00002.safetensors" if what == "shard" else "")
        path.rename(tmp_path / "outside")
        path.symlink_to(tmp_path / "outside")
        with pytest.raises(ValueError, match=r"train-0000\d\.safetensors is a link that leaves the data set's folder"):
            PackedDataset(packed)

    def test_a_shard_that_is_a_link_to_itself_is_missing(self, packed):
        path = packed / SHARD_FOLDER / "train-00002.safetensors"
        path.unlink()
        path.symlink_to(path.name)
        with pytest.raises(ValueError, match=r"train-00002\.safetensors is missing"):
            PackedDataset(packed)

    def test_links_within_the_set_are_followed(self, packed):
        path = packed / SHARD_FOLDER / "train-00002.safetensors"
        path.rename(packed / "elsewhere")
        path.symlink_to(packed / "elsewhere")
        assert len(PackedDataset(packed)) == 23

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda content: content.update(format="zip"), '"format" must be "avppc-packed"'),
            (lambda content: content.update(version=2), "version 2 is not supported"),
            (lambda content: content.update(fps=30), "fps must be 25, got 30"),
            (lambda content: content.update(samples=1), "samples must be 1920 for 3 frames, got 1"),
            (lambda content: content.update(frames=-3), "frames must be an integer from 1"),
            (lambda content: content.update(height="8"), "height must be an integer"),
            (lambda content: content.update(words="WORD"), "words must be a list of strings"),
            (lambda content: content.pop("words"), "is damaged: KeyError 'words'"),
            (lambda content: content.update(splits={"dev": []}), "splits must be among train, val, test"),
            (lambda content: content["splits"]["train"][0].update(clips=6), "has 6 clips but 5 sources"),
            (lambda content: content["splits"]["train"].append(content["splits"]["train"][0]), "listed twice"),
            (lambda content: content.update(words=["WORD0"]), "labels must be from -1 to 0"),
        ],
    )
    def test_index_is_checked(self, packed, change, message):
        edit_index(packed, change)
        with pytest.raises(ValueError, match=message):
            PackedDataset(packed, verify=False)

    def test_index_that_is_not_json(self, packed):
        (packed / "index.json").write_text("{")
        with pytest.raises(ValueError, match=r"index\.json is not valid JSON"):
            PackedDataset(packed)

    def test_missing_shard(self, packed):
        (packed / SHARD_FOLDER / "train-00003.safetensors").unlink()
        for verify in (True, False):
            with pytest.raises(ValueError, match=r"train-00003\.safetensors is missing; `avppc prepare` with the same"):
                PackedDataset(packed, verify=verify)


@pytest.mark.parametrize("cut", ["in the clip", "to nothing"])
def test_a_shard_that_is_cut_short_in_use_is_an_error(tmp_path, cut):
    """Touching a mapped page that is not there any more would end the process without a word."""
    with PackedDataset(write_packed(tmp_path / "packed")) as dataset:
        path = sorted((tmp_path / "packed" / "shards").iterdir())[1]
        size = path.stat().st_size
        os.truncate(path, size - 1 if cut == "in the clip" else 0)
        dataset.batch(torch.tensor([0, 22]))  # of other shards
        with pytest.raises(ValueError, match=rf"{path.name} has been cut short while it was in use, from {size:,} to"):
            dataset.batch(torch.tensor([0, 7]))
        sampler = EpochSampler(23, 23, seed=0)
        with ClipLoader(dataset, sampler) as loader, pytest.raises(ValueError, match="has been cut short"):
            next(loader)
