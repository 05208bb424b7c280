import io
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.errors import DataError
from data_pipeline.images import BadImage
from data_pipeline.shardset import ShardSet
from maws import stages
from maws.config import ConfigError, DataConfig, override
from maws.data import loader
from maws.data.feed import Feed
from maws.data.loader import LoadImage, StepDataset
from maws.data.order import Item, Order, Part
from maws.data.transforms import Preprocess, crop_box
from maws.quarantine import Quarantine


def dataset(stage: str, shards: ShardSet, tmp_path, part: Part = Part(), settings=()) -> StepDataset:
    module = stages.load(stage)
    cfg = override(module.PRESETS["debug"], [f"data.shards={shards.path}", *settings])
    cfg = module.prepare(cfg, shards, tmp_path)
    return module.dataset(cfg, shards, tmp_path, part)


@pytest.mark.parametrize("stage", ["mae", "wsp"])
def test_two_ranks_together_load_what_one_process_loads(stage, shards, tmp_path):
    whole = dataset(stage, shards, tmp_path)[4]
    halves = [dataset(stage, shards, tmp_path, Part(rank, 2))[4] for rank in range(2)]
    where = {key: (half, i) for half in halves for i, key in enumerate(half["keys"])}
    assert sorted(whole["keys"]) == sorted(halves[0]["keys"] + halves[1]["keys"])
    for i, key in enumerate(whole["keys"]):
        if whole["keys"].count(key) > 1:
            continue  # two visits of one sample have different crops
        half, j = where[key]
        assert torch.equal(half["image"][j], whole["image"][i])
        if stage == "mae":
            assert torch.equal(half["ids_shuffle"][j], whole["ids_shuffle"][i])


def test_wsp_sees_the_patches_that_mask_ratio_leaves(shards, tmp_path):
    batch = dataset("wsp", shards, tmp_path, settings=["mask_ratio=0.5"])[4]
    assert batch["ids_keep"].shape == (16, 8)
    assert all(len(set(row.tolist())) == 8 and row.min() >= 0 and row.max() < 16 for row in batch["ids_keep"])
    assert "ids_keep" not in dataset("wsp", shards, tmp_path)[4]
    with pytest.raises(ConfigError, match=r"mask_ratio=0\.99 must be at least 0 and leave some of 16 patches"):
        dataset("wsp", shards, tmp_path, settings=["mask_ratio=0.99"])


def test_a_broken_sample_is_replaced_by_the_next_of_its_stream_and_noted(shards):
    order = Order(shards, seed=0, batch_size=8, streams=4, resample=False)
    broken = order.item(1, 2, 0)
    image = LoadImage(DataConfig(), shards, 0, 32)

    def load(item: Item):
        if item.key == broken.key:
            raise BadImage("truncated")
        return image(item)

    batch = StepDataset(order, Part(), load)[2]
    shard = shards.manifest["shards"][broken.shard]["name"]
    assert batch["bad"] == [{"key": broken.key, "shard": shard, "reason": "truncated"}]
    assert len(batch["keys"]) == 8 and broken.key not in batch["keys"]
    assert batch["keys"][2] == order.item(1, 2, 0, skip=1).key


def test_a_shard_set_with_nothing_readable_ends_the_run(shards, monkeypatch):
    def load(item: Item):
        raise BadImage("undecodable")

    monkeypatch.setattr(loader, "MAX_REPLACEMENTS", 5)
    with pytest.raises(DataError, match="5 samples in a row could not be read"):
        StepDataset(Order(shards, seed=0, batch_size=8), Part(), load)[0]


def test_too_many_bad_samples_end_the_run_and_each_is_listed_once(tmp_path):
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", max_bad=0.02, samples=100)
    bad = [{"key": k, "shard": "00000", "reason": "truncated"} for k in "ab"]
    quarantine.add(1, bad)
    quarantine.add(2, bad[:1])
    assert len((tmp_path / "quarantine.jsonl").read_text().splitlines()) == 2
    resumed = Quarantine(tmp_path / "quarantine.jsonl", max_bad=0.02, samples=100)
    with pytest.raises(DataError, match=r"3 of 100 .* \(3 truncated\), more than data.max_bad allows \(2\)"):
        resumed.add(3, [{"key": "c", "shard": "00000", "reason": "truncated"}])


