"""The robustness sets in their on-disk forms, scored in one call by a classifier of 1000 classes and a narrow tower;
expected values come from a slow path of its own: Pillow, numpy and a loop over the pictures.
"""

import io
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.shardset import VocabularyEntry, write_vocabulary
from eval import features
from eval.evaluators.robustness import Config
from eval.published import registry
from eval.robust.corruption_error import SEVERITIES
from eval.robust.head_classes import imagenet
from eval.robust.mappings import alexnet_errors, objectnet_numbers, si_score_numbers
from eval.robust.real import picture as picture_name
from eval.robust.real import read_lists
from tests.eval.conftest import NAMES, SIDE, atto, corpus, picture, write_run, write_tar

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
WNIDS = [own[-1] for own in imagenet().folders]


class World(NamedTuple):
    """A classifier and its scores of a picture; the sets; what each metric of each set should be."""

    run: Path
    logits: Callable[[np.ndarray], np.ndarray]
    folder: Path
    references: dict[str, str]
    expected: dict[tuple[str, str], float]


def pixels(number: int) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture(number % 50, number))))


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "png")
    return buffer.getvalue()


def put(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(array))


def slow_logits(weight: np.ndarray, bias: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    tower = atto()

    def logits(array: np.ndarray) -> np.ndarray:
        """Of one picture of any size, with the centre cut after a resize of the short side."""
        image = Image.fromarray(array)
        if image.size != (SIDE, SIDE):
            image = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        normalised = (np.asarray(image) / 255 - MEAN) / STD
        with torch.no_grad():
            tokens = tower(torch.from_numpy(normalised.transpose(2, 0, 1)[None]).float())
        return weight @ tokens[0, 0].double().numpy() + bias

    return logits


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Callable[[np.ndarray], np.ndarray]]:
    """A head that answers differently for different pictures, and more often with classes that only some sets have."""
    tower, rng = atto(), np.random.default_rng(0)
    weight = rng.normal(size=(1000, tower.embed_dim))
    plain = slow_logits(weight, np.zeros(1000))
    bias = -np.mean([plain(pixels(number)) for number in range(24)], axis=0)
    bias[[one for own in objectnet_numbers().values() for one in own]] += 0.4
    bias[list(si_score_numbers().values())] += 0.4
    head = {"head.weight": torch.from_numpy(weight).float(), "head.bias": torch.from_numpy(bias).float()}
    run = tmp_path_factory.mktemp("runs") / "ft"
    write_run(run, tower.state_dict() | head, ["mae", "finetune"], classes=1000)
    return run, slow_logits(weight, bias)


def best(scores: np.ndarray, among: Sequence[int]) -> int:
    return max(among, key=lambda one: scores[one])


def alternating(guesses: Sequence[int], among: Sequence[int]) -> list[int]:
    """The guess itself for two of three pictures, the next class of `among` for the third."""
    return [g if i % 3 else among[(among.index(g) + 1) % len(among)] for i, g in enumerate(guesses)]


@pytest.fixture(scope="module")
def world(classifier, tmp_path_factory) -> World:
    run, logits = classifier
    folder = tmp_path_factory.mktemp("sets")
    here = World(run, logits, folder, {}, {})
    for write in (imagenet_val, imagenet_v2, imagenet_real, lists_of_200, sketch, imagenet_c, objectnet, si_score):
        write(here)
    return here


