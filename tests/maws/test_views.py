"""Views against torchvision's own transforms, and against the crops of runs before there were views."""

import itertools
import math

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as tv2
import torchvision.transforms.v2.functional as tv
from PIL import Image, ImageFilter, ImageOps

from data_pipeline.images import decode
from maws import config
from maws.config import ConfigError, DataConfig
from maws.data.loader import LoadImage, LoadTwoViews, StepDataset
from maws.data.order import Order, Part
from maws.data.transforms import simple_crop
from maws.data.views import DISTORTED, SIMPLE, View, colour_jitter, show, three_augment, view_of

ALL = [
    View(),
    View(crop="fixed"),
    View(crop="centre"),
    SIMPLE,
    DISTORTED,
    View(crop="centre", flip=True, jitter=(0, 0, 2.0, 0.5)),
]


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth shapes and some noise in all channels."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / (5 + c) + c) * np.cos(y / (7 - c)) * 70 + 128 for c in range(3)]
    return Image.fromarray((np.stack(waves, 2) + rng.integers(-30, 30, (height, width, 3))).astype(np.uint8))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def levels(a: torch.Tensor, b: torch.Tensor) -> int:
    """The largest difference of two pictures."""
    assert a.shape == b.shape
    return int((a.int() - b.int()).abs().max())


@pytest.mark.parametrize("view", ALL, ids=lambda v: v.crop + "+" * (v != View(crop=v.crop)))
def test_a_view_is_a_function_of_its_stream_and_of_nothing_else(view):
    image = photo(50, 40)
    before = image.tobytes()
    shown = [view(image, 24, rng(s)) for s in range(12)]
    torch.manual_seed(1)
    np.random.seed(1)
    assert all(torch.equal(a, view(image, 24, rng(s))) for s, a in enumerate(shown))
    assert all(a.shape == (3, 24, 24) and a.dtype == torch.uint8 for a in shown)
    assert len({a.numpy().tobytes() for a in shown}) > (0 if view == View(crop="centre") else 1)
    assert image.tobytes() == before


def old_random_resized_crop(image: Image.Image, size: int, scale: tuple, flip: bool, draws) -> torch.Tensor:
    """Draw by draw what runs did before there were views: area, log aspect, left, top; then the flip."""
    width, height = image.size
    box = None
    for _ in range(10):
        area, aspect = width * height * draws.uniform(*scale), math.exp(draws.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(draws.integers(0, width - w + 1)), int(draws.integers(0, height - h + 1))
            box = (left, top, left + w, top + h)
            break
    assert box is not None
    if flip and draws.random() < 0.5:
        image, box = ImageOps.mirror(image), (width - box[2], box[1], width - box[0], box[3])
    return tv.pil_to_tensor(image.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0))


@pytest.mark.parametrize("flip", [None, True, False])
def test_runs_without_settings_for_views_keep_their_crops_to_the_bit(flip, shards):
    image, scale = photo(61, 40), (0.3, 0.8)
    for s in range(20):
        expected = old_random_resized_crop(image, 16, scale, flip is not False, rng(s))
        assert torch.equal(View(crop_scale=scale, flip=flip)(image, 16, rng(s)), expected)
    order = Order(shards, seed=0, batch_size=8)
    item = order.items(1)[3]
    picture = decode(shards.image_bytes(item.shard, item.row))
    expected = old_random_resized_crop(picture, 32, (0.2, 1.0), True, item.stream(5, "augment"))
    assert torch.equal(LoadImage(DataConfig(), shards, 5, 32)(item)["image"], expected)


