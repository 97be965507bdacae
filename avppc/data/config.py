"""Settings of `avppc index`, `prepare` and `features`, and of the augmentation."""

from __future__ import annotations

import os
from dataclasses import KW_ONLY, dataclass, fields, replace
from pathlib import Path
from typing import Literal

from avppc.checks import MAX_SEED, check_integer, check_number, check_types, read_share
from avppc.clip import CLIP_FRAMES, LRW_COLUMNS, LRW_ROWS
from avppc.ops.log_mel.config import Framing, LogMelConfig, Padding, Preset, Window
from avppc.processes import count_cores

__all__ = ["AugmentConfig", "FeaturesConfig", "IndexConfig", "PrepareConfig", "VideoConfig"]

Layout = Literal["auto", "words", "tree"]
SplitUnit = Literal["sentence", "speaker"]
SentenceClips = Literal["rest", "all", "none"]
CropName = Literal["auto", "window", "centre", "box", "mesh", "cascade"]
TRACKED_CROPS = ("mesh", "cascade")
VideoDecoder = Literal["pyav", "torchcodec"]  # those of video/decode.py that commands offer
DecoderName = Literal["auto", VideoDecoder]
ReaderName = Literal["auto", "packed", VideoDecoder]
LoaderName = Literal[ReaderName, "dali"]  # which hands out batches for training alone
# Number and count of the processes of a launcher, and a variable that is only there where it started this one.
_LAUNCHERS = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_ID"))


@dataclass(frozen=True)
class _DataFolder:
    """What `--help` shows first."""

    data: Path
    """Folder of the videos."""


@dataclass(frozen=True, kw_only=True)
class VideoSelection:
    """Which videos are taken, which words are in them, and to which split they belong."""

    paths: Path | None = None
    """A list of the videos to take: a text file with one path below DATA a line, or a manifest as `avppc index` writes
    it. None: all below DATA."""
    layout: Layout = "auto"
    """Which folders are words. "words": all that hold videos as DATA/WORD/{train,val,test}/*; "tree": none; "auto": as
    "words", but no folder with videos further down, and no single one unless its files are named WORD_* after it. Where
    none is, "auto" takes the words inside the videos from .align files (GRID's) or Praat's .TextGrid below DATA."""
    words: Path | None = None
    """Where the words inside the videos are: a table (tab or comma) with the columns clip, start_frame and end_frame
    (frames of 1/25 s) or start_seconds and end_seconds, word, and perhaps split and speaker; or a folder of .align or
    .TextGrid files. Each word gives one labelled clip around its middle. None: as layout says."""
    words_ignore: tuple[str, ...] = ("sil", "sp")
    """What of the words' files is a pause, or is to be left out for another reason."""
    words_least: int = 1
    """Words that have fewer training examples are left out, in all splits."""
    split_by: SplitUnit = "sentence"
    """What is never in two splits: a sentence (recordings whose file has the same name) or a speaker. The words' table
    says the splits of the videos if it has them, else folders named train, val or test, else the shares below."""
    val_share: float = 0.07
    """Share of the sentences or speakers for validation: each falls to a split by its name and split_seed alone."""
    test_share: float = 0.15
    """Share of the sentences or speakers for testing."""
    val_names: tuple[str, ...] = ()
    """Sentences or speakers for validation, by name, in place of a share."""
    test_names: tuple[str, ...] = ()
    """Sentences or speakers for testing, by name, in place of a share."""
    split_seed: int = 0
    """Another number draws other splits."""
    frames: int = CLIP_FRAMES
    """Frames of a clip, of 1/25 s each; shorter videos give none."""

    def __post_init__(self) -> None:
        check_types(self)
        check_integer("frames", self.frames, 1, 10_000)
        self._check_words()

    def _check_words(self) -> None:
        if self.words is not None and self.layout == "words":
            raise ValueError("layout 'words' takes words from the folders, and words from a file: give one of them")
        check_integer("words_least", self.words_least, 1)
        check_number("val_share", self.val_share, 0.0, 1.0)
        check_number("test_share", self.test_share, 0.0, 1.0)
        if self.val_share + self.test_share > 1:
            raise ValueError(f"val_share + test_share must be at most 1, got {self.val_share} + {self.test_share}")
        check_integer("split_seed", self.split_seed, 0, MAX_SEED)
        for name in ("words_ignore", "val_names", "test_names"):
            if not all(isinstance(text, str) for text in getattr(self, name)):
                raise TypeError(f"{name} must be texts, got {getattr(self, name)!r}")
        if both := set(self.val_names) & set(self.test_names):
            raise ValueError(f"val_names and test_names must have no name in common, got {sorted(both)[0]!r} in both")


