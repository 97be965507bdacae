"""Sound files as recorders and corpora have them."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from make_videos import beep_with_clicks, click_seconds
from numpy.typing import NDArray
from ogg_pages import add_empty_packets

from avppc.data.features import read_sound
from avppc.data.video.source import DecodeError

SAMPLES = np.arange(-4000, 4000, dtype=np.int16)
FORMAT = struct.pack("<HHIIHH", 1, 1, 16_000, 32_000, 2, 16)


def chunk(name: bytes, content: bytes, said: int | None = None) -> bytes:
    return name + struct.pack("<I", len(content) if said is None else said) + content


def wave_file(*chunks: bytes, kind: bytes = b"RIFF", said: int | None = None) -> bytes:
    return chunk(kind, b"WAVE" + chunk(b"fmt ", FORMAT) + b"".join(chunks), said)


class TestWave:
    @pytest.mark.parametrize("said", [44 + 16_000, 0, 0xFFFFFFFF, 1_000_000], ids=str)
    def test_a_wrong_length_of_the_whole_is_not_asked(self, tmp_path, said):
        """RecordRTC writes 44 plus the bytes of the samples, 8 too many."""
        path = tmp_path / "a.wav"
        path.write_bytes(wave_file(chunk(b"data", SAMPLES.tobytes()), said=said))
        assert np.array_equal(read_sound(path), SAMPLES)

    @pytest.mark.parametrize("before", [b"", chunk(b"LIST", b"INFOISFT" + bytes(5)) + b"\0"], ids=["plain", "odd-LIST"])
    def test_samples_cut_short_are_told(self, tmp_path, before):
        path = tmp_path / "a.wav"
        path.write_bytes(wave_file(before, chunk(b"data", SAMPLES.tobytes()))[:-1000])
        with pytest.raises(DecodeError, match=r"a\.wav: truncated: 1000 bytes are missing"):
            read_sound(path)

    def test_what_follows_the_samples_may_be_lost(self, tmp_path):
        path = tmp_path / "a.wav"
        path.write_bytes(wave_file(chunk(b"data", SAMPLES.tobytes()), chunk(b"LIST", bytes(100)))[:-50])
        assert np.array_equal(read_sound(path), SAMPLES)

    def test_64_bit_lengths(self, tmp_path):
        path = tmp_path / "a.wav"
        lengths = chunk(b"ds64", struct.pack("<QQQI", 0, 16_000, 8_000, 0))
        data = chunk(b"data", SAMPLES.tobytes(), said=0xFFFFFFFF)
        whole = chunk(b"RF64", b"WAVE" + lengths + chunk(b"fmt ", FORMAT) + data, said=0xFFFFFFFF)
        path.write_bytes(whole)
        assert np.array_equal(read_sound(path), SAMPLES)
        path.write_bytes(whole[:-100])
        with pytest.raises(DecodeError, match="100 bytes are missing"):
            read_sound(path)


def test_nist_sphere(tmp_path):
    """TIMIT's files, which are named .WAV."""
    fields = ["channel_count -i 1", "sample_count -i 8000", "sample_rate -i 16000", "sample_n_bytes -i 2",
              "sample_byte_format -s2 01", "sample_sig_bits -i 16"]  # fmt: skip
    header = "\n".join(["NIST_1A", "   1024", *fields, "end_head", ""]).ljust(1024).encode()
    path = tmp_path / "SA1.WAV"
    path.write_bytes(header + SAMPLES.tobytes())
    assert np.array_equal(read_sound(path), SAMPLES)


def write_sound(path: Path, codec: str, samples: NDArray[np.int16], rate: int = 16_000, layout: str = "mono") -> Path:
    """samples: [S] at 16 kHz or [S * rate / 16000] at another rate; written to each channel."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout=layout, options={"strict": "experimental"})
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        resampler = av.AudioResampler(stream.format.name, layout, rate)
        for converted in [*resampler.resample(frame), *resampler.resample(None), None]:
            container.mux(stream.encode(converted))
    return path


@pytest.mark.parametrize(
    ("name", "codec", "rate"),
    [("a.tta", "tta", 16_000), ("a.wv", "wavpack", 16_000), ("a.ac3", "ac3", 48_000), ("a.eac3", "eac3", 48_000),
     ("a.amr", "libopencore_amrnb", 8_000), ("a.voc", "pcm_u8", 16_000)],
)  # fmt: skip
def test_other_formats(tmp_path, name, codec, rate):
    samples = beep_with_clicks(rate, rate, [])
    found = read_sound(write_sound(tmp_path / name, codec, samples, rate))
    assert abs(len(found) - 16_000) < 1000
    assert np.abs(found).max() > 300


def test_unknown_formats_are_named_as_such(tmp_path):
    path = tmp_path / "a.xyz"
    path.write_bytes(b"#!AMS" * 1000)
    with pytest.raises(DecodeError, match=r"neither sound nor video of a known format \(wav,"):
        read_sound(path)


def test_ogg_with_packets_without_content(tmp_path):
    path = write_sound(tmp_path / "a.ogg", "vorbis", beep_with_clicks(64_000, 16_000, [3.0]), layout="stereo")
    whole = read_sound(path)
    assert add_empty_packets(path, header_pages=2) > 0
    assert np.array_equal(read_sound(path)[: len(whole)], whole)
    assert click_seconds(whole) == pytest.approx(3.0, abs=0.003)


@pytest.mark.parametrize(
    ("name", "codec"), [("a.wma", "wmav2"), ("a.wav", "adpcm_ima_wav"), ("b.wav", "adpcm_ms")], ids=lambda value: value
)
def test_a_last_frame_without_a_time_stamp_follows_the_others(tmp_path, name, codec):
    rate = 44_100
    with av.open(str(tmp_path / name), "w") as output:
        stream = output.add_stream(codec, rate=rate, layout="mono")
        if codec == "wmav2":
            stream.bit_rate = 64_000
        sound = av.AudioFrame.from_ndarray(beep_with_clicks(rate, rate, (0.9,))[None], format="s16", layout="mono")
        sound.sample_rate, sound.time_base, sound.pts = rate, Fraction(1, rate), 0
        output.mux([*stream.encode(sound), *stream.encode(None)])
    samples = read_sound(tmp_path / name)
    assert len(samples) / 16_000 == pytest.approx(1.0, abs=2048 / rate)
    delay = 2048 / rate if codec == "wmav2" else 0  # its first block only prepares the second one
    assert click_seconds(samples) == pytest.approx(0.9 - delay, abs=0.003)
