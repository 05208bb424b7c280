"""The head of a finetuned classifier on cached features, and what it is asked that it cannot answer."""

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from data_pipeline.errors import UsageError
from data_pipeline.shardset import VocabularyEntry, write_vocabulary
from eval import correct
from eval.base import Score
from eval.classes import plain_classes, read_classes
from eval.classifier import load_classifier, logits
from eval.datasets import open_data
from eval.evaluators.finetune import Config, Finetune, refuse_other_classes
from eval.features import decoded, open_encoder
from eval.results import read
from maws.checkpoint import CheckpointError
from maws.models.vit import VisionTransformer, build_vit
from tests.eval.conftest import NAMES, Files, atto, write_run

CPU = torch.device("cpu")


def classifier_run(folder: Path, names: tuple[str, ...] = NAMES, tower: VisionTransformer | None = None) -> Path:
    tower, generator = tower or atto(), torch.Generator().manual_seed(2)
    head = {"head.weight": torch.randn(len(names), 32, generator=generator),
            "head.bias": torch.randn(len(names), generator=generator)}  # fmt: skip
    words = [VocabularyEntry(i, f"{name}.n.01", "", [name], "", 1) for i, name in enumerate(names)]
    folder.mkdir(parents=True, exist_ok=True)
    write_vocabulary(folder / "vocabulary.parquet", words)
    weights = dict(tower.state_dict()) | head
    more = {} if tower.shape.pool == "cls" else {"model": vars(tower.shape)}
    return write_run(folder / "run", weights, ["mae", "finetune"], classes=len(names), trainable="last 1",
                     extras={"vocabulary.parquet": folder / "vocabulary.parquet"}, **more)  # fmt: skip


@pytest.mark.parametrize("pool", ["cls", "mean_norm"])
def test_scores_are_those_of_the_whole_model_and_come_from_the_cache(pool, files: Files, tmp_path):
    tower = build_vit("atto", image_size=32, seed=5, pool=pool).eval()
    encode = open_encoder(classifier_run(tmp_path, tower=tower), CPU)
    data = open_data([files.test], classes=files.classes)
    classifier = load_classifier(encode)
    assert (classifier.classes, classifier.names, classifier.wnids[0]) == (7, NAMES, None)
    found = logits(encode, classifier, data.test)
    pictures = torch.cat([b.images for b in decoded(data.test, range(len(data.test)), encode.preprocess)])
    with torch.no_grad():
        tokens = tower(encode.prepare(pictures))
        pooled = tokens[:, 0] if pool == "cls" else tower.norm(tokens[:, 1:].mean(dim=1))
        wanted = pooled @ classifier.weight.T + classifier.bias
    assert_close(found.features, wanted, rtol=0, atol=1e-5)
    encode.tower.forward = None  # type: ignore[assignment] - asked again, the tower is not needed
    assert torch.equal(logits(encode, classifier, data.test).features, found.features)


def test_the_evaluator_counts_what_the_scores_say(files: Files, tmp_path, evaluate):
    run = classifier_run(tmp_path)
    encode, data = open_encoder(run, CPU), open_data([files.test], classes=files.classes)
    scores = {s.metric: s for s in Finetune(Config(), data, 0).run(encode) if isinstance(s, Score)}
    found = logits(encode, load_classifier(encode), data.test)
    best = found.features.argsort(dim=1, descending=True)
    hits = sum(int(row[0]) == int(label) for row, label in zip(best, found.labels, strict=True))
    five = sum(int(label) in row[:5].tolist() for row, label in zip(best, found.labels, strict=True))
    assert (scores["top1"].value, scores["top5"].value) == (hits / 28, five / 28)
    per_class = [(best[found.labels == c, 0] == c).double().mean() for c in range(7)]
    assert scores["mean_per_class"].value == pytest.approx(float(sum(per_class)) / 7)
    assert scores["top1"].facts == {"protocol": "finetune", "trainable": "last 1"}
    done = evaluate("finetune", "--run", run, "--data", files.test, "--classes", files.classes)
    assert done.code == 0, done.err
    kept = {result.metric: correct.read(run, result) for result in read(run / "results.jsonl")}
    assert kept["top1"] is not None and kept["top5"] is None
    assert kept["top1"].tolist() == (best[:, 0] == found.labels).tolist()  # what paired tests of two runs need


def test_other_classes_are_refused(files: Files, tmp_path):
    classifier = load_classifier(open_encoder(classifier_run(tmp_path), CPU))
    refuse_other_classes(classifier, read_classes(files.classes))
    numbers = plain_classes([str(i) for i in range(7)], "here", named=False)
    refuse_other_classes(classifier, numbers)  # nothing to compare
    with pytest.raises(UsageError, match="the head has 7 outputs and the data 5 classes"):
        refuse_other_classes(classifier, plain_classes(list("abcde"), "here"))
    turned = load_classifier(open_encoder(classifier_run(tmp_path / "turned", NAMES[1:] + NAMES[:1]), CPU))
    with pytest.raises(UsageError, match=r"class 0 of .* is 'red', which is output 6 \(7 classes are elsewhere\)"):
        refuse_other_classes(turned, read_classes(files.classes))
    other = load_classifier(open_encoder(classifier_run(tmp_path / "other", tuple("abcdefg")), CPU))
    with pytest.raises(UsageError, match="'red' in the data and 'a' in the release"):
        refuse_other_classes(other, read_classes(files.classes))


def test_a_release_without_a_classifiers_head_says_what_to_do(run: Path, tmp_path):
    with pytest.raises(CheckpointError, match="without a classifier's head; finetune it on a labelled set"):
        load_classifier(open_encoder(run, CPU))
    synsets = write_run(tmp_path / "synsets", dict(atto().state_dict()) | {"head.0.weight": torch.zeros(3, 32),
                        "head.0.bias": torch.zeros(3)}, ["wsp"], head="linear", classes=3)  # fmt: skip
    with pytest.raises(CheckpointError, match="ask it with python -m eval wsphead"):
        load_classifier(open_encoder(synsets, CPU))


def test_a_thousand_outputs_without_a_vocabulary_are_imagenets_in_the_order_of_their_wnids(tmp_path):
    weights = dict(atto().state_dict()) | {"head.weight": torch.zeros(1000, 32), "head.bias": torch.zeros(1000)}
    classifier = load_classifier(open_encoder(write_run(tmp_path / "in1k", weights, ["imported"], classes=1000), CPU))
    assert (classifier.wnids[0], classifier.names[0], classifier.wnids[999]) == ("n01440764", "tench", "n15075141")
    assert list(classifier.wnids) == sorted(map(str, classifier.wnids))