@pytest.mark.parametrize("size", [(70, 45), (45, 70), (300, 120), (30, 20)])
@pytest.mark.parametrize("crop", ["fixed", "centre"])
def test_fixed_and_centre_crops_cut_the_resized_picture(crop, size):
    image = photo(*size)
    resized = tv.pil_to_tensor(tv.resize(image, [32], tv2.InterpolationMode.BICUBIC))  # 28 x 256/224
    width, height = resized.shape[2], resized.shape[1]
    windows = {
        (x, y): resized[:, y : y + 28, x : x + 28] for x in range(width - 28 + 1) for y in range(height - 28 + 1)
    }
    if crop == "centre":
        windows = {((width - 28) // 2, (height - 28) // 2): windows[(width - 28) // 2, (height - 28) // 2]}
    found = set()
    for s in range(30):
        shown = View(crop=crop, flip=False)(image, 28, rng(s))
        place = min(windows, key=lambda w: levels(windows[w], shown))
        assert levels(windows[place], shown) <= 1
        found.add(place)
        mirrored = {levels(View(crop=crop, flip=True)(image, 28, rng(s)), v) <= 1 for v in (shown, shown.flip(2))}
        assert True in mirrored
    assert len(found) == 1 if crop == "centre" else len({x for x, _ in found}) > 2 and len({y for _, y in found}) > 2


@pytest.mark.parametrize(("size", "side"), [((70, 45), 24), ((45, 71), 24), ((20, 20), 32), ((9, 40), 6)])
def test_the_simple_crop_is_torchvisions_resize_and_padded_random_crop(size, side):
    image = photo(*size)
    resized = tv.resize(image, [side], tv2.InterpolationMode.BICUBIC)
    padded = tv.pil_to_tensor(tv.pad(resized, [4, 4, 4, 4], padding_mode="reflect"))
    places = itertools.product(range(padded.shape[2] - side + 1), range(padded.shape[1] - side + 1))
    windows = {(x, y): padded[:, y : y + side, x : x + side] for x, y in places}
    found = set()
    for s in range(60):
        shown = tv.pil_to_tensor(simple_crop(image, side, rng(s)).at(side))
        place = min(windows, key=lambda w: levels(windows[w], shown))
        assert levels(windows[place], shown) <= 1
        found.add(place)
    for axis in (0, 1):  # from the first place to the last: 9 at least
        seen = {place[axis] for place in found}
        assert min(seen) <= 1 and max(seen) >= padded.shape[2 - axis] - side - 3 and len(seen) >= 8


def test_half_of_the_pictures_are_mirrored_but_those_of_centre_crops_only_when_asked():
    image = photo(40, 30)
    for view, expected in [(View(), 1), (SIMPLE, 1), (View(crop="centre"), 0), (View(crop="centre", flip=True), 1)]:
        plain = View(crop=view.crop, flip=False)
        flips = sum(not torch.equal(view(image, 16, rng(s)), plain(image, 16, rng(s))) for s in range(60))
        assert (18 < flips < 42) if expected else flips == 0
        for s in range(20):
            a, b = view(image, 16, rng(s)), plain(image, 16, rng(s))
            assert torch.equal(a, b) or levels(a, b.flip(2)) <= 1


@pytest.mark.parametrize("size", [(1, 1), (1, 700), (700, 1), (65_535, 1), (2, 3), (5, 7)])
@pytest.mark.parametrize("view", ALL, ids=lambda v: v.crop + "+" * (v != View(crop=v.crop)))
def test_pictures_of_any_size_have_views(view, size):
    for side in (1, 8, 40):
        assert view(Image.new("RGB", size, (10, 200, 30)), side, rng()).shape == (3, side, side)
    plain = View(view.crop, view.crop_scale, view.flip)
    assert levels(plain(Image.new("RGB", size, (10, 200, 30)), 8, rng()), plain(photo(1, 1), 8, rng()) * 0) == 200


def test_colour_jitter_is_torchvisions_with_the_same_factors():
    image, strengths = photo(30, 20), (0.4, 0.5, 0.2, 0.1)
    functions = [tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue]
    orders = set()
    for s in range(40):
        shown = show(image, colour_jitter(strengths, rng(s)))
        draws = rng(s)
        order = draws.permutation(4).tolist()
        expected = image
        for i in order:
            low, high = (-strengths[3], strengths[3]) if i == 3 else (1 - strengths[i], 1 + strengths[i])
            expected = functions[i](expected, low + (high - low) * draws.random())
        assert torch.equal(shown, tv.pil_to_tensor(expected))
        orders.add(tuple(order))
    assert len(orders) > 15  # of 24


def test_a_strength_of_zero_changes_nothing_and_the_others_do_not_notice():
    image = photo(30, 20)
    assert colour_jitter((0, 0, 0, 0), rng()) == []
    for s in range(10):
        (contrast,) = colour_jitter((0, 0.5, 0, 0), rng(s))
        among_all = [c for c in colour_jitter((0.1, 0.5, 0.1, 0.1), rng(s)) if c.args[0] is tv.adjust_contrast]
        assert torch.equal(show(image, [contrast]), show(image, among_all))
    low = [colour_jitter((3.0, 0, 0, 0), rng(s))[0].args[1] for s in range(60)]
    assert 0 <= min(low) < 0.5 and 3.5 < max(low) < 4  # factors are never negative


def test_jitter_comes_with_its_probability():
    image = photo(30, 20)
    for probability, least, most in [(0.0, 0, 0), (0.8, 63, 93), (1.0, 100, 100)]:
        view = View(crop="centre", jitter=(0.4, 0.4, 0.2, 0.1), jitter_probability=probability)
        plain = View(crop="centre")(image, 16, rng())
        assert least <= sum(not torch.equal(view(image, 16, rng(s)), plain) for s in range(100)) <= most


def test_three_augment_makes_exactly_one_change_each_as_often():
    image = photo(30, 30)
    grey = tv.pil_to_tensor(tv.rgb_to_grayscale(image, 3))
    solarised = tv.pil_to_tensor(tv.solarize(image, 128))
    seen, radii = [], []
    for s in range(150):
        shown = show(image, [three_augment(30, rng(s))])
        draws = rng(s)
        kind = int(draws.integers(3))
        if kind == 2:
            radii.append(0.1 + 1.9 * draws.random())
            expected = tv.pil_to_tensor(image.filter(ImageFilter.GaussianBlur(radii[-1])))
            assert levels(shown, expected) <= 1
        else:
            assert torch.equal(shown, (grey, solarised)[kind])
        seen.append(kind)
    assert min(np.bincount(seen)) > 30
    assert min(radii) < 0.4 and max(radii) > 1.7
    by_hand = np.asarray(image).copy()
    by_hand[by_hand >= 128] = 255 - by_hand[by_hand >= 128]
    assert np.array_equal(solarised.permute(1, 2, 0), by_hand)


def test_the_second_view_of_lc_mae_is_cropped_flipped_jittered_and_then_changed_by_three_augment():
    image = photo(50, 40)
    for s in range(20):
        draws = rng(s)
        picture = simple_crop(image, 24, draws).at(24)
        if draws.random() < 0.5:
            picture = ImageOps.mirror(picture)
        jitter = colour_jitter((0.4, 0.4, 0.2, 0.1), draws) if draws.random() < 0.8 else []
        expected = show(picture, [*jitter, three_augment(24, draws)])
        assert torch.equal(DISTORTED(image, 24, rng(s)), expected)


@pytest.mark.parametrize("view", ALL, ids=lambda v: v.crop + "+" * (v != View(crop=v.crop)))
def test_a_second_size_shows_the_same_region_in_the_same_colours(view):
    image = photo(160, 120)
    image = image.filter(ImageFilter.GaussianBlur(4))  # so that two sizes of it can be compared
    for s in range(12):
        first, second = view.with_second(image, 64, 32, rng(s))
        assert torch.equal(first, view(image, 64, rng(s))) and second.shape == (3, 32, 32)
        halved = first.float().unflatten(1, (32, 2)).unflatten(3, (32, 2)).mean((2, 4))
        assert (halved - second.float()).abs().mean() < 6
        assert (halved - second.flip(2).float()).abs().mean() > 2 * (halved - second.float()).abs().mean()


def test_the_second_size_is_made_by_lanczos_from_the_picture_itself():
    image = photo(100, 60)
    for s in range(5):
        _, second = View(flip=False).with_second(image, 32, 16, rng(s))
        cut = View(flip=False).cut(image, 32, rng(s))
        expected = image.resize((16, 16), Image.Resampling.LANCZOS, box=cut.box)
        assert torch.equal(second, tv.pil_to_tensor(expected))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop": "center"}, r"crop=center is not known; did you mean centre\?"),
        ({"crop_scale": (0.0, 1.0)}, r"crop_scale=0\.0,1\.0 must be two shares of the area"),
        ({"crop_scale": (0.8, 0.2)}, r"crop_scale=0\.8,0\.2 must be two shares of the area"),
        ({"jitter": (0.4, 0.4, 0.4, 0.6)}, r"jitter=0\.4,0\.4,0\.4,0\.6 must be strengths .* hue at most 0\.5"),
        ({"jitter": (-0.1, 0, 0, 0)}, r"jitter=-0\.1,0,0,0 must be strengths"),
        ({"jitter": (float("nan"), 0, 0, 0)}, r"jitter=nan,0,0,0 must be strengths"),
        ({"jitter_probability": 1.5}, r"jitter_probability=1\.5 must lie between 0 and 1"),
    ],
)
def test_impossible_views_are_refused_with_the_way_out(settings, message, shards):
    with pytest.raises(ConfigError, match=message):
        View(**settings)
    with pytest.raises(ConfigError, match=r"data\." + message):
        LoadImage(DataConfig(**settings), shards, 0, 32)


