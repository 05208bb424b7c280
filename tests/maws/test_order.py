from collections import Counter

import numpy as np
import pytest

from data_pipeline.shardset import ShardSet
from maws.config import ConfigError
from maws.data.order import Order, Part, choose_streams, cut


def test_without_resampling_an_epoch_visits_every_sample_at_most_once(shards: ShardSet):
    order = Order(shards, seed=0, batch_size=8, streams=4, resample=False)
    visits = Counter(key for step in range(order.steps_per_epoch) for key in order.keys(step))
    assert len(visits) == order.steps_per_epoch * 8 == len(shards)
    assert set(visits.values()) == {1}


def test_with_resampling_visits_follow_the_repeat_factors(shards: ShardSet):
    order = Order(shards, seed=0, batch_size=8, streams=4)
    epochs = 40
    visits = Counter(key for step in range(epochs * order.steps_per_epoch) for key in order.keys(step))
    expected = {}
    for shard in range(shards.num_shards):
        index = shards.index(shard)
        expected |= dict(zip(index["key"].to_pylist(), index["repeat"].to_pylist(), strict=True))
    assert max(expected.values()) > 1.2  # otherwise this test would not test anything
    for key, repeat in expected.items():
        assert abs(visits[key] / epochs - repeat) < 0.45, key


def test_a_batch_holds_the_same_samples_on_any_number_of_ranks(shards: ShardSet):
    order = Order(shards, seed=3, batch_size=16, streams=8)
    for step in (0, 5, order.steps_per_epoch + 2):
        whole = sorted(order.keys(step))
        for world in (2, 4, 8):
            parts = [order.items(step, Part(rank, world)) for rank in range(world)]
            assert {len(p) for p in parts} == {16 // world}
            assert sorted(item.key for part in parts for item in part) == whole


def test_the_order_is_a_function_of_seed_epoch_and_step(shards: ShardSet):
    def fresh(seed: int = 3) -> Order:
        return Order(shards, seed=seed, batch_size=16, streams=8)

    straight = fresh()
    sequence = [straight.keys(step) for step in range(25)]
    assert fresh().keys(17) == sequence[17]  # without what came before
    assert fresh(4).keys(17) != sequence[17]
    per_epoch = straight.steps_per_epoch
    assert sequence[0] != sequence[per_epoch]  # every epoch has its own order


def test_streams_share_rows_evenly_whatever_the_sizes_of_shards():
    counts = np.array([5, 0, 1, 100, 3, 8])
    streams = cut(counts, 4)
    assert [sum(s.stop - s.start for s in stream) for stream in streams] == [29, 29, 29, 30]
    rows = [(s.shard, r) for stream in streams for s in stream for r in range(s.start, s.stop)]
    assert rows == [(shard, r) for shard, n in enumerate(counts) for r in range(n)]


def test_samples_without_a_synset_are_left_out_where_labels_are_needed(shards: ShardSet):
    labelled = Order(shards, seed=0, batch_size=8, labelled=True)
    everything = Order(shards, seed=0, batch_size=8)
    assert labelled.samples < everything.samples == len(shards)
    for item in labelled.items(3):
        assert shards.record(item.shard, item.row)["synsets"]


def test_settings_that_cannot_work_say_what_would(shards: ShardSet):
    with pytest.raises(ConfigError, match=r"batch_size=4096 is more than an epoch .* try optim\.batch_size=128"):
        Order(shards, seed=0, batch_size=4096)
    with pytest.raises(ConfigError, match=r"batch_size=10 must be a multiple of data\.streams=4; try data\.streams=2"):
        Order(shards, seed=0, batch_size=10, streams=4)
    with pytest.raises(ConfigError, match="3 ranks cannot share 4 streams evenly"):
        Order(shards, seed=0, batch_size=8, streams=4).check_world(3)


def test_the_number_of_streams_does_not_depend_on_the_ranks_and_is_at_most_64():
    assert choose_streams(4096, 3_000_000) == 64
    assert choose_streams(96, 3_000_000) == 32
    assert choose_streams(16, 40) == 2


def test_a_stream_that_draws_nothing_in_an_epoch_is_refused_in_words(shards: ShardSet, monkeypatch):
    """Repeat factors below one leave samples out; on a small set that can be all of a stream."""
    order, rows = Order(shards, seed=0, batch_size=8, streams=8), Order.rows
    monkeypatch.setattr(
        Order, "rows", lambda self, n: rows(self, n)._replace(repeat=np.full(len(rows(self, n).rows), 0.0))
    )
    with pytest.raises(ConfigError, match=r"stream \d of 8 has no sample in epoch 0: .* use fewer data\.streams"):
        order.items(0)
