"""What `avppc read` has read of a video, and its page, with the video in it."""

from __future__ import annotations

import base64
import hashlib
import math
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup
from numpy.typing import NDArray

from avppc._version import __version__
from avppc.clip import VIDEO_FPS
from avppc.data.video.crop import Crop
from avppc.data.video.track import MouthTrack
from avppc.evaluate.diagnose.check_sync import Offset
from avppc.evaluate.lipreading.heads import LipReader
from avppc.evaluate.media import Picture, make_film
from avppc.evaluate.record import PALETTE, changed_settings, command_line, page_environment
from avppc.export.config import ReadConfig
from avppc.files import replace_file, temporary_place
from avppc.printing import ProgressBar

SHOWN = 5
"""Words of each window that are shown."""
GENERATOR = "avppc read"
"""By this a page is known for one of ours."""
_SCRIPT = Path(__file__).with_name("read.js")
_SURE = 0.5  # probability below which a word is shown in a paler colour
_IN_SYNC_MS = 80  # lips move a little before they are heard
_COPY_BYTES = 3 << 18  # a multiple of 3: base64 in pieces is base64 of the whole


@dataclass(frozen=True, eq=False)
class Windows:
    """The likeliest words of all windows of a video."""

    starts: NDArray[np.int64]
    """[n] first frame of each, of 1/25 s."""
    words: NDArray[np.int32]
    """[n, K] numbers of its likeliest words, the likeliest first."""
    probabilities: NDArray[np.float32]
    """[n, K] theirs."""
    frames: int
    """Length of each."""
    stride: int
    """Frames from one to the next, where none is refused."""
    refused: list[tuple[float, float, str]]
    """Middle of the first and of the last window in a row that could not be read, seconds, and why."""
    damage: str
    """Why nothing is read of what comes after the last window; "" if that is the video's end."""
    notes: list[str]
    """What was converted."""

    @property
    def seconds(self) -> NDArray[np.float64]:
        """[n] the windows' middles."""
        return (self.starts + self.frames / 2) / VIDEO_FPS


@dataclass(frozen=True)
class SpokenWord:
    """A word that was read."""

    word: str
    start_seconds: float
    """When it becomes the likeliest word."""
    end_seconds: float
    """When another one does."""
    seconds: float
    """When it is most probable."""
    probability: float
    """Then, 0 to 1."""


@dataclass(frozen=True)
class TrueWord:
    """A word that is said, as somebody has written it down."""

    word: str
    start_seconds: float
    end_seconds: float
    known: bool
    """Whether it is in the vocabulary."""
    found: bool
    """Whether it is among the words that were read, most probable at a moment within it, or nearly so."""
    at_middle: str
    """The likeliest word at its middle; "" where nothing was read within _NEAR_SECONDS of it."""

    @property
    def right_at_middle(self) -> bool:
        """Whether that is this word."""
        return self.at_middle == self.word


@dataclass(frozen=True, eq=False)
class Reading:
    """All that is said of a video."""

    config: ReadConfig
    reader: LipReader
    picture: Picture
    crop: Crop
    crop_name: str
    """How the mouth's place was found."""
    windows: Windows
    words: list[SpokenWord]
    truth: list[TrueWord]
    """What is said, where a file was given that tells."""
    offset: Offset | None
    offset_problem: str
    """Why there is no offset."""


def as_json(reading: Reading) -> dict[str, Any]:
    """All that was read, as JSON values: times in seconds of the video, probabilities from 0 to 1."""
    windows, info = reading.windows, reading.reader.info
    return {
        "video": str(reading.config.video),
        "seconds": reading.picture.seconds,
        "text": " ".join(item.word for item in reading.words),
        "words": [asdict(item) for item in reading.words],
        "windows": [
            {
                "seconds": round(float(seconds), 4),
                "words": {
                    reading.reader.words[word]: round(float(share), 4)
                    for word, share in zip(words[:SHOWN], shares[:SHOWN], strict=True)
                },
            }
            for seconds, words, shares in zip(windows.seconds, windows.words, windows.probabilities, strict=True)
        ],
        "truth": _truth_json(reading),
        "window_frames": windows.frames,
        "refused": [
            {"start_seconds": first, "end_seconds": last, "reason": reason} for first, last, reason in windows.refused
        ],
        "damage": windows.damage or None,
        "notes": windows.notes,
        "offset": _offset_json(reading),
        "reader": {
            "row": info.row,
            "labels_per_word": info.labels_per_word,
            "head": info.head,
            "val_wcr": info.val_wcr,
            "test_wcr": info.test_wcr,
            "encoder_sha256": info.encoder_sha256,
            "words": list(info.words),
        },
    }


def _truth_json(reading: Reading) -> dict[str, Any] | None:
    """The words that are said, and the shares of them that are read; None where nobody tells."""
    truth = reading.truth
    if not truth:
        return None
    return {
        "file": str(reading.config.words),
        "words_found": sum(item.found for item in truth) / len(truth),
        "right_at_middle": sum(item.right_at_middle for item in truth) / len(truth),
        "added": len(reading.words) - sum(item.found for item in truth),
        "words": [{**asdict(item), "right_at_middle": item.right_at_middle} for item in truth],
    }