@dataclass(frozen=True)
class SharedWork(VideoSelection, _DataFolder):
    """Settings of work on videos that several processes, or machines, share."""

    _: KW_ONLY
    workers: int = 0
    """Processes; 0: one for each core."""
    shard: str = ""
    """"i/n" (0/4 to 3/4, say): do the i-th of n shares of the work, each on a machine of its own with the same OUT; the
    one that ends last writes the manifest or index. Empty: RANK / WORLD_SIZE or SLURM_PROCID / SLURM_NTASKS where the
    environment has them, else everything."""
    timeout_seconds: float = 120.0
    """A video that twice gives nothing for so long is refused, and tried again by the next command. It is the decoder's
    own processor time, or its waiting: a machine that sleeps meanwhile does no harm."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("workers", self.workers, 0, 1024)
        check_number("timeout_seconds", self.timeout_seconds, 1.0)
        self.share()

    @property
    def processes(self) -> int:
        """Worker processes to use."""
        return self.workers or count_cores()

    def share(self) -> tuple[int, int]:
        """The number of this share of the work, from 0, and the number of all shares."""
        text, origin = self.shard, "shard"
        if (launcher := self._launcher()) is not None:
            text, origin = "/".join(os.environ[name] for name in launcher[:2]), "/".join(launcher[:2])
        return read_share(origin, text)

    def end_of_share(self) -> int | None:
        """Says why this was but a share of the work, where nobody gave `shard`.

        Returns:
            4, a command's exit code, where no launcher has started this process: nobody does the other shares.
        """
        launcher = self._launcher()
        if launcher is None or self.share()[1] == 1:
            return None
        number, count, of_launcher = launcher
        share = "share {} of {}".format(*self.share())
        print(f"this was {share}, as {number} and {count} in the environment say; --shard 0/1 does all")
        return None if of_launcher in os.environ else 4

    def _launcher(self) -> tuple[str, str, str] | None:
        """The environment variables that say which share this is; None where `shard` says it, or nobody."""
        if self.shard:
            return None
        return next((names for names in _LAUNCHERS if names[0] in os.environ and names[1] in os.environ), None)


@dataclass(frozen=True)
class IndexConfig(SharedWork):
    """Lists what a folder of videos holds, without decoding: length, rates, streams, and what is wrong."""

    data: Path
    """Folder of the videos, as for `avppc prepare`."""
    out: Path | None = None
    """Manifest to write, NAME.jsonl, a JSON object a line; None: DATA/manifest.jsonl. Speakers and boxes that it has
    already are kept, and files that have not changed since are not read again."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.out is not None and self.out.suffix != ".jsonl":  # a video or a list of them, say
            raise ValueError(f"out must end in .jsonl, got {self.out}")