def imagenet_val(world: World) -> None:
    """Pictures of every class of ImageNet-O and five others, in class folders."""
    listed = registry.find("imagenet-o").classes
    assert isinstance(listed, tuple)
    known = [WNIDS.index(wnid) for wnid in listed]
    places = [*known[:14], *(n for n in range(1000) if n not in known)][:19]
    hits, hidden, friends = [], [], []
    for i, place in enumerate(places):
        array = pixels(i)
        scores = world.logits(array)
        place = best(scores, range(1000)) if i % 2 else place
        put(world.folder / "val" / WNIDS[place] / picture_name(40_000 + i), array)
        hits.append(best(scores, range(1000)) == place)
        covered = array.copy()
        covered[8:24, 8:24] = 0
        hidden.append(best(world.logits(covered), range(1000)) == place)
        if place in known:
            friends.append(scores[known])
    strangers = []
    for i in range(9):
        array = pixels(200 + i)
        put(world.folder / "imagenet-o" / WNIDS[known[i]] / f"{i}.jpg", array)
        strangers.append(world.logits(array)[known])
    world.references["imagenet1k"] = world.references["imagenet-o"] = str(world.folder)
    world.expected["imagenet1k:val", "top1"] = fmean(hits)
    world.expected["imagenet1k:val", "centre-occlusion"] = fmean(hidden)
    confidence = [1 / np.exp(s - s.max()).sum() for s in (*strangers, *friends)]
    truth = [True] * len(strangers) + [False] * len(friends)
    ranked = [truth[i] for i in np.argsort(confidence)]  # no two are equal
    precision = [fmean(ranked[: i + 1]) for i, is_stranger in enumerate(ranked) if is_stranger]
    world.expected["imagenet-o:test", "aupr"] = fmean(precision)


def imagenet_v2(world: World) -> None:
    guesses = [best(world.logits(pixels(300 + i)), range(1000)) for i in range(12)]
    for i, place in enumerate(labels := alternating(guesses, range(1000))):
        put(world.folder / "imagenetv2-matched-frequency-format-val" / str(place) / f"{i}.jpeg", pixels(300 + i))
    world.references["imagenet-v2"] = str(world.folder)
    world.expected["imagenet-v2:test", "top1"] = fmean(a == b for a, b in zip(guesses, labels, strict=True))


def imagenet_real(world: World) -> None:
    """Right where the guess is in a picture's list, also not as its first; one with an empty list is no part of it."""
    lists = read_lists()[:5000]
    put(world.folder / "real" / "val" / picture_name(1), pixels(0))  # the first list is empty
    hits, used = [], set()
    for i in range(9):
        array = pixels(400 + i)
        guess = best(world.logits(array), range(1000))
        fits = [n for n, own in enumerate(lists, 1) if own and (guess in own) == bool(i % 3) and n not in used]
        place = max(fits, key=lambda n: guess in lists[n - 1][1:])  # not the first of its list, where there is such
        used.add(place)
        put(world.folder / "real" / "val" / picture_name(place), array)
        hits.append(bool(i % 3))
    world.references["imagenet-real"] = str(world.folder / "real")
    world.expected["imagenet-real:val", "real/top1"] = fmean(hits)


def lists_of_200(world: World) -> None:
    """ImageNet-A as its tar, ImageNet-R unpacked."""
    for name, start in (("imagenet-a", 500), ("imagenet-r", 600)):
        among = [WNIDS.index(wnid) for wnid in registry.find(name).classes or ()]
        guesses = [best(world.logits(pixels(start + i)), among) for i in range(10)]
        free = [best(world.logits(pixels(start + i)), range(1000)) for i in range(10)]
        labels = alternating(guesses, among)
        files = {f"{name}/{WNIDS[place]}/{i}.jpg": pixels(start + i) for i, place in enumerate(labels)}
        if name == "imagenet-a":
            write_tar(world.folder / "imagenet-a.tar", [(path, png(array)) for path, array in files.items()])
        else:
            for path, array in files.items():
                put(world.folder / path, array)
        world.references[name] = str(world.folder)
        world.expected[f"{name}:test", "top1"] = fmean(a == b for a, b in zip(guesses, labels, strict=True))
        assert world.expected[f"{name}:test", "top1"] > fmean(a == b for a, b in zip(free, labels, strict=True))


def sketch(world: World) -> None:
    guesses = [best(world.logits(pixels(700 + i)), range(1000)) for i in range(6)]
    for i, place in enumerate(labels := alternating(guesses, range(1000))):
        put(world.folder / "sketch" / WNIDS[place] / f"sketch_{i}.JPEG", pixels(700 + i))
    world.references["imagenet-sketch"] = str(world.folder)
    world.expected["imagenet-sketch:test", "top1"] = fmean(a == b for a, b in zip(guesses, labels, strict=True))


