"""Settings of the talking-mouths data set: its size and speakers, how hard the clips are to read, what is said."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from avppc.checks import MAX_SEED, check_choice, check_integer, check_types
from avppc.processes import count_cores

__all__ = ["SynthConfig"]

# Sizes of the lists of words; here so that the settings can be checked without the generator's extra packages.
MAX_WORDS = 186
RESERVED_WORDS = 20

Look = Literal["mouth", "head"]


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
    test_clips: int = 0
    """Test clips in all, a multiple of the words, in place of test_clips_per_word; 0: as that says."""
    extra_clips: int = 0
    """Unlabelled training clips in OUT/_UNLABELED/train: phrases with words outside the labelled list."""
    split_by: str = "face,voice"
    """What no two splits share: "face", "voice", "face,voice", or "" (nothing)."""
    difficulty: Literal["easy", "medium", "hard"] = "medium"
    """How much pose, light, blur, noise, context and speakers vary."""
    look: Look = "mouth"
    """mouth: a mouth drawn on a flat face; head: a life-like head (extra `heads`)."""
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
        check_integer("test_clips", self.test_clips, 0, 10_000_000)
        if self.test_clips % self.words:
            raise ValueError(f"test_clips must be a multiple of the {self.words} words, got {self.test_clips}")
        if self.test_clips:  # the same data set, whichever way its size is given
            object.__setattr__(self, "test_clips_per_word", self.test_clips // self.words)
            object.__setattr__(self, "test_clips", 0)
        if not self.clips:
            raise ValueError("clips_per_word, val_clips_per_word, test_clips_per_word and extra_clips are all 0")
        for part in self.split_kinds:
            check_choice("split_by", part, ("face", "voice"))
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


# Words as news readers say them, four letters or more. The first twenty make the default set; MILLION and BILLION look
# the same on the lips, so no lip reader tells them apart.
_WORDS = """
    ABOUT BECAUSE BUSINESS CHANGE EVERYTHING FAMILIES HOSPITAL HOUSE MILLION BILLION
    MOMENT PEOPLE POLICE PRICE PRESS SOMETHING SPEND THOUGHT WEATHER WORLD
    ABSOLUTELY ACCUSED ACTION AFRICA AFTERNOON AGREEMENT ALLOWED ALWAYS AMERICA ANOTHER
    ANSWER AREAS ATTACK AUTHORITIES BANKS BEFORE BEHIND BELIEVE BENEFITS BETTER
    BETWEEN BLACK BORDER BRITAIN BROUGHT BUDGET BUILDING CAMPAIGN CAPITAL CENTRAL
    CERTAINLY CHALLENGE CHANCE CHARGES CHILDREN CLEAR CLOUD COMMUNITY COMPANY CONCERNS
    CONFERENCE CONTROL COUNCIL COUNTRY COUPLE COURT CRIME CRISIS CUSTOMERS DEATH
    DEBATE DECISION DEGREES DESCRIBED DIFFERENT DIFFICULT EARLY ECONOMY EDUCATION ELECTION
    EMERGENCY ENERGY ENGLAND ENOUGH EUROPE EVENING EVIDENCE EXAMPLE EXPECTED FIGHTING
    FIGURES FINANCIAL FOCUS FOLLOWING FOOTBALL FOREIGN FORWARD FRANCE FRIDAY FUTURE
    GENERAL GERMANY GLOBAL GOVERNMENT GROWTH HAPPENED HEALTH HEAVY HISTORY HUNDREDS
    HUMAN IMPACT IMPORTANT INDUSTRY INFLATION INQUIRY INTEREST INVESTMENT JUDGE JUSTICE
    KILLED LABOUR LEADERS LEVEL LITTLE LONDON MAJORITY MARKET MEDICAL MEETING
    MEMBERS MINISTER MONEY MORNING MURDER NATIONAL NORTHERN NUMBER OFFICE OPERATION
    OPPOSITION PARLIAMENT PATIENTS PERHAPS PERSONAL POLITICAL POTENTIAL POWER PRIVATE PROBABLY
    PROBLEM PROCESS PUBLIC QUESTION RECORD REFORM REPORT RESPONSE RUSSIA SCHOOL
    SCOTLAND SECURITY SERVICE SIGNIFICANT SOCIETY SOUTHERN SPEECH SUMMER SUNSHINE SUPPORT
    TEMPERATURES THOUSANDS TOGETHER TOMORROW UNION UNTIL VICTIMS VIOLENCE WATER WELFARE
    WESTMINSTER WINDS WITHIN WOMEN WORKERS YESTERDAY
"""
WORDS: tuple[str, ...] = tuple(_WORDS.split())

BEFORE: tuple[str, ...] = (
    "the", "and the", "this", "our", "in the", "for", "with", "of", "that", "a new", "some", "more", "is", "was",
    "very", "to", "all the", "many", "when", "they say",
)  # fmt: skip
AFTER: tuple[str, ...] = (
    "today", "is", "was", "in the", "of the", "and", "now", "again", "for you", "will", "that", "has been", "on monday",
    "at home", "we know", "but",
)  # fmt: skip


@dataclass(frozen=True)
class Difficulty:
    """Amounts of everything that varies between clips without changing what is said."""

    pose: float
    """Head position, tilt, size and their drift; 1 is about 3 pixels and 4 degrees."""
    light: float
    """Strength and slant of the directional light."""
    blur: float
    """Largest standard deviation of the camera's blur, pixels."""
    noise: float
    """Camera noise; 1 draws a standard deviation from 1 to 5 gray levels."""
    target_noise: float
    """Standard deviation of the lips' aim around a phoneme's ideal shape."""
    reverb: float
    """Probability of a reverberant room."""
    snr_db: tuple[float, float]
    """Range of the speech-to-noise ratio, dB."""
    context: float
    """Probability of words before, and likewise after, the labelled word."""
    jitter_seconds: float
    """Standard deviation of the word's centre around the clip's centre."""
    identity: float
    """Spread of faces and voices; 0 makes everyone the average person."""


# Each amount as (easy, medium, hard).
_AMOUNTS: dict[str, tuple[Any, Any, Any]] = {
    "pose": (0.4, 1.0, 1.6),
    "light": (0.5, 1.0, 1.3),
    "blur": (0.3, 1.0, 1.6),
    "noise": (0.4, 1.0, 1.8),
    "target_noise": (0.03, 0.07, 0.12),
    "reverb": (0.3, 0.5, 0.7),
    "snr_db": ((10.0, 30.0), (0.0, 20.0), (-5.0, 15.0)),
    "context": (0.0, 0.5, 1.0),
    "jitter_seconds": (0.02, 0.05, 0.08),
    "identity": (0.6, 1.0, 1.0),
}
DIFFICULTIES: dict[str, Difficulty] = {
    name: Difficulty(**{amount: values[column] for amount, values in _AMOUNTS.items()})
    for column, name in enumerate(("easy", "medium", "hard"))
}
