"""Frozen features: right, in order, cached by what they depend on, and without broken pictures."""

import io
import json
import logging
import os
import struct
import threading
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close

from data_pipeline.errors import DataError, UsageError
from data_pipeline.images import decode
from eval import encoder, feature_file, features
from eval.datasets import open_data
from eval.features import Encoder, decoded, extract, open_encoder
from eval.progress import Progress
from maws.data.transforms import Preprocess, normalise
from maws.models.vit import VARIANTS, VisionTransformer
from maws.release import write_release
from maws.weight_files import Weights
from tests.eval.conftest import SIDE, atto, corpus, write_parquet, write_run

CPU = torch.device("cpu")


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
    with pytest.raises(DataError, match="gives nan or infinity on the evaluation data, first for 'test-red-100'"):
        extract(Encoder(tower, Preprocess(SIDE)), data.test)


def test_the_first_picture_with_infinite_features_is_named(data, monkeypatch):
    """The ninth, which is the fourth of the second batch."""
    tower_of, seen = Encoder.all, []

    def all_of(encode, images):
        found = tower_of(encode, images)
        for number in range(len(images)):
            if len(seen) + number >= 8:
                found["mean"][number, 2] = torch.inf
        seen.extend(images)
        return found

    monkeypatch.setattr(Encoder, "all", all_of)
    with pytest.raises(DataError, match=f"first for '{data.test.keys[8]}' \\(mean features\\)"):
        extract(Encoder(atto(), Preprocess(SIDE), batch=5), data.test)


# --------------------------------------------------------------------------------------------------------- honest cache


def counted(monkeypatch) -> list[int]:
    """Sizes of the batches that are really computed."""
    sizes, tower_of = [], Encoder.all
    monkeypatch.setattr(Encoder, "all", lambda e, images: (sizes.append(len(images)), tower_of(e, images))[1])
    return sizes


def test_another_value_in_a_file_of_the_same_size_and_time_is_another_tower(run, data):
    first = extract(open_encoder(run, CPU), data.test).features
    file = run / "release" / "model.safetensors"
    before, whole = file.stat(), bytearray(file.read_bytes())
    whole[-4:] = struct.pack("<f", 3.0)  # the last value of the last tensor
    with file.open("r+b") as opened:
        opened.write(whole)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)
    assert not torch.equal(extract(open_encoder(run, CPU), data.test).features, first)


def as_data(path, keys, images, labels):
    return open_data([write_parquet(path, key=keys, image=images, label=labels)]).test


def test_every_change_of_the_data_misses_the_cache(run, tmp_path, monkeypatch):
    sizes = counted(monkeypatch)
    keys, images, labels = (list(column) for column in corpus("x", 1))
    path = tmp_path / "d.parquet"
    first = extract(open_encoder(run, CPU), as_data(path, keys, images, labels))
    again = extract(open_encoder(run, CPU), as_data(path, keys, images, labels))
    assert torch.equal(first.features, again.features) and sizes == [7]
    pixels = np.array(Image.open(io.BytesIO(images[2])))
    pixels[0, 0, 0] ^= 1  # one bit of one picture
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    picture = extract(
        open_encoder(run, CPU), as_data(path, keys, [*images[:2], buffer.getvalue(), *images[3:]], labels)
    )
    assert [bool(same.all()) for same in picture.features == first.features] == [row != 2 for row in range(7)]
    order = extract(open_encoder(run, CPU), as_data(path, keys[::-1], images[::-1], labels[::-1]))
    assert_close(order.features, first.features.flip(0))
    assert order.keys == first.keys[::-1]
    other = extract(open_encoder(run, CPU), as_data(path, keys, images, [*labels[:5], labels[6], labels[5]]))
    assert other.labels.tolist() != first.labels.tolist()
    assert sizes == [7] * 4


def test_precision_and_resolution_are_part_of_what_is_cached(run, data, monkeypatch):
    sizes = counted(monkeypatch)
    exact = extract(open_encoder(run, CPU), data.test).features
    rough = extract(open_encoder(run, CPU, precision="bf16"), data.test).features
    large = extract(open_encoder(run, CPU, image_size=48), data.test).features
    assert len(sizes) == len(list((run / "features").iterdir())) == 3
    assert not torch.equal(exact, rough) and not torch.equal(exact, large)
    assert_close(rough, exact, atol=0.08, rtol=0.05)  # 8 bits of mantissa, and some blocks
    assert rough.dtype == torch.float32