def imagenet_c(world: World) -> None:
    """Two pictures in each of the 75 folders, right the more seldom the more severe; one corruption of extra.tar."""
    ratios, arrays = [], [pixels(number) for number in range(8)]
    guesses = [best(world.logits(array), range(1000)) for array in arrays]
    for c, (corruption, reference) in enumerate(alexnet_errors().items()):
        errors = []
        for severity in SEVERITIES:
            wrong = 0
            for i in range(2):
                array, guess = arrays[c % 4 * 2 + i], guesses[c % 4 * 2 + i]
                is_wrong = (c + i) % 5 < severity - 1
                place = (guess + 1) % 1000 if is_wrong else guess
                put(world.folder / "c" / corruption / str(severity) / WNIDS[place] / f"{i}.JPEG", array)
                wrong += is_wrong
            errors.append(wrong / 2)
            world.expected["imagenet-c:test", f"corruption/{corruption}/{severity}"] = wrong / 2
        world.expected["imagenet-c:test", f"corruption/{corruption}"] = fmean(errors)
        ratios.append((fmean(errors), fmean(errors) / reference))
        world.expected["imagenet-c:test", f"ce/{corruption}"] = ratios[-1][1]
    world.expected["imagenet-c:test", "mean-error"] = fmean(error for error, _ in ratios)
    world.expected["imagenet-c:test", "mce"] = fmean(ratio for _, ratio in ratios)
    put(world.folder / "c" / "spatter" / "1" / WNIDS[0] / "0.JPEG", arrays[1])
    for name in ("spatter/1", "spatter"):
        world.expected["imagenet-c:test", f"corruption/{name}"] = float(guesses[1] != 0)
    world.references["imagenet-c"] = str(world.folder / "c")


def objectnet(world: World) -> None:
    """A red frame of two pixels around each picture; a class without a counterpart is no part of it."""
    numbers = objectnet_numbers()
    flat = [one for own in numbers.values() for one in own]
    among, everywhere = [], []
    for i in range(16):
        array = pixels(800 + i)
        array = np.pad(array, ((2, 2), (2, 2), (0, 0)))
        array[:2], array[-2:], array[:, :2], array[:, -2:] = (255, 0, 0), (255, 0, 0), (255, 0, 0), (255, 0, 0)
        scores = world.logits(array[2:-2, 2:-2])
        guess = best(scores, flat)
        name = next(name for name, own in numbers.items() if (guess in own) == bool(i % 4))
        put(world.folder / "images" / name / f"{i}.png", array)
        among.append(guess in numbers[name])
        everywhere.append(best(scores, range(1000)) in numbers[name])
    put(world.folder / "images" / "no_such_class" / "0.png", pixels(0))
    assert fmean(among) > fmean(everywhere) > 0
    world.references["objectnet"] = str(world.folder)
    values = {"objectnet/a": fmean(among), "objectnet/b": fmean(everywhere), "top1": fmean(everywhere)}
    world.expected.update({("objectnet:test", metric): value for metric, value in values.items()})


def si_score(world: World) -> None:
    mapped = si_score_numbers()
    numbered = {place: name for name, place in mapped.items()}
    arrays = [pixels(900 + i) for i in range(30)]
    guessed = [(array, numbered.get(best(world.logits(array), range(1000)))) for array in arrays]
    fitting = [(array, name) for array, name in guessed if name]
    assert fitting
    for wrong, (factor, folder) in enumerate((("size", "area"), ("location", "location"), ("rotation", "rotation"))):
        put(world.folder / folder / (fitting[0][1] or "") / "right.jpg", fitting[0][0])
        for i in range(wrong):
            array, name = guessed[i]
            put(world.folder / folder / ("zebra" if name != "zebra" else "wok") / f"{i}.jpg", array)
        world.expected["si-score:test", f"{factor}/top1"] = 1 / (1 + wrong)
    world.references["si-score"] = str(world.folder)


def lines(results: Path) -> list[dict]:
    return [json.loads(line) for line in results.read_text().splitlines()]