def _offset_json(reading: Reading) -> dict[str, Any]:
    """The offset of the sound, positive where it is late; or why there is none."""
    if reading.offset is None:
        return {"late_ms": None, "problem": reading.offset_problem}
    overall = reading.offset.overall
    late = [None if math.isnan(value) else round(value, 1) for value in reading.offset.late_ms.tolist()]
    return {
        "late_ms": round(overall.offset_ms, 1) if overall.is_clear else None,
        "problem": None if overall.is_clear else "sound and picture have too little to do with each other",
        "seconds": [round(value, 3) for value in reading.offset.seconds.tolist()],
        "late_ms_at": late,
    }


def write_page(reading: Reading, out: Path) -> None:
    """Writes the page. The video in it is copied piece by piece."""
    config, picture = reading.config, reading.picture
    # What a command leaves here that is killed, the next one removes.
    with temporary_place(Path(tempfile.gettempdir()) / "avppc-read") as folder:
        folder.mkdir(mode=0o700)
        film = folder / "film"
        with ProgressBar("video of the page", int(picture.seconds), "seconds") as progress:
            most_bytes = int(config.video_megabytes * 1e6)
            media_type = make_film(config.video, picture, film, most_bytes, _whole_steps(progress.advance))
        marker = hashlib.sha256(str(film).encode()).hexdigest()
        before, _, after = _render(reading, media_type, marker).partition(marker)
        with replace_file(out) as temporary, temporary.open("xb") as page, film.open("rb") as source:
            page.write(before.encode())
            while piece := source.read(_COPY_BYTES):
                page.write(base64.b64encode(piece))
            page.write(after.encode())


def _render(reading: Reading, media_type: str, marker: str) -> str:
    """The page's HTML, with `marker` in the place of the video."""
    data = _page_data(reading)
    script = _SCRIPT.read_text(encoding="utf-8")
    environment = page_environment(Path(__file__).parent)
    environment.filters["percent"] = lambda share: f"{100 * share:.{0 if share >= 0.1 else 1}f}\u00a0%"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("read.html.jinja").render(
        generator=GENERATOR,
        version=__version__,
        script=Markup(script),
        script_hash=f"sha256-{digest}",
        palette=PALETTE,
        name=reading.config.video.name,
        marker=marker,
        media_type=media_type,
        width=reading.picture.width,
        height=reading.picture.height,
        seconds=reading.picture.seconds,
        found=reading.words,
        found_with_others=[(item, _others(reading, item)) for item in reading.words],
        sure=_SURE,
        truth=reading.truth,
        truth_name=reading.config.words.name if reading.config.words else "",
        offset="late" in data,
        notices=_notices(reading),
        key_numbers=_key_numbers(reading),
        refused=reading.windows.refused,
        about=_about(reading),
        command=command_line("read", _settings(reading.config)),
        data=htmlsafe_json_dumps(data, separators=(",", ":"), ensure_ascii=False),
    )


def _whole_steps(advance: Callable[[int], None]) -> Callable[[float], None]:
    """Counts parts, and calls with whole numbers."""
    rest = 0.0

    def add(part: float) -> None:
        nonlocal rest
        rest += part
        if rest >= 1:
            advance(int(rest))
            rest -= int(rest)

    return add


def _others(reading: Reading, item: SpokenWord) -> list[tuple[str, float]]:
    """The likeliest words at the moment of a word that was read, without it, with their probabilities."""
    place = int(np.abs(reading.windows.seconds - item.seconds).argmin())
    pairs = zip(reading.windows.words[place][:SHOWN], reading.windows.probabilities[place][:SHOWN], strict=True)
    named = [(reading.reader.words[word], float(share)) for word, share in pairs]
    return [(word, share) for word, share in named if word != item.word]


def _notices(reading: Reading) -> list[str]:
    windows, notices = reading.windows, []
    if reading.crop.mode == "auto" and reading.picture.width != reading.picture.height:
        notices.append(
            "Nothing tells where the mouth is: the middle square of the picture was read. --crop mesh finds the mouth, "
            "--crop window with --crop-rows and --crop-columns says where it is."
        )
    if windows.damage:
        notices.append(f"Only the video up to {windows.seconds[-1]:.2f} s is read, then: {windows.damage}.")
    return notices


