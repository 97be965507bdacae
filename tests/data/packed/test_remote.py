from __future__ import annotations

import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from hand_edited import without_checksum
from make_videos import write_video
from packed_sets import clip_video, write_packed
from tiny_runs import tiny_config, write_tiny_set

from avppc.data.config import PrepareConfig
from avppc.data.packed import remote
from avppc.data.packed.dataset import PackedDataset, data_sha256
from avppc.data.packed.remote import cache_folder, fetch_packed, remote_url, upload_packed
from avppc.data.prepare import prepare
from avppc.data.source import DataSource
from avppc.evaluate.media import make_clip_sheet
from avppc.train.loop import pretrain

URL = "memory://bucket/set"


@pytest.fixture(autouse=True)
def _own_places(tmp_path, monkeypatch):
    monkeypatch.setenv("AVPPC_CACHE", str(tmp_path / "cache"))
    yield
    memory = fsspec.filesystem("memory")
    for path in memory.ls("/", detail=False):
        memory.rm(path, recursive=True)


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("s3://bucket/set/", "s3://bucket/set"),
        (Path("s3://bucket/set"), "s3://bucket/set"),
        ("gs://b/a b", "gs://b/a b"),
        ("memory://x", "memory://x"),
        ("file:///data/set", "file:///data/set"),
        (Path("file:///data/set"), "file:///data/set"),
        ("data/packed", None),
        ("/data/s3", None),
        (Path("C:\\data"), None),
        ("a:b", None),
    ],
    ids=str,
)
def test_addresses(given, url):
    assert remote_url(given) == url


class TestReading:
    def test_processes_of_a_machine_copy_each_shard_once(self, tmp_path, monkeypatch):
        """Threads stand for them: a lock is the open file's, not the process's."""
        upload_packed(write_packed(tmp_path / "packed"), URL)
        copied = []

        def copy(files, root, url, folder, record):
            if not (folder / record.file).exists():
                copied.append(record.file)
                time.sleep(0.05)
            fetch_shard(files, root, url, folder, record)

        fetch_shard = remote._fetch_shard
        monkeypatch.setattr(remote, "_fetch_shard", copy)
        with ThreadPoolExecutor(3) as pool:
            folders = list(pool.map(lambda _: fetch_packed(URL), range(3)))
        assert len(set(folders)) == 1
        assert sorted(copied) == sorted(path.name for path in (tmp_path / "packed" / "shards").iterdir())

    def test_without_a_home_the_variable_is_named(self, monkeypatch):
        monkeypatch.delenv("AVPPC_CACHE")
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
        with pytest.raises(ValueError, match="set AVPPC_CACHE"):
            cache_folder(URL)

    def test_a_set_elsewhere_is_the_same_set(self, tmp_path):
        upload_packed(write_packed(tmp_path / "packed"), URL)
        with PackedDataset(URL) as dataset:
            assert len(dataset) == 23
            batch = dataset.batch(torch.tensor([22, 4, 9]))
            for row, number in enumerate((22, 4, 9)):
                assert np.array_equal(batch.video[row].numpy(), clip_video(number))
            copy = pickle.loads(pickle.dumps(dataset))
            assert torch.equal(copy.batch(torch.tensor([5])).video, dataset.batch(torch.tensor([5])).video)

    def test_paths_lose_a_slash(self, tmp_path):
        upload_packed(write_packed(tmp_path / "packed"), URL)
        assert len(PackedDataset(Path("memory://bucket/set"))) == 23

    def test_file_addresses(self, tmp_path):
        packed = write_packed(tmp_path / "packed")
        assert len(PackedDataset(f"file://{packed}")) == 23

    def test_the_checksum_of_a_set_copies_no_shard(self, tmp_path):
        packed = write_packed(tmp_path / "packed")
        upload_packed(packed, URL)
        assert data_sha256(URL) == data_sha256(packed)
        assert list((cache_folder(URL) / "shards").iterdir()) == []

    def test_shards_are_copied_once(self, tmp_path, monkeypatch):
        upload_packed(write_packed(tmp_path / "packed"), URL)
        fetch_packed(URL)
        opened = []
        real = type(fsspec.filesystem("memory")).open
        monkeypatch.setattr(
            type(fsspec.filesystem("memory")),
            "open",
            lambda self, path, *rest, **options: opened.append(path) or real(self, path, *rest, **options),
        )
        assert len(PackedDataset(URL)) == 23
        assert not [path for path in opened if path.endswith(".safetensors")]
        (shard := cache_folder(URL) / "shards" / "train-00001.safetensors").write_bytes(b"cut off")
        assert len(PackedDataset(URL)) == 23
        assert [path for path in opened if path.endswith(".safetensors")] == [f"/bucket/set/shards/{shard.name}"]

    def test_a_flipped_byte_is_refused_by_name_and_not_kept(self, tmp_path):
        upload_packed(write_packed(tmp_path / "packed"), URL)
        memory = fsspec.filesystem("memory")
        path = "/bucket/set/shards/train-00002.safetensors"
        content = bytearray(memory.cat_file(path))
        content[-1] ^= 1
        memory.pipe_file(path, bytes(content))
        with pytest.raises(ValueError, match=r"memory://bucket/set/shards/train-00002\.safetensors is damaged"):
            PackedDataset(URL)
        names = [file.name for file in (cache_folder(URL) / "shards").iterdir()]
        assert not [name for name in names if "train-00002" in name or name.endswith(".partial")]

    def test_copies_that_are_damaged_later_are_copied_again(self, tmp_path):
        upload_packed(write_packed(tmp_path / "packed"), URL)
        with PackedDataset(URL) as dataset:
            whole = dataset.batch(torch.arange(23)).video
        for number in (1, 2):
            copy = cache_folder(URL) / "shards" / f"train-0000{number}.safetensors"
            content = bytearray(copy.read_bytes())
            content[-1] ^= 1
            copy.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"train-00001\.safetensors is damaged: .*the same command copies it again"
        ):
            PackedDataset(URL)
        with PackedDataset(URL) as dataset:
            assert torch.equal(dataset.batch(torch.arange(23)).video, whole)

    def test_path_tricks_in_the_index_are_refused(self, tmp_path):
        upload_packed(write_packed(tmp_path / "packed"), URL)
        memory = fsspec.filesystem("memory")
        index = memory.cat_file("/bucket/set/index.json")
        index = index.replace(b"train-00001.safetensors", b"../../x.safetensors")
        memory.pipe_file("/bucket/set/index.json", without_checksum(index))
        with pytest.raises(ValueError, match=r"is not a shard's name"):
            PackedDataset(URL)

    def test_only_the_split_is_copied(self, tmp_path):
        upload_packed(write_packed(tmp_path / "packed"), URL)
        with pytest.raises(ValueError, match=r"split 'test' of .* has no clips; available: 'train'"):
            PackedDataset(URL, "test")
        assert list((cache_folder(URL) / "shards").iterdir()) == []

    @pytest.mark.parametrize(
        ("url", "error", "message"),
        [
            ("memory://bucket/none", ValueError, "is not a packed data set: it has no index.json"),
            ("nosuch://bucket/set", ValueError, "nosuch://bucket/set is no address that fsspec knows"),
        ],
    )
    def test_what_is_not_there(self, url, error, message):
        with pytest.raises(error, match=message):
            PackedDataset(url)


