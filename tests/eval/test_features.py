"""Frozen features: right, in order, cached by what they depend on, and without broken pictures."""

import json
import logging
from dataclasses import asdict, replace

import pytest
import torch
from torch.testing import assert_close

from data_pipeline.errors import DataError
from data_pipeline.images import decode
from eval import features
from eval.datasets import open_data
from eval.features import Encoder, decoded, extract, open_encoder
from maws.data.transforms import Preprocess, normalise
from maws.models.vit import VARIANTS
from maws.release import write_release
from maws.weight_files import Weights
from tests.eval.conftest import SIDE, atto, corpus, write_parquet, write_run

CPU = torch.device("cpu")


@pytest.fixture
def data(files):
    return open_data([files.test], [files.train], files.classes)


def test_features_are_class_tokens_and_patch_means_one_by_one(run, data, monkeypatch):
    monkeypatch.setattr(features, "BATCH", 5)  # the last batch has three
    sizes, tower_of = [], Encoder.all
    monkeypatch.setattr(Encoder, "all", lambda e, images: (sizes.append(len(images)), tower_of(e, images))[1])
    encode = open_encoder(run, CPU)
    found, patches = extract(encode, data.test), extract(encode, data.test, "mean")  # both from one pass
    tower, preprocess = atto(), Preprocess(SIDE)
    for row in range(len(data.test)):
        image = preprocess(decode(data.test.read(row)))
        with torch.no_grad():
            expected = tower.forward_features(normalise(image[None], preprocess))[0]
        assert_close(found.features[row], expected[0], atol=1e-5, rtol=1e-4)
        assert_close(patches.features[row], expected[1:].mean(0), atol=1e-5, rtol=1e-4)
    assert sizes == [5, 5, 5, 5, 5, 3]
    assert found.features.dtype == torch.float32
    assert found.labels.tolist() == data.test.labels.tolist()
    assert found.keys == data.test.keys


def test_decoding_keeps_the_order(data):
    pieces = list(decoded(data.test, range(len(data.test)), Preprocess(SIDE), batch=3))
    assert [row for piece in pieces for row in piece.rows] == list(range(len(data.test)))


def test_features_are_extracted_once(run, data, monkeypatch):
    first = extract(open_encoder(run, CPU), data.test)
    monkeypatch.setattr(features, "_compute", lambda *_: pytest.fail("the cache was not used"))
    second = extract(open_encoder(run, CPU), data.test)
    assert_close(first.features, second.features, atol=0, rtol=0)
    assert first.keys == second.keys
    assert [file.suffix for file in (run / "features").iterdir()] == [".safetensors"]


def test_other_weights_preprocessing_or_data_are_extracted_again(run, data, tmp_path):
    encode = open_encoder(run, CPU)
    base = extract(encode, data.test).features
    other = open_encoder(write_run(tmp_path / "other", atto(seed=1).state_dict(), ["wsp"]), CPU)
    other.cache = encode.cache
    assert not torch.equal(extract(other, data.test).features, base)
    encode.preprocess = replace(encode.preprocess, resize=SIDE + 8)
    wide = extract(encode, data.test).features
    assert not torch.equal(wide, base)
    encode.preprocess = replace(encode.preprocess, squash=True)
    extract(encode, data.test)
    assert len(extract(open_encoder(run, CPU), data.train)) == len(data.train)
    assert len(list((run / "features").iterdir())) == 5


def test_the_same_weights_read_another_way_are_extracted_again(run, data):
    """Heads and pooling are settings of config.json, which no tensor shows: an import may be made again with others."""
    base = extract(open_encoder(run, CPU), data.test).features
    config = json.loads((run / "release" / "config.json").read_text())
    config["model"]["heads"] *= 2
    (run / "release" / "config.json").write_text(json.dumps(config))
    assert not torch.equal(extract(open_encoder(run, CPU), data.test).features, base)


@pytest.mark.parametrize("given", ["", "release", "release/ema.safetensors", "alone", "alone/ema.safetensors"])
def test_the_cache_lies_beside_a_release_also_when_the_file_of_its_mean_is_given(tmp_path, data, given):
    """A release by itself keeps what is made of it; one that belongs to a run leaves it to the run's folder."""
    config = {"stage": "wsp", "lineage": ["wsp"], "variant": "atto", "model": asdict(VARIANTS["atto"]), "train": {}}
    weights, ema = (Weights.of(dict(atto(seed=seed).state_dict())) for seed in (0, 1))
    folder = tmp_path / ("alone" if given.startswith("alone") else "run/release")
    write_release(folder, weights, config | {"image_size": SIDE}, Preprocess(SIDE), ema=ema)
    path = tmp_path / given if given.startswith("alone") else tmp_path / "run" / given
    found = extract(open_encoder(path, CPU), data.test).features
    seed = 1 if given.endswith("safetensors") else 0
    assert_close(found, extract(Encoder(atto(seed=seed), Preprocess(SIDE)), data.test).features)
    home = tmp_path / ("alone" if given.startswith("alone") else "run")
    assert len(list((home / "features").iterdir())) == 1


def test_a_damaged_cache_is_made_again(run, data, caplog):
    first = extract(open_encoder(run, CPU), data.test)
    file = next((run / "features").iterdir())
    file.write_bytes(file.read_bytes()[:-100])
    with caplog.at_level(logging.WARNING):
        second = extract(open_encoder(run, CPU), data.test)
    assert "are damaged" in caplog.text
    assert_close(first.features, second.features)


def test_a_cache_that_cannot_be_written_is_only_a_warning(run, data, caplog):
    (run / "features").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        assert len(extract(open_encoder(run, CPU), data.test)) == len(data.test)
    assert "features are not cached" in caplog.text


def broken_data(tmp_path, broken: int, per_class: int = 30):
    pictures = corpus("x", per_class)
    images = [image[:200] if row < broken else image for row, image in enumerate(pictures.images)]
    path = write_parquet(tmp_path / "b.parquet", key=pictures.keys, image=images, label=pictures.labels)
    return open_data([path])


def test_a_broken_picture_is_dropped_counted_and_reported(tmp_path, caplog):
    data = broken_data(tmp_path, broken=2)
    with caplog.at_level(logging.WARNING):
        found = extract(Encoder(atto(), Preprocess(SIDE)), data.test)
    assert found.keys == data.test.keys[2:] and len(found.features) == len(found.labels) == 208
    assert sum(found.broken.values()) == 2
    assert "2 of 210 pictures of the evaluation data cannot be read and are left out: 2 truncated" in caplog.text


def test_more_than_one_percent_broken_is_an_error(tmp_path):
    data = broken_data(tmp_path, broken=3)
    message = r"more than 1% of the 210 pictures of the evaluation data cannot be read, such as 'x-red-0' \(truncated\)"
    with pytest.raises(DataError, match=message):
        extract(Encoder(atto(), Preprocess(SIDE)), data.test)


def test_an_encoder_that_gives_nan_is_refused(data):
    tower = atto()
    with torch.no_grad():
        tower.norm.bias.fill_(torch.nan)
    with pytest.raises(DataError, match="gives nan or infinity"):
        extract(Encoder(tower, Preprocess(SIDE)), data.test)