def test_every_set_is_scored_in_one_call_as_a_loop_over_the_pictures_scores_it(world, evaluate, tmp_path, caplog):
    given = [f"{name}={path}" for name, path in world.references.items()]
    results = tmp_path / "results.jsonl"
    outcome = evaluate("robustness", "--run", world.run, "--results", results, "--data", *given)
    assert outcome.code == 0, outcome.err
    found = {(line["config"]["paths"]["data"][0], line["metric"]): line for line in lines(results)}
    assert {key: line["value"] for key, line in found.items()} == pytest.approx(world.expected, abs=1e-9)
    assert "is not as published: 12 pictures, published are 10,000" in caplog.text

    facts = found["imagenet-a:test", "top1"]["config"]
    assert (
        facts["protocol"] == "imagenet-a" and facts["complete"] is False and facts["chance"] == pytest.approx(1 / 200)
    )
    assert facts["published"]["data"] == {"name": "imagenet-a", "split": "test", "whole": False}
    assert found["imagenet1k:val", "centre-occlusion"]["config"]["preprocess"]["side"] == 16
    assert found["objectnet:test", "top1"]["config"]["preprocess"]["border"] == 2
    assert found["imagenet-o:test", "aupr"]["config"]["known_pictures"] < found["imagenet-o:test", "aupr"]["n"]
    named = found["si-score:test", "rotation/top1"]["config"]["published"]["data"]["name"]
    assert named == "si-score-rotation" and found["imagenet-c:test", "mce"]["config"]["better"] == "lower"
    assert len({line["hashes"]["data"] for line in found.values()}) == len(world.references)
    assert found["imagenet-real:val", "real/top1"]["n"] == 9
    sizes = {name: found["imagenet-c:test", name]["n"] for name in ("corruption/fog/1", "corruption/fog", "mce")}
    assert sizes == {"corruption/fog/1": 2, "corruption/fog": 10, "mce": 150}


def test_without_one_folder_there_is_no_mean_corruption_error_but_a_score_of_each_that_is_there(
    world, evaluate, tmp_path, caplog
):
    for severity in (1, 2, 4, 5):
        shutil.copytree(world.folder / "c" / "fog" / str(severity), tmp_path / "c" / "fog" / str(severity))
    results = tmp_path / "results.jsonl"
    outcome = evaluate("robustness", "--run", world.run, "--results", results, "--data", f"imagenet-c={tmp_path}/c")
    assert outcome.code == 0, outcome.err
    assert "imagenet-c:test lacks 71 of its 75 folders (brightness/1" in caplog.text
    found = {line["metric"]: line["value"] for line in lines(results)}
    names = [f"corruption/fog/{severity}" for severity in (1, 2, 4, 5)]
    assert found == {name: world.expected["imagenet-c:test", name] for name in names} | {
        "corruption/fog": pytest.approx(fmean(world.expected["imagenet-c:test", name] for name in names))
    }


# ------------------------------------------------------------------------------------------------- other heads and data


@pytest.fixture
def named_run(tmp_path: Path) -> tuple[Path, Callable[[np.ndarray], np.ndarray]]:
    """A head of the seven classes of the conftest in another order, and one more."""
    tower, rng = atto(), np.random.default_rng(1)
    order = [*reversed(NAMES), "purple"]
    weight = rng.normal(size=(8, tower.embed_dim))
    plain = slow_logits(weight, np.zeros(8))
    bias = -np.mean([plain(pixels(number)) for number in range(12)], axis=0)
    entries = [VocabularyEntry(i, f"{name}.n.01", f"n{i:08d}", [name], "", 1) for i, name in enumerate(order)]
    write_vocabulary(tmp_path / "vocabulary.parquet", entries)
    head = {"head.weight": torch.from_numpy(weight).float(), "head.bias": torch.from_numpy(bias).float()}
    extras = {"vocabulary.parquet": tmp_path / "vocabulary.parquet"}
    run = write_run(tmp_path / "named", tower.state_dict() | head, ["finetune"], classes=8, extras=extras)
    logits = slow_logits(weight, bias)
    return run, lambda array: logits(array)[[order.index(name) for name in (*NAMES, "purple")]]


