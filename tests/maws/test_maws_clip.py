"""Files of type maws_clip: what both generations of names compute, from the recipe's table and torch's own layer.

The text tower here is written from recipes §11.5 and fed the file's own tensors. Axes: B captions, T tokens, D width.
"""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from official import ATTO, clip_shapes, drawn, older_text_names, small
from torch import Tensor, nn
from torch.testing import assert_close

from maws.checkpoint import CheckpointError
from maws.interop import detect_layout, load_layout, read_foreign, write_foreign
from maws.interop.converted import ConvertedClip
from maws.models.two_tower import CLIP_VARIANTS

S = "text_encoder.encoder.transformer."
GENERATIONS = {"newer": lambda t: t, "older": older_text_names}
SMALL = {**ATTO, "e": 24, "dt": 128, "layers": 3, "v": 60, "positions": 514}


@pytest.fixture(params=GENERATIONS)
def tensors(request) -> dict[str, Tensor]:
    return GENERATIONS[request.param](drawn(clip_shapes(**SMALL)))


@pytest.fixture
def captions() -> tuple[Tensor, Tensor]:
    """Ids and mask of three captions of 17, 6 and 2 tokens, padded on the right."""
    ids = torch.randint(4, 60, (3, 17), generator=torch.Generator().manual_seed(2))
    for row, length in enumerate((17, 6, 2)):
        ids[row, 0], ids[row, length - 1], ids[row, length:] = 0, 2, 1
    return ids, (ids != 1).long()


