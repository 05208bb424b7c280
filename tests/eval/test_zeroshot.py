"""Zero-shot against its definition; kept class embeddings; template files."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from data_pipeline.errors import DataError, UsageError
from data_pipeline.images import decode
from eval.base import File, Score
from eval.class_embeddings import class_embeddings
from eval.classes import read_classes
from eval.datasets import open_data
from eval.evaluators.zeroshot import Config, Zeroshot
from eval.features import extract, open_encoder
from eval.report_pictures import guesses
from eval.templates import bundled, read_templates, templates_for
from eval.texts import embed
from maws.data.transforms import normalise
from maws.release import load_tokenizer, load_two_tower, open_release
from tests.eval.conftest import NAMES, picture

CPU = torch.device("cpu")


@pytest.fixture
def names(tmp_path):
    """Classes with one to three names."""
    entries = [
        {"label": i, "names": [name, f"{name} thing", f"very {name}"][: 1 + i % 3]} for i, name in enumerate(NAMES)
    ]
    (tmp_path / "names.json").write_text(json.dumps(entries))
    return tmp_path / "names.json"


def by_definition(lit_run, classes, templates) -> torch.Tensor:
    """Per class: all templates x all names, embed, normalise each, mean, normalise."""
    release = open_release(lit_run)
    towers, tokenize = load_two_tower(release), load_tokenizer(release)
    rows = []
    for own in classes.names:
        each = []
        for template in templates.texts:
            for name in own:
                with torch.no_grad():
                    each.append(F.normalize(towers.encode_text(*tokenize([template.format(name)]))[0], dim=0))
        rows.append(F.normalize(torch.stack(each).mean(dim=0), dim=0))
    return torch.stack(rows)


def test_class_embeddings_are_normalised_means_over_templates_and_names(lit_run, names):
    classes, templates = read_classes(names), read_templates("drawings")
    found = class_embeddings(open_encoder(lit_run, CPU), classes, templates)
    assert_close(found, by_definition(lit_run, classes, templates), atol=1e-5, rtol=1e-4)


def test_zeroshot_is_the_nearest_class_by_cosine(lit_run, names, files):
    data = open_data([files.test], classes=names)
    found = list(Zeroshot(Config(), data, 0).run(open_encoder(lit_run, CPU)))
    scores = {item.metric: item.value for item in found if isinstance(item, Score)}
    classifier = by_definition(lit_run, data.classes, read_templates("default"))
    release = open_release(lit_run)
    towers, right = load_two_tower(release), 0
    for row, label in enumerate(data.test.labels.tolist()):
        image = normalise(release.preprocess(decode(data.test.read(row)))[None], release.preprocess)
        with torch.no_grad():
            right += int((towers.encode_image(image)[0] @ classifier.T).argmax()) == label
    assert scores["top1"] == pytest.approx(right / len(data.test))
    assert set(scores) == {"top1", "top5", "mean_per_class"}  # no class has a synset
    (file,) = [item for item in found if isinstance(item, File)]
    counts = json.loads(file.text)
    assert file.name.startswith("confusion/zeroshot-") and counts["images"] == len(data.test)
    assert sum(each["right"] for each in counts["classes"]) == right
    assert sum(pair["count"] for pair in counts["pairs"]) == len(data.test) - right


def test_ids_of_wordnet_are_no_names_to_ask_for(tmp_path):
    """Class folders of ImageNet without --classes: "a photo of a n01440764." would be scored, and be chance."""
    for label, wnid in enumerate(("n01440764", "n01443537")):
        (tmp_path / wnid).mkdir()
        (tmp_path / wnid / "a.png").write_bytes(picture(label, 0))
    with pytest.raises(UsageError, match="by the names of the classes; give them with --classes"):
        Zeroshot(Config(), open_data([tmp_path]), 0)
    (tmp_path / wnid).rename(tmp_path / "caf\udce9")  # latin-1 on disk
    with pytest.raises(DataError, match=r"the class 'caf\\udce9' of the labels found in the data is not UTF-8 text"):
        open_data([tmp_path])


def test_classes_with_synsets_are_also_scored_by_hierarchy(lit_run, files):
    data = open_data([files.test], classes=files.classes)
    scores = [item for item in Zeroshot(Config(), data, 0).run(open_encoder(lit_run, CPU)) if isinstance(item, Score)]
    assert {"top1", "hierarchy/height", "hierarchy/mistake_distance"} < {score.metric for score in scores}
    assert all(score.chosen == {"templates": "default", "language": "en"} for score in scores)


def test_the_examples_of_the_report_are_as_sure_as_the_bounded_scale_is(lit_run, names, files):
    """A learned scale may lie beyond the bound; what scores pairs never does (and `classify` shows the same)."""
    weights = lit_run / "release" / "model.safetensors"
    save_file(load_file(weights) | {"logit_scale": torch.tensor([9.0])}, weights)  # e to the 9th: 8,103
    encode, data = open_encoder(lit_run, CPU), open_data([files.test], classes=names)
    cosine = (
        extract(encode, data.test, "joint").features @ by_definition(lit_run, data.classes, read_templates("default")).T
    )
    expected = (100 * cosine).softmax(1).max(1).values
    for guess in guesses(lit_run, data, "default", 4):
        assert (expected - guess.top[0][1]).abs().min() < 1e-4


def test_two_classes_and_three_templates_are_the_mean_of_normalised_texts(lit_run, tmp_path):
    """Recipes 11.6-4."""
    (tmp_path / "two.txt").write_text("red; scarlet\nblue\n")
    (tmp_path / "three.txt").write_text("a {}\n{}\na very {} thing\n")
    classes, templates = read_classes(tmp_path / "two.txt"), read_templates(str(tmp_path / "three.txt"))
    found = class_embeddings(open_encoder(lit_run, CPU), classes, templates)
    release = open_release(lit_run)
    towers, tokenize = load_two_tower(release), load_tokenizer(release)
    said = [["a red", "red", "a very red thing", "a scarlet", "scarlet", "a very scarlet thing"],
            ["a blue", "blue", "a very blue thing"]]  # fmt: skip
    for row, texts in zip(found, said, strict=True):
        with torch.no_grad():
            vectors = [towers.encode_text(*tokenize([text]))[0] for text in texts]
        mean = torch.stack([vector / vector.norm() for vector in vectors]).mean(dim=0)
        assert_close(row, mean / mean.norm(), atol=1e-5, rtol=1e-4)


def test_texts_keep_their_order_whatever_their_length_and_number(lit_run, monkeypatch):
    monkeypatch.setattr("eval.texts.TEXTS", 4)
    encode = open_encoder(lit_run, CPU)
    texts = [f"{'very ' * (7 * row % 5)}{name} thing" for row, name in enumerate(NAMES)]
    together = embed(encode, texts)
    assert_close(together, torch.cat([embed(encode, [text]) for text in texts]), atol=1e-5, rtol=1e-4)
    assert_close(together.norm(dim=1), torch.ones(len(texts)))


# ---------------------------------------------------------------------------------------------------------------- kept


def kept(lit_run):
    return sorted((lit_run / "features").glob("classes-*.safetensors"))


def test_class_embeddings_are_kept_and_the_text_tower_rests_the_second_time(lit_run, names, monkeypatch):
    classes, templates = read_classes(names), read_templates("drawings")
    first = class_embeddings(open_encoder(lit_run, CPU), classes, templates)
    assert len(kept(lit_run)) == 1
    with monkeypatch.context() as patch:
        patch.setattr("eval.class_embeddings.embed_batches", lambda *_: pytest.fail("texts were encoded again"))
        assert torch.equal(class_embeddings(open_encoder(lit_run, CPU), classes, templates), first)


def test_other_texts_another_tokenizer_or_other_weights_make_them_again(lit_run, names):
    classes, encode = read_classes(names), open_encoder(lit_run, CPU)
    first = class_embeddings(encode, classes, read_templates("drawings"))
    assert not torch.equal(class_embeddings(encode, classes, read_templates("default")), first)
    assert len(kept(lit_run)) == 2
    (lit_run / "release" / "tokenizer" / "note.txt").write_text("another tokenizer")
    class_embeddings(encode, classes, read_templates("drawings"))
    assert len(kept(lit_run)) == 3
    encode.sha256 = "0" * 64
    class_embeddings(encode, classes, read_templates("drawings"))
    assert len(kept(lit_run)) == 4


def test_a_damaged_file_is_told_and_made_again(lit_run, names, caplog):
    classes, templates = read_classes(names), read_templates("drawings")
    first = class_embeddings(open_encoder(lit_run, CPU), classes, templates)
    kept(lit_run)[0].write_bytes(b"damage")
    assert torch.equal(class_embeddings(open_encoder(lit_run, CPU), classes, templates), first)
    assert "are damaged" in caplog.text
    caplog.clear()
    class_embeddings(open_encoder(lit_run, CPU), classes, templates)
    assert not caplog.text


# ----------------------------------------------------------------------------------------------------------- templates


def test_classes_bring_their_templates_unless_others_are_asked_for():
    food = read_classes("food101")
    assert templates_for(food).texts == ("a photo of {}, a type of food.",)
    assert templates_for(food, "drawings") == read_templates("drawings")
    assert templates_for(food, "imagenet1k").texts == read_classes("imagenet1k").templates


def test_classes_without_templates_take_the_default_ones(names):
    assert templates_for(read_classes(names)) == read_templates("default")


@pytest.mark.parametrize("name", bundled())
def test_bundled_templates_are_whole(name):
    templates = read_templates(name)
    assert len(set(templates.texts)) == len(templates.texts) > 3
    assert all("fox" in text for text in templates("fox"))


def test_braces_in_a_name_are_harmless():
    assert read_templates("default")("{0} {x}")[0] == "a photo of a {0} {x}."


def test_templates_from_files(tmp_path):
    (tmp_path / "t.txt").write_text("\ufeff# a comment\n\n#{}\na {} here\n")
    (tmp_path / "t.json").write_text('["one {}", "two {}"]')
    assert read_templates(str(tmp_path / "t.txt")).texts == ("#{}", "a {} here")
    assert read_templates(str(tmp_path / "t.json")).texts == ("one {}", "two {}")
    assert read_templates(str(tmp_path / "t.txt")).sha256 != read_templates(str(tmp_path / "t.json")).sha256


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("drawing", None, r"cannot read templates from drawing .*did you mean drawings\?"),
        ("t.txt", "no braces\n", "the template 'no braces' of .* must have {} once"),
        ("t.txt", "# only a comment\n", "holds no templates"),
        ("t.json", "{}", "must be a JSON list of text"),
        ("t.json", '{"templates": "x {}"}', "must be a JSON list of text"),
        ("t.json", "[", "is not JSON"),
    ],
)
def test_refused_templates(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
        name = str(tmp_path / name)
    with pytest.raises(DataError, match=message):
        read_templates(name)
