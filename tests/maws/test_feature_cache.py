"""Cached features: what the tower makes of the crops a training would see, and refused where they are not."""

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from releases import untrained
from torch import Tensor
from torch.testing import assert_close
from training import arguments, losses, run_each

from data_pipeline.errors import DataError, UserError
from data_pipeline.shardset import ShardSet, manifest_bytes
from maws import cache_features, config, stages
from maws.__main__ import main, parser
from maws.config import ConfigError, override
from maws.data.loader import LoadImage
from maws.data.order import Item, Part
from maws.feature_cache import MANIFEST, SETTINGS, FeatureCache, LoadFeatures, read_manifest
from maws.models import init
from maws.models.vit import normalise
from maws.release import load_image_tower, open_release
from maws.stages import lit

K = 3
CROP = ["data.crop_scale=0.5,1.0", "data.flip=yes"]


@pytest.fixture(scope="module")
def tower(tmp_path_factory) -> Path:
    return untrained(tmp_path_factory.mktemp("tower") / "release", seed=0)


@pytest.fixture(scope="module")
def cached(tmp_path_factory, shards_path, tower) -> Path:
    """A shard set of its own with a cache of three crops."""
    folder = tmp_path_factory.mktemp("cached") / "shards"
    shutil.copytree(shards_path, folder)
    assert cache(tower, folder) == 0
    return folder


@pytest.fixture
def copy(tmp_path, cached) -> Path:
    """The same, to be spoilt."""
    return shutil.copytree(cached, tmp_path / "shards")


def cache(tower: Path, shards: Path, *more: str, crops: int = K) -> int:
    return main(["cache-features", *words(tower, shards, crops), *more])


def words(tower: Path, shards: Path, crops: int = K) -> list[str]:
    return ["--run", str(tower), "--shards", str(shards), "--crops", str(crops), "--workers", "0", *CROP]


def folder_of(shards: Path) -> Path:
    (found,) = (shards / "features").iterdir()
    return found


def configured(tower: Path, shards: Path, *settings: str) -> Any:
    cfg = override(stages.preset("lit", "debug"), [f"data.shards={shards}", "data.resample=no", *CROP, *settings])
    return replace(cfg, init_from=str(tower), init_sha256=open_release(tower).sha256)


def prepared(tower: Path, shards: Path, run: Path, *settings: str) -> Any:
    return lit.prepare(configured(tower, shards, *settings), ShardSet.open(shards), run)


def objective_of(cfg: Any, tower: Path) -> Any:
    made = lit.objective(cfg, None)  # type: ignore[arg-type]
    init.fill(made, made.init_rules(), 0)
    made.towers.image.load_state_dict(load_image_tower(open_release(tower)).state_dict())
    return made.train()


def test_features_are_what_the_tower_makes_of_the_crops_of_the_first_epochs(cached, tower):
    shards, found = ShardSet.open(cached), folder_of(cached)
    kept = FeatureCache(found, read_manifest(found), "")
    data = configured(tower, cached).data
    load, encoder = LoadImage(data, shards, 0, 32), load_image_tower(open_release(tower))
    for shard, row in ((0, 0), (3, 5), (shards.num_shards - 1, shards.shard_sizes[-1] - 1)):
        key = shards.index(shard)["key"][row].as_py()
        images = torch.stack([load(Item(shard, row, key, epoch, 0))["image"] for epoch in range(K)])
        assert (images[0] != images[1]).any()
        want = encoder(normalise(images, data.mean, data.std))[:, 0]
        assert_close(torch.stack([kept.read(shard, row, crop) for crop in range(K)]), want, rtol=1e-4, atol=1e-5)


def test_epochs_take_the_crops_in_turn_and_further_visits_of_an_epoch_the_next_ones(cached):
    found = folder_of(cached)
    kept = FeatureCache(found, read_manifest(found), "")
    load = LoadFeatures(kept)
    for epoch, again, crop in ((0, 0, 0), (2, 0, 2), (3, 0, 0), (1, 1, 2), (2, 1, 0)):
        assert load(Item(1, 4, "", epoch, again))["features"].equal(kept.read(1, 4, crop))


