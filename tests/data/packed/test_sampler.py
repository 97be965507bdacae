from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avppc.data.packed.loader import EpochSampler

seeds = st.integers(0, 2**70)
sizes = st.integers(1, 200)


def epoch_of(sampler: EpochSampler, epoch: int = 0) -> list[list[int]]:
    return [sampler.batch(epoch, number).tolist() for number in range(sampler.batches_per_epoch)]


class TestOrder:
    @given(sizes, st.integers(1, 20), seeds, st.integers(0, 10**6))
    @settings(deadline=None)
    def test_each_clip_at_most_once_an_epoch(self, clips, batch, seed, epoch):
        if clips < batch:
            return
        sampler = EpochSampler(clips, batch, seed=seed)
        seen = [clip for rows in epoch_of(sampler, epoch) for clip in rows]
        assert len(set(seen)) == len(seen)
        assert set(seen) <= set(range(clips))
        assert len(seen) == clips // batch * batch

    @given(st.integers(0, 10**6), seeds)
    @settings(deadline=None, max_examples=25)
    def test_pure_function_of_seed_and_epoch(self, epoch, seed):
        one, other = EpochSampler(50, 7, seed=seed), EpochSampler(50, 7, seed=seed)
        list(zip(other, range(20), strict=False))  # wherever the stream stands
        assert epoch_of(one, epoch) == epoch_of(other, epoch)
        assert epoch_of(one, epoch) != epoch_of(one, epoch + 1)
        assert epoch_of(one, epoch) != epoch_of(EpochSampler(50, 7, seed=seed + 1), epoch)

    def test_order_is_fixed_for_ever(self):
        """A change here would change every run that is resumed with a newer version."""
        sampler = EpochSampler(10, 5, seed=3)
        assert epoch_of(sampler) == FIXED[0]
        assert epoch_of(sampler, 1) == FIXED[1]

    def test_shuffle_is_uniform(self):
        """Each clip comes to each place equally often, within five standard deviations."""
        places = np.array([EpochSampler(5, 5, seed=seed).order(0) for seed in range(4_000)])
        counts = np.array([[np.sum(places[:, place] == clip) for clip in range(5)] for place in range(5)])
        assert np.abs(counts - 800).max() < 5 * np.sqrt(4_000 * 0.2 * 0.8)


class TestRanks:
    @given(sizes, st.integers(1, 8), st.sampled_from([1, 2, 3, 4]), seeds)
    @settings(deadline=None)
    def test_ranks_share_the_epoch(self, clips, batch, world, seed):
        if clips < batch * world:
            return
        ranks = [EpochSampler(clips, batch, seed=seed, rank=r, world_size=world) for r in range(world)]
        seen = Counter(clip for sampler in ranks for rows in epoch_of(sampler) for clip in rows)
        assert set(seen.values()) == {1}
        assert len({sampler.batches_per_epoch for sampler in ranks}) == 1
        assert len(seen) == clips // (batch * world) * batch * world
        for number in range(ranks[0].batches_per_epoch):
            assert {len(sampler.batch(0, number)) for sampler in ranks} == {batch}

    @pytest.mark.parametrize("speakers_per_batch", [None, 4])
    def test_world_size_may_change_with_the_same_global_batch(self, speakers_per_batch):
        clips, global_batch = 100, 24
        speakers = torch.arange(clips) % 5

        def global_batches(world: int, state, steps: int) -> list[list[int]]:
            samplers = [
                EpochSampler(
                    clips,
                    global_batch // world,
                    seed=1,
                    rank=rank,
                    world_size=world,
                    speakers=speakers,
                    speakers_per_batch=speakers_per_batch,
                )
                for rank in range(world)
            ]
            for sampler in samplers:
                sampler.load_state(state)
            batches = [[c for sampler in samplers for c in next(sampler).tolist()] for _ in range(steps)]
            states = [sampler.state() for sampler in samplers]
            assert all(found == states[0] for found in states)
            state.update(states[0])
            return batches

        whole = global_batches(1, {"epoch": 0, "batches_consumed": 0}, 12)
        state = {"epoch": 0, "batches_consumed": 0}
        pieces = [batch for world in (2, 4, 1, 3, 2, 6) for batch in global_batches(world, state, 2)]
        assert pieces == whole


