"""What the GPU's video decoder can do, asked of the driver itself (cuvidGetDecoderCaps)."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

LIBRARY = "libnvcuvid.so.1"
# The driver's numbers of codecs (cudaVideoCodec), by FFmpeg's names.
_CODECS = {"mpeg1video": 0, "mpeg2video": 1, "mpeg4": 2, "vc1": 3, "h264": 4, "hevc": 8, "vp8": 9, "vp9": 10, "av1": 11}
_DECODERS = {"libvpx": "vp8", "libvpx-vp9": "vp9", "libdav1d": "av1", "wmv3": "vc1"}  # FFmpeg's, of other names
_CHROMA_420 = 1  # cudaVideoChromaFormat
_MACROBLOCK_PIXELS = 256


class _Caps(ctypes.Structure):
    """CUVIDDECODECAPS of NVIDIA's cuviddec.h; fields that older drivers do not fill in were reserved then."""

    _fields_ = (
        ("codec", ctypes.c_int),
        ("chroma_format", ctypes.c_int),
        ("bit_depth_minus_8", ctypes.c_uint),
        ("_reserved1", ctypes.c_uint * 3),
        ("is_supported", ctypes.c_ubyte),
        ("decoders", ctypes.c_ubyte),
        ("output_formats", ctypes.c_ushort),
        ("max_width", ctypes.c_uint),
        ("max_height", ctypes.c_uint),
        ("max_macroblocks", ctypes.c_uint),
        ("min_width", ctypes.c_ushort),
        ("min_height", ctypes.c_ushort),
        ("_histograms", ctypes.c_ushort * 2),
        ("_reserved3", ctypes.c_uint * 10),
    )


@dataclass(frozen=True)
class DecoderCaps:
    """Limits of the GPU's decoder for one codec, 8 bits and 4:2:0; sizes in pixels."""

    is_supported: bool
    min_width: int
    min_height: int
    max_width: int
    max_height: int
    max_macroblocks: int
    """Most blocks of 16 x 16."""


def nvdec_problem(codec: str, width: int, height: int, device: torch.device) -> str | None:
    """Why the GPU's decoder does not take 8-bit 4:2:0 video of a codec (FFmpeg's name) and size; None where it does."""
    name = _DECODERS.get(codec, codec)
    if name not in _CODECS:
        return f"the GPU's decoder knows {', '.join(_CODECS)}, this is {codec}"
    try:
        caps = decoder_caps(name, device)
    except OSError as error:
        return str(error)
    if not caps.is_supported:
        return f"the GPU's decoder does not decode {name} of 8 bits, 4:2:0"
    this = f"this is {width} x {height}"
    if width < caps.min_width or height < caps.min_height:
        return f"the GPU's decoder wants {name} of {caps.min_width} x {caps.min_height} at least, {this}"
    if width > caps.max_width or height > caps.max_height:
        return f"the GPU's decoder takes {name} of {caps.max_width} x {caps.max_height} at most, {this}"
    blocks = -(-width // 16) * -(-height // 16)
    if blocks > caps.max_macroblocks:
        most = caps.max_macroblocks * _MACROBLOCK_PIXELS
        return f"the GPU's decoder takes {name} of {most} pixels at most, {this}"
    return None


@functools.cache
def decoder_caps(codec: str, device: torch.device) -> DecoderCaps:
    """What the GPU's driver says that it can decode of one codec.

    Raises:
        OSError: the driver's library is not there, or does not answer.
    """
    try:
        library: Any = ctypes.CDLL(LIBRARY)
        ask = library.cuvidGetDecoderCaps
    except OSError as error:
        raise OSError(f"the driver's video decoder cannot be loaded ({error})") from error
    except AttributeError as error:
        raise OSError(
            f"the driver's video decoder is too old to be asked: no cuvidGetDecoderCaps in {LIBRARY}"
        ) from error
    ask.restype, ask.argtypes = ctypes.c_int, [ctypes.POINTER(_Caps)]
    caps = _Caps(codec=_CODECS[codec], chroma_format=_CHROMA_420)
    with _context_of(device):
        status = ask(ctypes.byref(caps))
    if status != 0:
        raise OSError(f"the driver's video decoder does not tell what it can do (cuvidGetDecoderCaps: error {status})")
    sides = (caps.min_width, caps.min_height, caps.max_width, caps.max_height)
    return DecoderCaps(bool(caps.is_supported), *sides, caps.max_macroblocks)


@contextlib.contextmanager
def _context_of(device: torch.device) -> Iterator[None]:
    """Makes the device's context current in this thread: the driver answers for that device."""
    with torch.cuda.device(device):
        torch.empty(1, device=device)  # makes the context where there is none yet
        yield
