"""Attention: against timm's own unfused weights, distances against a quadruple loop, and what the evaluator keeps."""

import base64
import io
import json
import math
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close
from training import ROOT, Training

from data_pipeline.errors import DataError, UsageError
from data_pipeline.images import decode
from eval import pictures as module
from eval.attention_maps import Attended, maps, patch_distances, reach, watch
from eval.base import File, Score
from eval.encoder import Encoder, open_encoder
from eval.evaluators import attention
from eval.evaluators.attention import Attention, Config
from eval.pictures import open_pictures
from maws.data.transforms import Preprocess
from maws.models.vit import Options, VisionTransformer, build_vit
from tests.eval.conftest import SIDE

SHAPES = {
    "plain": {},
    "no class token": {"class_tokens": 0, "pool": "mean"},
    "two class tokens": {"class_tokens": 2},
    "relative positions": {"positions": "relative"},
    "relative, no class token": {"positions": "relative", "class_tokens": 0, "pool": "mean"},
    "norm of the mean": {"pool": "mean_norm"},
}


def tower_of(normed: bool = False, options: Options = Options(), **shape) -> VisionTransformer:
    """With parameters that are nowhere 0 or 1, and attention that is far from even."""
    tower = build_vit("atto", SIDE, options, seed=1, **shape)
    for block in tower.blocks if normed else []:
        block.attn.q_norm, block.attn.k_norm = nn.LayerNorm(16), nn.LayerNorm(16)
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=rng)
    return tower.eval().requires_grad_(False)


def images(n: int = 3, side: int = SIDE) -> torch.Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(3))


def seen(tower: VisionTransformer, pixels: torch.Tensor) -> list[Attended]:
    found: list[Attended] = []
    with watch(tower, range(len(tower.blocks)), lambda number, attended: found.append(attended)), torch.no_grad():
        tower(pixels)
    return found


def of_timm(tower: VisionTransformer, pixels: torch.Tensor) -> list[torch.Tensor]:
    """B H T T of each block, as timm's attention multiplies them with the values when it is not fused."""
    found: list[torch.Tensor] = []
    handles = []
    for block in tower.blocks:
        block.attn.fused_attn = False
        handles.append(block.attn.attn_drop.register_forward_hook(lambda _, args, out: found.append(out)))
    with torch.no_grad():
        tower(pixels)
    for block, handle in zip(tower.blocks, handles, strict=True):
        block.attn.fused_attn = True
        handle.remove()
    return found


def random_attended(heads: int = 2, grid: tuple[int, int] = (2, 3), class_tokens: int = 1) -> Attended:
    rng = torch.Generator().manual_seed(5)
    tokens = class_tokens + grid[0] * grid[1]
    q, k, bias = (
        torch.randn(*shape, generator=rng) for shape in ((2, heads, tokens, 4),) * 2 + ((1, heads, *(tokens,) * 2),)
    )
    return Attended(q, k, bias)


def scores(items) -> list[float]:
    return [item.value for item in items if isinstance(item, Score)]


def content_of(items) -> dict:
    (file,) = [item for item in items if isinstance(item, File)]
    return json.loads(file.text)


@pytest.fixture
def data(files):
    return open_pictures([files.test])  # 28 pictures


@pytest.fixture
def encode() -> Encoder:
    return Encoder(tower_of(), Preprocess(SIDE))


# ------------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("normed", [False, True], ids=["", "q_norm"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_weights_are_those_timm_has_when_it_is_not_fused(shape, normed):
    tower = tower_of(normed, **shape)
    expected = of_timm(tower, images())
    assert expected[0].max() > 2 / expected[0].shape[-1], "even attention would show nothing"
    for attended, weights in zip(seen(tower, images()), expected, strict=True):
        assert_close(attended.weights(slice(None)), weights)


def test_our_float32_attention_is_read_as_well():
    tower, ours = tower_of(), tower_of(options=Options(fp32_attention=True))
    for attended, weights in zip(seen(ours, images()), of_timm(tower, images()), strict=True):
        assert_close(attended.weights(slice(None)), weights)