def test_bad_samples_are_counted_by_reason_also_after_half_a_line_of_a_killed_writer(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    path.write_text('{"step": 1, "key": "a", "shard": "0", "reason": "truncated"}\n{"step": 2, "key": "b", "sh')
    quarantine = Quarantine(path, max_bad=1.0, samples=100)
    for key, reason in (("b", "truncated"), ("c", "undecodable"), ("d", "0.tar ends inside sample 3; run `…`")):
        quarantine.add(3, [{"key": key, "shard": "0", "reason": reason}])
    assert quarantine.report() == {
        "data/bad_samples": 4, "data/bad_samples/truncated": 2, "data/bad_samples/undecodable": 1,
        "data/bad_samples/unreadable": 1,
    }  # fmt: skip
    assert Quarantine(path, max_bad=1.0, samples=100).report() == quarantine.report()
    assert Quarantine(tmp_path / "none.jsonl", max_bad=1.0, samples=100).report() == {}


def test_damaged_pictures_on_disk_are_replaced_alike_whatever_the_number_of_workers(shards, tmp_path):
    copy = tmp_path / "shards"
    shutil.copytree(shards.path, copy)
    places = {(0, 3): b"\0" * 40, (2, 5): b"\x89PNG\r\n\x1a\n" + b"\0" * 30}  # nothing at all, and no more than a start
    for (shard, row), junk in places.items():
        with (copy / "shards" / f"{shard:05}.tar").open("r+b") as tar:
            tar.seek(shards.index(shard)["image_offset"][row].as_py())
            tar.write(junk)
    data = dataset("mae", ShardSet.open(copy), tmp_path)
    steps = data.order.steps_per_epoch
    found = {}
    for workers in (0, 2):
        feed = Feed(data, 0, steps, workers)
        made = [feed.next()[0] for _ in range(steps)]
        feed.close()
        quarantine = Quarantine(tmp_path / f"{workers}.jsonl", max_bad=0.02, samples=120)
        for step, batch in enumerate(made):
            quarantine.add(step, batch["bad"])
        found[workers] = made, (tmp_path / f"{workers}.jsonl").read_text()
        keys = {shards.index(shard)["key"][row].as_py() for shard, row in places}
        assert set(quarantine.reasons) == keys and quarantine.report()["data/bad_samples"] == 2
        assert not any(keys & set(batch["keys"]) for batch in made) and all(len(b["keys"]) == 16 for b in made)
    assert found[0][1] == found[2][1]
    for alone, worked in zip(found[0][0], found[2][0], strict=True):
        assert alone["keys"] == worked["keys"] and torch.equal(alone["image"], worked["image"])


def test_crops_take_the_asked_share_of_the_area_and_stay_inside():
    rng = np.random.default_rng(0)
    for _ in range(300):
        left, top, right, bottom = crop_box(200, 100, (0.2, 0.6), rng)
        assert 0 <= left < right <= 200 and 0 <= top < bottom <= 100
        assert 0.19 < (right - left) * (bottom - top) / 20_000 < 0.61
        assert 0.73 < (right - left) / (bottom - top) < 1.37


def test_evaluation_images_are_resized_by_the_short_side_and_cut_in_the_middle():
    wide = np.zeros((50, 100, 3), np.uint8)
    wide[:, 25:75] = 255
    out = Preprocess(image_size=40)(Image.fromarray(wide))
    assert out.shape == (3, 40, 40) and out.dtype == torch.uint8
    assert out[:, :, 2:-2].min() > 250


def test_captions_reach_the_text_tower_as_tokens(shards, tmp_path):
    from maws.data.captions import clean_caption
    from maws.data.tokenizer import train_tokenizer

    assert clean_caption("Ben &amp; I @home see https://x.y/z #red  fox") == "Ben & I see red fox"
    captions = [shards.record(0, i)["caption"] for i in range(shards.shard_sizes[0])] * 3
    tok = train_tokenizer(captions, vocabulary=60, context=6)
    again = train_tokenizer(captions, vocabulary=60, context=6)
    assert tok.model == again.model
    ids, mask = tok(["the cat", "", "the cat at home the cat at home the cat", "犬"])
    assert ids.shape == mask.shape == (4, 8)
    assert ids[:, 0].tolist() == [0] * 4  # <s>
    assert ids[1].tolist() == [0, 2, 1, 1, 1, 1, 1, 1] and mask[1].tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
    assert ids[2, -1] == 2 and mask[2].all()  # cut to the context, </s> kept
    assert 3 in ids[3].tolist()  # a character that was never seen is unknown
    assert tok.pieces.decode([int(i) - 1 for i in ids[0][1:] if i > 3]) == "the cat"
    assert ids.max() < tok.vocabulary
    tok.save(tmp_path)
    from maws.data.tokenizer import load_tokenizer

    assert torch.equal(load_tokenizer(tmp_path, 6)(["the cat"])[0], tok(["the cat"])[0])
    with pytest.raises(DataError, match="no sample has a caption"):
        train_tokenizer(["", "  "], 60, 6)
    with pytest.raises(DataError, match="holds no tokenizer"):
        load_tokenizer(tmp_path / "nowhere", 6)


def test_pictures_are_read_from_bytes_of_any_kind_of_image(shards):
    image = LoadImage(DataConfig(), shards, 0, 32)(Order(shards, seed=0, batch_size=8).items(0)[0])["image"]
    assert image.shape == (3, 32, 32) and image.dtype == torch.uint8
    with pytest.raises(BadImage):
        loader.read(io.BytesIO(b"not a picture").getvalue())
