"""Compute and memory against published numbers, torch's own FLOP counter, and sums written out once more."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from maws.models import flops, memory
from maws.models.heads import Head
from maws.models.mae import DecoderShape, MaskedAutoencoder, long_sequence_decoder
from maws.models.simmim import SimMIM
from maws.models.text import TEXT_VARIANTS, TextTower
from maws.models.two_tower import TwoTower
from maws.models.vit import VARIANTS, Shape, VisionTransformer

TINY = Shape(patch=4, depth=3, width=24, heads=2, image=24, class_tokens=2)  # 6 x 6 patches
PAPERS = ("vit_b16", "vit_l16", "vit_h14", "vit_2b14", "vit_6.5b14")


def counted(module: nn.Module, *inputs: torch.Tensor, **others: int) -> int:
    """Multiply-adds of one forward pass, by the operations torch dispatches; of one image when there is one."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(*inputs, **others)
    operations = counter.get_total_flops()
    assert operations % 2 == 0
    return operations // 2


def meta(make) -> nn.Module:
    with torch.device("meta"):
        return make()


@pytest.mark.parametrize(
    ("name", "full", "encoder", "decoder", "ratio"),
    [  # recipes §9.12, GMAC
        ("vit_b16", 17.6, 4.4, 5.4, 0.557), ("vit_l16", 61.6, 15.4, 5.4, 0.337), ("vit_h14", 167.3, 41.4, 7.1, 0.290),
        ("vit_2b14", 493.6, 123.6, 7.2, 0.265), ("vit_6.5b14", 1673.6, 420.5, 7.2, 0.256),
    ],
)  # fmt: skip
def test_multiply_adds_are_those_of_the_table_of_figure_5(name, full, encoder, decoder, ratio):
    shape = VARIANTS[name]
    assert round(flops.trunk(shape, 224) / 1e9, 1) == full
    assert round(flops.encoder(shape, 224, 0.75) / 1e9, 1) == encoder
    assert round(flops.decoder(shape, DecoderShape(), 224, 0.75) / 1e9, 1) == decoder
    mae = flops.masked_autoencoder(shape, 224, DecoderShape()).forward
    assert round(mae / flops.trunk(shape, 224), 3) == ratio


@pytest.mark.parametrize("name", ["vit_b16", "vit_l16"])
def test_the_trunk_costs_what_torch_counts(name):
    vit = meta(lambda: VisionTransformer(VARIANTS[name], 224))
    assert counted(vit, torch.empty(1, 3, 224, 224, device="meta")) == flops.trunk(VARIANTS[name], 224)


@pytest.mark.parametrize(
    "decoder",
    [
        DecoderShape(width=16, depth=2, heads=4),
        long_sequence_decoder(TINY),
        DecoderShape(width=16, depth=2, heads=4, reduction="conv"),
        DecoderShape(width=16, depth=2, heads=4, reduction="average"),
        DecoderShape(width=16, depth=2, heads=4, reduction="conv", restore=True),
        DecoderShape(width=16, depth=2, heads=4, reduction="average", restore=True),
    ],
    ids=lambda d: f"{d.width}x{d.depth}-{d.reduction}{'-restored' * d.restore}",
)
def test_a_masked_autoencoder_costs_what_torch_counts(decoder):
    mae = meta(lambda: MaskedAutoencoder(TINY, 24, decoder))
    images, ids = torch.empty(1, 3, 24, 24, device="meta"), torch.empty(1, 36, dtype=torch.long, device="meta")
    keep = flops.visible(TINY, 24, 0.75)
    assert counted(mae, images, ids, keep=keep) == flops.masked_autoencoder(TINY, 24, decoder, skip=True).forward


def test_the_papers_code_also_embeds_masked_and_predicts_visible_patches():
    n, keep, values = 36, 9, 3 * 4 * 4
    more = (n - keep) * values * 24 + (keep + 2) * 16 * values  # and predicts class tokens
    decoder = DecoderShape(width=16, depth=2, heads=4)
    whole, skipped = (flops.masked_autoencoder(TINY, 24, decoder, skip=skip).forward for skip in (False, True))
    assert whole - skipped == more


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_a_wsp_head_costs_what_torch_counts(head):
    linear, mlp = [(24, 50)], [(24, 24), (24, 50)]
    made = meta(lambda: nn.Sequential(*(nn.Linear(*sizes) for sizes in (mlp if head == "mlp" else linear))))
    assert counted(made, torch.empty(1, 24, device="meta")) == flops.wsp_head(24, 50, head)
    cost = flops.weakly_supervised(TINY, 24, 50, head)
    assert cost.forward == flops.trunk(TINY, 24) + flops.wsp_head(24, 50, head)


