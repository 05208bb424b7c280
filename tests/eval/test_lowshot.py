"""Low-shot splits and scores."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

from eval import logistic
from eval.base import File, Score
from eval.datasets import open_data
from eval.evaluators import lowshot
from eval.evaluators.lowshot import Config, LinearConfig, Lowshot, VptConfig, split
from eval.features import Encoder, Features, extract
from eval.metrics import topk
from maws.data.transforms import Preprocess
from tests.eval.conftest import SIDE, atto

SMALL = Config(seeds=2, vpt=VptConfig(steps=2, batch=8, prompts=2), linear=LinearConfig(l2=(0.1, 0.01)))


@pytest.fixture(scope="module")
def data(files):
    return open_data([files.test], [files.train], files.classes)


@pytest.fixture(scope="module")
def encode():
    return Encoder(atto(), Preprocess(SIDE))


@pytest.fixture(scope="module")
def items(data, encode):
    return list(Lowshot(SMALL, data, 3).run(encode))


def bank(labels: list[int], keys: list[str] | None = None) -> Features:
    keys = keys or [f"k{number:03d}" for number in range(len(labels))]
    n = len(labels)
    return Features(torch.zeros(n, 2), torch.tensor(labels), torch.arange(n), tuple(keys), {})


def test_a_split_has_at_most_k_images_of_every_class():
    features = bank([0] * 9 + [1] * 2 + [2] * 5)
    rows = split(features, 4, seed=0)
    assert Counter(features.labels[rows].tolist()) == {0: 4, 1: 2, 2: 4}
    assert len(set(rows.tolist())) == len(rows)


def test_splits_differ_by_seed_and_one_shot_is_part_of_five_shot():
    features = bank([0] * 50 + [1] * 50)
    one, five, other = split(features, 1, 0), split(features, 5, 0), split(features, 5, 1)
    assert set(one.tolist()) < set(five.tolist())
    assert set(five.tolist()) != set(other.tolist())


def test_a_split_does_not_depend_on_the_order_of_the_files():
    features = bank([0, 1] * 20)
    turned = bank([1, 0] * 20, list(features.keys)[::-1])
    keys = [features.keys[row] for row in split(features, 3, 0).tolist()]
    assert keys == [turned.keys[row] for row in split(turned, 3, 0).tolist()] == sorted(keys)


def test_every_image_is_drawn_equally_often():
    features = bank([0] * 10)
    counts = Counter(row for seed in range(600) for row in split(features, 1, seed).tolist())
    assert set(counts) == set(range(10)) and max(counts.values()) < 2 * min(counts.values())


def test_one_score_per_seed_shot_and_method(items):
    scores = [item for item in items if isinstance(item, Score)]
    expected = {(f"{k}-shot/{m}/top1", seed) for k in (1, 5) for m in ("linear", "vpt") for seed in (3, 4)}
    assert {(score.metric, score.seed) for score in scores} == expected and len(scores) == 8
    assert all(score.n == 28 and 0 <= score.value <= 1 for score in scores)


def test_splits_are_written_down_with_sorted_keys(items, data):
    splits = [item for item in items if isinstance(item, File)]
    assert len(splits) == len({file.name for file in splits}) == 4
    for file in splits:
        content = json.loads(file.text)
        assert content["keys"] == sorted(content["keys"]) and set(content["keys"]) <= set(data.train.keys)
        assert len(content["keys"]) == 7 * content["k"]
        assert f"-{content['k']}shot-seed{content['seed']}.json" in file.name


def test_linear_is_a_logistic_regression_on_the_written_split(items, data, encode):
    train, test = extract(encode, data.train), extract(encode, data.test)
    scores = {(item.metric, item.seed): item for item in items if isinstance(item, Score)}
    for file in (item for item in items if isinstance(item, File)):
        content = json.loads(file.text)
        rows = [train.keys.index(key) for key in content["keys"]]
        score = scores[f"{content['k']}-shot/linear/top1", content["seed"]]
        l2 = score.chosen["linear.l2"]
        head = logistic.fit(train.features[rows], train.labels[rows], 7, l2, iterations=SMALL.linear.iterations)
        assert score.value == pytest.approx(topk(head(test.features), test.labels, 1))


def test_the_choice_is_made_once_on_one_split_and_written_down(items):
    chosen = [item.chosen for item in items if isinstance(item, Score)]
    assert all(one == chosen[0] for one in chosen)
    assert chosen[0]["linear.l2_chosen_on"] == "seed 3, 5-shot, 7 of its images held out"


def test_the_same_seed_gives_the_same_scores(items, data, encode):
    assert list(Lowshot(SMALL, data, 3).run(encode)) == items


def test_vpt_without_prompts_or_training_is_the_linear_score(data, encode):
    cfg = replace(SMALL, vpt=VptConfig(prompts=0, steps=0))
    scores = {(s.metric, s.seed): s.value for s in Lowshot(cfg, data, 0).run(encode) if isinstance(s, Score)}
    for k in (1, 5):
        for seed in (0, 1):
            assert scores[f"{k}-shot/vpt/top1", seed] == scores[f"{k}-shot/linear/top1", seed]


def test_linear_alone_decodes_no_picture_twice(data, encode, monkeypatch):
    monkeypatch.setattr(lowshot, "pictures", lambda *_: pytest.fail("pictures were decoded"))
    metrics = {
        s.metric for s in Lowshot(replace(SMALL, methods=("linear",)), data, 0).run(encode) if isinstance(s, Score)
    }
    assert metrics == {"1-shot/linear/top1", "5-shot/linear/top1"}