def test_the_model_is_as_before_and_what_it_gives_too():
    tower, pixels = tower_of(positions="relative"), images()
    before = tower(pixels)
    with watch(tower, [0, 1], lambda number, attended: None):
        assert torch.equal(tower(pixels), before)
    with pytest.raises(RuntimeError), watch(tower, [0], lambda number, attended: None):
        raise RuntimeError
    for block in tower.blocks:
        assert not block.attn._forward_pre_hooks and not block.attn.qkv._forward_hooks
    assert torch.equal(tower(pixels), before)


def test_under_bf16_weights_are_float32_and_sum_to_1():
    tower = tower_of()
    found: list[torch.Tensor] = []
    with watch(tower, [1], lambda _, attended: found.append(attended.weights(slice(None)))):
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            tower(images())
    assert found[0].dtype == torch.float32
    assert_close(found[0].sum(-1), torch.ones(found[0].shape[:-1]))


# ----------------------------------------------------------------------------------------------------------- distances


@pytest.mark.parametrize("class_tokens", [0, 1, 2])
def test_distances_are_those_of_a_quadruple_loop(class_tokens):
    grid, patch = (2, 3), 16
    attended = random_attended(grid=grid, class_tokens=class_tokens)
    weights = (attended.queries @ attended.keys.transpose(-2, -1) + attended.bias).softmax(-1)
    found = reach(attended, patch_distances(grid, patch), class_tokens)
    cells = [(row, col) for row in range(grid[0]) for col in range(grid[1])]
    for image in range(2):
        for head in range(2):
            over_all = over_patches = share = 0.0
            for q, (row, col) in enumerate(cells):
                total = far = 0.0
                for k, (other_row, other_col) in enumerate(cells):
                    weight = weights[image, head, class_tokens + q, class_tokens + k].item()
                    far += weight * patch * math.hypot(row - other_row, col - other_col)
                    total += weight
                over_all, over_patches, share = over_all + far, over_patches + far / total, share + 1 - total
            means = [
                x[image, head].item() * len(cells) for x in (found.over_all, found.over_patches, found.class_share)
            ]
            assert means == pytest.approx([over_all, over_patches, share], rel=1e-5, abs=1e-6)


def test_even_attention_reaches_the_mean_of_all_distances():
    nothing = torch.zeros(1, 1, 1 + 6, 4)
    found = reach(Attended(nothing, nothing, None), far := patch_distances((2, 3), 8), class_tokens=1)
    assert found.over_patches.item() == pytest.approx(far.mean().item())
    assert found.over_all.item() == pytest.approx(far.mean().item() * 6 / 7)
    assert found.class_share.item() == pytest.approx(1 / 7)


def test_some_queries_at_a_time_give_what_all_at_once_give():
    attended, far = random_attended(), patch_distances((2, 3), 8)
    whole = reach(attended, far, 1)
    for most in (1, 2 * 2 * 7 * 4):  # one query, four queries
        parts = reach(attended, far, 1, most)
        assert_close(parts.over_patches, whole.over_patches)
        assert_close(parts.over_all, whole.over_all)
    assert [rows.stop - rows.start for rows in attended.chunks(1, 2 * 2 * 7 * 4)] == [4, 2]


def test_weights_never_exceed_what_may_exist_at_once(monkeypatch):
    attended, most = random_attended(), 2 * 2 * 7 * 2
    shapes: list[int] = []
    weights = Attended.weights
    monkeypatch.setattr(Attended, "weights", lambda self, rows: shapes.append((w := weights(self, rows)).numel()) or w)
    reach(attended, patch_distances((2, 3), 8), 1, most)
    assert shapes and max(shapes) <= most


def test_a_query_that_sees_the_class_token_alone_looks_nowhere():
    q = torch.zeros(1, 1, 7, 1).index_fill_(2, torch.arange(1, 7), 1.0)
    k = torch.zeros(1, 1, 7, 1).index_fill_(2, torch.tensor([0]), 1e4)
    found = reach(Attended(q, k, None), patch_distances((2, 3), 8), 1)
    assert (found.over_patches.item(), found.over_all.item(), found.class_share.item()) == (0, 0, 1)


