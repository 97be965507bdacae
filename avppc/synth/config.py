"""Settings of the talking-mouths data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from avppc.checks import MAX_SEED, check_choice, check_integer, check_types
from avppc.processes_cores import count_cores

# Sizes of the lists of words; here so that the settings can be checked without the generator's extra packages.
MAX_WORDS = 186
RESERVED_WORDS = 20


@dataclass(frozen=True)
class SynthConfig:
    """A data set of synthetic talking mouths in LRW's layout: OUT/WORD/{train,val,test}/WORD_00001.mp4."""

    out: Path
    """Folder of the data set; made if it is missing, continued if the same settings began it."""
    words: int = 20
    """Labelled words, from the top of the list of 186; with extra_clips at most 166."""
    clips_per_word: int = 100
    """Training clips of each word."""
    val_clips_per_word: int = 10
    """Validation clips of each word."""
    test_clips_per_word: int = 20
    """Test clips of each word."""
    extra_clips: int = 0
    """Unlabelled training clips in OUT/_UNLABELED/train: phrases with words outside the labelled list."""
    split_by: str = "face,voice"
    """What no two splits share: "face", "voice", "face,voice", or "" (nothing)."""
    difficulty: Literal["easy", "medium", "hard"] = "medium"
    """How much pose, light, blur, noise, context and speakers vary."""
    train_speakers: int = 150
    """Speakers of the training split."""
    val_speakers: int = 10
    """Speakers of the validation split."""
    test_speakers: int = 40
    """Speakers of the test split."""
    seed: int = 0
    """Seed of everything that is drawn, except the speech synthesiser's own variation."""
    workers: int = 0
    """Processes; 0: one for each core."""
    overwrite: bool = False
    """Delete a data set of other settings that is in the way; otherwise it is an error."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("clips_per_word", "val_clips_per_word", "test_clips_per_word", "extra_clips"):
            check_integer(name, getattr(self, name), 0, 99_999)
        check_integer("words", self.words, 1, MAX_WORDS - (RESERVED_WORDS if self.extra_clips else 0))
        if not self.clips:
            raise ValueError("clips_per_word, val_clips_per_word, test_clips_per_word and extra_clips are all 0")
        for part in self.split_kinds:
            check_choice("split_by", part, ("face", "voice"))
        check_choice("difficulty", self.difficulty, ("easy", "medium", "hard"))
        for name in ("train_speakers", "val_speakers", "test_speakers"):
            check_integer(name, getattr(self, name), 1, 1_000_000)
        check_integer("seed", self.seed, 0, MAX_SEED)
        check_integer("workers", self.workers, 0, 4096)

    @property
    def split_kinds(self) -> tuple[str, ...]:
        """The parts of split_by."""
        return tuple(sorted({part.strip() for part in self.split_by.split(",") if part.strip()}))

    @property
    def clips(self) -> int:
        """Clips of the whole data set."""
        a_word = self.clips_per_word + self.val_clips_per_word + self.test_clips_per_word
        return self.words * a_word + self.extra_clips

    @property
    def worker_processes(self) -> int:
        """Processes that make clips."""
        return self.workers or count_cores()
