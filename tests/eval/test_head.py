"""Zero-shot from a head over synsets: the mapping of classes, the score against a loop, and a prior that is undone."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from data_pipeline.errors import UsageError
from data_pipeline.shardset import VocabularyEntry, write_vocabulary
from eval import head as head_module
from eval.classes import Classes, read_classes
from eval.evaluators.wsphead import Config, Wsphead
from eval.head import Settings, head_scores, load_head
from eval.hierarchy import nouns
from eval.metrics import NEVER, topk
from eval.synset_match import as_text, match_classes
from maws.checkpoint import CheckpointError
from maws.objectives.multi_label import Head
from maws.release import open_release
from tests.eval.conftest import atto, write_run

# dog is there itself with two below it, cats only below, vehicles only above; nothing above or below `love`
VOCABULARY = ("dog.n.01", "poodle.n.01", "corgi.n.01", "tabby.n.01", "siamese_cat.n.01", "vehicle.n.01", "red.n.01")
COUNTS = (900, 30, 20, 7, 5, 400, 0)
WNIDS = ("n02084071", "n02113335", "n02112826", "n02123045", "n02123597", "n04524313", "n04962784")


def classes(*entries: tuple[str | None, str]) -> Classes:
    """Of (synset, names separated by commas)."""
    names = tuple(tuple(text.split(",")) for _, text in entries)
    return Classes(names, tuple(synset for synset, _ in entries), "a test", "c" * 64)


def vocabulary(counts=COUNTS) -> list[VocabularyEntry]:
    return [
        VocabularyEntry(i, name, wnid, [name.split(".")[0]], "", count)
        for i, (name, wnid, count) in enumerate(zip(VOCABULARY, WNIDS, counts, strict=True))
    ]


def wsp_run(folder, kind="linear", loss="softmax", counts=COUNTS, **changes):
    """A finished WSP run whose head has random weights."""
    torch.manual_seed(5)
    tower = atto()
    head = Head(tower.embed_dim, len(VOCABULARY), kind, loss)
    weights = tower.state_dict() | {f"head.{name}": value for name, value in head.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_vocabulary(folder / "vocabulary.parquet", vocabulary(counts))
    config = {"classes": len(VOCABULARY), "head": kind, "loss": loss} | changes
    return write_run(folder, weights, ["wsp"], extras={"vocabulary.parquet": folder / "vocabulary.parquet"}, **config)


CLASSES = classes(
    ("dog.n.01", "dog"),
    ("n02113335", "a poodle by its id"),
    (None, "cat,house cat,true cat"),
    ("motorcycle.n.01", "motorbike"),
    (None, "qwertzuiop"),
    ("red.n.01", "red"),
)
INDICES = [(0,), (1,), (3, 4), (5,), (), (6,)]


# ------------------------------------------------------------------------------------------------------------- mapping


def test_classes_are_found_by_synset_id_or_name_and_matched_with_what_the_vocabulary_has():
    matches = match_classes(CLASSES, vocabulary())
    assert [(m.synset, m.found, m.matched) for m in matches] == [
        ("dog.n.01", "synset", "same"),
        ("poodle.n.01", "synset", "same"),
        ("cat.n.01", "name", "below"),
        ("motorcycle.n.01", "synset", "above"),
        (None, "none", "none"),
        ("red.n.01", "synset", "same"),
    ]
    assert [m.indices for m in matches] == INDICES
    assert matches[2].synsets == ("tabby.n.01", "siamese_cat.n.01")
    kept = json.loads(as_text(matches))
    assert kept["matched"] == {"same": 3, "below": 1, "above": 1, "none": 1}
    assert [entry["name"] for entry in kept["classes"]] == [names[0] for names in CLASSES.names]


def test_hyponyms_speak_for_a_class_of_the_vocabulary_where_that_is_asked_for():
    dog, poodle, *_ = match_classes(CLASSES, vocabulary(), below=True)
    assert dog.indices == (0, 1, 2) and poodle.indices == (1,)


def test_among_the_senses_of_a_name_the_one_that_all_names_share_wins_then_one_of_the_vocabulary():
    (animal,), (club,) = (match_classes(classes((None, names)), vocabulary()) for names in ("bat", "bat,cricket bat"))
    assert (animal.synset, club.synset) == ("bat.n.01", "cricket_bat.n.01")
    bird = VocabularyEntry(0, "crane.n.05", "n02012849", ["crane"], "", 3)  # the first sense is a writer
    (crane,) = match_classes(classes((None, "Crane (a bird)")), [bird])
    assert (crane.synset, crane.found, crane.matched) == ("crane.n.05", "name", "same")


def test_a_name_means_what_the_other_classes_mean_and_a_longer_one_what_it_ends_in():
    dogs = match_classes(classes((None, "boxer"), (None, "beagle"), ("poodle.n.01", "x"), (None, "my dalmatian")), [])
    assert [match.synset for match in dogs] == ["boxer.n.04", "beagle.n.01", "poodle.n.01", "dalmatian.n.02"]
    assert [match.found for match in dogs] == ["name", "name", "synset", "ending"]
    athletes = match_classes(classes((None, "boxer"), (None, "wrestler"), ("swimmer.n.02", "x")), [])
    assert athletes[0].synset == "boxer.n.01"


def test_names_alone_find_more_of_cifar_100_than_the_first_sense_of_each():
    given = read_classes("cifar100")
    found = match_classes(replace(given, synsets=(None,) * len(given)), [])
    firsts = [nouns().senses(names[0])[:1] for names in given.names]
    firsts = [nouns().synset(rows[0]).name if rows else None for rows in firsts]
    ours = sum(match.synset == synset for match, synset in zip(found, given.synsets, strict=True))
    assert ours > 5 + sum(first == synset for first, synset in zip(firsts, given.synsets, strict=True))


def test_names_in_another_language_are_not_taken_for_english_ones():
    italian = replace(classes((None, "cane"), ("dog.n.01", "cane")), language="it")
    assert [match.synset for match in match_classes(italian, vocabulary())] == [None, "dog.n.01"]


# --------------------------------------------------------------------------------------------------------------- score


@pytest.mark.parametrize(("kind", "loss"), [("linear", "softmax"), ("mlp", "softmax"), ("mlp", "sigmoid")])
def test_a_score_is_the_log_of_the_posterior_over_the_prior_by_a_loop(tmp_path, monkeypatch, kind, loss):
    release = open_release(wsp_run(tmp_path / "wsp", kind, loss))
    features = torch.randn(11, release.shape.width)
    monkeypatch.setattr(head_module, "MOST_SCORES", 3 * len(VOCABULARY))  # rows in batches of three
    found = head_scores(features, release, CLASSES, Settings(tau=0.7, temperature=2.0))
    with torch.no_grad():
        logits = load_head(release)(features).double() / 2.0
    for row in range(11):
        z = logits[row].tolist()
        whole = sum(math.exp(value) for value in z)
        posterior = [math.exp(v) / whole if loss == "softmax" else 1 / (1 + math.exp(-v)) for v in z]
        for label, indices in enumerate(INDICES):
            if not indices:
                assert found[row, label] == NEVER
                continue
            share = sum(max(1, COUNTS[i]) for i in indices) / sum(max(1, count) for count in COUNTS)
            expected = math.log(sum(posterior[i] for i in indices)) - 0.7 * math.log(share)
            assert float(found[row, label]) == pytest.approx(expected, abs=1e-4)


def test_the_prior_may_be_the_mean_posterior_of_the_pictures_themselves(tmp_path):
    release = open_release(wsp_run(tmp_path / "wsp", "linear"))
    features = torch.randn(64, release.shape.width)
    posterior = load_head(release)(features).softmax(dim=1)
    own = torch.stack([posterior[:, list(i)].sum(dim=1) for i in INDICES if i], dim=1)  # B 5
    expected = (own / own.mean(dim=0)).log()
    found = head_scores(features, release, CLASSES, Settings(prior="mean"))
    assert_close(found[:, [0, 1, 2, 3, 5]], expected, atol=1e-5, rtol=1e-5)


def test_a_head_that_learned_skewed_tags_is_right_again_once_the_prior_is_divided_out(tmp_path):
    """Four kinds of pictures, tagged 1000 : 100 : 10 : 1. Trained on that, nearly all is taken for the first; the
    same pictures, each kind as often, are told apart when the prior is taken out, and not when it is left in."""
    counts, width = (1000, 100, 10, 1), atto().embed_dim
    names = ("dog.n.01", "lamp.n.01", "tabby.n.01", "vehicle.n.01")
    generator = torch.Generator().manual_seed(0)
    centres = 0.5 * torch.randn(4, width, generator=generator)

    def pictures(kinds: torch.Tensor) -> torch.Tensor:
        return centres[kinds] + torch.randn(len(kinds), width, generator=generator)

    # the exact posterior of these Gaussians: linear scores m·x - |m|²/2 + log p
    head = Head(width, 4, "linear")
    share = torch.tensor(counts, dtype=torch.float).log() - math.log(sum(counts))
    head[0].weight.data, head[0].bias.data = centres.clone(), share - centres.square().sum(dim=1) / 2
    weights = atto().state_dict() | {f"head.{name}": value for name, value in head.state_dict().items()}
    entries = [
        VocabularyEntry(i, name, f"n{i:08d}", [], "", n) for i, (name, n) in enumerate(zip(names, counts, strict=True))
    ]
    write_vocabulary(tmp_path / "vocabulary.parquet", entries)
    extras = {"vocabulary.parquet": tmp_path / "vocabulary.parquet"}
    config = {"classes": 4, "head": "linear", "loss": "softmax"}
    release = open_release(write_run(tmp_path / "wsp", weights, ["wsp"], extras=extras, **config))
    set_ = classes(*((name, "x") for name in names))

    labels = torch.arange(4).repeat_interleave(500)
    features = pictures(labels)
    ideal = topk(features @ centres.T - centres.square().sum(dim=1) / 2, labels, 1)
    found = {tau: topk(head_scores(features, release, set_, Settings(tau=tau)), labels, 1) for tau in (0.0, 1.0)}
    assert found[1.0] == pytest.approx(ideal)
    assert found[0.0] < ideal - 0.1


def test_a_class_without_a_synset_is_never_right_also_where_hardly_any_other_is_left(tmp_path):
    few = classes(("dog.n.01", "dog"), ("red.n.01", "red"), *[(None, f"qwertz{letter}") for letter in "abcd"])
    release = open_release(wsp_run(tmp_path / "wsp"))
    scores = head_scores(torch.randn(6, release.shape.width), release, few)
    assert topk(scores, torch.arange(6), 5) == pytest.approx(2 / 6)  # the dog and the red, of two that are ranked


# ----------------------------------------------------------------------------------------------------------- evaluator


def test_the_command_keeps_scores_the_mapping_and_the_confusion(tmp_path, files, evaluate, caplog):
    run = wsp_run(tmp_path / "wsp")
    named = [{"label": i, "name": name, "synset": s} for i, (s, name) in enumerate(
        [("dog.n.01", "dog"), ("poodle.n.01", "poodle"), (None, "cat"), ("motorcycle.n.01", "bike"),
         (None, "qwertzuiop"), ("red.n.01", "red"), ("lamp.n.01", "lamp")])]  # fmt: skip
    (tmp_path / "classes.json").write_text(json.dumps(named))
    outcome = evaluate("wsphead", "--run", run, "--data", files.test, "--classes", tmp_path / "classes.json")
    assert outcome.code == 0, outcome.err
    assert "no synset stands for qwertzuiop, lamp; they count as wrong" in caplog.text
    lines = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    metrics = {line["metric"]: line for line in lines}
    assert {"top1", "top5", "mean_per_class", "hierarchy/height"} <= metrics.keys()
    assert metrics["top1"]["config"]["chosen"]["matched"] == {"same": 3, "below": 1, "above": 1, "none": 2}
    assert metrics["top1"]["config"]["wsphead"]["tau"] == 1.0
    (mapping,) = (run / "synsets").glob("*.json")
    (confused,) = (run / "confusion").glob("wsphead-*.json")
    assert len(json.loads(mapping.read_text())["classes"]) == 7
    found = json.loads(confused.read_text())
    assert found["images"] == 28 and found["classes"][4]["right"] == found["classes"][6]["right"] == 0
    right = sum(entry["right"] for entry in found["classes"])
    assert metrics["top1"]["value"] == pytest.approx(right / 28)
    (tmp_path / "file").touch()
    asked = ("--classes", tmp_path / "classes.json", "--results", tmp_path / "file" / "r.jsonl")
    outcome = evaluate("wsphead", "--run", run, "--data", files.test, *asked)
    assert outcome.code == 1 and "give --results in a folder that can be written to" in outcome.err


def test_settings_are_checked():
    with pytest.raises(ValueError, match="prior must be counts or mean"):
        Config(prior="uniform")
    with pytest.raises(ValueError, match="temperature must be above 0"):
        Config(temperature=0.0)
    assert Wsphead.needs_text is False


# -------------------------------------------------------------------------------------------------------------- errors


def test_a_release_without_a_head_or_with_another_vocabulary_is_refused(tmp_path, run):
    features = torch.zeros(1, atto().embed_dim)
    with pytest.raises(CheckpointError, match="needs the release of a wsp run"):
        head_scores(features, open_release(run), CLASSES)
    smaller = wsp_run(tmp_path / "a")
    write_vocabulary(smaller / "release" / "vocabulary.parquet", vocabulary()[:-1])
    with pytest.raises(CheckpointError, match="has 6 synsets and the head 7 outputs"):
        head_scores(features, open_release(smaller), CLASSES)
    (smaller / "release" / "vocabulary.parquet").unlink()
    with pytest.raises(CheckpointError, match="nobody knows what its head's outputs mean"):
        head_scores(features, open_release(smaller), CLASSES)


def test_classes_that_are_all_strangers_are_refused(tmp_path):
    release = open_release(wsp_run(tmp_path / "wsp"))
    with pytest.raises(UsageError, match="none of the 1 classes of a test is a synset of the vocabulary"):
        head_scores(torch.zeros(1, release.shape.width), release, classes((None, "qwertzuiop")))