class TestState:
    @given(st.integers(0, 40), st.integers(0, 40))
    @settings(deadline=None)
    def test_stream_goes_on_where_the_state_was_taken(self, before, after):
        sampler = EpochSampler(23, 4, seed=5)
        for _ in range(before):
            next(sampler)
        state = sampler.state()
        assert state == {"epoch": before // 5, "batches_consumed": before % 5}
        expected = [next(sampler).tolist() for _ in range(after)]
        other = EpochSampler(23, 4, seed=5)
        other.load_state(state)
        assert [next(other).tolist() for _ in range(after)] == expected

    def test_copy_is_a_stream_of_its_own(self):
        sampler = EpochSampler(23, 4, seed=5)
        next(sampler)
        other = sampler.copy()
        assert next(other).tolist() == sampler.batch(0, 1).tolist()
        assert sampler.state() == {"epoch": 0, "batches_consumed": 1}

    @pytest.mark.parametrize(
        ("state", "message"),
        [
            ({"epoch": 0}, "keys epoch and batches_consumed"),
            ({"epoch": -1, "batches_consumed": 0}, "epoch must be at least 0"),
            ({"epoch": 0, "batches_consumed": 5}, "batches_consumed must be from 0 to 4"),
        ],
    )
    def test_impossible_states(self, state, message):
        with pytest.raises(ValueError, match=message):
            EpochSampler(23, 4, seed=5).load_state(state)


class TestSpeakers:
    @given(
        st.lists(st.integers(0, 6), min_size=40, max_size=120),
        st.sampled_from([(12, 3), (12, 4), (8, 1), (6, 6)]),
        st.integers(0, 100),
    )
    @settings(deadline=None)
    def test_batches_are_groups_of_one_speaker(self, speakers, batch_and_groups, epoch):
        batch, groups = batch_and_groups
        size = batch // groups
        if sum(count // size for count in Counter(speakers).values()) < groups:
            return
        sampler = EpochSampler(len(speakers), batch, seed=0, speakers=torch.tensor(speakers), speakers_per_batch=groups)
        seen = []
        for rows in epoch_of(sampler, epoch):
            assert len(rows) == batch
            for start in range(0, batch, size):
                assert len({speakers[clip] for clip in rows[start : start + size]}) == 1
            seen += rows
        assert len(set(seen)) == len(seen)

    def test_all_clips_come_over_the_epochs(self):
        speakers = torch.arange(50) % 7
        sampler = EpochSampler(50, 12, seed=0, speakers=speakers, speakers_per_batch=4)
        assert {clip for epoch in range(20) for rows in epoch_of(sampler, epoch) for clip in rows} == set(range(50))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_clips": 0}, "num_clips must be from 1"),
        ({"batch_size": 0}, "batch_size must be from 1"),
        ({"batch_size": 24}, "batch_size must be one that 23 clips fill on each of 1 ranks, got 24"),
        ({"rank": 2, "world_size": 2}, "rank must be from 0 to 1, got 2"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"speakers_per_batch": 2}, "needs speakers"),
        (
            {"speakers_per_batch": 3, "speakers": torch.zeros(23, dtype=torch.int64)},
            "must divide the global batch of 4",
        ),
        ({"speakers_per_batch": 2, "speakers": torch.zeros(22, dtype=torch.int64)}, "speakers must be 23 integers"),
        ({"speakers_per_batch": 2, "speakers": torch.full((23,), -1)}, "some are not known"),
        ({"speakers_per_batch": 1, "speakers": torch.arange(23)}, "in groups of 4 clips of one speaker"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        EpochSampler(**{"num_clips": 23, "batch_size": 4, "seed": 0} | options)


FIXED = [[[7, 3, 5, 4, 6], [8, 1, 2, 0, 9]], [[5, 1, 7, 4, 8], [2, 0, 3, 9, 6]]]