@pytest.mark.parametrize("fact", ["torch", "pillow", "libjpeg_turbo", "code"])
def test_other_software_computes_again(run, data, monkeypatch, fact):
    extract(open_encoder(run, CPU), data.test)
    sizes = counted(monkeypatch)
    monkeypatch.setattr(feature_file, "software", lambda own=feature_file.software(): own | {fact: "another"})
    extract(open_encoder(run, CPU), data.test)
    assert len(sizes) == 1


def test_the_software_that_is_recorded_is_what_pixels_and_features_come_from():
    found = feature_file.software()
    assert found["torch"] == torch.__version__.split("+")[0] or found["torch"] == torch.__version__
    assert len(found["code"]) == 64
    for name in feature_file.CODE:
        assert (feature_file.ROOT / name).is_file()


def flip_a_byte(whole: bytes) -> bytes:
    return whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:]


DAMAGES = {
    "a flipped bit": flip_a_byte,
    "cut off": lambda whole: whole[:-100],
    "empty": lambda whole: b"",
    "no safetensors file": lambda whole: b"PK" + whole[2:],
    "of something else": lambda whole: whole.replace(b"tower", b"joint"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_not_as_it_was_written_is_made_again(run, data, monkeypatch, damage):
    first = extract(open_encoder(run, CPU), data.test, "mean")
    (file,) = (run / "features").iterdir()
    whole = file.read_bytes()
    file.write_bytes(DAMAGES[damage](whole))
    assert file.read_bytes() != whole
    sizes = counted(monkeypatch)
    assert_close(extract(open_encoder(run, CPU), data.test, "mean").features, first.features, atol=0, rtol=0)
    assert len(sizes) == 1 and file.read_bytes() == whole


def test_processes_that_make_the_same_file_do_each_other_no_harm(run, data):
    found = []
    encoders = [open_encoder(run, CPU) for _ in range(4)]
    threads = [threading.Thread(target=lambda e=e: found.append(extract(e, data.test))) for e in encoders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(torch.equal(one.features, found[0].features) for one in found)
    assert len(list((run / "features").iterdir())) == 1  # and nothing that was left half-written
    assert torch.equal(extract(open_encoder(run, CPU), data.test).features, found[0].features)


def test_weights_that_are_replaced_while_they_are_read_are_refused(run, monkeypatch):
    def slow(release, load=encoder.load_image_tower):
        tower = load(release)
        file = release.weights
        file.write_bytes(file.read_bytes())
        return tower

    monkeypatch.setattr(encoder, "load_image_tower", slow)
    with pytest.raises(DataError, match="were replaced while they were read; start again"):
        open_encoder(run, CPU)


def test_an_encoder_without_a_hash_keeps_nothing(data, tmp_path):
    extract(Encoder(atto(), Preprocess(SIDE), cache=tmp_path), data.test)
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------- resolution


def test_at_another_resolution_positions_are_interpolated_and_pictures_scaled(run, data):
    encode = open_encoder(run, CPU, image_size=48)
    table = atto().pos_embed  # 1 1+16 D, of a grid of 4 x 4
    places = F.interpolate(table[:, 1:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2), size=(6, 6), mode="bicubic")
    expected = torch.cat([table[:, :1], places.flatten(2).transpose(1, 2)], dim=1)
    assert_close(encode.tower.pos_embed, expected)
    tower = VisionTransformer(VARIANTS["atto"], 48).eval()
    tower.load_state_dict(atto().state_dict() | {"pos_embed": expected})
    by_hand = Encoder(tower, Preprocess(48))
    assert_close(extract(encode, data.test).features, extract(by_hand, data.test).features)
    assert encode.preprocess == Preprocess(48)


def test_the_crop_keeps_its_share_of_the_picture():
    wide = Preprocess(224, 256, squash=True)
    assert encoder.scaled(wide, 448) == replace(wide, image_size=448, resize=512)
    assert encoder.scaled(wide, 518) == replace(wide, image_size=518, resize=592)
    assert encoder.scaled(Preprocess(224), 448) == Preprocess(448)


@pytest.mark.parametrize(("size", "near"), [(50, 48), (53, 56), (3, 8), (-8, 8)])
def test_a_size_that_no_patches_fill_is_refused_with_the_nearest(run, size, near):
    message = f"--image-size {size} is not a multiple of the encoder's patch of 8 pixels; the nearest that is: {near}"
    with pytest.raises(UsageError, match=message):
        open_encoder(run, CPU, image_size=size)


def test_relative_positions_have_one_resolution():
    relative = replace(VARIANTS["atto"], positions="relative")
    encoder.check(relative, 32, 32)
    with pytest.raises(UsageError, match=r"relative positions, one value for each offset .* leave --image-size away"):
        encoder.check(relative, 32, 64)


# --------------------------------------------------------------------------------------------------- settings and speed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "fp16"}, "--precision fp16 is not known; use fp32 or bf16"),
        ({"batch": 0}, "--batch 0 must be at least 1; the default is 128"),
        ({"partition": "zero2"}, "--partition zero2 is not known; use auto, none, zero3"),
        ({"partition": "zero3"}, "this is one process; start it with torchrun"),
    ],
)
def test_settings_that_cannot_be_had_are_told(run, settings, message):
    with pytest.raises(UsageError, match=message):
        open_encoder(run, CPU, **settings)


def test_a_full_gpu_names_the_batch(data, monkeypatch):
    def full(self, images):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(VisionTransformer, "forward", full)
    with pytest.raises(UsageError, match="not enough memory for 96 pictures of 32 pixels at a time; give --batch 48"):
        extract(Encoder(atto(), Preprocess(SIDE), batch=96), data.test)


def test_a_tower_without_class_token_has_no_features_of_one(data):
    without = VisionTransformer(replace(VARIANTS["atto"], class_tokens=0, pool="mean"), SIDE)
    with pytest.raises(UsageError, match="there are no cls features: this encoder has no class token; use mean"):
        extract(Encoder(without, Preprocess(SIDE)), data.test, "cls")


def test_a_tower_that_norms_the_mean_has_all_kinds_and_others_are_told_theirs():
    tower = VisionTransformer(replace(VARIANTS["atto"], pool="mean_norm"), SIDE)
    tower.load_state_dict(atto(3).state_dict())
    encode, images = Encoder(tower, Preprocess(SIDE)), torch.randint(0, 256, (3, 3, SIDE, SIDE), dtype=torch.uint8)
    plain = VisionTransformer(VARIANTS["atto"], SIDE)  # the same weights, every token normed
    plain.load_state_dict(tower.state_dict())
    raw, normed = tower(encode.prepare(images)), plain(encode.prepare(images)).detach()
    expected = {"cls": normed[:, 0], "mean": normed[:, 1:].mean(1), "mean_norm": tower.norm(raw[:, 1:].mean(1))}
    found = encode.all(images)
    assert found.keys() == expected.keys() and encode.own("pooled") == "mean_norm"
    for kind, given in found.items():
        torch.testing.assert_close(given, expected[kind], msg=kind)
    with pytest.raises(UsageError, match=r"no mean_norm features: this encoder does not take .*; use cls or mean$"):
        Encoder(plain, Preprocess(SIDE)).own("mean_norm")


def test_rows_move_up_in_place():
    table = torch.arange(30.0).reshape(10, 3)
    rows = torch.tensor([0, 3, 4, 9])
    expected = table[rows].clone()
    found = features._compact(table, rows)
    assert torch.equal(found, expected) and found.data_ptr() == table.data_ptr()


def test_views_of_another_size_come_in_order(data):
    seen = []

    def view(image, position):
        seen.append(position)
        return torch.full((3, 5, 7), position, dtype=torch.uint8)

    found = list(decoded(data.test, [7, 3, 27, 0, 11], Preprocess(SIDE), batch=2, view=view))
    assert [one.images[:, 0, 0, 0].tolist() for one in found] == [[7, 3], [27, 0], [11]]
    assert found[0].images.shape == (2, 3, 5, 7) and sorted(seen) == [0, 3, 7, 11, 27]


def test_only_some_batches_are_decoded_ahead(data, monkeypatch):
    """Not the whole data set: 1.28 million pictures are 190 GB of pixels."""
    monkeypatch.setattr("eval.decode.workers", lambda: 1)
    read = []
    watched = replace(data.test, read=lambda row: (read.append(row), data.test.read(row))[1])
    batches = decoded(watched, range(28), Preprocess(SIDE), batch=2)
    next(batches)
    batches.close()
    assert len(read) <= 2 * (2 + 8)


def test_progress_says_how_long_it_waited_for_pictures(data, monkeypatch):
    monkeypatch.setattr("eval.progress.QUIET", 0.0)
    stream = io.StringIO()
    monkeypatch.setattr(features, "Progress", lambda what, total: Progress(what, total, stream))
    extract(Encoder(atto(), Preprocess(SIDE)), data.test)
    assert "28 of 28" in stream.getvalue() and "% of the time waiting for pictures" in stream.getvalue()
