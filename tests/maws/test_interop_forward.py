"""What foreign tensors compute, from their own names: the same as our modules with the converted ones.

What is computed here starts from the foreign tensors alone: recipes §2.1 and §3.3 to the letter, torch's own multi-head
attention, torchvision's own model. Axes: B images, N patches, T tokens, R rows, D width, E decoder width, p patch side.
"""

import pytest
import torch
import torch.nn.functional as F
from official import ATTO, Tensors, drawn, long_shapes, lut_shapes, mae_shapes, maws_shapes, small, swag_shapes
from torch import Tensor
from torch.testing import assert_close
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionTransformer

from maws.interop import load_layout, lut, read_foreign
from maws.models.guided import GuidedAutoencoder
from maws.models.heads import Head
from maws.models.mae import MaskedAutoencoder, normalise_patches, patchify
from maws.models.vit import VisionTransformer
from maws.objectives.momentum_guidance import Guidance, MomentumGuidance, reconstruct_patches
from maws.objectives.targets import Pixels


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def norm(x: Tensor, t: Tensors, name: str) -> Tensor:
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / (var + 1e-6).sqrt() * t[f"{name}.weight"] + t[f"{name}.bias"]


def mae_blocks(x: Tensor, t: Tensors, prefix: str, heads: int) -> Tensor:
    """Pre-norm blocks in einsum, for biases of queries, keys and values together or of queries and values alone."""
    for i in range(len({name.split(".")[1] for name in t if name.startswith(prefix)})):
        at, (b, n, d) = f"{prefix}{i}.", x.shape
        bias = t.get(f"{at}attn.qkv.bias")
        if bias is None:
            bias = torch.cat([t[f"{at}attn.q_bias"], torch.zeros(d, dtype=x.dtype), t[f"{at}attn.v_bias"]])
        qkv = torch.einsum("bnd,ed->bne", norm(x, t, f"{at}norm1"), t[f"{at}attn.qkv.weight"]) + bias
        q, k, v = qkv.reshape(b, n, 3, heads, d // heads).unbind(2)
        weight = (torch.einsum("bnhc,bmhc->bhnm", q, k) * (d // heads) ** -0.5).softmax(-1)
        mixed = torch.einsum("bhnm,bmhc->bnhc", weight, v).reshape(b, n, d)
        x = x + mixed @ t[f"{at}attn.proj.weight"].T + t[f"{at}attn.proj.bias"]
        h = norm(x, t, f"{at}norm2") @ t[f"{at}mlp.fc1.weight"].T + t[f"{at}mlp.fc1.bias"]
        h = 0.5 * h * (1 + torch.erf(h / 2**0.5))
        x = x + h @ t[f"{at}mlp.fc2.weight"].T + t[f"{at}mlp.fc2.bias"]
    return x


def pick(x: Tensor, ids: Tensor) -> Tensor:
    return torch.gather(x, 1, ids[..., None].expand(-1, -1, x.shape[2]))


def cut(images: Tensor, p: int) -> Tensor:
    """B N 3pp: row, column, channel inside a patch."""
    rows = [
        images[:, :, i : i + p, j : j + p] for i in range(0, images.shape[2], p) for j in range(0, images.shape[3], p)
    ]
    return torch.stack([row.permute(0, 2, 3, 1).flatten(1) for row in rows], dim=1)


def mae_encoder(t: Tensors, images: Tensor, ids_keep: Tensor | None, heads: int) -> Tensor:
    p = t["patch_embed.proj.weight"].shape[-1]
    kernel = t["patch_embed.proj.weight"].permute(0, 2, 3, 1).flatten(1)  # as patches are cut
    x = cut(images, p) @ kernel.T + t["patch_embed.proj.bias"] + t["pos_embed"][:, 1:]
    x = x if ids_keep is None else pick(x, ids_keep)
    cls = (t["cls_token"] + t["pos_embed"][:, :1]).expand(len(x), -1, -1)
    return norm(mae_blocks(torch.cat([cls, x], dim=1), t, "blocks.", heads), t, "norm")


def mae_loss(t: Tensors, images: Tensor, noise: Tensor, ratio: float, heads: int) -> tuple[Tensor, Tensor]:
    """Recipes §2.1 and §2.2, with the reduced decoder of §3.3 where its tensors are there; loss and ids_shuffle."""
    n, p = noise.shape[1], t["patch_embed.proj.weight"].shape[-1]
    keep, side = int(n * (1 - ratio)), int(n**0.5)
    ids_shuffle = noise.argsort(dim=1)
    ids_restore = ids_shuffle.argsort(dim=1)
    mask = torch.ones(len(images), n, dtype=images.dtype)
    mask[:, :keep] = 0
    mask = mask.gather(1, ids_restore)
    x = mae_encoder(t, images, ids_shuffle[:, :keep], heads) @ t["decoder_embed.weight"].T + t["decoder_embed.bias"]
    e = x.shape[2]
    x_ = torch.cat([x[:, 1:], t["mask_token"].expand(len(x), n - keep, -1)], dim=1)
    x_ = pick(x_, ids_restore)
    if "decoder_downsample.weight" in t:
        grid = x_.reshape(-1, side // 2, 2, side // 2, 2, e)  # B rows row cols col E
        x_ = torch.einsum("brickd,edik->brce", grid, t["decoder_downsample.weight"]).flatten(1, 2)
        x_ = x_ + t["decoder_downsample.bias"]
    x = torch.cat([x[:, :1], x_], dim=1) + t["decoder_pos_embed"]
    x = mae_blocks(x, t, "decoder_blocks.", heads)[:, 1:]
    if "decoder_upsample.weight" in t:
        grid = torch.einsum("brcd,deik->bricke", x.unflatten(1, (side // 2, -1)), t["decoder_upsample.weight"])
        x = grid.reshape(len(x), n, e) + t["decoder_upsample.bias"]
    prediction = norm(x, t, "decoder_norm") @ t["decoder_pred.weight"].T + t["decoder_pred.bias"]
    if prediction.shape[1] < n:
        p, mask = 2 * p, mask.reshape(-1, side // 2, 2, side // 2, 2).mean(dim=(2, 4)).flatten(1)
    target = cut(images, p)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    return (((prediction - target) ** 2).mean(-1) * mask).sum() / mask.sum(), ids_shuffle


def our_loss(mae: MaskedAutoencoder, images: Tensor, ids_shuffle: Tensor, keep: int) -> Tensor:
    ids, weight = mae.predicted(ids_shuffle, keep)
    target, _, _ = normalise_patches(patchify(images, mae.prediction_patch))
    error = ((mae(images, ids_shuffle, keep) - pick(target, ids)) ** 2).mean(-1)
    return error.mean() if weight is None else (error * weight).sum() / weight.sum()


@pytest.mark.parametrize(
    ("layout", "shapes"),
    [
        ("mae", mae_shapes(**ATTO, e=16, deep=2)),
        ("lut", lut_shapes(**ATTO, e=16, deep=1, hidden=20)),
        ("long_seq_mae", long_shapes(**ATTO, deep=2)),
        ("long_seq_mae", long_shapes(**ATTO, deep=1, split=True)),
        ("long_seq_mae", long_shapes(**ATTO, deep=1, up=True)),
    ],
    ids=["mae", "lut", "reduced", "reduced without a bias of the keys", "reduced and restored"],
)
def test_the_official_loss_is_ours_from_the_official_tensors(images, layout, shapes):
    tensors = drawn(shapes)
    noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(3))
    want, ids_shuffle = mae_loss(tensors, images, noise, ratio=0.7, heads=2)  # keeps 4 of 16, of which 2 x 2 are mixed
    mae = load_layout(layout).to_ours(tensors).build()
    assert isinstance(mae, MaskedAutoencoder)
    assert_close(our_loss(mae, images, ids_shuffle, keep=4), want, rtol=0, atol=1e-6)


def test_a_finetuned_maws_file_classifies_from_its_class_token(tmp_path, images):
    tensors = drawn(maws_shapes(**ATTO, classes=7))
    torch.save(tensors, tmp_path / "vit_ft_in1k.pt")
    found = read_foreign(tmp_path / "vit_ft_in1k.pt")
    logits = mae_encoder(tensors, images, None, heads=2)[:, 0] @ tensors["head.weight"].T + tensors["head.bias"]
    ours = F.linear(found.build()(images)[:, 0], found.heads["head.weight"], found.heads["head.bias"])
    assert_close(ours, logits, rtol=0, atol=1e-6)


def swag_tokens(t: Tensors, images: Tensor, heads: int) -> Tensor:
    """T B D: SWAG keeps tokens first, and uses torch's attention as it is."""
    d, p = t["class_token"].shape[2], t["conv_proj.weight"].shape[-1]
    x = F.conv2d(images, t["conv_proj.weight"], t["conv_proj.bias"], stride=p).flatten(2).permute(2, 0, 1)
    x = torch.cat([t["class_token"].expand(-1, len(images), -1), x]) + t["encoder.pos_embedding"]
    for i in range(len({name.split(".")[2] for name in t if ".layer_" in name})):
        at = f"encoder.layers.layer_{i}."
        y = F.layer_norm(x, (d,), t[f"{at}ln_1.weight"], t[f"{at}ln_1.bias"], 1e-6)
        own = [t[f"{at}self_attention.{name}"] for name in ("in_proj_weight", "in_proj_bias")]
        out = [t[f"{at}self_attention.out_proj.{name}"] for name in ("weight", "bias")]
        x = x + F.multi_head_attention_forward(y, y, y, d, heads, *own, None, None, False, 0.0, *out)[0]
        y = F.layer_norm(x, (d,), t[f"{at}ln_2.weight"], t[f"{at}ln_2.bias"], 1e-6)
        y = F.gelu(F.linear(y, t[f"{at}mlp.linear_1.weight"], t[f"{at}mlp.linear_1.bias"]))
        x = x + F.linear(y, t[f"{at}mlp.linear_2.weight"], t[f"{at}mlp.linear_2.bias"])
    return F.layer_norm(x, (d,), t["encoder.ln.weight"], t["encoder.ln.bias"], 1e-6)


def test_a_swag_tower_computes_what_torchs_attention_does_with_its_tensors(images):
    tensors = drawn(swag_shapes(**ATTO, classes=7))
    found = load_layout("swag").to_ours(tensors)
    assert found.kind == "classifier"
    want = swag_tokens(tensors, images, heads=2).transpose(0, 1)  # B T D
    assert_close(found.build()(images), want, rtol=0, atol=1e-6)
    assert torch.equal(found.heads["head.weight"], tensors["head.layers.head.weight"])


def test_torchvisions_own_model_gives_the_same_features_and_classes_from_its_names(images):
    theirs = TorchvisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=128, num_classes=7
    )
    theirs = theirs.double().eval()
    theirs.load_state_dict(drawn({name: tuple(value.shape) for name, value in theirs.state_dict().items()}))
    found = load_layout("swag").to_ours(theirs.state_dict())
    ours = F.linear(found.build()(images)[:, 0], found.heads["head.weight"], found.heads["head.bias"])
    assert_close(ours, theirs(images), rtol=0, atol=1e-6)


def lut_head(t: Tensors, name: str, x: Tensor, training: bool) -> Tensor:
    """Linear, batch norm, ReLU, linear: R D to R D; in training by the rows' own mean and biased variance."""
    x = torch.einsum("rd,hd->rh", x, t[f"{name}.0.weight"])
    mean, var = (
        (x.mean(0), x.var(0, unbiased=False)) if training else (t[f"{name}.1.running_mean"], t[f"{name}.1.running_var"])
    )
    x = (x - mean) / (var + 1e-5).sqrt() * t[f"{name}.1.weight"] + t[f"{name}.1.bias"]
    return x.clamp(min=0) @ t[f"{name}.3.weight"].T


def test_the_whole_loss_of_a_lut_checkpoint_is_that_of_its_converted_objective():
    """Recipes §4.1, what the official code does: disjoint quarters of both views, symmetric, target in evaluation."""
    shapes = lut_shapes(**ATTO, e=16, deep=1, hidden=20)
    online, ema, g = drawn(shapes, seed=1), drawn(shapes, seed=2), torch.Generator().manual_seed(3)
    pixels = [torch.randint(256, (3, 3, 32, 32), generator=g, dtype=torch.uint8) for _ in range(2)]
    first, second = ((view.float() / 255).double() for view in pixels)
    noise = torch.rand(3, 16, generator=g)
    loss, ids = mae_loss(online, first, noise, ratio=0.75, heads=2)
    asked, wanted = [], []
    for view, keep in ((first, ids[:, :4]), (second, ids[:, 4:8])):
        pooled = mae_encoder(online, view, keep, heads=2)[:, 1:].mean(1)
        asked.append(lut_head(online, "predictor", lut_head(online, "head", pooled, True), True))
        wanted.append(lut_head(ema, "head", mae_encoder(ema, view, None, heads=2)[:, 1:].mean(1), False))
    cosines = [F.cosine_similarity(asked[0], wanted[1]).mean(), F.cosine_similarity(asked[1], wanted[0]).mean()]
    loss = loss + 0.25 * sum(2 - 2 * cosine for cosine in cosines) / 2

    found, target = load_layout("lut").to_ours(online), load_layout("lut").to_ours(ema)
    assert found.decoder is not None
    branches = GuidedAutoencoder(found.shape, 32, found.decoder), VisionTransformer(found.shape, 32)
    reconstruction = reconstruct_patches(Pixels(8, True), 4)
    guidance = Guidance(alpha=0.25, hidden=20)
    ours = MomentumGuidance(*branches, 4, (0.0,) * 3, (1.0,) * 3, reconstruction, guidance).double()
    ours.load_state_dict(lut.objective_state(found, target), strict=True)
    batch = {"image": pixels[0], "image_other": pixels[1], "ids_shuffle": ids}
    assert_close(ours.train()(batch)["loss"].double(), loss, rtol=0, atol=1e-5)  # targets and cosines are float32


def test_the_heads_of_a_lut_file_compute_linear_norm_relu_linear():
    tensors = small("lut")
    found = load_layout("lut").to_ours(tensors)
    x = torch.randn(3, 32, dtype=torch.float64)
    for ours, theirs in (("projector", "head"), ("predictor", "predictor")):
        head = Head(32, 20).double().eval()
        head.load_state_dict(
            {n.removeprefix(f"{ours}."): v for n, v in found.heads.items() if n.startswith(f"{ours}.")}, strict=True
        )
        assert_close(head(x), lut_head(tensors, theirs, x, training=False), rtol=0, atol=1e-6)
