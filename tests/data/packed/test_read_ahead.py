"""When the pages of clips are asked for ahead, and what memory batches lie in."""

from __future__ import annotations

import mmap
import os

import pytest
import torch
from packed_sets import write_packed

from avppc.data.packed import dataset as packed_module
from avppc.data.packed.dataset import BufferPool, PackedDataset, ReadAhead, blocks_read
from avppc.data.packed.shard import Shard


class TestReadAhead:
    def test_stops_when_nothing_is_read_and_begins_again(self):
        ahead = ReadAhead()
        batches = 0
        while ahead.wanted:
            ahead.batch_done(5, 5)
            batches += 1
            assert batches < 100
        ahead.batch_done(5, 5)
        assert not ahead.wanted
        ahead.batch_done(5, 6)
        for _ in range(batches):
            assert ahead.wanted
            ahead.batch_done(6, 6)
        assert not ahead.wanted

    def test_always_where_the_system_does_not_tell(self, monkeypatch):
        monkeypatch.setattr(packed_module, "_resource", None)
        assert blocks_read() is None
        ahead = ReadAhead()
        for _ in range(100):
            ahead.batch_done(blocks_read(), blocks_read())
        assert ahead.wanted

    @pytest.mark.skipif(not hasattr(mmap, "MADV_WILLNEED"), reason="this system takes no advice")
    def test_each_clip_is_asked_for_while_there_is_something_to_read(self, tmp_path, monkeypatch):
        asked = []
        monkeypatch.setattr(Shard, "read_ahead", lambda shard, row: asked.append(row))
        reads = iter(range(1000))
        monkeypatch.setattr(packed_module, "blocks_read", lambda: next(reads))
        with PackedDataset(write_packed(tmp_path / "packed")) as dataset:
            for _ in range(30):
                dataset.batch(torch.tensor([2, 9]))
            assert len(asked) == 60
            monkeypatch.setattr(packed_module, "blocks_read", lambda: 0)
            for _ in range(30):
                dataset.batch(torch.tensor([2, 9]))
            before = len(asked)
            dataset.batch(torch.tensor([2, 9]))
            assert len(asked) == before < 120

    @pytest.mark.skipif(not hasattr(mmap, "MADV_WILLNEED"), reason="this system takes no advice")
    def test_the_advice_covers_the_clip(self, tmp_path, monkeypatch):
        """Whole pages from that of the clip's first byte on, up to its last byte and no further."""
        with PackedDataset(write_packed(tmp_path / "packed")) as dataset:
            shard, row = dataset._shards[0], 3
            spans = []

            class Map:
                def madvise(self, advice, start, length):
                    assert advice == mmap.MADV_WILLNEED
                    spans.append((start, start + length))

            first = {name: array.ctypes.data for name, array in shard._arrays.items()}
            base = first["labels"] - 4096  # the header fills one page
            monkeypatch.setattr(shard, "_map", Map())
            shard.read_ahead(row)
            for name, (start, end) in zip(("audio", "video"), spans, strict=True):
                size = shard._arrays[name][0].nbytes
                place = first[name] - base + row * size
                assert start % mmap.PAGESIZE == 0
                assert start <= place < start + mmap.PAGESIZE
                assert end == place + size

    @pytest.mark.skipif(blocks_read() is None, reason="this system does not count reads")
    def test_reads_from_a_disk_are_counted(self, tmp_path):
        path = tmp_path / "cold"
        path.write_bytes(os.urandom(1 << 20))
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            before = blocks_read()
            file.read()
            cold = blocks_read() - before
            file.seek(0)
            before = blocks_read()
            file.read()
            warm = blocks_read() - before
        if cold == 0:
            pytest.skip("this file system keeps everything in memory, or reads where it is not counted")
        assert warm == 0


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((3, 5, 7), torch.uint8), ((2, 641), torch.int16), ((130, 29, 96, 96), torch.uint8)],
    ids=["odd", "sound", "large"],
)
def test_buffers_begin_on_a_page(shape, dtype):
    pool = BufferPool()
    first = pool.empty(shape, dtype, False)
    second = pool.empty(shape, dtype, False)
    assert (first.shape, first.dtype) == (shape, dtype)
    assert first.is_contiguous()
    assert first.data_ptr() % mmap.PAGESIZE == second.data_ptr() % mmap.PAGESIZE == 0
    first.fill_(1)
    second.fill_(2)
    assert int(first.min()) == int(first.max()) == 1
    address = first.data_ptr()
    del first
    assert pool.empty(shape, dtype, False).data_ptr() == address