class TestUpload:
    def test_only_what_is_missing_is_sent(self, tmp_path):
        packed = write_packed(tmp_path / "packed")
        assert upload_packed(packed, URL) == 5
        assert upload_packed(packed, URL) == 0
        fsspec.filesystem("memory").rm_file("/bucket/set/shards/train-00003.safetensors")
        assert upload_packed(packed, URL) == 1
        write_packed(packed, clips=12, per_shard=4)
        assert upload_packed(packed, URL) == 3
        assert len(PackedDataset(URL)) == 12

    def test_an_upload_that_fails_leaves_no_half_set(self, tmp_path, monkeypatch):
        packed = write_packed(tmp_path / "packed")
        real = remote._put

        def put(files, path, target):
            if "00003" in target:
                raise OSError("the connection is gone")
            real(files, path, target)

        monkeypatch.setattr(remote, "_put", put)
        with pytest.raises(OSError, match="the connection is gone"):
            upload_packed(packed, URL)
        memory = fsspec.filesystem("memory")
        assert not memory.exists("/bucket/set/index.json")
        assert not [path for path in memory.find("/bucket/set") if path.endswith(".partial")]
        monkeypatch.undo()

    def test_prepare_sends_what_it_made(self, tmp_path, capsys):
        data = tmp_path / "data"
        data.mkdir()
        write_video(data / "a.mp4", size=(48, 64), options={"preset": "ultrafast"})
        config = PrepareConfig(data, tmp_path / "out", workers=1, upload=URL)
        assert prepare.execute(config) == 0
        assert "memory://bucket/set: 1 shards sent" in capsys.readouterr().out
        with PackedDataset(tmp_path / "out") as here, PackedDataset(URL) as there:
            assert torch.equal(here.batch(torch.tensor([0])).video, there.batch(torch.tensor([0])).video)


class TestTraining:
    def test_a_run_reads_a_set_elsewhere(self, tmp_path):
        """Checksums and all: by the same command as from a folder, with the same result."""
        local = write_tiny_set(tmp_path / "packed")
        upload_packed(local, URL)
        for data, name in ((local, "local"), (Path(URL), "remote")):
            pretrain(tiny_config(data, tmp_path / name, steps=2))
        one, other = ((tmp_path / name / "encoder.safetensors").read_bytes() for name in ("local", "remote"))
        assert one == other
        config = tiny_config(local, tmp_path)
        sheet = make_clip_sheet(DataSource(Path(URL)), config.cut, config.features)
        assert sheet.split == "test"
        assert len(sheet.strips) == 6
