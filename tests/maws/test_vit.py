"""The image tower against its definition written out (tests/reference.py), and each of its options."""

import math
from dataclasses import replace

import pytest
import reference
import torch
from timm.layers import resample_patch_embed
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch.testing import assert_close

from maws.config import ConfigError, ModelConfig
from maws.models import init
from maws.models.attention import Float32Attention, recomputed
from maws.models.patch_embed import resample_patches
from maws.models.pos_embed import offsets, relative_index, resize_positions, sincos_2d
from maws.models.vit import VARIANTS, Options, Shape, VisionTransformer, build_vit
from maws.stages import backbone, grid_of, image_side, options_of, patch_count, shape_of

TINY = Shape(patch=4, depth=2, width=16, heads=2, image=12)


def tiny(options: Options = Options(), seed: int = 0, **changes) -> VisionTransformer:
    vit = VisionTransformer(replace(TINY, **changes), 12, options)
    init.fill(vit, vit.init_rules(), seed)
    with torch.no_grad():  # biases and norms start at 0 and 1, which would hide mistakes
        for p in vit.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return vit.double().eval()


def images(n: int = 2, side: int = 12) -> torch.Tensor:
    return torch.randn(n, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(side))


@pytest.mark.parametrize(
    ("variant", "parameters", "entries"),
    [  # recipes §1.1
        ("vit_b16", 85_798_656, 150), ("vit_l16", 303_301_632, 294), ("vit_h14", 630_764_800, 390),
        ("vit_2b14", 1_890_408_960, 294), ("vit_6.5b14", 6_447_632_384, 390), ("vit_s16", 21_665_664, 150),
    ],
)  # fmt: skip
def test_sizes_are_the_papers(variant, parameters, entries):
    with torch.device("meta"):
        vit = VisionTransformer(VARIANTS[variant], 224)
    assert sum(p.numel() for p in vit.parameters()) == parameters
    assert len(vit.state_dict()) == entries


@pytest.mark.parametrize("variant", ["vit_b16", "vit_l16", "vit_h14", "vit_2b14", "vit_6.5b14"])
def test_names_and_shapes_are_those_of_the_released_files(variant):
    """recipes §11.2."""
    s = VARIANTS[variant]
    d, tokens = s.width, (224 // s.patch) ** 2 + 1
    want = {
        "cls_token": (1, 1, d), "pos_embed": (1, tokens, d), "patch_embed.proj.weight": (d, 3, s.patch, s.patch),
        "patch_embed.proj.bias": (d,), "norm.weight": (d,), "norm.bias": (d,),
    }  # fmt: skip
    for i in range(s.depth):
        b = f"blocks.{i}."
        want |= {b + f"norm{n}.{k}": (d,) for n in (1, 2) for k in ("weight", "bias")}
        want |= {b + "attn.qkv.weight": (3 * d, d), b + "attn.qkv.bias": (3 * d,), b + "attn.proj.weight": (d, d)}
        want |= {b + "attn.proj.bias": (d,), b + "mlp.fc1.weight": (4 * d, d), b + "mlp.fc1.bias": (4 * d,)}
        want |= {b + "mlp.fc2.weight": (d, 4 * d), b + "mlp.fc2.bias": (d,)}
    with torch.device("meta"):
        vit = VisionTransformer(s, 224)
    assert {k: tuple(v.shape) for k, v in vit.state_dict().items()} == want


def test_names_and_outputs_are_timms():
    vit = build_vit("atto", seed=0).eval()
    theirs = TimmVisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0).eval()
    theirs.load_state_dict(vit.state_dict(), strict=True)
    x = torch.randn(3, 3, 32, 32)
    assert_close(vit(x), theirs.forward_features(x))
    assert_close(vit.pooled(vit(x)), theirs(x))  # timm's token pooling, as released MAWS models do (recipes §1.2)


@pytest.mark.parametrize("changes", [{}, {"class_tokens": 3}, {"class_tokens": 0, "pool": "mean"}], ids=str)
def test_tokens_equal_their_definition_written_out(changes):
    vit, x = tiny(**changes), images()
    state = reference.double(vit)
    want = torch.stack([reference.encoder(state, image, 4, 2) for image in x])
    assert_close(vit(x), want, rtol=0, atol=1e-10)
    c = changes.get("class_tokens", 1)
    assert_close(vit.pooled(want, "mean"), want[:, c:].sum(dim=1) / 9)
    if c:
        assert_close(vit.pooled(want), sum(want[:, i] for i in range(c)) / c)


