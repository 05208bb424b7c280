"""`python -m eval classify`: what is in a picture, by whatever a release has; and one broken file is not the end."""

import io
import json

import pytest
import torch
from rich.cells import cell_len
from torch.testing import assert_close

from data_pipeline.images import decode
from data_pipeline.shardset import VocabularyEntry, write_vocabulary
from maws.data.transforms import normalise
from maws.objectives.multi_label import Head
from maws.release import load_image_tower, load_tokenizer, load_two_tower, open_release, read_weights
from tests.eval.conftest import NAMES, atto, picture, write_classes, write_run

WORDS = ("dog", "cat", "tree")


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "album"
    (folder / "deep").mkdir(parents=True)
    for name, label in (("b.png", 1), ("a.png", 0), ("deep/c.png", 2)):
        (folder / name).write_bytes(picture(label, 7))
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture
def wsp_run(tmp_path):
    """A WSP run whose head has random weights, over three synsets."""
    torch.manual_seed(3)
    tower, head = atto(), Head(atto().embed_dim, 3, "linear")
    torch.nn.init.normal_(head[-1].weight)
    entries = [VocabularyEntry(i, f"{w}.n.01", f"n{i:08d}", [w], "", 10 + 30 * i) for i, w in enumerate(WORDS)]
    write_vocabulary(tmp_path / "vocabulary.parquet", entries)
    weights = tower.state_dict() | {f"head.{name}": value for name, value in head.state_dict().items()}
    return write_run(
        tmp_path / "wsp_head", weights, ["wsp"], classes=3, head="linear", loss="softmax",
        extras={"vocabulary.parquet": tmp_path / "vocabulary.parquet"},
    )  # fmt: skip


def lines(outcome) -> list[dict]:
    return [json.loads(line) for line in outcome.out.splitlines()]


def seen(run, pictures):
    """Normalised pictures a, b, c as the release wants them."""
    release = open_release(run)
    files = (pictures / name for name in ("a.png", "b.png", "deep/c.png"))
    return normalise(torch.stack([release.preprocess(decode(file.read_bytes())) for file in files]), release.preprocess)


def test_a_lit_run_ranks_names_by_the_softmax_of_its_scaled_cosines(evaluate, lit_run, pictures, tmp_path):
    (tmp_path / "bare.txt").write_text("{}\n")
    asked = ("--classes", "red, blue,white", "--templates", tmp_path / "bare.txt", "--json", "--top", 2)
    outcome = evaluate("classify", pictures, "--run", lit_run, *asked)
    assert outcome.code == 0, outcome.err
    release = open_release(lit_run)
    with torch.no_grad():
        ids, mask = load_tokenizer(release)(["red", "blue", "white"])
        towers = load_two_tower(release)
        images, texts, scale = towers(seen(lit_run, pictures), ids, mask)
    cosines = images @ texts.T
    rows = lines(outcome)
    assert [row["image"] for row in rows] == [str(pictures / name) for name in ("a.png", "b.png", "deep/c.png")]
    for row, cosine in zip(rows, cosines, strict=True):
        best = sorted(range(3), key=lambda i: -cosine[i])[:2]
        assert [answer["name"] for answer in row["classes"]] == [("red", "blue", "white")[i] for i in best]
        found = torch.tensor([[answer["cosine"], answer["probability"]] for answer in row["classes"]])
        assert_close(found, torch.stack([cosine, (scale * cosine).softmax(0)], 1)[best], atol=1e-5, rtol=1e-4)


def test_tables_align_names_of_any_script(evaluate, lit_run, pictures):
    outcome = evaluate("classify", pictures / "a.png", "--run", lit_run, "--classes", "dog, 日本の家, größer, [b]x[/b]")
    first, *rows = outcome.out.splitlines()
    assert first == str(pictures / "a.png") and len(rows) == 4
    assert len({cell_len(row[: row.index("%")]) for row in rows}) == 1
    assert any("[b]x[/b]" in row for row in rows) and any("日本の家" in row for row in rows)
    assert [row.split()[0] for row in rows] == ["1", "2", "3", "4"]


def test_a_class_file_and_a_language_may_be_given(evaluate, lit_run, pictures, tmp_path):
    classes = write_classes(tmp_path / "classes.json")
    outcome = evaluate("classify", pictures / "a.png", "--run", lit_run, "--classes", classes, "--json", "--top", 99)
    answers = lines(outcome)[0]["classes"]
    assert {answer["name"] for answer in answers} == set(NAMES) and answers[0]["synset"].endswith(".n.01")
    assert sum(answer["probability"] for answer in answers) == pytest.approx(1, abs=1e-4)
    asked = ("--classes", "chien, chat", "--language", "fr")
    assert evaluate("classify", pictures / "a.png", "--run", lit_run, *asked).code == 0


def test_names_may_be_more_than_a_file_name_holds(evaluate, lit_run, pictures):
    names = ", ".join(f"thing number {number}" for number in range(40))
    outcome = evaluate("classify", pictures / "a.png", "--run", lit_run, "--classes", names, "--json")
    assert outcome.code == 0, outcome.err


