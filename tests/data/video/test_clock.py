from __future__ import annotations

from fractions import Fraction

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avppc.data.video.clock import AudioTimeline, FrameGrid

RATE = 16_000


def image(number: int) -> np.ndarray:
    return np.full((1, 1), number, np.uint8)


def settle(time_base: Fraction, stamps: list[int], first: int = 0) -> list[int | None]:
    """Numbers of the frames picked for the instants first, first + 1, ..."""
    grid = FrameGrid(time_base, stamps[0], first)
    images = [found for number, stamp in enumerate(stamps) for found in grid.push(stamp, image(number))]
    return [None if found is None else int(found[0, 0]) for found in images + grid.finish()]


class TestFrameGrid:
    @given(
        st.sampled_from([Fraction(1, 12_800), Fraction(1, 90_000), Fraction(1, 1000), Fraction(1001, 30_000)]),
        st.integers(-(10**9), 10**9),
        st.lists(st.integers(1, 5_000), min_size=1, max_size=60),
        st.integers(0, 5),
    )
    @settings(deadline=None)
    def test_nearest_time_stamp_wins(self, time_base, origin, steps, first):
        steps = [step % round(1 / time_base) + 1 for step in steps]  # up to a second
        stamps = [origin + sum(steps[:count]) for count in range(len(steps) + 1)]
        times = [(stamp - origin) * time_base for stamp in stamps]
        expected: list[int | None] = []
        number = first
        last_lasts = max(Fraction(1, 25), min(steps[-1] * time_base, Fraction(1, 10)))
        while Fraction(number, 25) - times[-1] < last_lasts:
            instant = Fraction(number, 25)
            nearest = min(range(len(times)), key=lambda frame: (abs(times[frame] - instant), frame))
            expected.append(nearest if abs(times[nearest] - instant) <= Fraction(1, 10) else None)
            number += 1
        assert settle(time_base, stamps, first) == expected

    def test_the_earlier_of_two_equally_near_frames_is_taken(self):
        assert settle(Fraction(1, 1000), [0, 20, 60, 80]) == [0, 1, 3]

    def test_25_fps_is_taken_as_it_is(self):
        grid = FrameGrid(Fraction(1, 25), 7)
        images = [found for number in range(30) for found in grid.push(7 + number, image(number))] + grid.finish()
        assert [int(found[0, 0]) for found in images] == list(range(30))
        assert grid.notes == []

    def test_a_picture_is_held_for_up_to_100_ms(self):
        """Of 1/12.5, 1/5 and 1/4 s: each instant takes the nearest one, and none that is further away."""
        assert settle(Fraction(1, 1000), [0, 80, 160]) == [0, 0, 1, 1, 2, 2]
        assert settle(Fraction(1, 1000), [0, 200]) == [0, 0, 0, 1, 1, 1, 1, 1]
        assert settle(Fraction(1, 1000), [0, 250]) == [0, 0, 0, None, 1, 1, 1, 1, 1]

    def test_holding_is_noted(self):
        grid = FrameGrid(Fraction(1, 1000), 0)
        for stamp in (0, 40, 80, 120, 305, 345):
            grid.push(stamp, image(0))
        assert grid.notes[1] == "frames held: until the next one came, up to 185 ms"

    def test_where_ticks_without_a_frame_repeat_the_last_one(self):
        grid = FrameGrid(Fraction(1, 25), 0, repeats=True)
        images = [found for stamp in (0, 1, 9, 10) for found in grid.push(stamp, image(stamp))] + grid.finish()
        assert [int(found[0, 0]) for found in images] == [0, *[1] * 8, 9, 10]
        assert grid.notes == ["frames held: until the next one came, up to 320 ms"]

    def test_stamps_must_grow(self):
        grid = FrameGrid(Fraction(1, 25), 0)
        grid.push(5, image(0))
        for stamp in (5, 4):
            with pytest.raises(ValueError, match=r"do not grow after 0\.200 s"):
                grid.push(stamp, image(1))

    def test_a_jump_is_refused_before_it_fills_the_memory(self):
        grid = FrameGrid(Fraction(1, 90_000), 0)
        grid.push(0, image(0))
        with pytest.raises(ValueError, match="gap of more than 10 s"):
            grid.push(1 << 40, image(1))