def test_only_visible_patches_enter_and_keep_their_places():
    vit, x, ids = tiny(), images(), [[3, 0, 8], [5, 1, 2]]
    state = reference.double(vit)
    want = torch.stack([reference.encoder(state, x[i], 4, 2, ids[i]) for i in range(2)])
    assert_close(vit(x, torch.tensor(ids)), want, rtol=0, atol=1e-10)


def test_relative_positions_are_a_learned_bias_for_each_offset():
    vit, x = tiny(positions="relative"), images()
    state, bias = reference.double(vit), torch.zeros(2, 10, 10, dtype=torch.float64)
    assert "pos_embed" not in state and state["rel_pos_bias.relative_position_bias_table"].shape == (5 * 5 + 3, 2)
    table = state["rel_pos_bias.relative_position_bias_table"]
    for a in range(10):
        for b in range(10):
            (ay, ax), (by, bx) = divmod(a - 1, 3), divmod(b - 1, 3)
            row = 27 if a == b == 0 else 25 if a == 0 else 26 if b == 0 else (ay - by + 2) * 5 + ax - bx + 2
            bias[:, a, b] = table[row]
    want = torch.stack([reference.encoder(state, image, 4, 2, bias=bias) for image in x])
    assert_close(vit(x), want, rtol=0, atol=1e-10)
    ids = torch.tensor([[3, 0, 8], [5, 1, 2]])
    tokens = [[0, *(ids[i] + 1).tolist()] for i in range(2)]
    some = [
        reference.encoder(state, x[i], 4, 2, ids[i].tolist(), bias[:, tokens[i]][:, :, tokens[i]]) for i in range(2)
    ]
    assert_close(vit(x, ids), torch.stack(some), rtol=0, atol=1e-10)


def test_relative_offsets_of_a_grid_that_is_not_square_are_all_used_and_symmetric():
    index = relative_index((2, 3), class_tokens=0)
    assert index.unique().tolist() == list(range(offsets((2, 3), 0)))
    assert torch.equal(index + index.T, torch.full((6, 6), offsets((2, 3), 0) - 1))  # opposite offsets mirror


def test_float32_attention_is_the_same_function_with_logits_and_softmax_in_float32(monkeypatch):
    vit, exact = tiny(), tiny(Options(fp32_attention=True))
    assert isinstance(exact.blocks[0].attn, Float32Attention)
    assert_close(exact(images()), vit(images()), rtol=0, atol=1e-5)  # its float32 within a float64 model
    ours, seen, sdpa = exact.blocks[0].attn.float(), [], torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v, *args, **kwargs):
        seen.extend([q.dtype, k.dtype, v.dtype, torch.is_autocast_enabled("cpu")])
        return sdpa(q, k, v, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    x = 40 * torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(0))  # large logits, as before a divergence
    with torch.autocast("cpu", torch.bfloat16):
        got = ours(x)
        q, k, v = ours.qkv(x).float().reshape(7, 3, 2, 8).permute(1, 2, 0, 3)
    with torch.autocast("cpu", enabled=False):
        mixed = ((q @ k.transpose(1, 2)) / math.sqrt(8)).softmax(dim=2) @ v  # H T d
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(got, ours.proj(mixed.transpose(0, 1).reshape(1, 7, 16)))
    assert seen == [torch.float32] * 3 + [False]


def test_position_table_equals_its_definition():
    table = sincos_2d(8, (2, 3), class_tokens=2)
    assert torch.equal(table[:2], torch.zeros(2, 8))
    for row in range(2):
        for col in range(3):
            want = [f(p * 10000 ** -(k / 2)) for p in (col, row) for f in (math.sin, math.cos) for k in range(2)]
            assert_close(table[2 + row * 3 + col], torch.tensor(want))
    with pytest.raises(ValueError, match="width divisible by 4, not 6"):
        sincos_2d(6, (2, 3))


