"""The scoring rules of the robustness sets against loops, scikit-learn and cases worked out by hand; their mappings."""

import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from torch.testing import assert_close

from data_pipeline.errors import DataError, UsageError
from eval.classes import Classes, plain_classes
from eval.classifier import Classifier, spellings_of
from eval.published import registry
from eval.robust.corruption_error import SEVERITIES, corruption_errors
from eval.robust.detection import anomaly, average_precision
from eval.robust.head_classes import head_outputs, imagenet, refuse_unknown
from eval.robust.mappings import MAPPINGS, alexnet_errors, objectnet_numbers, read, si_score_numbers
from eval.robust.real import number, picture, read_lists
from eval.robust.top1 import chance, padded, predictions, right
from eval.robust.views import bordered, occluded
from maws.data.transforms import Preprocess

WNID = "n01440764"

# --------------------------------------------------------------------------------------------------------------- top-1


def test_restricted_and_several_right_outputs_count_as_a_loop_over_the_pictures_counts_them():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(60, 9, generator=generator)
    asked = torch.tensor([1, 4, 5, 8])
    lists = [[i % 9] if i % 3 else [i % 9, (i + 1) % 9, (i + 4) % 9] for i in range(60)]
    for among in (None, asked):
        hits = right(predictions(logits, among), padded(lists)).tolist()
        candidates = range(9) if among is None else among.tolist()
        expected = [max(candidates, key=lambda s, row=row: row[s].item()) for row in logits]
        assert hits == [guess in own for guess, own in zip(expected, lists, strict=True)]
        assert 0 < sum(hits) < 60


def test_of_equal_scores_the_first_counts_and_a_picture_with_no_right_output_is_never_right():
    logits = torch.zeros(2, 4)
    assert predictions(logits, torch.tensor([2, 3])).tolist() == [2, 2]
    assert right(predictions(logits), padded([[], [0]])).tolist() == [False, True]
    for rule in (lambda scores: predictions(scores), lambda scores: anomaly(scores, torch.tensor([0, 1]))):
        with pytest.raises(DataError, match="nan or infinity"):
            rule(logits / 0)


def test_chance_is_the_mean_share_of_right_outputs():
    assert chance(padded([[3], [1, 2], [0, 1, 2]]), 8) == pytest.approx((1 + 2 + 3) / 3 / 8)


# ----------------------------------------------------------------------------------------------------------- detection


def test_average_precision_is_scikit_learns_and_that_of_a_loop_also_where_scores_are_equal():
    from sklearn.metrics import average_precision_score

    rng = np.random.default_rng(0)
    for levels in (5, 1000):
        scores, positive = rng.integers(0, levels, 300) / levels, rng.random(300) < 0.3
        loop, recall = 0.0, 0.0
        for threshold in sorted(set(scores), reverse=True):
            taken = scores >= threshold
            now = (positive & taken).sum() / positive.sum()
            loop, recall = loop + (now - recall) * (positive & taken).sum() / taken.sum(), now
        found = average_precision(torch.from_numpy(scores), torch.from_numpy(positive))
        assert found == pytest.approx(loop, abs=1e-12)
        assert found == pytest.approx(average_precision_score(positive, scores), abs=1e-12)
    with pytest.raises(ValueError, match="both kinds"):
        average_precision(torch.rand(3), torch.ones(3).bool())


def test_the_anomaly_is_one_minus_the_highest_probability_among_the_asked_outputs_only():
    logits = torch.randn(20, 7, generator=torch.Generator().manual_seed(1))
    asked = torch.tensor([0, 2, 6])
    expected = [1 - max(np.exp(row[asked]) / np.exp(row[asked]).sum()) for row in logits.double().numpy()]
    assert_close(anomaly(logits, asked), torch.tensor(expected, dtype=torch.double))
    sure = anomaly(torch.tensor([[60.0, 0.0], [70.0, 0.0]]), torch.tensor([0, 1]))
    assert sure[0] > sure[1] > 0  # float32 probabilities of both are 1


# --------------------------------------------------------------------------------------------------------- corruptions


def test_the_mean_corruption_error_divides_each_corruption_by_its_reference():
    errors = {"fog": dict(zip(SEVERITIES, (0.1, 0.2, 0.3, 0.4, 0.5), strict=True)),
              "snow": dict.fromkeys(SEVERITIES, 0.6), "spatter": {1: 0.9}}  # fmt: skip
    found = corruption_errors(errors, {"fog": 0.5, "snow": 0.8})
    assert found.normalised == pytest.approx({"fog": 0.6, "snow": 0.75})
    assert found.mce == pytest.approx(0.675) and found.mean_error == pytest.approx(0.45)
    assert found.mean == pytest.approx({"fog": 0.3, "snow": 0.6, "spatter": 0.9}) and not found.missing


def test_alexnet_itself_has_a_mean_corruption_error_of_one():
    errors = {name: {severity: error + 0.01 * (severity - 3) for severity in SEVERITIES}
              for name, error in alexnet_errors().items()}  # fmt: skip
    found = corruption_errors(errors, alexnet_errors())
    assert found.mce == pytest.approx(1) and found.mean_error == pytest.approx(sum(alexnet_errors().values()) / 15)


