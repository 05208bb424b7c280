import math

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch.testing import assert_close

from maws.models import init
from maws.models.mae import DecoderShape, MaskedAutoencoder, normalise_patches, patchify, unpatchify
from maws.models.pos_embed import sincos_2d
from maws.models.text import TEXT_VARIANTS, TextTower
from maws.models.two_tower import TwoTower
from maws.models.vit import VARIANTS, VisionTransformer, build_vit


@pytest.fixture(scope="module")
def mae() -> MaskedAutoencoder:
    mae = MaskedAutoencoder(VARIANTS["atto"], 32, DecoderShape(16, 2, 2))
    init.fill(mae, mae.init_rules(), seed=0)
    return mae.eval()


@pytest.fixture(scope="module")
def towers() -> TwoTower:
    towers = TwoTower(build_vit("atto", seed=None), TextTower(TEXT_VARIANTS["atto"]), 24)
    init.fill(towers, towers.init_rules(), seed=0)
    return towers.eval()


def shuffled(images: int, patches: int = 16) -> torch.Tensor:
    return torch.rand(images, patches, generator=torch.Generator().manual_seed(7)).argsort(dim=1)


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


def test_names_and_outputs_are_timms():
    vit = build_vit("atto", seed=0).eval()
    theirs = TimmVisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0).eval()
    theirs.load_state_dict(vit.state_dict(), strict=True)
    images = torch.randn(3, 3, 32, 32)
    assert_close(vit(images), theirs.forward_features(images))


def test_position_table_equals_its_definition():
    table = sincos_2d(8, (2, 3))
    assert torch.equal(table[0], torch.zeros(8))
    for row in range(2):
        for col in range(3):
            want = [f(p * 10000 ** -(k / 2)) for p in (col, row) for f in (math.sin, math.cos) for k in range(2)]
            assert_close(table[1 + row * 3 + col], torch.tensor(want))


def test_encoding_visible_patches_is_encoding_an_image_that_has_no_others():
    vit = build_vit("atto", seed=0).eval()
    images, ids = torch.randn(2, 3, 32, 32), shuffled(2)[:, :5]
    x = vit.patch_embed(images) + vit.pos_embed[:, 1:]
    x = torch.stack([x[i, ids[i]] for i in range(2)])
    x = torch.cat([(vit.cls_token + vit.pos_embed[:, :1]).expand(2, -1, -1), x], dim=1)
    assert_close(vit(images, ids), vit.norm(vit.blocks(x)))


def test_predictions_equal_the_papers_unshuffled_decoder(mae):
    images, ids, keep = torch.randn(2, 3, 32, 32), shuffled(2), 4
    x = mae.decoder_embed(mae.forward_features(images, ids[:, :keep]))
    full = torch.cat([x[:, 1:], mae.mask_token.expand(2, 12, -1)], dim=1)
    restored = torch.stack([full[i, ids[i].argsort()] for i in range(2)])  # back to row-major order
    x = torch.cat([x[:, :1], restored], dim=1) + mae.decoder_pos_embed
    for block in mae.decoder_blocks:
        x = block(x)
    every = mae.decoder_pred(mae.decoder_norm(x))[:, 1:]
    want = torch.stack([every[i, ids[i, keep:]] for i in range(2)])
    assert_close(mae(images, ids, keep), want)


def test_patchify_is_row_column_channel_and_unpatchify_undoes_it():
    images = torch.randn(2, 3, 24, 32)
    patches = patchify(images, 8)
    assert_close(patches[1, 4 + 2, 3 * 5 + 8 * 3 * 2 + 1], images[1, 1, 8 + 2, 16 + 5])
    assert torch.equal(unpatchify(patches, 8, (3, 4)), images)


def test_normalised_targets_have_the_unbiased_statistics_of_each_patch():
    patches = torch.randn(2, 4, 48) * 3 + 5
    target, mean, std = normalise_patches(patches)
    one = patches[1, 2]
    assert_close(target[1, 2], (one - one.mean()) / (one.var(unbiased=True) + 1e-6).sqrt())
    assert_close(target * std + mean, patches)


def test_checkpointing_blocks_changes_memory_not_gradients():
    images, grads = torch.randn(2, 3, 32, 32), []
    for checkpointed in (False, True):
        vit = build_vit("atto", checkpoint_blocks=checkpointed, seed=0)
        vit(images).square().mean().backward()
        grads.append(vit.blocks[0].attn.qkv.weight.grad)
    assert_close(*grads)


def test_padding_does_not_change_a_captions_features(towers):
    ids = torch.tensor([[0, 57, 91, 2]])
    padded = torch.tensor([[0, 57, 91, 2, 1, 1, 1]])
    assert_close(towers.encode_text(ids, ids != 1), towers.encode_text(padded, padded != 1))


def test_the_locked_tower_gets_no_gradient_and_stays_in_evaluation_mode(towers):
    towers.train()
    assert not towers.image.training and towers.text.training
    image, text, _ = towers(torch.randn(2, 3, 32, 32), torch.tensor([[0, 5, 2], [0, 9, 2]]), torch.ones(2, 3).long())
    (image * text).sum().backward()
    assert all(p.grad is None for p in towers.image.parameters())
    assert towers.vision_projection.grad is not None  # MAWS trains a projection behind the locked tower
    towers.zero_grad()
    towers.eval()


def test_features_have_length_one_and_the_scale_starts_at_clips_and_is_bounded(towers):
    image, text, scale = towers(torch.randn(4, 3, 32, 32), torch.tensor([[0, 5, 2]]), torch.ones(1, 3).long())
    assert_close(image.norm(dim=1), torch.ones(4))
    assert_close(text.norm(dim=1), torch.ones(1))
    assert_close(scale, torch.tensor([1 / 0.07]))
    with torch.no_grad():
        towers.logit_scale.fill_(50.0)
        assert_close(towers.scale(), torch.tensor([100.0]))
        towers.logit_scale.fill_(math.log(1 / 0.07))


def test_unknown_variants_and_unfitting_images_are_refused():
    with pytest.raises(KeyError, match="unknown variant 'vit_x'"):
        build_vit("vit_x")
    with pytest.raises(ValueError, match="50 is not a multiple of nano's patch size 8"):
        build_vit("nano", image_size=50)