def test_positions_on_the_same_grid_are_untouched_and_on_another_keep_the_class_tokens():
    table = torch.randn(1, 1 + 14 * 14, 8)
    assert resize_positions(table, 1, (14, 14), (14, 14)) is table
    larger = resize_positions(table, 1, (14, 14), (32, 32))
    assert larger.shape == (1, 1 + 32 * 32, 8) and torch.equal(larger[:, 0], table[:, 0])
    with pytest.raises(ValueError, match=r"197 rows is not that of 1 class token\(s\) and 16 x 16"):
        resize_positions(table, 1, (16, 16), (32, 32))


@pytest.mark.parametrize("align_corners", [False, True])
def test_positions_are_interpolated_by_the_bicubic_convolution_written_out(align_corners):
    """Keys's cubic with a = -0.75, borders repeated; `align_corners` says where the new points lie."""
    old, new, a = (3, 4), (5, 6), -0.75
    table = torch.randn(1, 2 + 12, 5, dtype=torch.float64)

    def weights(t: float) -> list[float]:
        near = [(a + 2) * s**3 - (a + 3) * s**2 + 1 for s in (t, 1 - t)]
        far = [a * s**3 - 5 * a * s**2 + 8 * a * s - 4 * a for s in (1 + t, 2 - t)]
        return [far[0], near[0], near[1], far[1]]

    def taps(i: int, n_old: int, n_new: int) -> list[tuple[int, float]]:
        x = i * (n_old - 1) / (n_new - 1) if align_corners else (i + 0.5) * n_old / n_new - 0.5
        base = math.floor(x)
        return [(min(max(base + j - 1, 0), n_old - 1), w) for j, w in enumerate(weights(x - base))]

    got = resize_positions(table, 2, old, new, align_corners)
    for y in range(new[0]):
        for x in range(new[1]):
            want = sum(
                wy * wx * table[0, 2 + ty * 4 + tx]
                for ty, wy in taps(y, old[0], new[0])
                for tx, wx in taps(x, old[1], new[1])
            )
            assert_close(got[0, 2 + y * 6 + x], want, rtol=0, atol=1e-6)


def test_patch_kernels_are_resampled_as_pictures_or_by_pseudo_inverse():
    kernel = torch.randn(6, 3, 8, 8)
    assert resample_patches(kernel, 8) is kernel
    assert resample_patches(kernel, 14).shape == (6, 3, 14, 14)
    constant = torch.full((2, 3, 4, 4), 0.7)
    assert_close(resample_patches(constant, 7), torch.full((2, 3, 7, 7), 0.7))  # a picture of one colour stays one
    assert_close(resample_patches(kernel, 16, "pinv"), resample_patch_embed(kernel, [16, 16]))
    patch = torch.randn(3, 8, 8)
    enlarge = torch.nn.functional.interpolate(torch.eye(64).view(64, 1, 8, 8), (16, 16), mode="bicubic", antialias=True)
    larger = (patch.view(3, 64) @ enlarge.view(64, 256)).view(3, 16, 16)
    bigger_kernel = resample_patches(kernel, 16, "pinv")
    assert_close((bigger_kernel * larger).sum((1, 2, 3)), (kernel * patch).sum((1, 2, 3)), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="resampled by bicubic or pinv, not 'nearest'"):
        resample_patches(kernel, 16, "nearest")


@pytest.mark.parametrize(
    ("policy", "want"),
    [("none", []), ("all", [0, 1, 2, 3, 4]), ("every 2", [0, 2, 4]), ("first 3", [0, 1, 2]), ("first 9", range(5))],
)
def test_a_policy_says_which_blocks_are_recomputed(policy, want):
    assert [i for i, again in enumerate(recomputed(policy, 5)) if again] == list(want)


@pytest.mark.parametrize("policy", ["all", "every 2", "first 1"])
def test_recomputing_blocks_changes_memory_not_gradients(policy):
    grads, x = [], torch.randn(2, 3, 32, 32)
    for chosen in ("none", policy):
        vit = build_vit("atto", options=Options(drop_path=0.3, checkpoint_blocks=chosen)).train()
        torch.manual_seed(5)  # the same paths are dropped, in the second forward too
        vit(x).square().mean().backward()
        grads.append(vit.blocks[0].attn.qkv.weight.grad)
    assert torch.equal(*grads)


