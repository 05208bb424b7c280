import hashlib
import shutil
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.shardset import ShardSet
from maws.config import ConfigError
from maws.data import survey as survey_module
from maws.data.order import Order, Part, choose_streams, cut
from maws.data.survey import survey


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


# sha256 of the visits of seven steps, made by the first version of this module (its survey read every index whole)
AS_EVER = {
    (True, False): "2c1fa04eb926067c",
    (True, True): "114a5579c0d8cc2e",
    (False, False): "f5d7239dfc1e32a0",
    (False, True): "3d0d32dc9016ee21",
}


@pytest.mark.parametrize(("resample", "labelled"), AS_EVER)
def test_the_order_of_a_run_is_what_it_was_in_every_version(shards: ShardSet, resample: bool, labelled: bool):
    order = Order(shards, seed=3, batch_size=16, streams=4, window=2, resample=resample, labelled=labelled)
    last = order.steps_per_epoch
    steps = (
        9 * last,
        0,
        3,
        last - 1,
        last,
        2 * last + 1,
        5 * last - 1,
    )  # the last first: nothing depends on the past
    visits = [tuple(item) for step in sorted(steps) for item in order.items(step)]
    assert hashlib.sha256(repr(visits).encode()).hexdigest()[:16] == AS_EVER[resample, labelled]
    again = Order(shards, seed=3, batch_size=16, streams=4, window=2, resample=resample, labelled=labelled)
    assert {step: again.items(step) for step in steps} == {step: order.items(step) for step in steps}


@pytest.fixture
def large(monkeypatch, tmp_path) -> Path:
    """Sets of eight shards count as large, and their surveys are kept here."""
    monkeypatch.setattr(survey_module, "KEEP_FROM", 8)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "maws" / "survey"


def indexes_read(monkeypatch) -> list[int]:
    read, one = [], survey_module.one
    monkeypatch.setattr(survey_module, "one", lambda *a: read.append(a[1]) or one(*a))
    return read


@pytest.mark.parametrize(("resample", "labelled"), [(True, True), (True, False), (False, True)])
def test_the_survey_of_a_large_set_is_read_once_and_is_that_of_the_indexes(
    shards, monkeypatch, large, resample, labelled
):
    tables = [shards.index(n).to_pydict() for n in range(shards.num_shards)]
    eligible = [[i for i, labels in enumerate(t["labels"]) if labels or not labelled] for t in tables]
    visits = [sum(t["repeat"][i] if resample else 1 for i in rows) for t, rows in zip(tables, eligible, strict=True)]
    read = indexes_read(monkeypatch)
    for _ in range(2):
        counts, expected = survey(shards, resample, labelled)
        assert counts.tolist() == [len(rows) for rows in eligible]
        assert expected.tolist() == pytest.approx(visits)
        assert len(read) == shards.num_shards
    (kept,) = large.iterdir()
    for damaged in (b"", kept.read_bytes()[:-9], b"\x93NUMPY" + kept.read_bytes()[6:].replace(b"<f8", b"<i8")):
        kept.write_bytes(damaged)  # is not believed
        assert survey(shards, resample, labelled)[0].tolist() == counts.tolist()


def test_where_every_sample_counts_once_the_manifest_is_enough(shards, monkeypatch, large):
    read = indexes_read(monkeypatch)
    assert Order(shards, seed=0, batch_size=8, resample=False).samples == len(shards)
    assert not read and not large.exists()


class Ranks:
    """Three threads as ranks, with the collectives of maws.dist."""

    def __init__(self) -> None:
        self.meeting, self.said, self.me = threading.Barrier(3, timeout=20), {}, threading.local()

    def rank(self) -> int:
        return self.me.rank

    def world_size(self) -> int:
        return 3

    def gather_objects(self, value):
        self.said[self.rank()] = value
        self.meeting.wait()
        out = [self.said[rank] for rank in range(3)]
        self.meeting.wait()
        return out

    def broadcast(self, value):
        return self.gather_objects(value)[0]

    def run(self, work) -> list:
        def as_rank(rank: int):
            self.me.rank = rank
            try:
                return work()
            except DataError as e:
                return str(e)

        with ThreadPoolExecutor(3) as pool:
            return list(pool.map(as_rank, range(3)))


def test_ranks_share_the_survey_and_all_learn_what_one_could_not_read(shards, monkeypatch, large, tmp_path):
    alone = survey(shards, True, True)
    next(large.iterdir()).unlink()
    read, ranks = indexes_read(monkeypatch), Ranks()
    found = ranks.run(lambda: survey(shards, True, True, ranks))
    assert all(np.array_equal(part, whole) for each in found for part, whole in zip(each, alone, strict=True))
    assert sorted(read) == list(range(shards.num_shards))  # each index once
    shutil.copytree(shards.path, tmp_path / "copy")
    (tmp_path / "copy" / "shards" / "00001.parquet").unlink()
    next(large.iterdir()).unlink()
    damaged = ShardSet.open(tmp_path / "copy")
    assert all("00001.parquet" in text for text in ranks.run(lambda: survey(damaged, True, True, ranks)))
    assert not list(large.iterdir())