@dataclass(frozen=True, kw_only=True)
class CropSettings:
    """Where in a video's picture the mouth is."""

    crop: CropName = "auto"
    """What is stored as 96 x 96 pixels. "window": crop_rows and crop_columns; "centre": the middle square; "auto": the
    window for 256 x 256 video (LRW's), the middle square for all other; "box": each video's own box, from the manifest;
    "mesh" and "cascade": the mouth, found and followed by the face mesh or OpenCV's cascade (extras)."""
    crop_rows: tuple[int, int] = LRW_ROWS
    """First row of the window and the one after its last, pixels of the picture as it is shown."""
    crop_columns: tuple[int, int] = LRW_COLUMNS
    """First column of the window and the one after its last, pixels of the picture as it is shown."""
    centre_fraction: float = 1.0
    """Side of the middle square as a share of the frame's shorter side."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("crop_rows", "crop_columns"):
            pair = getattr(self, name)
            if not isinstance(pair, tuple) or len(pair) != 2:
                raise ValueError(f"{name} must be two numbers, got {pair!r}")
            check_integer(f"{name}, first", pair[0], 0)
            check_integer(f"{name}, second", pair[1], pair[0] + 1)
        check_number("centre_fraction", self.centre_fraction, 0.01, 1.0)


@dataclass(frozen=True, kw_only=True)
class CutSettings:
    """Which clips a video gives."""

    stride: int = CLIP_FRAMES
    """Unlabelled videos are cut into clips that start this many frames apart; 0: only the clip at the start. A labelled
    video gives one clip, its first frames; one with words inside it a clip a word, and what sentence_clips says."""
    word_context: int | None = None
    """How many frames a word's clip shows and lets hear before and after the word; beyond them the nearest frame is
    held, and the sound is silent. None: all that fits into the clip, neighbouring words too."""
    sentence_clips: SentenceClips = "rest"
    """Clips without label that training videos with words give beside those of the words, stride frames apart. "rest":
    where no word's clip lies; "all": from the whole video; "none": none."""

    def __post_init__(self) -> None:
        check_types(self)
        check_integer("stride", self.stride, 0)
        if self.word_context is not None:
            check_integer("word_context", self.word_context, 0, 10_000)


@dataclass(frozen=True)
class PrepareConfig(CropSettings, CutSettings, SharedWork):
    """Decodes videos once into packed shards; after an interruption the same command goes on where it stopped."""

    data: Path
    """Folder of the videos: DATA/WORD/{train,val,test}/*.mp4 as in LRW (labelled), DATA/_UNLABELED/** or any other tree
    of videos (without labels; folders named train, val or test set the split). A DATA/manifest.jsonl may give the
    speaker or the mouth's box of each; videos that `avppc index` found to be of no use are left out, and those
    that have changed since are refused."""
    out: Path
    """Folder of the packed data set."""
    decoder: DecoderName = "auto"
    """"pyav" reads the luma where FFmpeg left it; "torchcodec" (an extra) computes it from colours, which may differ by
    a few units, and refuses more files; "auto": PyAV, which is the quicker one on a CPU."""
    clips_per_shard: int = 512
    """The most clips of a shard; each process holds one shard in memory (0.3 MB a clip of 29 frames)."""
    upload: str = ""
    """Where to copy the finished set, if anywhere: an address that fsspec knows, such as s3://BUCKET/SET.
    Training takes the address for its --data."""
    overwrite: bool = False
    """Replace a data set in OUT that was made from another folder or with other settings; otherwise it is refused."""

    def __post_init__(self) -> None:
        for part in (SharedWork, CutSettings, CropSettings):
            part.__post_init__(self)
        check_integer("clips_per_shard", self.clips_per_shard, 1, 1_000_000)
        if self.backend != "pyav" and self.crop in TRACKED_CROPS:
            raise ValueError(f"decoder {self.decoder!r} follows no mouths, crop is {self.crop!r}: give --decoder pyav")

    @property
    def backend(self) -> VideoDecoder:
        """What decodes."""
        return "pyav" if self.decoder == "auto" else self.decoder


@dataclass(frozen=True, kw_only=True)
class VideoConfig(CropSettings, CutSettings, VideoSelection):
    """Which clips are cut out of videos that are not packed: those of `avppc prepare` with the same settings."""

    def __post_init__(self) -> None:
        for part in (VideoSelection, CutSettings, CropSettings):
            part.__post_init__(self)


_OF_WORDS = {"words", "words_ignore", "words_least", "word_context", "sentence_clips"}
_OF_SPLITS = {"split_by", "split_seed", "val_share", "val_names", "test_share", "test_names"}
WORD_SETTINGS = {each.name: each.default for each in fields(PrepareConfig) if each.name in _OF_WORDS | _OF_SPLITS}
"""The settings that are about words inside longer videos alone, and their defaults."""