def sound(samples: np.ndarray, pts: int, rate: int = RATE, planar_float: bool = False) -> av.AudioFrame:
    if planar_float:
        frame = av.AudioFrame.from_ndarray(samples[None].astype(np.float32), format="fltp", layout="mono")
    else:
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
    frame.sample_rate, frame.pts, frame.time_base = rate, pts, Fraction(1, rate)
    return frame


class TestAudioTimeline:
    @given(
        st.lists(st.tuples(st.integers(1, 1500), st.sampled_from([0, 0, 0, -700, 500, 5000])), min_size=1, max_size=12),
        st.integers(-4_000, 4_000),
        st.integers(0, 8_000),
        st.integers(1, 8_000),
    )
    @settings(deadline=None)
    def test_samples_lie_where_their_stamps_say(self, pieces, start, first, count):
        """Against an array in which each piece is simply written at its time, later ones never over earlier ones."""
        length = 60_000
        expected, known = np.zeros(length, np.int16), np.zeros(length, bool)
        timeline = AudioTimeline(Fraction(0))
        pts, value = start, 0
        for samples, gap in pieces:
            # Gaps below 25 ms may be jitter, which the tests below look at: make them larger or none.
            pts += gap
            wave = np.arange(value, value + samples).astype(np.int16)
            value += samples
            timeline.push(sound(wave, pts))
            places = np.arange(pts, pts + samples)
            inside = (places >= 0) & (places < length)
            fresh = (
                inside & ~known[np.clip(places, 0, length - 1)] & (places >= (np.flatnonzero(known).max(initial=-1)))
            )
            expected[places[fresh]], known[places[fresh]] = wave[fresh], True
            pts += samples
        timeline.finish()
        found, missing = timeline.take(first, count)
        assert np.array_equal(found, expected[first : first + count])
        heard = np.ones(count, bool)
        for begin, end in missing:
            heard[begin:end] = False
        assert np.array_equal(heard, known[first : first + count])

    def test_small_jitter_of_the_stamps_is_closed_up(self):
        timeline = AudioTimeline(Fraction(0))
        wave = np.arange(4000, dtype=np.int16)
        for start in range(0, 4000, 400):
            timeline.push(sound(wave[start : start + 400], start + (start // 400 % 3) * 100))
        timeline.finish()
        found, missing = timeline.take(0, 4000)
        assert np.array_equal(found, wave)
        assert missing == []

    @pytest.mark.parametrize("offset", [320, 176, 80, -80, -256])
    @pytest.mark.parametrize("late", [0.0, 0.0009])
    def test_a_lasting_offset_is_kept(self, offset, late):
        """5 packets of 20 ms, then all others off by 3 to 20 ms, with stamps that are rounded or are not."""
        timeline = AudioTimeline(Fraction(0))
        wave = np.arange(1, 9601, dtype=np.int16)
        for number, start in enumerate(range(0, 9600, 320)):
            jitter = round(late * RATE) * (number % 2)
            timeline.push(sound(wave[start : start + 320], start + jitter + (offset if number >= 5 else 0)))
        timeline.finish()
        found, missing = timeline.take(0, 9600)
        (place,) = np.flatnonzero(found == 2500)
        assert abs(place - 2499 - offset) <= round(late * RATE)
        assert np.array_equal(found[place : place + 5000], np.arange(2500, 7500))
        assert [start for start, end in missing if end < 9600] == ([1600] if offset > 0 else [])

    def test_wild_jitter_around_the_run_is_closed_up(self):
        """Stamps of 40 packets that are up to 10 ms off, to both sides: the sound goes on without a gap."""
        timeline = AudioTimeline(Fraction(0))
        wave = np.arange(1, 12_801, dtype=np.int16)
        for number, start in enumerate(range(0, 12_800, 320)):
            off = 0 if number == 0 else (-160, 96, 64, -64, 120)[number % 5]
            timeline.push(sound(wave[start : start + 320], start + off))
        timeline.finish()
        found, missing = timeline.take(0, 12_800)
        assert np.array_equal(found, wave)
        assert missing == []

    def test_lost_packets_add_up_to_nothing(self):
        """Of every 20 packets of 20 ms one is lost: all others stay at their times."""
        timeline = AudioTimeline(Fraction(0))
        wave = np.arange(1, 30_001, dtype=np.int16)
        for number, start in enumerate(range(0, 30_000, 320)):
            if number % 20 != 10:
                timeline.push(sound(wave[start : start + 320], start))
        timeline.finish()
        found, missing = timeline.take(0, 30_000)
        heard = np.ones(30_000, bool)
        for begin, end in missing:
            heard[begin:end] = False
        assert np.array_equal(found[heard], wave[heard])
        assert [end - begin for begin, end in missing] == [320] * 5

    def test_a_frame_without_a_stamp_follows_the_one_before(self):
        timeline = AudioTimeline(Fraction(0))
        wave = np.arange(1200, dtype=np.int16)
        timeline.push(sound(wave[:400], 100))
        for start in (400, 800):
            frame = sound(wave[start : start + 400], 0)
            frame.pts = None
            timeline.push(frame)
        timeline.finish()
        assert np.array_equal(timeline.take(100, 1200)[0], wave)

    def test_a_beginning_without_a_stamp_is_refused(self):
        frame = sound(np.zeros(10, np.int16), 0)
        frame.pts = None
        with pytest.raises(ValueError, match="begins with frames without time stamps"):
            AudioTimeline(Fraction(0)).push(frame)

    def test_dropping_keeps_the_numbers(self):
        timeline = AudioTimeline(Fraction(0))
        wave = np.arange(3000, dtype=np.int16)
        timeline.push(sound(wave[:1000], 0))
        timeline.drop_before(700)
        timeline.push(sound(wave[1000:2000], 1000))
        timeline.drop_before(1500)
        timeline.push(sound(wave[2000:], 2000))
        found, missing = timeline.take(1600, 1000)
        assert np.array_equal(found, wave[1600:2600])
        assert missing == []

    def test_floats_are_rounded_and_clipped(self):
        timeline = AudioTimeline(Fraction(0))
        timeline.push(sound(np.array([0.0, 0.5, -0.5, 1.0, -1.0, 2.0, 1.6 / 32768]), 0, planar_float=True))
        assert timeline.take(0, 7)[0].tolist() == [0, 16384, -16384, 32767, -32768, 32767, 2]

    def test_sound_that_is_no_number_is_refused(self):
        timeline = AudioTimeline(Fraction(0))
        timeline.push(sound(np.array([0.0, np.nan]), 0, planar_float=True))
        with pytest.raises(ValueError, match="not finite"):
            timeline.take(0, 2)

    @pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
    def test_other_rates_keep_the_time(self, rate):
        """A burst at 0.3 s of a tone stays at 0.3 s, whatever the rate, and a gap of the stamps stays a gap."""
        timeline = AudioTimeline(Fraction(0))
        time = np.arange(rate) / rate
        wave = np.where((time >= 0.3) & (time < 0.31), 20_000 * np.sin(2 * np.pi * 1_000 * time), 0).astype(np.int16)
        for start in range(0, rate, 1024):
            timeline.push(sound(wave[start : start + 1024], start, rate))
        timeline.push(sound(wave[: rate // 2], rate + rate // 2, rate))
        timeline.finish()
        found, missing = timeline.take(0, 2 * RATE)
        for begin in (0, RATE + RATE // 2):
            burst = np.flatnonzero(np.abs(found[begin : begin + RATE // 2]) > 2_000)
            assert abs(burst.min() / RATE - 0.3) < 0.001
            assert abs(burst.max() / RATE - 0.31) < 0.001
        assert [(round(a / RATE, 2), round(b / RATE, 2)) for a, b in missing if b - a > 10] == [(1.0, 1.5)]

    def test_impossible_rates_are_refused(self):
        with pytest.raises(ValueError, match="audio of 1000 Hz; 4000 to 384000 Hz are allowed"):
            AudioTimeline(Fraction(0)).push(sound(np.zeros(10, np.int16), 0, 1_000))

    def test_a_jump_is_refused_before_it_fills_the_memory(self):
        timeline = AudioTimeline(Fraction(0))
        timeline.push(sound(np.zeros(10, np.int16), 0))
        with pytest.raises(ValueError, match="gap of more than 600 s"):
            timeline.push(sound(np.zeros(10, np.int16), 1 << 40))