def test_batches_and_losses_are_those_of_the_pictures_epoch_after_epoch(cached, tower, tmp_path):
    runs = {kind: prepared(tower, cached, tmp_path / kind, f"data.features={kind}") for kind in ("images", "cache")}
    shards, objective = ShardSet.open(cached), objective_of(runs["images"], tower)
    first, second = (lit.dataset(cfg, shards, tmp_path / kind, Part()) for kind, cfg in runs.items())
    epoch = first.order.steps_per_epoch
    for step in (0, 3, epoch, 2 * epoch + 1):  # in epochs 0, 1 and 2
        images, features = first[step], second[step]
        assert images["keys"] == features["keys"]
        assert "image" not in features
        assert_close(objective(features)["loss"], objective(images)["loss"], rtol=1e-5, atol=1e-6)


def test_a_training_from_the_cache_has_the_losses_of_one_from_pictures_also_when_resumed(cached, tower, tmp_path):
    settings = ["data.resample=no", "optim.length=16 steps", "checkpoint.every=6 steps", "checkpoint.keep=9", *CROP]
    common = [*settings, "--init-from", str(tower)]
    images, features = tmp_path / "images", tmp_path / "features"
    from_cache = arguments("lit", features, cached, *common, "data.features=cache")
    found = run_each([arguments("lit", images, cached, *common), from_cache])
    assert [code for code, _ in found] == [0, 0], found
    want = losses(images)
    assert len(want) == 16  # of 7 steps an epoch
    assert losses(features) == pytest.approx(want, rel=1e-4)
    straight = open_release(features).sha256
    shutil.rmtree(features / "release")  # as if it had been killed after the first checkpoint
    for path in (features / "checkpoints").iterdir():
        if path.name != "step_0000006":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (code, printed), *_ = run_each([[*from_cache, "--resume", "auto"]])
    assert code == 0, printed
    assert losses(features) == pytest.approx(want, rel=1e-4)
    assert open_release(features).sha256 == straight


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_features_in_half_precision_are_the_rounded_ones(cached, tower, tmp_path, dtype):
    other = shutil.copytree(cached, tmp_path / "shards", ignore=shutil.ignore_patterns("features"))
    assert cache(tower, other, "--dtype", dtype) == 0
    exact, half = (FeatureCache(f, read_manifest(f), "") for f in (folder_of(cached), folder_of(other)))
    value = half.read(2, 3, 1)
    assert value.dtype == getattr(torch, dtype)
    assert_close(value, exact.read(2, 3, 1).to(value.dtype))
    cfg = prepared(tower, other, tmp_path / "run", "data.features=cache")
    batch = lit.dataset(cfg, ShardSet.open(other), tmp_path / "run", Part())[0]
    assert objective_of(cfg, tower)(batch)["loss"].isfinite()


def test_a_command_that_was_killed_goes_on_behind_the_last_whole_shard(copy, tower, monkeypatch):
    straight = {p.name: p.read_bytes() for p in folder_of(copy).iterdir()}
    shutil.rmtree(copy / "features")
    encode, seen = cache_features.encode, []

    def killed(tower: Any, images: Tensor, data: Any) -> Tensor:
        seen.append(len(images))
        if len(seen) == 4:
            raise KeyboardInterrupt
        return encode(tower, images, data)

    monkeypatch.setattr(cache_features, "encode", killed)
    assert cache(tower, copy) == 130  # interrupted
    done = sorted(p.name for p in folder_of(copy).iterdir())
    assert done == ["00000.arrow", "00001.arrow", "00002.arrow", SETTINGS]
    with pytest.raises(ConfigError, match="is not finished"):
        prepared(tower, copy, copy.parent / "run", "data.features=cache")
    seen.clear()
    monkeypatch.setattr(cache_features, "encode", lambda *given: seen.append(0) or encode(*given))
    assert cache(tower, copy) == 0
    assert len(seen) == ShardSet.open(copy).num_shards - 3
    assert {p.name: p.read_bytes() for p in folder_of(copy).iterdir()} == straight
    seen.clear()
    assert cache(tower, copy) == 0
    assert not seen  # nothing is left to do