def test_without_all_severities_there_is_no_mean_corruption_error():
    found = corruption_errors({"fog": {1: 0.1, 2: 0.3}}, {"fog": 0.5, "snow": 0.8})
    assert found.mce is None and found.mean_error is None and not found.normalised
    assert found.missing == ("fog/3", "fog/4", "fog/5", *(f"snow/{s}" for s in SEVERITIES))
    assert found.mean == pytest.approx({"fog": 0.2})


# --------------------------------------------------------------------------------------------------------------- views


def test_the_occluded_square_is_in_the_centre_grows_with_the_picture_and_nothing_else_changes():
    pixels = np.random.default_rng(0).integers(1, 256, (50, 70, 3)).astype(np.uint8)
    plain = Preprocess(48, 56)
    for fill, colour in (("black", (0, 0, 0)), ("mean", (124, 116, 104))):
        view = occluded(plain, 112, fill)
        before, after = plain(Image.fromarray(pixels)), view(Image.fromarray(pixels))
        inside = torch.zeros(48, 48, dtype=torch.bool)
        inside[12:36, 12:36] = True
        assert_close(after[:, ~inside], before[:, ~inside])
        assert after[:, inside].unique(dim=1).flatten().tolist() == list(colour)
        assert asdict(view) == asdict(plain) | {"side": 24, "fill": fill}  # what the cache of features is named by


def test_the_border_is_cut_off_before_the_resize():
    pixels = np.full((24, 34, 3), 200, np.uint8)
    pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:] = 0, 0, 0, 0
    plain = Preprocess(20)
    assert bordered(plain, 2)(Image.fromarray(pixels)).unique().tolist() == [200]
    assert_close(bordered(plain, 2)(Image.fromarray(pixels)), plain(Image.fromarray(pixels[2:-2, 2:-2])))
    assert_close(bordered(plain, 0)(Image.fromarray(pixels)), plain(Image.fromarray(pixels)))


# ---------------------------------------------------------------------------------------------------------------- head


def head(names: Sequence[str], wnids: Sequence[str | None], spellings=None) -> Classifier:
    count = len(names)
    known = spellings or tuple(frozenset({name, wnid or name}) for name, wnid in zip(names, wnids, strict=True))
    return Classifier(torch.zeros(count, 4), torch.zeros(count), tuple(names), tuple(wnids), tuple(known))


def test_outputs_are_found_by_wnid_then_by_a_name_that_only_one_has_and_in_any_order():
    wnids = [own[-1] for own in imagenet().folders]
    backwards = head([imagenet().name(i) for i in reversed(range(1000))], wnids[::-1])
    assert head_outputs(imagenet(), backwards) == {i: 999 - i for i in range(1000)}
    some = head(
        ["tench", "missile", "Mountain"],
        [None, None, None],
        tuple(map(frozenset, (["tench"], ["missile"], ["mountain"]))),
    )
    assert head_outputs(imagenet(), some) == {0: 0, 970: 2}  # ImageNet-1k has two missiles
    own = plain_classes(("red", "Dark Green", "blue"), "a test")
    assert head_outputs(own, head(["x", "blue", "darkgreen"], [None] * 3)) == {1: 2, 2: 1}


def test_numbers_stand_for_each_other_only_where_neither_side_has_names_and_there_are_as_many():
    numbered = Classes((("0",), ("1",)), (None, None), "a test", "c" * 64, named=False)
    nameless = head(["class 0", "class 1"], [None, None], (frozenset(), frozenset()))
    assert head_outputs(numbered, nameless) == {0: 0, 1: 1}
    assert head_outputs(numbered, head(["red", "blue"], [None, None])) == {}
    with pytest.raises(
        UsageError, match=r"here: the head has no output for 2 of the classes that have pictures \(0, 1\)"
    ):
        refuse_unknown(["0", "1", "0"], "here", nameless)


# ------------------------------------------------------------------------------------------------------------ mappings


def test_the_class_lists_are_those_that_timm_carries():
    folder = Path(timm.data.__file__).parent / "_info"
    for name in ("a", "r"):
        theirs = sorted((folder / f"imagenet_{name}_synsets.txt").read_text().split())
        assert list(registry.find(f"imagenet-{name}").classes or ()) == theirs
    real = (folder / "imagenet_real_labels.json").read_bytes()
    assert real == (MAPPINGS / "real.json").read_bytes()
    (hashes,) = registry.find("imagenet-real").lists.values()
    assert hashes.sha256 == hashlib.sha256(real).hexdigest()


def test_every_class_of_a_set_is_one_of_imagenet_and_no_class_twice():
    known = {own[-1] for own in imagenet().folders}
    for name in ("imagenet-a", "imagenet-o", "imagenet-r"):
        classes = registry.find(name).classes
        assert isinstance(classes, tuple) and len(set(classes)) == len(classes) == 200 and set(classes) <= known
        assert list(classes) == sorted(classes)
    flat = [one for own in objectnet_numbers().values() for one in own]
    assert len(objectnet_numbers()) == 113 and len(flat) == len(set(flat)) == 125
    assert tuple(objectnet_numbers()) == registry.find("objectnet").classes
    assert tuple(si_score_numbers()) == registry.find("si-score").classes and len(si_score_numbers()) == 61
    assert len(alexnet_errors()) == 15
    assert set(alexnet_errors()) == set(registry.find("imagenet-c").split("test").options["corruptions"])


