import pytest
import torch
from torch import nn
from torch.testing import assert_close

from maws.models import init
from maws.models.mae import DecoderShape, MaskedAutoencoder
from maws.models.pos_embed import sincos_2d
from maws.models.vit import VARIANTS, build_vit


def test_filled_parameters_have_the_statistics_of_their_formula():
    mae = MaskedAutoencoder(VARIANTS["nano"], 48, DecoderShape(96, 2, 3))
    init.fill(mae, mae.init_rules(), seed=1)
    init.check(mae, mae.init_rules(), at_most=1000)
    qkv = mae.blocks[0].attn.qkv.weight
    assert_close(qkv.std(), torch.tensor((2 / (192 + 3 * 192)) ** 0.5), rtol=0.02, atol=0)  # Xavier: var 2/(in+out)
    assert_close(mae.pos_embed[0], sincos_2d(192, (6, 6)))


def test_a_network_whose_initialisation_was_lost_is_refused():
    vit = build_vit("nano", seed=0)
    nn.init.kaiming_uniform_(vit.blocks[0].attn.qkv.weight, a=5**0.5)  # torch's own default: what gets lost is this
    with pytest.raises(RuntimeError, match=r"blocks\.0\.attn\.qkv\.weight has standard deviation .* refusing"):
        init.check(vit, vit.init_rules(), at_most=1000)


def test_values_depend_on_seed_and_name_only():
    first, again, other = (build_vit("atto", seed=s).state_dict() for s in (3, 3, 4))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])
    assert not torch.equal(first["blocks.0.attn.proj.weight"], first["blocks.1.attn.proj.weight"])