def spoil_picture(shards: Path, shard: int, row: int) -> str:
    there = ShardSet.open(shards)
    index = there.index(shard)
    with there.tar_path(shard).open("r+b") as file:
        file.seek(index["image_offset"][row].as_py())
        file.write(bytes(index["image_size"][row].as_py()))
    return index["key"][row].as_py()


def test_unreadable_pictures_are_left_out_counted_and_replaced_as_the_loader_does(copy, tower, tmp_path):
    shutil.rmtree(copy / "features")
    key = spoil_picture(copy, 2, 5)
    assert cache(tower, copy) == 0
    assert sum(read_manifest(folder_of(copy))["unreadable"].values()) == 1
    bad = {}
    for kind in ("images", "cache"):
        cfg = prepared(tower, copy, tmp_path / kind, f"data.features={kind}")
        batches = lit.dataset(cfg, ShardSet.open(copy), tmp_path / kind, Part())
        found = [batches[step] for step in range(batches.order.steps_per_epoch)]
        bad[kind] = [(b["keys"], b["bad"]) for b in found]
    assert bad["images"] == bad["cache"]
    assert [entry["key"] for _, left_out in bad["cache"] for entry in left_out] == [key]
    shutil.rmtree(copy / "features")
    spoil_picture(copy, 1, 1)
    with pytest.raises(DataError, match="2 of 120 samples could not be read"):
        cache_features.run(parser().parse_args(["cache-features", *words(tower, copy)]))


def rewrite(folder: Path, **changed: Any) -> None:
    manifest = json.loads((folder / MANIFEST).read_text()) | changed
    (folder / MANIFEST).write_bytes(manifest_bytes(manifest))


def other_set(copy: Path, found: Path) -> None:
    rewrite(found, shards_sha256="0" * 64)


def fewer(copy: Path, found: Path) -> None:
    files = read_manifest(found)["files"]
    rewrite(found, files=[files[0] | {"rows": files[0]["rows"] - 1}, *files[1:]])


def flipped(copy: Path, found: Path) -> None:
    data = bytearray((found / "00003.arrow").read_bytes())
    data[len(data) // 2] ^= 1
    (found / "00003.arrow").write_bytes(data)


def cut_short(copy: Path, found: Path) -> None:
    data = (found / "00003.arrow").read_bytes()
    (found / "00003.arrow").write_bytes(data[:-100])


def missing(copy: Path, found: Path) -> None:
    (found / "00001.arrow").unlink()


def edited(copy: Path, found: Path) -> None:
    text = (found / MANIFEST).read_text()
    (found / MANIFEST).write_text(text.replace('"crops": 3', '"crops": 2'))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (other_set, "another shard set, or of .* before it was changed"),
        (fewer, "has features of 119 samples, the shard set has 120"),
        (flipped, "00003.arrow is damaged: its sha256"),
        (cut_short, "00003.arrow has .* bytes, the manifest says"),
        (missing, "00001.arrow is missing"),
        (edited, "manifest.json is damaged"),
    ],
)
def test_a_cache_that_is_not_of_this_set_or_damaged_is_refused(copy, tower, tmp_path, spoil, says):
    spoil(copy, folder_of(copy))
    with pytest.raises(DataError, match=says) as refused:
        prepared(tower, copy, tmp_path / "run", "data.features=cache")
    assert "cache-features" in str(refused.value)
    if spoil is not edited:  # the command makes as many crops as there were
        assert "--crops 3" in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["data.crop_scale=0.4,1.0"], "is of crop_scale 0.5, 1.0"),
        (["data.flip=no"], "is of flip True"),
        (["data.std=0.5,0.5,0.5"], r"is of std 0.229, 0.224, 0.225"),
        (["model.image_size=48"], r"is of images of 32 px, .* set model.\* to the same"),  # no command can make it
        (["model.pool=mean"], r"is of pool cls, .* set model.\* to the same"),
    ],
)
def test_a_cache_of_other_crops_is_not_taken_and_the_error_says_what_is_there(cached, tower, tmp_path, settings, says):
    with pytest.raises(ConfigError, match=says):
        prepared(tower, cached, tmp_path / "run", "data.features=cache", *settings)


