"""Settings of `avppc export`, `embed` and `read`: the encoder for other programs, its features, a video read by it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, get_args

from avppc.checks import MAX_THREADS, check_choice, check_choices, check_integer, check_number, check_types
from avppc.clip import SPLITS, SplitName
from avppc.data.config import CropName, CropSettings, ReaderName, VideoConfig
from avppc.models.encoder_file import check_repository
from avppc.train.config import Precision

__all__ = ["EmbedConfig", "ExportConfig", "ReadConfig"]

FormatName = Literal["safetensors", "torch-export", "onnx", "hub"]
FORMATS: tuple[FormatName, ...] = get_args(FormatName)
EMBEDDING_SUFFIXES = (".npz", ".parquet")


@dataclass(frozen=True)
class ExportConfig:
    """Writes a run's visual encoder for other programs, with a model card; each file is checked against torch."""

    FORMER_NAMES: ClassVar[dict[str, str]] = {"format": "formats"}
    """Fields by other names that files and flags may give them."""

    run: Path
    """Directory of a finished pretraining run."""
    out: Path
    """Directory to make: encoder.safetensors, encoder.pt2, encoder.onnx, encoder.json and README.md, the model card."""
    formats: tuple[FormatName, ...] = ("safetensors", "torch-export", "onnx")
    """"safetensors" for `avppc.load_encoder`; "torch-export" for torch alone; "onnx" for ONNX runtimes (needs the extra
    [export]); "hub" for the Hugging Face Hub: config.json and model.safetensors."""
    push: str = ""
    """USER/NAME, a repository on the Hugging Face Hub to which the directory is uploaded (needs the extra [hub])."""
    private: bool = False
    """Makes that repository private where there is none yet."""

    def __post_init__(self) -> None:
        check_types(self)
        check_choices("formats", self.formats, FORMATS)
        if self.push:
            check_repository("push", self.push)
            if "hub" not in self.formats:
                raise ValueError(f"push needs the format 'hub', got formats={self.formats}")
        elif self.private:
            raise ValueError("private is about the repository of push, and none is given")


@dataclass(frozen=True)
class EmbedConfig:
    """Writes the encoder's features of every clip of a data set into one file, for other programs."""

    data: Path
    """Directory (or address) of packed shards, as `avppc prepare` writes it; or a folder of videos."""
    encoder: Path
    """Directory of a finished run or of an export, or an encoder file."""
    out: Path
    """File to write: NAME.npz, or NAME.parquet (needs the extra [parquet]). Clips that could not be embedded are listed
    beside it, in NAME.npz.skipped.jsonl."""
    loader: ReaderName = "auto"
    """How clips are read: "packed" shards; or videos by "pyav" or "torchcodec"; "auto": as they lie there."""
    videos: VideoConfig = field(default_factory=VideoConfig)
    """How clips are cut out of videos; unless one of these is given, as those of the run, where encoder is one."""
    workers: int = 0
    """Processes that decode videos; 0: one for each core."""
    splits: tuple[SplitName, ...] = ()
    """Splits to take; if none is named, all that there are."""
    per: Literal["clip", "frame"] = "clip"
    """"clip": one vector a clip, the mean over its frames; "frame": one vector a frame."""
    batch_size: int = 64
    """Clips that the encoder sees at once."""
    verify_data: bool = True
    """Checks each shard's checksum; the clips of a damaged shard are skipped."""
    precision: Precision = "fp32"
    """Arithmetic of the encoder: "fp32", "bf16", or "auto", bf16 where the hardware is quick at it."""
    device: str = "auto"
    """"cpu", "cuda", "cuda:1"...; "auto" takes a GPU where there is one."""
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.out.suffix not in EMBEDDING_SUFFIXES:
            raise ValueError(f"out must end in {' or '.join(EMBEDDING_SUFFIXES)}, got {str(self.out)!r}")
        for split in self.splits:
            check_choice("splits", split, SPLITS)
        check_integer("workers", self.workers, 0, 1024)
        check_integer("batch_size", self.batch_size, 1)
        check_integer("threads", self.threads, 0, MAX_THREADS)


@dataclass(frozen=True, kw_only=True)
class ReadConfig(CropSettings):
    """Reads the lips in one video: a page with the video, the likeliest words over time, and the sound's offset."""

    video: Path
    """The video, of any kind that `avppc prepare` takes; it needs no sound. It may come first, without the flag."""
    run: Path
    """Directory of a run that `avppc evaluate` has measured: of the readers that are kept there, the one that reads
    most validation clips is taken; or one of them, RUN/evaluation/reader-*.safetensors."""
    out: Path | None = None
    """The page, NAME.html; by default the video's name, in the folder in which the command is given."""
    json: Path | None = None
    """Where to write the same as JSON, if anywhere: NAME.json."""
    words: Path | None = None
    """What is said, to be shown beside it and compared: a table, an .align or a .TextGrid file, as for `avppc prepare`;
    of a table the rows whose clip is called as the video."""
    crop: CropName = "auto"
    """Where the mouth is, as for `avppc prepare`; "auto": as the clips were cropped that the reader was trained on."""
    stride_frames: int = 1
    """Frames of 1/25 s between two looks at the video, each as long as the reader's training clips."""
    video_megabytes: float = 40.0
    """Megabytes that the video in the page may have, about; longer ones are compressed more."""
    precision: Precision = "auto"
    """Arithmetic of the encoders."""
    device: str = "auto"
    """"cpu", "cuda", "cuda:1"...; "auto" takes a GPU where there is one."""
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, endings in (("out", (".html", ".htm")), ("json", (".json",))):
            path = getattr(self, name)
            if path is not None and path.suffix not in endings:
                raise ValueError(f"{name} must end in {' or '.join(endings)}, got {path}")
        check_integer("stride_frames", self.stride_frames, 1, 1000)
        check_number("video_megabytes", self.video_megabytes, 0.1, 1000)
        check_integer("threads", self.threads, 0, MAX_THREADS)