def test_pictures_of_ones_own_in_the_layout_of_imagenet_c_are_scored_by_the_names_of_their_folders(
    named_run, evaluate, tmp_path
):
    run, logits = named_run
    expected: dict[str, list[float]] = {}
    for i in range(12):
        kind, label = ("rain/1", "rain/10", "dust/3")[i % 3], i % 7
        put(tmp_path / "own" / kind / NAMES[label] / f"{i}.png", pixels(i))
        expected.setdefault(f"corruption/{kind}", []).append(float(logits(pixels(i)).argmax() != label))
    outcome = evaluate("robustness", "--run", run, "--data", f"corrupted={tmp_path}/own")
    assert outcome.code == 0, outcome.err
    found = {line["metric"]: line["value"] for line in lines(run / "results.jsonl")}
    means = {kind: fmean(errors) for kind, errors in expected.items()}
    rain = fmean((means["corruption/rain/1"], means["corruption/rain/10"]))
    means |= {"corruption/rain": rain, "corruption/dust": means["corruption/dust/3"]}
    assert found == pytest.approx(means | {"mean-error": fmean((rain, means["corruption/dust/3"]))})


def test_a_set_of_which_a_picture_cannot_be_read_is_not_whole(named_run, evaluate, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "MAX_BAD", 0.5)
    run, _ = named_run
    for kind in ("rain/1", "dust/1"):
        for i in range(3):
            put(tmp_path / "own" / kind / NAMES[i] / f"{i}.png", pixels(i))
    (tmp_path / "own" / "rain" / "1" / NAMES[0] / "0.png").write_bytes(b"no picture")
    outcome = evaluate("robustness", "--run", run, "--data", f"corrupted={tmp_path}/own")
    assert outcome.code == 0, outcome.err
    found = {line["metric"]: line for line in lines(run / "results.jsonl")}
    whole = {metric: line["config"]["published"]["data"]["whole"] for metric, line in found.items()}
    assert whole == {"corruption/rain/1": False, "corruption/rain": False, "mean-error": False,
                     "corruption/dust/1": True, "corruption/dust": True}  # fmt: skip
    assert {metric: line["config"]["complete"] for metric, line in found.items()} == whole
    assert (found["corruption/rain"]["n"], found["mean-error"]["n"]) == (2, 5)


def test_the_centre_of_any_labelled_pictures_can_be_painted_over(named_run, evaluate, files):
    run, logits = named_run
    outcome = evaluate("occlusion", "--run", run, "--data", files.test, "--classes", files.classes, "--set", "side=70",
                       "fill=mean")  # fmt: skip
    assert outcome.code == 0, outcome.err
    found = {line["metric"]: line["value"] for line in lines(run / "results.jsonl")}
    test = corpus("test", 4, start=100)
    plain, hidden = [], []
    for data, label in zip(test.images, test.labels, strict=True):
        array = np.asarray(Image.open(io.BytesIO(data)))
        covered = array.copy()
        covered[11:21, 11:21] = np.round(255 * MEAN)
        plain.append(logits(array).argmax() == label)
        hidden.append(logits(covered).argmax() == label)
    assert found == pytest.approx({"top1": np.mean(plain), "centre-occlusion": np.mean(hidden)})


def test_a_head_that_lacks_classes_with_pictures_is_refused_before_any_is_decoded(named_run, world, evaluate, tmp_path):
    run, _ = named_run
    outcome = evaluate("robustness", "--run", run, "--data", f"imagenet-v2={world.folder}")
    assert outcome.code == 2
    assert "imagenet-v2:test: the head has no output for" in outcome.err and "it has 8 outputs" in outcome.err
    assert not (run / "features").exists()


def test_imagenet_o_without_the_validation_set_a_set_without_a_rule_and_a_plain_path_are_refused(
    world, evaluate, tmp_path
):
    outcome = evaluate("robustness", "--run", world.run, "--data", f"imagenet-o={world.folder}")
    assert outcome.code == 2 and "imagenet1k=/data/imagenet" in outcome.err
    (tmp_path / "empty").mkdir()
    outcome = evaluate("robustness", "--run", world.run, "--data", f"corrupted={tmp_path}/empty")
    assert outcome.code == 1 and "expected CORRUPTION/SEVERITY/" in outcome.err
    outcome = evaluate("robustness", "--run", world.run, "--data", world.folder)
    assert outcome.code == 2 and "NAME=PATH" in outcome.err


def test_settings_are_checked():
    with pytest.raises(ValueError, match="0 to 224"):
        Config(occlusion=300)
    with pytest.raises(ValueError, match="black or mean"):
        Config(occlusion_fill="grey")
    with pytest.raises(ValueError, match="0 or more"):
        Config(border=-1)