def _key_numbers(reading: Reading) -> list[tuple[str, str, str]]:
    """(value, name, remark) of the numbers below the timeline."""
    info = reading.reader.info
    rate = (f"{100 * info.test_wcr:.0f}\u00a0%", "of test words read right", f"by this reader, {len(info.words)} words")
    numbers = [(str(len(reading.words)), "words read", f"in {reading.picture.seconds:.1f}\u00a0s"), rate]
    if reading.truth:
        found, middle = (sum(each) for each in zip(*((i.found, i.right_at_middle) for i in reading.truth), strict=True))
        at_middle = f"{middle} are the likeliest at their middle"
        numbers[0] = (f"{found} of {len(reading.truth)}", "words said are among those read", at_middle)
    if reading.offset is None:
        return [*numbers, ("\u2013", "offset of the sound", reading.offset_problem)]
    overall = reading.offset.overall
    if not overall.is_clear:
        return [*numbers, ("?", "offset of the sound", "sound and picture have too little to do with each other")]
    late = overall.offset_ms
    verdict = "in sync" if abs(late) <= _IN_SYNC_MS else "the sound is late" if late > 0 else "the sound is early"
    return [*numbers, (f"{late:+.0f}\u00a0ms".replace("-", "\u2212"), "offset of the sound", verdict)]


def _about(reading: Reading) -> list[str]:
    """How the video was read, in sentences."""
    info, windows, config = reading.reader.info, reading.windows, reading.config
    labels = f"{info.labels_per_word} labelled clips a word" if info.labels_per_word else "all labelled clips"
    trained = "the run's encoder as pretraining left it" if info.row == "frozen" else "the run's encoder, fine-tuned"
    encoder = info.encoder
    size, length = f"{encoder.input_pixels} \u00d7 {encoder.input_pixels} pixels", windows.frames / VIDEO_FPS
    texts = [
        f"The reader of {config.run}: {trained} ({encoder.backbone}, {size}) and a head ({info.head}) trained on "
        f"{labels}; of the validation clips it reads {100 * info.val_wcr:.1f}\u00a0% right, of the test clips "
        f"{100 * info.test_wcr:.1f}\u00a0%.",
        f"A window of {windows.frames} frames ({length:.2f}\u00a0s), as long as its training clips, slides over the "
        f"video in steps of {windows.stride} ({1000 * windows.stride / VIDEO_FPS:.0f}\u00a0ms). What it reads belongs "
        "to the window's middle, so nothing is read of the first and the last half window. The words at the top are "
        "the row of words that explains all windows best, each change of the word at a cost; in place of a word that "
        "the reader has never learned it says the one that looks most like it.",
        f"Crop of the mouth: {reading.crop_name}.",
    ]
    if windows.notes:
        texts.append(f"Converted: {'; '.join(windows.notes)}.")
    return texts


def _settings(config: ReadConfig) -> dict[str, Any]:
    """The flags of the command that makes this page again."""
    given = {"video": str(config.video), "run": str(config.run)}
    return {**given, **changed_settings(config, ReadConfig(video=config.video, run=config.run))}


def _page_data(reading: Reading) -> dict[str, Any]:
    """What the page's script draws."""
    windows, words = reading.windows, reading.words
    numbers = windows.words[:, :SHOWN]
    used, places = np.unique(numbers, return_inverse=True)
    return {
        "fps": VIDEO_FPS,
        "seconds": max(reading.picture.seconds, float(windows.seconds[-1])),
        "width": reading.picture.width,
        "step": windows.stride / VIDEO_FPS,
        "sure": _SURE,
        "times": windows.seconds.round(3).tolist(),
        "vocabulary": [reading.reader.words[word] for word in used.tolist()],
        "words": places.reshape(numbers.shape).tolist(),
        "shares": (1000 * windows.probabilities[:, :SHOWN]).round().astype(int).tolist(),
        "found": [
            {
                "word": item.word,
                "start": round(item.start_seconds, 3),
                "end": round(item.end_seconds, 3),
                "at": round(item.seconds, 3),
                "share": round(item.probability, 3),
            }
            for item in words
        ],
        **({"truth": [_lane(item) for item in reading.truth]} if reading.truth else {}),
        **_boxes(reading),
        **_late(reading.offset),
    }


def _lane(item: TrueWord) -> dict[str, Any]:
    start, end = round(item.start_seconds, 3), round(item.end_seconds, 3)
    return {"word": item.word, "start": start, "end": end, "found": item.found}


def _boxes(reading: Reading) -> dict[str, Any]:
    """Where the mouth is, in pixels of the picture as it is shown: one box, or one for each frame."""
    crop, picture = reading.crop, reading.picture
    if not isinstance(crop.track, MouthTrack):
        rows, columns = crop.box(picture.height, picture.width)
        return {"box": [columns.start, rows.start, columns.stop, rows.stop]}
    places = sorted(crop.track.places.items())
    times = [float(stamp * picture.time_base - picture.origin_seconds) for stamp, _ in places]
    # The track counts from the middle of the first pixel, a picture from its edge.
    boxes = [[round(value, 1) for value in (x + 0.5, y + 0.5, a, b)] for _, (x, y, a, b) in places]
    return {"track": {"times": [round(time, 3) for time in times], "places": boxes}}


def _late(offset: Offset | None) -> dict[str, Any]:
    if offset is None or not np.isfinite(offset.late_ms).any():
        return {}
    reach = 1000 * int(offset.overall.lags[-1]) // VIDEO_FPS
    values = [None if math.isnan(value) else round(value) for value in offset.late_ms.tolist()]
    return {"late": {"reach": reach, "times": offset.seconds.round(2).tolist(), "values": values}}