def test_a_map_is_the_row_of_its_query_without_class_tokens():
    attended = random_attended(class_tokens=2)
    found = maps(attended, [4, 0], (2, 3), class_tokens=2)  # B H R h w
    weights = attended.weights(slice(None))
    assert found.shape == (2, 2, 2, 2, 3)
    assert_close(found[1, 0, 0, 1, 2], weights[1, 0, 2 + 4, 2 + 5])
    assert_close(found[0, 1, 1].flatten(), weights[0, 1, 2, 2:])


# ----------------------------------------------------------------------------------------------------------- evaluator


def test_scores_are_means_over_pictures_patches_and_heads(encode, data, monkeypatch):
    cfg = Config(images=5, pictures=0)
    found = list(Attention(cfg, data, 0).run(encode))
    rows = [0, 7, 14, 20, 27]  # at even distances; 13.5 and 20.25 rounded
    pixels = encode.prepare(torch.stack([encode.preprocess(decode(data.test.read(row))) for row in rows]))
    far = patch_distances((4, 4), 8)
    expected = []
    for weights in of_timm(encode.tower, pixels):
        patches = weights[:, :, 1:, 1:]
        expected.append((patches / patches.sum(-1, keepdim=True) * far).sum(-1).mean((0, 2)))
    assert scores(found) == pytest.approx([x.mean().item() for x in expected], rel=1e-5)
    content = content_of(found)
    assert_close(torch.tensor(content["distance"]["over_patches"]), torch.stack(expected), rtol=1e-3, atol=0.0)
    assert (content["images"], content["grid"], content["maps"]) == (5, [4, 4], [])
    monkeypatch.setattr(attention, "BATCH", 2)
    assert scores(Attention(cfg, data, 0).run(encode)) == pytest.approx(scores(found), rel=1e-6)


def test_class_tokens_may_count_as_no_distance(encode, data):
    plain, other = (list(Attention(Config(renormalise=on), data, 0).run(encode)) for on in (True, False))
    assert all(less < more for less, more in zip(scores(other), scores(plain), strict=True))
    content = content_of(other)
    means = [sum(heads) / len(heads) for heads in content["distance"]["over_all"]]
    assert scores(other) == pytest.approx(means, rel=1e-3)
    assert content["distance"] == content_of(plain)["distance"]


def test_maps_are_of_the_last_block_and_the_patches_asked_for(encode, data):
    cfg = Config(pictures=2, at=("0:0", "0.5:0.9", "1:1"))
    content = content_of(Attention(cfg, data, 0).run(encode))
    assert [entry["key"] for entry in content["maps"]] == [data.test.keys[0], data.test.keys[27]]
    assert content["block"] == 2
    entry = content["maps"][1]
    image = encode.preprocess(decode(data.test.read(27)))
    weights = of_timm(encode.tower, encode.prepare(image[None]))[1][0]  # H T T
    for query, (row, column) in zip(entry["queries"], [(0, 0), (3, 2), (3, 3)], strict=True):
        assert (query["row"], query["column"]) == (row, column)
        expected = weights[:, 1 + 4 * row + column, 1:].unflatten(-1, (4, 4))
        assert_close(torch.tensor(query["heads"]), expected, rtol=1e-3, atol=1e-7)
    shown = Image.open(io.BytesIO(base64.b64decode(entry["picture"].partition(",")[2])))
    assert torch.equal(torch.tensor(list(shown.tobytes())), image.permute(1, 2, 0).flatten().long())


def test_another_block_can_be_asked_for(encode, data):
    last, first = (content_of(Attention(Config(block=block), data, 0).run(encode))["maps"] for block in (2, 1))
    assert content_of(Attention(Config(), data, 0).run(encode))["maps"] == last != first
    with pytest.raises(UsageError, match="has 2 blocks"):
        list(Attention(Config(block=3), data, 0).run(encode))


def test_places_are_the_centre_and_some_of_the_seed(data):
    first, again, other = (Attention(Config(seeded=2), data, seed).places() for seed in (0, 0, 1))
    assert first == again != other
    assert first[0] == other[0] == (0.5, 0.5) and len(first) == 3


