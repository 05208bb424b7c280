"""Zero-shot against its definition; template files."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from data_pipeline.errors import DataError
from data_pipeline.images import decode
from eval.classes import read_classes
from eval.datasets import open_data
from eval.evaluators.zeroshot import Config, Zeroshot, class_embeddings
from eval.features import open_encoder
from eval.templates import bundled, read_templates
from maws.data.transforms import normalise
from maws.release import load_tokenizer, load_two_tower, open_release
from tests.eval.conftest import NAMES

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
        rows.append(F.normalize(sum(each) / len(each), dim=0))
    return torch.stack(rows)


def test_class_embeddings_are_normalised_means_over_templates_and_names(lit_run, names):
    classes, templates = read_classes(names), read_templates("drawings")
    found = class_embeddings(open_encoder(lit_run, CPU), classes, templates)
    assert_close(found, by_definition(lit_run, classes, templates), atol=1e-5, rtol=1e-4)


def test_zeroshot_is_the_nearest_class_by_cosine(lit_run, names, files):
    data = open_data([files.test], classes=names)
    scores = {score.metric: score.value for score in Zeroshot(Config(), data, 0).run(open_encoder(lit_run, CPU))}
    classifier = by_definition(lit_run, data.classes, read_templates("default"))
    release = open_release(lit_run)
    towers, right = load_two_tower(release), 0
    for row, label in enumerate(data.test.labels.tolist()):
        image = normalise(release.preprocess(decode(data.test.read(row)))[None], release.preprocess)
        with torch.no_grad():
            right += int((towers.encode_image(image)[0] @ classifier.T).argmax()) == label
    assert scores["top1"] == pytest.approx(right / len(data.test))
    assert set(scores) == {"top1", "top5", "mean_per_class"}


@pytest.mark.parametrize("name", bundled())
def test_bundled_templates_are_whole(name):
    templates = read_templates(name)
    assert len(set(templates.texts)) == len(templates.texts) > 3
    assert all("fox" in text for text in templates("fox"))


def test_braces_in_a_name_are_harmless():
    assert read_templates("default")("{0} {x}")[0] == "a photo of a {0} {x}."


def test_templates_from_files(tmp_path):
    (tmp_path / "t.txt").write_text("# a comment\n\n#{}\na {} here\n")
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
        ("t.json", "[", "is not JSON"),
    ],
)
def test_refused_templates(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
        name = str(tmp_path / name)
    with pytest.raises(DataError, match=message):
        read_templates(name)