def test_settings_of_a_run_reach_its_view():
    cfg = DataConfig(crop="simple", flip=False, jitter=(0.1, 0.2, 0.3, 0.4), jitter_probability=0.5, three_augment=True)
    assert view_of(cfg) == View("simple", (0.2, 1.0), False, (0.1, 0.2, 0.3, 0.4), 0.5, True)
    assert view_of(DataConfig()) == View()
    written = ["crop=simple", "flip=none", "jitter=0.4,0.4,0.2,0.1", "three_augment=yes"]
    cfg = config.override(DataConfig(flip=True), written)
    assert view_of(config.from_json(DataConfig, config.to_json(cfg))) == DISTORTED


class TestLoading:
    @pytest.fixture
    def order(self, shards):
        return Order(shards, seed=2, batch_size=8, streams=4, resample=False)

    def test_tokenizers_get_the_same_region_at_their_size(self, shards, order):
        item = order.items(0)[1]
        plain = LoadImage(DataConfig(), shards, 2, 32)(item)
        both = LoadImage(DataConfig(), shards, 2, 32, second_size=16)(item)
        assert sorted(both) == ["image", "image_second"] and both["image_second"].shape == (3, 16, 16)
        assert torch.equal(plain["image"], both["image"])

    def test_two_views_are_drawn_independently_and_the_first_is_that_of_one_view(self, shards, order):
        load = LoadTwoViews(DataConfig(), View(), View(), shards, 2, 32)
        samples = [load(item) for item in order.items(0)]
        for item, sample in zip(order.items(0), samples, strict=True):
            assert sorted(sample) == ["image", "image_other"]
            assert torch.equal(sample["image"], LoadImage(DataConfig(), shards, 2, 32)(item)["image"])
        assert sum(torch.equal(s["image"], s["image_other"]) for s in samples) == 0

    def test_views_that_are_not_given_are_those_of_the_run(self, shards, order):
        cfg, item = DataConfig(crop="centre"), order.items(0)[0]
        sample = LoadTwoViews(cfg, None, None, shards, 2, 32)(item)
        assert torch.equal(sample["image"], sample["image_other"])  # a centre crop leaves nothing to chance
        assert torch.equal(sample["image"], LoadImage(cfg, shards, 2, 32)(item)["image"])

    def test_views_of_the_same_crop_differ_in_colours_alone(self, shards, order):
        solarised_or_not = View(crop="simple", jitter=(0.4, 0.4, 0.2, 0.1), jitter_probability=1.0)
        load = LoadTwoViews(DataConfig(), SIMPLE, SIMPLE, shards, 2, 32, same_crop=True)
        for item in order.items(1):
            sample = load(item)
            assert torch.equal(sample["image"], sample["image_other"])
        load = LoadTwoViews(DataConfig(), SIMPLE, solarised_or_not, shards, 2, 32, same_crop=True)
        for item in order.items(1):
            sample = load(item)
            changes = solarised_or_not.changes(32, item.stream(2, "augment other"))
            expected = show(Image.fromarray(sample["image"].permute(1, 2, 0).numpy()), changes)
            assert torch.equal(sample["image_other"], expected)

    def test_two_ranks_together_load_the_views_of_one_process(self, shards, order):
        load = LoadTwoViews(DataConfig(), SIMPLE, DISTORTED, shards, 2, 32)
        whole = StepDataset(order, Part(), load)[3]
        for rank in range(2):
            batch = StepDataset(order, Part(rank, 2), load)[3]
            for i, key in enumerate(batch["keys"]):
                j = whole["keys"].index(key)
                assert torch.equal(batch["image"][i], whole["image"][j])
                assert torch.equal(batch["image_other"][i], whole["image_other"][j])