@pytest.mark.parametrize("text", ["0.5", "0.5:1.5", "-0.1:0", "a:b", "0.5:nan", ""])
def test_a_query_outside_of_the_picture_is_refused(text):
    with pytest.raises(ValueError, match="x:y in shares"):
        Config(at=(text,))


def test_pictures_can_be_named(encode, data):
    key = data.test.keys[9]
    content = content_of(Attention(Config(keys=(key,)), data, 0).run(encode))
    assert [entry["key"] for entry in content["maps"]] == [key]
    with pytest.raises(UsageError, match=r"no picture 'nobody'; keys are such as test-red-100"):
        Attention(Config(keys=("nobody",)), data, 0)


def test_at_another_size_the_grid_and_the_pixels_are_of_that_size(run, data):
    small, large = (open_encoder(run, torch.device("cpu"), image_size=size) for size in (None, 64))
    found = list(Attention(Config(pictures=1), data, 0).run(large))
    content = content_of(found)
    assert (content["grid"], content["image_size"]) == ([8, 8], 64)
    assert len(content["maps"][0]["queries"][0]["heads"][0]) == 8
    assert content["uniform"] == pytest.approx(patch_distances((8, 8), 8).mean().item())
    near = scores(Attention(Config(pictures=0), data, 0).run(small))
    assert all(1.5 < far / close < 2.5 for far, close in zip(scores(found), near, strict=True))


def test_a_broken_picture_is_left_out_and_damaged_weights_are_told(encode, data, monkeypatch):
    read = data.test.read
    broken = replace(data, test=replace(data.test, read=lambda row: b"no picture" if row == 27 else read(row)))
    with pytest.raises(DataError, match="more than 1%"):
        list(Attention(Config(), broken, 0).run(encode))
    monkeypatch.setattr(module, "MAX_BAD", 0.6)
    content = content_of(Attention(Config(pictures=2), broken, 0).run(encode))
    assert content["images"] == 27
    assert [entry["key"] for entry in content["maps"]] == [data.test.keys[0]]
    encode.tower.blocks[0].norm1.weight[:] = math.nan
    with pytest.raises(DataError, match="nan or infinity"):
        list(Attention(Config(), data, 0).run(encode))


def test_the_same_twice_and_from_the_command_line(run, files, evaluate):
    texts = []
    for _ in range(2):
        done = evaluate("attention", "--run", run, "--data", files.test, "--set", "attention.images=4")
        assert done.code == 0 and "4  pixels" in done.out
        (file,) = (run / "attention").glob("*.json")
        texts.append(file.read_text())
    assert texts[0] == texts[1]
    done = evaluate("attention", "--run", run, "--data", files.test, "--set", "attention.at=2:0")
    assert done.code != 0 and "x:y in shares" in done.err


@pytest.mark.slow
@pytest.mark.parametrize("partition", ["none", "zero3"])
def test_on_two_ranks_files_are_those_of_one_process(run, files, evaluate, monkeypatch, partition):
    """28 pictures in batches of 3: ten, so each rank has five; the maps' two batches are both ranks'."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    asked = ["spectrum", "attention", "--run", run, "--data", files.test, "--batch", "3"]
    started = Training([*map(str, asked), "--partition", partition], 2, target="tests.eval.test_distributed:command")
    codes, _ = started.wait(120)
    assert codes == [0, 0], [process.printed() for process in started.processes]
    written = [*(run / "spectrum").iterdir(), *(run / "attention").iterdir()]
    shared = [json.loads(file.read_text()) for file in written]
    assert evaluate(*asked).code == 0
    for file, ours in zip(written, shared, strict=True):
        alone = json.loads(file.read_text())
        for layer, values in alone.pop("layers", {}).items():
            assert ours["layers"][layer] == pytest.approx(values, rel=1e-5)
        ours.pop("layers", None)
        for name in ("distance", "class_share"):  # sums in another order, then four digits
            if name in alone:
                one, other = (torch.tensor(list(_flat(x.pop(name)))) for x in (alone, ours))
                assert_close(one, other, rtol=2e-3, atol=1e-6)
        assert alone == ours


def _flat(values):
    for value in values.values() if isinstance(values, dict) else values:
        yield from _flat(value) if isinstance(value, dict | list) else [value]