def test_mapped_classes_bear_names_of_the_class_they_are_mapped_to():
    """Not of all: a `flute` is ImageNet's flute, a `pig` its hog. A shifted list would agree nearly nowhere."""
    ours = spellings_of(imagenet())
    si = sum(re.sub("[^a-z]", "", name) in ours[number] for name, number in si_score_numbers().items())
    objects = sum(any(folder.replace("_", "") in ours[n] for n in own) for folder, own in objectnet_numbers().items())
    assert si >= 45 and objects >= 50


def test_every_mapping_says_where_it_comes_from_and_the_readme_has_its_hash():
    readme = (MAPPINGS / "README.md").read_text()
    files = sorted(MAPPINGS.glob("*.json"))
    assert re.findall(r"\| (\S+\.json) \|", readme) == [file.name for file in files]
    for file in files:
        assert f"{hashlib.sha256(file.read_bytes()).hexdigest()} |" in readme, file
        if file.name != "real.json":  # byte for byte the published file
            assert all(
                one["from"].startswith(("https://", "Hendrycks")) for one in json.loads(file.read_text())["sources"]
            )


def test_reals_lists_are_those_of_the_pictures_numbers():
    lists = read_lists()
    assert len(lists) == 50_000 and sum(1 for own in lists if own) == 46_837
    assert lists[:3] == ((), (970, 795), (230, 231))  # as in the published file
    assert number(f"val/n01751748/{picture(17)}") == 17 and number("ILSVRC2012_val_1.JPEG") is None


# ------------------------------------------------------------------------------------------------------------- layouts


def lay(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def problems(name: str, folder: Path) -> str:
    published = registry.find(name)
    return "; ".join(registry.verify(published, str(published.evaluate), folder).problems)


def test_what_is_missing_of_a_set_is_said(tmp_path):
    lay(tmp_path / "c", f"fog/1/{WNID}/a.JPEG", f"fog/2/{WNID}/a.JPEG", f"spatter/1/{WNID}/a.JPEG")
    said = problems("imagenet-c", tmp_path / "c")
    assert "73 folders are not there: brightness/1" in said and "fog/1 has 1 pictures, published are 50,000" in said
    lay(tmp_path / "si", "area/ambulance/1.jpg", "location/wok/1.jpg")
    said = problems("si-score", tmp_path / "si")
    assert "object rotation is not there: expected rotation/ or" in said
    assert "object size has 1 pictures, published are 92,884" in said
    lay(tmp_path / "si", "area/no_such_thing/1.jpg")
    with pytest.raises(DataError, match="what is no class of si-score: no_such_thing"):
        problems("si-score", tmp_path / "si")


def test_reals_own_file_is_checked_and_pictures_without_labels_are_counted(tmp_path):
    lay(tmp_path, f"val/{picture(1)}", f"val/n01751748/{picture(2)}", "val/other.JPEG", "real.json")
    assert "real.json has bytes 1, published is 388478" in problems("imagenet-real", tmp_path)
    shutil.copy(MAPPINGS / "real.json", tmp_path / "real.json")
    assert "real.json" not in problems("imagenet-real", tmp_path)
    source = registry.open_split(registry.find("imagenet-real"), "val", tmp_path)
    assert source.keys == [picture(1), picture(2)] and source.labels == [None, 970]
    assert source.left_out["no_real_label"] == 1


def test_objectnets_own_mapping_is_compared_with_ours(tmp_path):
    lay(tmp_path, "images/air_freshener/a.png", "images/chair/a.png")
    labels = {folder: one["label"] for folder, one in read("objectnet")["classes"].items()}
    classes = {label: "; ".join("x" * len(objectnet_numbers()[folder])) for folder, label in labels.items()}
    own = tmp_path / "mappings"
    own.mkdir()
    (own / "folder_to_objectnet_label.json").write_text(json.dumps(labels | {"air_freshener": "Air freshener"}))
    (own / "objectnet_to_imagenet_1k.json").write_text(json.dumps(classes))
    assert "112 classes have no picture" in problems("objectnet", tmp_path)
    assert "another way" not in problems("objectnet", tmp_path)
    (own / "objectnet_to_imagenet_1k.json").write_text(json.dumps(classes | {labels["chair"]: "x"}))
    assert "mappings/ maps 1 classes in another way than ours: chair" in problems("objectnet", tmp_path)
    (own / "objectnet_to_imagenet_1k.json").write_text("[")
    with pytest.raises(DataError, match="is not JSON"):
        problems("objectnet", tmp_path)
    source = registry.find("objectnet")
    (own / "objectnet_to_imagenet_1k.json").unlink()
    assert registry.open_split(source, "test", tmp_path).left_out["no_imagenet_class"] == 1