def test_without_a_cache_the_error_prints_the_command_that_makes_it(cached, tmp_path, monkeypatch):
    other = untrained(tmp_path / "a tower", seed=1)
    with pytest.raises(ConfigError, match=r"another tower \(") as refused:
        prepared(other, cached, tmp_path / "run", "data.features=cache", "seed=4", "data.jitter=0.1,0,0,0")
    printed = shlex.split(str(refused.value).split("\n")[1])
    assert printed[:4] == ["python", "-m", "maws", "cache-features"]
    assert main([*printed[3:], "--workers", "0"]) == 0
    cfg = prepared(other, cached, tmp_path / "run", "data.features=cache", "seed=4", "data.jitter=0.1,0,0,0")
    (made,) = [f for f in (cached / "features").iterdir() if f.name.startswith(cfg.init_sha256[:12])]
    assert cfg.features_sha256 == FeatureCache(made, read_manifest(made), "").sha256
    shutil.rmtree(made)


def test_a_run_that_is_resumed_with_another_cache_is_refused(copy, tower, tmp_path):
    """The hash of the manifest is a setting of the run."""
    before = prepared(tower, copy, tmp_path / "run", "data.features=cache")
    assert cache(tower, copy, "--overwrite", "--seed", "1") == 0
    after = prepared(tower, copy, tmp_path / "run", "data.features=cache")
    (difference,) = config.differences(config.to_json(before), config.to_json(after))
    assert difference.startswith("features_sha256: ")
    asked = configured(tower, copy, "data.features=cache")
    unfilled = config.differences(config.to_json(before), config.to_json(asked))
    assert not unfilled  # a finished run is known before its data is looked at


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--crops", "0"], "--crops 0 must be 1 or more"),
        (["--dtype", "float8"], "did you mean float"),
        (["optim.lr=1"], "only data settings"),
        (["data.crop=middle"], "data.crop=middle is not known"),
        (["data.features=cache"], "this reads images"),
        (["--crops", "2"], "other settings (crops 3); add --overwrite"),
    ],
)
def test_what_cannot_be_cached_is_said(cached, tower, capsys, more, says):
    assert cache(tower, cached, *more) != 0
    assert says in capsys.readouterr().err


def test_only_a_locked_image_tower_has_cached_features(tower, cached, tmp_path):
    with pytest.raises(ConfigError, match="lock=none trains it"):
        prepared(tower, cached, tmp_path / "run", "data.features=cache", "lock=none")
    with pytest.raises(ConfigError, match="did you mean cache"):
        prepared(tower, cached, tmp_path / "run", "data.features=cached")
    cfg = override(stages.preset("mae", "debug"), [f"data.shards={cached}", "data.features=cache"])
    with pytest.raises(ConfigError, match="stage lit with lock=image"):
        stages.load("mae").dataset(cfg, ShardSet.open(cached), tmp_path, Part())


def hashes_on_ranks(cache: str) -> str:
    """In a rank: what is wrong with a cache of which this rank sees but half."""
    import torch.distributed as td

    td.init_process_group("gloo")
    kept = FeatureCache(Path(cache), read_manifest(Path(cache)), "")
    try:
        kept.verify(Part(td.get_rank(), td.get_world_size()))
    except UserError as e:
        return str(e)
    return ""


@pytest.mark.slow
def test_every_rank_learns_of_a_file_that_one_of_them_found_damaged(copy, tmp_path):
    flipped(copy, folder_of(copy))
    assert all("00003.arrow is damaged" in said for said in run_ranks(
        "test_feature_cache", "hashes_on_ranks", tmp_path, cache=str(folder_of(copy))
    ))  # fmt: skip