def newer(t: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    """One layer's tensors as torch's encoder layer names them."""
    old = f"{S}layers.{i}."
    if f"{old}attention.input_projection.weight" not in t:
        at = f"{S}layers.layers.{i}."
        return {name.removeprefix(at): value for name, value in t.items() if name.startswith(at)}
    layer = {f"self_attn.in_proj_{k}": t[f"{old}attention.input_projection.{k}"] for k in ("weight", "bias")}
    for theirs, torchs in (
        ("attention.output_projection", "self_attn.out_proj"), ("residual_mlp.mlp.0", "linear1"),
        ("residual_mlp.mlp.3", "linear2"), ("attention_layer_norm", "norm1"), ("final_layer_norm", "norm2"),
    ):  # fmt: skip
        layer |= {f"{torchs}.{k}": t[f"{old}{theirs}.{k}"] for k in ("weight", "bias")}
    return layer


def text_tower(t: dict[str, Tensor], ids: Tensor, heads: int) -> Tensor:
    """The first token after the last layer, B D: post-norm layers of torch, positions counted over what is no pad."""
    real = ids != 1
    places = torch.where(real, real.cumsum(1) + 1, 1)
    x = t[f"{S}token_embedding.weight"][ids] + t[f"{S}positional_embedding.embedding.weight"][places]
    d = x.shape[2]
    x = F.layer_norm(x, (d,), t[f"{S}embedding_layer_norm.weight"], t[f"{S}embedding_layer_norm.bias"], 1e-5)
    layers = sum(name.endswith(("self_attn.in_proj_bias", "input_projection.bias")) for name in t)
    for i in range(layers):
        x = torchs_layer(newer(t, i), d, heads, 1e-5, norm_first=False)(x, src_key_padding_mask=~real)
    return x[:, 0]


def image_tower(t: dict[str, Tensor], images: Tensor, heads: int) -> Tensor:
    """The class token after the final norm, B D: pre-norm layers of torch."""
    names = {"norm1": "norm1", "norm2": "norm2", "linear1": "mlp.fc1", "linear2": "mlp.fc2"}
    names |= {"self_attn.in_proj_": "attn.qkv.", "self_attn.out_proj": "attn.proj"}
    d, kernel = t["cls_token"].shape[2], t["patch_embed.proj.weight"]
    x = F.conv2d(images, kernel, t["patch_embed.proj.bias"], stride=kernel.shape[-1]).flatten(2).transpose(1, 2)
    x = torch.cat([t["cls_token"].expand(len(x), -1, -1), x], dim=1) + t["pos_embed"]
    for i in range(sum(name.endswith("qkv.bias") for name in t)):
        parts = [
            (torchs, f"blocks.{i}.{theirs}", "" if torchs.endswith("_") else ".") for torchs, theirs in names.items()
        ]
        layer = {f"{a}{dot}{k}": t[f"{b}{dot}{k}"] for a, b, dot in parts for k in ("weight", "bias")}
        x = torchs_layer(layer, d, heads, 1e-6, norm_first=True)(x)
    return F.layer_norm(x, (d,), t["norm.weight"], t["norm.bias"], 1e-6)[:, 0]


def torchs_layer(tensors: dict[str, Tensor], d: int, heads: int, eps: float, norm_first: bool) -> nn.Module:
    """In training mode, which has no dropout here: in evaluation torch would take another path through it."""
    layer = nn.TransformerEncoderLayer(
        d, heads, 4 * d, dropout=0.0, activation="gelu", layer_norm_eps=eps, batch_first=True, norm_first=norm_first,
        dtype=torch.float64,
    )  # fmt: skip
    layer.load_state_dict(tensors, strict=True)
    return layer.requires_grad_(False)


def test_both_towers_compute_what_the_original_tensors_do(tensors, captions):
    found = load_layout("maws_clip").to_ours(tensors, heads=2)
    assert isinstance(found, ConvertedClip)
    model, (ids, mask) = found.build(), captions
    first = text_tower(tensors, ids, heads=4)
    assert_close(model.text(ids, mask), first, rtol=0, atol=1e-5)
    text = F.normalize(first @ tensors["text_projection"], dim=-1)
    assert_close(model.encode_text(ids, mask), text, rtol=0, atol=1e-5)

    images = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    vision = {n.removeprefix("vision_encoder."): v for n, v in tensors.items() if n.startswith("vision_encoder.")}
    image = F.normalize(image_tower(vision, images, heads=2) @ tensors["vision_projection"], dim=-1)
    assert_close(model.encode_image(images), image, rtol=0, atol=1e-5)
    scale = min(math.exp(tensors["logit_scale"]), 100)
    assert_close(model.scale().double(), torch.tensor([scale], dtype=torch.float64), rtol=1e-6, atol=0)


def test_padding_and_its_length_change_nothing(tensors, captions):
    model, (ids, mask) = load_layout("maws_clip").to_ours(tensors).build(), captions
    alone = model.encode_text(ids[1:2, :6], mask[1:2, :6])
    assert_close(model.encode_text(ids, mask)[1:2], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_written_back_it_has_the_names_and_values_of_the_newer_generation(tmp_path, tensors, suffix):
    tokenizer = {"text_tokenizer.vocab": torch.zeros(3)}
    torch.save(tensors | tokenizer, tmp_path / "clip.pth")
    found = read_foreign(tmp_path / "clip.pth")
    assert (found.layout, list(found.dropped)) == ("maws_clip", list(tokenizer))
    write_foreign(tmp_path / f"back{suffix}", found, "maws_clip")
    again = read_foreign(tmp_path / f"back{suffix}")
    assert isinstance(again, ConvertedClip) and isinstance(found, ConvertedClip)
    assert (again.shape, again.text, again.joint_width) == (found.shape, found.text, found.joint_width)
    back = load_layout("maws_clip").from_ours(again)
    original = drawn(clip_shapes(**SMALL))
    assert back.keys() == original.keys()
    assert all(torch.equal(back[name], value) for name, value in original.items())


@pytest.mark.parametrize("name", CLIP_VARIANTS)
def test_the_released_pairs_build_by_name_with_the_documented_shapes(name):
    """Recipes §8.1 and §11.5."""
    columns = ("d", "depth", "p", "n", "e", "dt", "layers")
    rows = {
        "vit_b16_xlmr_b": (768, 12, 16, 196, 768, 768, 12),
        "vit_l16_xlmr_l": (1024, 24, 16, 196, 1024, 1024, 24),
        "vit_h14_xlmr_l": (1280, 32, 14, 256, 1024, 1024, 24),
        "vit_2b14_xlmr_l": (2560, 24, 14, 256, 2048, 1024, 24),
    }
    sizes = dict(zip(columns, rows[name], strict=True))
    official = {n: torch.empty(s, device="meta") for n, s in clip_shapes(**sizes, v=250_002, positions=514).items()}
    for generation in GENERATIONS.values():
        file = generation(official)
        assert detect_layout(file) == "maws_clip"
        found = load_layout("maws_clip").to_ours(file)
        assert (found.released_as, found.image_size, found.dropped) == (name, 224, {})
        back = load_layout("maws_clip").from_ours(found)
        assert {n: tuple(v.shape) for n, v in back.items()} == {n: tuple(v.shape) for n, v in official.items()}
    assert (found.text.heads, found.text.context) == (sizes["dt"] // 64, 100)
    assert found.weights["text_projection"].shape == (sizes["dt"], sizes["e"])


def test_a_wrong_shape_a_missing_and_an_unknown_tensor_are_named(tensors):
    convert = load_layout("maws_clip").to_ours
    for name, ours, size in [
        ("vision_projection", "vision_projection", (32, 24)),
        ("vision_encoder.blocks.1.mlp.fc1.weight", "blocks.1.mlp.fc1.weight", (128, 32)),
        (f"{S}embedding_layer_norm.bias", "text.encoder.embeddings.LayerNorm.bias", (128,)),
    ]:
        with pytest.raises(CheckpointError) as wrong:
            convert(tensors | {name: torch.zeros(5, 3)})
        assert f"{ours} is (5, 3), expected {size}" in str(wrong.value)
        with pytest.raises(CheckpointError, match=f"missing: {ours}"):
            convert({n: v for n, v in tensors.items() if n != name})
    with pytest.raises(CheckpointError, match="unknown: projection_bias"):
        convert(tensors | {"projection_bias": torch.zeros(3)})
    last = next(n for n in reversed(tensors) if n.endswith(("in_proj_bias", "input_projection.bias")))
    with pytest.raises(CheckpointError, match=r"in_proj_bias is \(5,\), expected queries, keys and values|input_proj"):
        convert(tensors | {last: torch.zeros(5)})
    with pytest.raises(CheckpointError, match=r"missing: .*attention\.self\.query\.bias"):
        convert({n: v for n, v in tensors.items() if n != last})
    with pytest.raises(CheckpointError, match="no maws_clip file has a head"):
        convert(
            tensors | {"vision_encoder.head.weight": torch.zeros(3, 32), "vision_encoder.head.bias": torch.zeros(3)}
        )
    with pytest.raises(CheckpointError, match=r"token_embedding\.weight is missing"):
        convert({n: v for n, v in tensors.items() if not n.endswith("token_embedding.weight")})


def test_both_generations_in_one_file_are_not_chosen_from():
    both = drawn(clip_shapes(**SMALL))
    with pytest.raises(CheckpointError, match="there twice, under both generations of names"):
        load_layout("maws_clip").to_ours(both | older_text_names(both))


def test_what_maws_clip_has_no_place_for_is_refused():
    clip = load_layout("maws_clip")
    found = clip.to_ours(drawn(clip_shapes(**SMALL)))
    siglip = dataclasses.replace(found, weights=found.weights | {"logit_bias": torch.zeros(1)})
    bert = dataclasses.replace(found, text=dataclasses.replace(found.text, layout="bert", pool="mean"))
    trunk = load_layout("maws").to_ours(small("maws"))
    for model, said in ((siglip, "logit_bias"), (bert, "layout bert, captions read as"), (trunk, "write a trunk as")):
        with pytest.raises(CheckpointError, match=said):
            clip.from_ours(model)


def test_a_token_type_that_is_not_zero_travels_in_the_token_embedding(captions):
    found, (ids, mask) = load_layout("maws_clip").to_ours(drawn(clip_shapes(**SMALL))), captions
    types = "text.encoder.embeddings.token_type_embeddings.weight"
    typed = dataclasses.replace(found, weights=found.weights | {types: torch.rand(1, 128, dtype=torch.float64)})
    again = load_layout("maws_clip").to_ours(load_layout("maws_clip").from_ours(typed))
    assert not again.weights[types].any()
    assert_close(again.build().encode_text(ids, mask), typed.build().encode_text(ids, mask), rtol=0, atol=1e-5)