def test_a_wsp_run_shows_its_synsets_or_classes_with_the_prior_taken_out(evaluate, wsp_run, pictures):
    release = open_release(wsp_run)
    weights = read_weights(release, r"head\..*")
    (weight,) = (value for name, value in weights.items() if name.endswith("weight"))
    (bias,) = (value for name, value in weights.items() if name.endswith("bias"))
    tower = load_image_tower(release)
    with torch.no_grad():
        posterior = (tower.pooled(tower(seen(wsp_run, pictures))) @ weight.T + bias).softmax(1)
    for row, expected in zip(lines(evaluate("classify", pictures, "--run", wsp_run, "--json")), posterior, strict=True):
        found = {answer["synset"]: answer["probability"] for answer in row["classes"]}
        assert found == pytest.approx({f"{w}.n.01": p for w, p in zip(WORDS, expected.tolist(), strict=True)}, rel=1e-3)
    likelihood = posterior[:, [1, 0]] / torch.tensor([40.0, 10.0])  # cat and dog, by their images in training
    asked = ("--classes", "cat, dog, qwertzuiop", "--json")
    for row, expected in zip(lines(evaluate("classify", pictures, "--run", wsp_run, *asked)), likelihood, strict=True):
        found = {answer["name"]: answer["probability"] for answer in row["classes"]}
        cat, dog = (expected / expected.sum()).tolist()
        assert found == pytest.approx({"cat": cat, "dog": dog}, rel=1e-3)


def test_an_imported_classifier_shows_its_own_classes(evaluate, pictures, tmp_path):
    tower, head = atto(), torch.nn.Linear(atto().embed_dim, 7)
    weights = tower.state_dict() | {f"head.{name}": value for name, value in head.state_dict().items()}
    run = write_run(tmp_path / "imported", weights, ["imported"], classes=7)
    with torch.no_grad():
        expected = head(tower.pooled(tower(seen(run, pictures)))).softmax(1)
    plain = lines(evaluate("classify", pictures, "--run", run, "--json", "--top", 1))
    assert [row["classes"][0]["name"] for row in plain] == [f"class {int(i)}" for i in expected.argmax(1)]
    named = lines(
        evaluate("classify", pictures, "--run", run, "--json", "--classes", write_classes(tmp_path / "c.json"))
    )
    for row, p in zip(named, expected, strict=True):
        assert row["classes"][0]["name"] == NAMES[p.argmax()]
        assert row["classes"][0]["probability"] == pytest.approx(p.max().item(), rel=1e-3)
    outcome = evaluate("classify", pictures, "--run", run, "--classes", "dog, cat")
    assert outcome.code == 2 and "tells 7 classes apart, and --classes has 2" in outcome.err


def test_a_broken_picture_is_named_and_the_others_go_on(evaluate, wsp_run, pictures, monkeypatch, caplog):
    """Names may come from stdin; the order is kept, and the exit code says that something was wrong."""
    (pictures / "b.png").write_bytes(picture(1, 1)[:300])
    listed = f"{pictures / 'a.png'}\n\n{pictures / 'b.png'}\n{pictures / 'none.png'}\n{pictures / 'deep/c.png'}\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(listed))
    outcome = evaluate("classify", "-", "--run", wsp_run, "--json")
    assert outcome.code == 1
    assert [row.get("error") for row in lines(outcome)] == [None, "truncated", "no such file or directory", None]
    assert f"{pictures / 'b.png'} cannot be read: truncated" in caplog.text
    table = evaluate("classify", pictures / "b.png", pictures / "a.png", "--run", wsp_run)
    assert table.code == 1 and str(pictures / "a.png") in table.out and "b.png" not in table.out


def test_wrong_usage_is_told(evaluate, run, lit_run, wsp_run, pictures, tmp_path):
    def refused(*arguments):
        outcome = evaluate("classify", *arguments)
        assert outcome.code in (1, 2) and "Traceback" not in outcome.err
        return outcome.err.splitlines()[-1]

    message = refused(pictures, "--run", run)
    assert (
        "is a wsp release: it has neither a text tower nor a head" in message and "--stage lit --init-from" in message
    )
    assert "is asked by the names of classes" in refused(pictures, "--run", lit_run)
    assert "to choose between classes takes two or more" in refused(pictures, "--run", lit_run, "--classes", "dog,")
    assert "names 'dog' twice" in refused(pictures, "--run", lit_run, "--classes", "dog, cat, dog")
    assert "imagenet1k" in refused(pictures, "--run", lit_run, "--classes", "imagnet1k")
    assert "--templates are sentences for a text tower" in refused(pictures, "--run", wsp_run, "--templates", "default")
    (tmp_path / "empty").mkdir()
    assert "holds no pictures" in refused(tmp_path / "empty", "--run", lit_run)
    assert "--top 0: show at least one class" in refused(pictures, "--run", lit_run, "--top", 0)
    assert "unrecognized arguments: --clases" in refused(pictures, "--run", lit_run, "--clases", "x")