def test_a_lit_pair_costs_what_torch_counts_and_only_its_text_side_is_trained():
    text, images = TEXT_VARIANTS["atto"], torch.zeros(1, 3, 24, 24)
    ids = torch.full((1, text.context + 2), 5)
    towers = TwoTower(VisionTransformer(TINY, 24), TextTower(text), 20).eval()
    cost = flops.locked_image_text(TINY, 24, text, joint_width=20)
    assert counted(towers, images, ids, torch.ones_like(ids)) == cost.forward
    assert cost.frozen == flops.trunk(TINY, 24) == counted(towers.image, images)
    assert flops.locked_image_text(TINY, 24, text, 20, batch=7).trained == cost.trained + 2 * 7 * 20
    assert cost.training() == 3 * cost.trained + cost.frozen


def test_simmim_costs_what_torch_counts_where_all_patches_are_predicted():
    simmim = meta(lambda: SimMIM(TINY, 24))
    images, ids = torch.empty(1, 3, 24, 24, device="meta"), torch.empty(1, 36, dtype=torch.long, device="meta")
    assert counted(simmim, images, ids, keep=0) == flops.simmim(TINY, 24).forward


def test_lc_mae_is_both_encoders_one_decoder_and_the_heads_that_torch_counts():
    decoder = DecoderShape(width=16, depth=2, heads=4)
    images, ids = torch.empty(1, 3, 24, 24, device="meta"), torch.empty(1, 36, dtype=torch.long, device="meta")
    mae, mlp = meta(lambda: MaskedAutoencoder(TINY, 24, decoder)), meta(lambda: Head(24))
    head = counted(mlp.eval(), torch.empty(1, 24, device="meta"))
    reconstruct = counted(mae, images, ids, keep=9)
    encode = counted(meta(lambda: VisionTransformer(TINY, 24)), images, ids[:, :9])
    target = flops.trunk(TINY, 24) + head
    both = flops.guided_autoencoder(TINY, 24, decoder, skip=True)
    assert both == flops.Cost(reconstruct + 2 * head + encode + 2 * head, frozen=2 * target)
    one = flops.guided_autoencoder(TINY, 24, decoder, symmetric=False, skip=True)
    assert one == flops.Cost(reconstruct + 2 * head, frozen=target)
    assert one.training() == 3 * one.trained + target
    assert one.training(checkpointed=True) == 4 * one.trained + target


@pytest.mark.parametrize("name", PAPERS)
def test_leaving_out_norms_and_biases_changes_less_than_swags_counter_can_tell(name):
    """Its counter: projections with bias, scaling, both products, softmax per head, GELU, 2 per norm, 1 per sum."""
    shape = VARIANTS[name]
    t, d, m = 1 + (224 // shape.patch) ** 2, shape.width, 4 * shape.width
    attention = 4 * t * (d + 1) * d + d * t + 2 * d * t * t + shape.heads * t * t
    block = 6 * t * d + attention + t * (d + 1) * m + t * m + t * (m + 1) * d
    assert flops.blocks(t, d, shape.depth) == pytest.approx(shape.depth * block, rel=3e-3)


def test_model_states_take_what_was_measured():
    both = 6_447_632_384 + 27_751_500  # ViT-6.5B and MAE's decoder, deepspeed.md §5
    assert round(memory.states(both) / 2**30, 1) == 96.5
    assert round((memory.states(both, target=both) - memory.states(both)) / 2**30) == 24 + 12  # fp32 mean, bf16 weights
    assert memory.states(both, target=3, ranks=8) == (16 * both + 18) / 8


def test_activations_take_what_was_measured():
    """deepspeed.md §5, MB per image of ViT-6.5B: MAE encoder, MAE decoder, WSP."""
    stacks = {(65, 4096, 32): (272.6, 17.0, 8.5), (257, 512, 8): (33.7, 2.1, 4.2), (257, 4096, 32): (1078, 67.4, 33.7)}
    for stack, (kept, inputs, once) in stacks.items():
        assert memory.activations(*stack) / 1e6 == pytest.approx(kept, abs=0.05 if kept < 1000 else 0.5)
        assert memory.checkpointed([stack]) / 1e6 == pytest.approx(inputs + once, abs=0.1)
    encoder, decoder, _ = stacks
    assert memory.checkpointed([encoder, decoder]) / 1e6 == pytest.approx(17.0 + 2.1 + 8.5, abs=0.15)