@dataclass(frozen=True)
class AugmentConfig:
    """How the training clips are varied, each anew in each step.

    Past and future of a clip are varied apart, but for pictures that pass through the encoder once for both, as local
    motion's do: they keep one crop and one light.
    """

    shift_pixels: int = 6
    """Largest shift, up or down and left or right, of the square that is cut out of the stored picture, in its pixels;
    the square stays inside the picture."""
    flip_probability: float = 0.5
    """Probability of mirroring left and right."""
    gamma_range: float = 0.0
    """Exponents of the luma are drawn from 1/(1+x) to 1+x; 0 leaves it as it is."""
    contrast_range: float = 0.0
    """Contrast factors are drawn from 1-x to 1+x."""
    brightness_range: float = 0.0
    """Luma offsets are drawn from -x to x, on the scale of 0 to 1."""
    pixel_noise: float = 0.0
    """Largest standard deviation of the noise added to the luma, on the scale of 0 to 1."""
    time_jitter_frames: int = 2
    """An element is cut this many frames shorter, from a start drawn at random; sound follows the picture."""
    time_mask_frames: int = 0
    """Up to this many consecutive frames are replaced by the element's mean frame."""
    mel_shift_frames: int = 2
    """Largest circular shift of the log-mel features, in mel frames of 10 ms."""
    mel_noise_floor: bool = True
    """Adds a noise floor with a tilt to the log-mel features, at a level from 8 to 1 (in ln) below their mean."""
    mel_mask_bands: int = 4
    """Up to this many neighbouring mel bands are replaced by the mean."""

    def __post_init__(self) -> None:
        check_types(self)
        check_integer("shift_pixels", self.shift_pixels, 0)
        check_number("flip_probability", self.flip_probability, 0, 1)
        check_number("gamma_range", self.gamma_range, 0)
        check_number("contrast_range", self.contrast_range, 0, 1)
        check_number("brightness_range", self.brightness_range, 0, 1)
        check_number("pixel_noise", self.pixel_noise, 0, 1)
        check_integer("time_jitter_frames", self.time_jitter_frames, 0)
        check_integer("time_mask_frames", self.time_mask_frames, 0)
        check_integer("mel_shift_frames", self.mel_shift_frames, 0)
        check_integer("mel_mask_bands", self.mel_mask_bands, 0)


@dataclass(frozen=True)
class FeaturesConfig:
    """Log-mel features or MFCC of the sound of one file."""

    source: Path
    """The file: wav, flac, mp3, ogg, NIST SPHERE, mp4, mkv, ...; its first audio stream is mixed to mono at 16 kHz. It
    may be given first, without the flag: avppc features FILE."""
    preset: Preset = "torchaudio"
    """Whose features: torchaudio, librosa, whisper or kaldi."""
    mfcc: int = 0
    """Cepstral coefficients to give instead of the 80 bands, 1 to 80; 0: the bands."""
    window: Window | None = None
    """Another window than the preset's. LogMelConfig says what this and the next five mean."""
    window_samples: int | None = None
    """Another length of the window, at most fft_size."""
    fft_size: int | None = None
    """Another length of the Fourier transform, even, 2 to 8192."""
    hop_samples: int | None = None
    """Another distance between frames."""
    framing: Framing | None = None
    """Other places of the frames."""
    padding: Padding | None = None
    """Another padding at the ends."""
    plot: Path | None = None
    """Where to write a picture of the waveform and the features: .png, .svg or .pdf."""
    out: Path | None = None
    """Where to write the features: .npy, float32 [frames, features]."""

    def __post_init__(self) -> None:
        check_types(self)
        _ = self.settings  # checks what changes the preset
        for name, allowed in (("plot", (".png", ".svg", ".pdf")), ("out", (".npy",))):
            path = getattr(self, name)
            if path is not None and path.suffix not in allowed:
                raise ValueError(f"{name} must end in {' or '.join(allowed)}, got {path}")

    @property
    def settings(self) -> LogMelConfig:
        """The preset, with the settings that were given in place of its own."""
        names = ("window", "window_samples", "fft_size", "hop_samples", "framing", "padding")
        changes = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return replace(LogMelConfig.preset(self.preset), mfcc=self.mfcc, **changes)
