"""What the driver is asked of its video decoder, against a library that answers by NVIDIA's header."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess

import pytest
import torch

from avppc.data.on_the_fly import nvdec

# A decoder of H.264 (48 to 4096 pixels a side, 65536 macroblocks) and VP9 (128 x 144 to 8192 x 8000); HEVC is there but
# not supported; AV1 gives an error. The structure is written down as in cuviddec.h.
DRIVER = """
#include <string.h>
typedef struct {
  int eCodecType; int eChromaFormat; unsigned int nBitDepthMinus8; unsigned int reserved1[3];
  unsigned char bIsSupported; unsigned char nNumNVDECs; unsigned short nOutputFormatMask;
  unsigned int nMaxWidth; unsigned int nMaxHeight; unsigned int nMaxMBCount;
  unsigned short nMinWidth; unsigned short nMinHeight;
  unsigned char bIsHistogramSupported; unsigned char nCounterBitDepth; unsigned short nMaxHistogramBins;
  unsigned int reserved3[10];
} Caps;
int cuvidGetDecoderCaps(Caps* caps) {
  if (sizeof(Caps) != 88 || caps->eChromaFormat != 1 || caps->nBitDepthMinus8 != 0) return 1;
  for (int i = 0; i < 3; i++) if (caps->reserved1[i]) return 2;
  for (int i = 0; i < 10; i++) if (caps->reserved3[i]) return 3;
  caps->nNumNVDECs = 7; caps->nOutputFormatMask = 3; caps->bIsHistogramSupported = 1; caps->nMaxHistogramBins = 256;
  switch (caps->eCodecType) {
    case 4: caps->bIsSupported = 1; caps->nMinWidth = 48; caps->nMinHeight = 49; caps->nMaxWidth = 4096;
            caps->nMaxHeight = 4097; caps->nMaxMBCount = 65536; return 0;
    case 10: caps->bIsSupported = 1; caps->nMinWidth = 128; caps->nMinHeight = 144; caps->nMaxWidth = 8192;
             caps->nMaxHeight = 8000; caps->nMaxMBCount = 1000; return 0;
    case 8: return 0;
    default: return 201;
  }
}
"""
DEVICE = torch.device("cuda", 0)
COMPILER = shutil.which("cc") or shutil.which("gcc")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No answer kept from another test, and no device needed."""
    nvdec.decoder_caps.cache_clear()
    monkeypatch.setattr(nvdec, "_context_of", lambda device: contextlib.nullcontext())
    yield
    nvdec.decoder_caps.cache_clear()


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> str:
    if COMPILER is None:
        pytest.skip("needs a C compiler")
    folder = tmp_path_factory.mktemp("driver")
    (folder / "driver.c").write_text(DRIVER)
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", "driver.so", "driver.c"], cwd=folder, check=True)
    return str(folder / "driver.so")


def test_all_of_the_answer_is_read(monkeypatch, library):
    monkeypatch.setattr(nvdec, "LIBRARY", library)
    assert nvdec.decoder_caps("h264", DEVICE) == nvdec.DecoderCaps(True, 48, 49, 4096, 4097, 65536)
    assert nvdec.decoder_caps("vp9", DEVICE) == nvdec.DecoderCaps(True, 128, 144, 8192, 8000, 1000)
    assert not nvdec.decoder_caps("hevc", DEVICE).is_supported


@pytest.mark.parametrize(
    ("codec", "width", "height", "problem"),
    [
        ("h264", 256, 256, None),
        ("h264", 48, 49, None),
        ("h264", 47, 256, "wants h264 of 48 x 49 at least, this is 47 x 256"),
        ("h264", 256, 48, "wants h264 of 48 x 49 at least, this is 256 x 48"),
        ("h264", 4097, 256, "takes h264 of 4096 x 4097 at most, this is 4097 x 256"),
        ("libvpx-vp9", 256, 256, None),
        ("vp9", 256, 128, "wants vp9 of 128 x 144 at least"),
        ("vp9", 512, 512, "takes vp9 of 256000 pixels at most, this is 512 x 512"),
        ("vp9", 16 * 25, 16 * 40, None),
        ("vp9", 16 * 25 + 1, 16 * 40, "takes vp9 of 256000 pixels at most"),
        ("hevc", 256, 256, "does not decode hevc of 8 bits, 4:2:0"),
        ("libdav1d", 256, 256, r"does not tell what it can do \(cuvidGetDecoderCaps: error 201\)"),
        ("prores", 256, 256, "knows mpeg1video, .*av1, this is prores"),
    ],
)
def test_reasons(monkeypatch, library, codec, width, height, problem):
    monkeypatch.setattr(nvdec, "LIBRARY", library)
    found = nvdec.nvdec_problem(codec, width, height, DEVICE)
    if problem is None:
        assert found is None
    else:
        with pytest.raises(AssertionError, match=problem):
            raise AssertionError(found)


def test_without_the_drivers_library(monkeypatch):
    monkeypatch.setattr(nvdec, "LIBRARY", "libnone-such.so.1")
    assert "the driver's video decoder cannot be loaded (libnone-such.so.1: cannot open shared object file" in str(
        nvdec.nvdec_problem("h264", 256, 256, DEVICE)
    )


def test_a_library_without_the_function(monkeypatch):
    monkeypatch.setattr(nvdec, "LIBRARY", None)  # this program itself
    assert "no cuvidGetDecoderCaps in" in str(nvdec.nvdec_problem("h264", 256, 256, DEVICE))


def test_the_structure_is_the_headers_size():
    assert ctypes.sizeof(nvdec._Caps) == 88


@pytest.mark.skipif(
    not torch.cuda.is_available() and os.environ.get("AVPPC_REQUIRE_GPU") != "1",
    reason="the driver's own answer needs a CUDA device",
)
def test_the_driver_answers(monkeypatch):
    monkeypatch.undo()
    problem = nvdec.nvdec_problem("h264", 256, 256, DEVICE)
    if problem is not None and "cannot be loaded" in problem:
        pytest.skip(problem)
    assert problem is None
    caps = nvdec.decoder_caps("h264", DEVICE)
    assert caps.is_supported
    assert 0 < caps.min_width <= 256 <= caps.max_width
