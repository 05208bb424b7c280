"""The protocols of linear probes against plain loops over the same views; what is chosen, and on what."""

import dataclasses
import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from data_pipeline.errors import DataError, UsageError
from data_pipeline.images import decode
from eval import distributed, logistic, mae_probe, probes, ridge, wsp_probe
from eval.augment import byol_crop, resized_crop
from eval.base import Entry, configure
from eval.evaluators import linear
from eval.evaluators.linear import Config, Linear, MaeConfig, WspConfig
from eval.features import Encoder, extract
from maws.data.transforms import Preprocess
from maws.schedule import warmup_cosine
from maws.seeding import generator
from tests.eval.conftest import NAMES, SIDE, atto

S, N = len(NAMES), 42  # classes, training images
MAE = MaeConfig(epochs=3, warmup=1, batch=10, lr=2.0)
WSP = WspConfig(epochs=2, batch=16, lr=(0.5, 1e-5))


@pytest.fixture(scope="module")
def encode():
    return Encoder(atto(), Preprocess(SIDE), batch=4)


@pytest.fixture
def task(data, encode):
    readable = {kind: extract(encode, data.train, kind) for kind in ("pooled", "mean")}
    return probes.Task(encode, data.train, readable, S, seed=5)


def by_hand(task, step, course, kind="cls"):
    """The views of every epoch, one after another, and a step for each whole batch of them."""
    data, images = task.dataset, [decode(task.dataset.read(row)) for row in range(N)]
    for epoch in range(course.epochs):
        order = torch.randperm(N, generator=generator(task.seed, "probe order", epoch)).tolist()
        for number in range(N // course.batch):
            which = order[number * course.batch : (number + 1) * course.batch]
            views = torch.stack([course.view(epoch)(images[row], row) for row in which])
            step(task.encode(views, kind), torch.from_numpy(data.labels[which]), which)


def test_the_mae_probe_is_a_plain_loop_over_the_same_views(task):
    linear_layer = task.head("pooled")
    rate, shape = 2.0 * 10 / 256, linear_layer.weight.shape
    buffers = [torch.zeros(shape), torch.zeros(S)]
    weight, bias = linear_layer.weight.detach().clone(), torch.zeros(S)
    multiplier, running, steps = warmup_cosine(4, 12), [torch.zeros(shape[1]), torch.ones(shape[1])], 0

    def step(x, labels, _):
        nonlocal weight, bias, steps
        mean, variance = x.mean(0), x.var(0, correction=0)
        running[0] = 0.9 * running[0] + 0.1 * mean
        running[1] = 0.9 * running[1] + 0.1 * x.var(0, correction=1)
        x = (x - mean) / (variance + 1e-6).sqrt()
        error = ((x @ weight.T + bias).softmax(1) - F.one_hot(labels, S)) / len(x)
        gradient = error.T @ x
        buffers[0] = 0.9 * buffers[0] + gradient * 0.001 * weight.norm() / gradient.norm()
        buffers[1] = 0.9 * buffers[1] + error.sum(0)
        weight = weight - rate * multiplier(steps) * buffers[0]
        bias = bias - rate * multiplier(steps) * buffers[1]
        steps += 1

    by_hand(task, step, probes.Course("", 3, 10, 1, lambda epoch: byol_crop(5, epoch, SIDE)))
    by_kind = {learnt.kind: learnt.probe for learnt in mae_probe.run(task, MAE)}
    x = task.readable["pooled"].features
    expected = (x - running[0]) / (running[1] + 1e-6).sqrt() @ weight.T + bias
    assert steps == 12
    assert_close(by_kind["pooled"].scores(x), expected, rtol=1e-4, atol=1e-5)
    assert not by_kind["mean"].scores(task.readable["mean"].features).allclose(expected, atol=1e-3)


def test_rates_learn_side_by_side_as_each_would_alone_and_the_best_on_held_out_images_is_taken(task):
    held = linear.hold_out(task.labels, 0.34, task.seed)

    def alone(rate, learns):
        head = task.head("pooled")
        optimiser = torch.optim.SGD(head.parameters(), rate, 0.9, weight_decay=1e-9, nesterov=True)
        multiplier, steps = warmup_cosine(0, 4), 0

        def step(x, labels, which):
            nonlocal steps
            keep = learns[which]
            optimiser.param_groups[0]["lr"] = rate * multiplier(steps)
            optimiser.zero_grad()
            F.cross_entropy(head(x[keep]), labels[keep]).backward()
            optimiser.step()
            steps += 1

        by_hand(task, step, probes.Course("", 2, 16, 0, lambda epoch: resized_crop(5, epoch, SIDE)))
        return head

    learnt = next(wsp_probe.run(task, WSP, 0.34))
    x, labels = task.readable["pooled"].features, task.labels
    top1 = {
        rate: float((alone(rate, ~held)(x[held]).argmax(1) == labels[held]).double().mean()) for rate in (0.5, 1e-5)
    }
    assert learnt.chosen["top1_by_lr"] == {f"{rate:g}": pytest.approx(value) for rate, value in top1.items()}
    assert top1[0.5] > top1[1e-5] and learnt.chosen["lr"] == learnt.facts["lr"] == 0.5
    assert learnt.chosen["held_out_images"] == int(held.sum())
    whole = alone(0.5, torch.ones_like(held)).eval()
    assert_close(learnt.probe.scores(x), whole(x).detach(), rtol=1e-4, atol=1e-5)


def test_one_rate_is_used_as_it_is_and_one_that_explodes_is_refused(task):
    (learnt,) = [
        one for one in wsp_probe.run(task, WspConfig(epochs=1, batch=16, lr=(0.2,)), 0.2) if one.kind == "mean"
    ]
    assert learnt.chosen == {} and learnt.facts["lr"] == 0.2
    with pytest.raises(UsageError, match="lr=1e\\+38 is too high"):
        list(wsp_probe.run(task, WspConfig(epochs=2, batch=16, lr=(1e38,)), 0.2))


def test_a_rate_of_mae_that_explodes_is_told(task):
    with pytest.raises(UsageError, match=r"linear.mae.lr=1e\+38 is too high"):
        list(mae_probe.run(task, MaeConfig(epochs=4, warmup=0, batch=10, lr=1e38)))


def test_a_rate_that_explodes_is_never_the_best(task):
    (learnt, _) = wsp_probe.run(task, WspConfig(epochs=2, batch=16, lr=(0.1, 1e38)), 0.2)
    assert learnt.chosen["lr"] == 0.1 and learnt.chosen["top1_by_lr"]["1e+38"] is None


def test_ranks_that_share_the_views_have_together_what_one_has(task, monkeypatch):
    batches = [torch.arange(9), torch.arange(20, 31)]  # 3 chunks of 4: one rank has fewer
    rows = task.readable["pooled"].rows

    def views():
        found = probes._views(task.encode, task.dataset, rows, batches, byol_crop(0, 0, SIDE))
        return [one["cls"] for one in found]

    whole = views()
    monkeypatch.setattr(distributed, "steps", lambda items: -(-len(items) // 2))
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "own_share", lambda items, rank=rank: items[rank::2])
        shares.append(views())
    for one, first, second in zip(whole, *shares, strict=True):
        assert one.equal(first + second) and not (first.any(1) & second.any(1)).any()


def test_scores_are_named_by_protocol_and_features_and_say_how_they_were_made(data):
    encode = Encoder(atto(), Preprocess(SIDE))
    cfg = Config(protocol=linear.PROTOCOLS, features=("pooled", "mean"), l2=(0.1,), mae=MAE, wsp=WSP)
    scores = {score.metric: score for score in Linear(cfg, data, 0).run(encode)}
    places = [p + k for p in ("", "mae/", "wsp/", "ridge/") for k in ("", "mean/")]
    assert scores.keys() == {place + metric for place in places for metric in ("top1", "top5", "mean_per_class")}
    assert {s.facts["protocol"] for s in scores.values()} == {f"linear/{name}" for name in linear.PROTOCOLS}
    assert scores["mae/mean/top1"].facts["features"] == "mean" and scores["mae/top1"].facts["features"] == "cls"
    assert scores["mae/top1"].facts["preprocess"]["resize"] == round(SIDE * 256 / 224)
    assert scores["mae/top1"].facts["lr"] == 2.0 * 10 / 256
    assert scores["wsp/top1"].facts["preprocess"]["resize"] in (0, SIDE)
    assert all(score.right for name, score in scores.items() if name.endswith("top1"))
    assert max(score.value for score in scores.values()) > 2 / S


def test_training_is_a_function_of_the_seed(task):
    first, again = (next(mae_probe.run(task, MAE)).probe.scores(task.readable["pooled"].features) for _ in range(2))
    other = next(mae_probe.run(dataclasses.replace(task, seed=6), MAE)).probe
    assert first.equal(again) and not first.equal(other.scores(task.readable["pooled"].features))


def test_ridge_is_least_squares_with_the_penalty_as_more_rows():
    draw = torch.Generator().manual_seed(0)
    for n, d in ((30, 4), (5, 9)):  # both sides of x'x and xx'
        x, y = torch.randn(n, d, generator=draw, dtype=torch.float64) * 3 + 1, torch.arange(n) % 3
        z = np.hstack([(x - x.mean(0)) / x.std(0, correction=0), np.full((n, 1), 7.0)])
        target = 2.0 * np.eye(3)[y] - 1
        rows = np.vstack([z, 0.5 * np.eye(d + 1)])
        expected = z @ np.linalg.lstsq(rows, np.vstack([target, np.zeros((d + 1, 3))]), rcond=None)[0]
        head = ridge.fit(x, y, 3, l2=0.25, bias=7.0)
        np.testing.assert_allclose(head(x).numpy(), expected, atol=1e-9)


@pytest.mark.parametrize("fit", [lambda x, y: logistic.fit(x, y, 2, 0.1), lambda x, y: ridge.fit(x, y, 2)])
def test_features_that_are_not_finite_are_refused(fit):
    x = torch.zeros(4, 3)
    x[2, 1] = torch.nan
    with pytest.raises(DataError, match="nan or infinity"):
        fit(x, torch.tensor([0, 1, 0, 1]))


def test_views_that_the_encoder_cannot_take_are_told(task, monkeypatch):
    monkeypatch.setattr(task.encode, "all", lambda images: {"cls": torch.full((len(images), 32), torch.nan)})
    with pytest.raises(DataError, match="nan or infinity on views"):
        list(mae_probe.run(task, MAE))


def test_a_class_without_training_images_is_told(data, encode):
    some = np.flatnonzero(data.train.labels != 3)
    keys, labels = tuple(data.train.keys[row] for row in some), data.train.labels[some]
    train = dataclasses.replace(
        data.train, keys=keys, labels=labels, sha256="less", read=lambda at: data.train.read(int(some[at]))
    )
    with pytest.raises(DataError, match="1 of 7 classes in the evaluation data have no training image: grey"):
        list(Linear(Config(protocol=("mae",), mae=MAE), dataclasses.replace(data, train=train), 0).run(encode))


def test_a_batch_larger_than_the_training_data_is_all_of_it_and_said(task, caplog):
    with caplog.at_level(logging.WARNING):
        (learnt, _) = mae_probe.run(task, MaeConfig(epochs=1, warmup=0))
    assert learnt.facts["batch"] == N and learnt.facts["lr"] == pytest.approx(0.1 * N / 256)
    assert "linear.mae.batch=16384, and there are 42 training images" in caplog.text


def test_l2_of_a_large_set_is_chosen_on_some_of_it_with_the_same_penalty_in_all(data, monkeypatch):
    seen = []

    def fit(x, y, classes, l2, **options):
        seen.append((len(x), l2))
        return logistic.LinearHead(torch.zeros(3), torch.ones(3), torch.zeros(4, 3), torch.zeros(4))

    monkeypatch.setattr(logistic, "fit", fit)
    choice, told = Linear(Config(search_images=40, l2=(0.1, 0.01)), data, 0)._search(
        torch.randn(400, 3), torch.arange(400) % 4
    )
    assert seen == [(32, pytest.approx(1.0)), (32, pytest.approx(0.1))]  # 10 times fewer images
    assert choice.l2 == 0.1 and told == {"search_images": 40, "held_out_images": 8}


def test_the_search_ends_after_two_weaker_strengths_that_are_worse(monkeypatch):
    tops = {1.0: 0.2, 0.1: 0.2, 0.01: 0.8, 1e-3: 0.7, 1e-4: 0.6, 1e-5: 0.9}
    tried = []

    def fit(x, y, classes, l2, **options):
        tried.append(l2)
        right = torch.arange(10) < 10 * tops[l2]
        return lambda features: F.one_hot(torch.where(right, 0, 1), 2).float()

    monkeypatch.setattr(logistic, "fit", fit)
    held = torch.arange(20) >= 10
    choice = linear.choose_l2(torch.zeros(20, 1), torch.zeros(20, dtype=torch.long), held, 2, tuple(tops), 5)
    assert tried == [1.0, 0.1, 0.01, 1e-3, 1e-4] and choice.l2 == 0.01


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ("protocol=lars", "one or more of logistic, mae, wsp, ridge"),
        ("features=joint", "one or more of pooled, cls, mean"),
        ("wsp.lr=0", "numbers above 0"),
        ("mae.batch=1", "batch 2 or more"),
        ("mae.resize=0.5", "resize must be 1 or more"),
    ],
)
def test_settings_that_mean_nothing_are_refused(setting, why):
    with pytest.raises(UsageError, match=why):
        configure([Entry("linear", Config(), Linear)], [f"linear.{setting}"])


def test_a_warm_up_as_long_as_the_training_is_refused(data):
    with pytest.raises(UsageError, match=r"linear.mae.warmup=10 leaves nothing of linear.mae.epochs=9"):
        Linear(Config(protocol=("mae",), mae=MaeConfig(epochs=9)), data, 0)


def test_class_tokens_of_an_encoder_without_one_are_refused(data, monkeypatch):
    encode = Encoder(atto(), Preprocess(SIDE))
    monkeypatch.setattr(type(encode), "kinds", property(lambda _: ("mean",)))
    with pytest.raises(UsageError, match="no class token; use mean"):
        list(Linear(Config(features=("cls",)), data, 0).run(encode))