def test_dropout_is_of_tokens_and_of_what_attention_and_mlp_add_in_training_only():
    vit = VisionTransformer(TINY, 12, Options(dropout=0.3, fp32_attention=True))
    assert {m.p for n, m in vit.named_modules() if isinstance(m, torch.nn.Dropout) and "attn_drop" not in n} >= {0.3}
    assert (vit.pos_drop.p, vit.blocks[1].attn.proj_drop.p, vit.blocks[1].mlp.drop2.p) == (0.3, 0.3, 0.3)
    dropped, plain = tiny(Options(dropout=0.3, fp32_attention=True)), tiny()
    assert_close(dropped(images()), plain(images()), rtol=0, atol=1e-5)
    attn, x = dropped.train().blocks[0].attn, images().flatten(2)[..., :16]
    torch.manual_seed(0)
    assert float((attn(x) == 0).double().mean()) == pytest.approx(0.3, abs=0.15)


def test_drop_path_rises_linearly_from_the_first_block_to_the_last():
    vit = VisionTransformer(Shape(patch=4, depth=5, width=16, heads=2, image=12), 12, Options(drop_path=0.4))
    rates = [getattr(b.drop_path1, "drop_prob", 0.0) for b in vit.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize("style", ["mae", "swag"])
def test_initial_values_are_those_of_the_recipe(style):
    vit = build_vit("nano", seed=None)
    rules = vit.init_rules(style=style)
    init.fill(vit, rules, seed=3)
    init.check(vit, rules, at_most=1000)
    vit.requires_grad_(False)
    attn, mlp, d = vit.blocks[2].attn, vit.blocks[2].mlp, 192
    assert_close(float(attn.qkv.weight.std()), math.sqrt(2 / (d + 3 * d)), rtol=0.02, atol=0)  # Xavier
    if style == "mae":  # recipes §2.4
        assert_close(float(vit.patch_embed.proj.weight.std()), math.sqrt(2 / (d + 192)), rtol=0.02, atol=0)
        assert_close(vit.pos_embed[0], sincos_2d(d, (6, 6)))
        assert float(mlp.fc1.bias.abs().max()) == 0 < float(vit.cls_token.abs().max())
    else:  # recipes §6.3
        assert_close(float(vit.patch_embed.proj.weight.std()), 192**-0.5, rtol=0.02, atol=0)
        assert_close(float(attn.proj.weight.std()), (3 * d) ** -0.5, rtol=0.02, atol=0)  # uniform within d^-1/2
        assert_close(float(vit.pos_embed.std()), 0.02, rtol=0.05, atol=0)
        assert float(mlp.fc1.bias.abs().max()) < 1e-5 and float(vit.cls_token.abs().max()) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 50}, r"model\.image_size=50 must be a multiple of atto's patch, 8; try 48"),
        ({"variant": "vit_b14"}, r"model\.variant=vit_b14 is not known; did you mean vit_2b14\?"),
        ({"pool": "tokens"}, r"model\.pool=tokens is not known; known: cls, mean"),
        ({"class_tokens": 0}, r"model\.pool=cls needs a class token; set model\.pool=mean"),
        ({"class_tokens": 2, "positions": "relative"}, "at most one class token"),
        ({"positions": "sincosine"}, r"model\.positions=sincosine is not known; did you mean sincos\?"),
        ({"checkpoint_blocks": "some"}, "write none, all, every K or first K"),
        ({"checkpoint_blocks": "every 0"}, "write none, all, every K or first K"),
        ({"drop_path": 1.0}, r"model\.drop_path=1\.0 must be at least 0 and less than 1"),
    ],
)
def test_a_model_that_cannot_be_is_refused_with_the_way_out(changes, message):
    with pytest.raises(ConfigError, match=message):
        backbone(ModelConfig(**({"variant": "atto"} | changes)))


def test_a_run_can_have_another_patch_size_and_other_tokens():
    model = ModelConfig(variant="atto", image_size=36, patch=12, class_tokens=4, pool="mean", drop_path=0.1)
    assert (shape_of(model).patch, image_side(model), grid_of(model), patch_count(model)) == (12, 36, (3, 3), 9)
    vit = backbone(model)
    assert vit.cls_token.shape == (1, 4, 32) and vit.pos_embed.shape == (1, 13, 32)
    assert options_of(model) == Options(drop_path=0.1)


def test_unknown_variants_and_unfitting_images_are_refused():
    with pytest.raises(KeyError, match="unknown variant 'vit_x'"):
        build_vit("vit_x")
    with pytest.raises(ValueError, match="image size 50 is not a multiple of the patch size 8"):
        build_vit("nano", image_size=50)
