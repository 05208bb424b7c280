"""AdaptFormer against a slow computation token by token, and its start as the plain trunk."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from data_pipeline.errors import UsageError
from eval.adapters.adapted import fresh
from eval.adapters.adaptformer import AdaptFormer
from maws.models.vit import build_vit
from tests.eval.adapting import SHAPES, WIDTH, check_that_the_trunk_is_untouched, noise, stirred_trunk
from tests.eval.conftest import SIDE


def adapter(trunk, seed: int = 0, **changes) -> AdaptFormer:
    sizes = {"bottleneck": 5, "dropout": 0.1, "scale": 0.1} | changes
    return AdaptFormer(trunk, torch.Generator().manual_seed(seed), **sizes)


def token_by_token(trunk, adapter, images):
    """The bottleneck of each token as a sum over its units, beside timm's own attention and MLP."""
    x = trunk.prepend(trunk.embed(images))
    for number, block in enumerate(trunk.blocks):
        stream = x + block.attn(block.norm1(x))
        x = stream + block.mlp(block.norm2(stream))
        for image in range(x.shape[0]):
            for token in range(x.shape[1]):
                added = adapter.up_bias[number].clone()
                for unit in range(adapter.down.shape[1]):
                    value = stream[image, token] @ adapter.down[number, unit] + adapter.down_bias[number, unit]
                    added = added + max(value, torch.zeros(())) * adapter.up[number, :, unit]
                x[image, token] += 0.1 * added
    return trunk.pooled(trunk.finished(x))


@torch.no_grad()
def test_features_are_those_of_a_computation_token_by_token():
    trunk, images = stirred_trunk(), noise(2)
    ours = adapter(trunk).eval()
    for parameter in ours.parameters():
        parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
    expected = token_by_token(trunk, ours, images)
    assert_close(ours(trunk, images), expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(expected, trunk.pooled(trunk(images)), atol=1e-2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_at_the_start_it_is_the_plain_trunk(shape):
    trunk, images = stirred_trunk(**shape), noise()
    assert_close(adapter(trunk)(trunk, images), trunk.pooled(trunk(images)), atol=1e-6, rtol=1e-6)


def test_its_parts_start_as_the_paper_says():
    trunk = stirred_trunk()
    ours = adapter(trunk, bottleneck=64)
    linear = nn.Linear(WIDTH, 64)
    nn.init.kaiming_uniform_(linear.weight, a=5**0.5)
    assert ours.down.shape == (2, 64, WIDTH) and ours.up.shape == (2, WIDTH, 64)
    assert ours.down.std().item() == pytest.approx(linear.weight.std().item(), rel=0.1)
    assert ours.down.abs().max() <= WIDTH**-0.5
    assert not any(part.any() for part in (ours.up, ours.up_bias, ours.down_bias))


def test_dropout_is_of_training_alone():
    trunk, images = stirred_trunk(), noise()
    ours = adapter(trunk, dropout=0.5)
    nn.init.normal_(ours.up)
    assert not ours(trunk, images).equal(ours(trunk, images))
    ours.eval()
    assert ours(trunk, images).equal(ours(trunk, images))


def test_training_fits_the_shots_and_leaves_the_trunk_alone():
    trunk = stirred_trunk()
    check_that_the_trunk_is_untouched(trunk, adapter(trunk))


def test_its_head_is_a_batch_norm_without_affine_and_a_linear_layer():
    head = fresh(WIDTH, 5, "adaptformer", torch.Generator().manual_seed(0))
    features = 3 + 2 * torch.randn(50, WIDTH)
    normed = (features - features.mean(0)) / (features.var(0, correction=0) + 1e-6).sqrt()
    assert_close(head(features), normed @ head.weight.T)
    assert {name for name, _ in head.named_parameters()} == {"weight", "bias"} and not head.bias.any()
    assert head.weight.std().item() == pytest.approx(0.01, rel=0.2)


def test_relative_positions_are_refused():
    trunk = build_vit("atto", image_size=SIDE, positions="relative")
    with pytest.raises(UsageError, match="AdaptFormer does not know relative positions"):
        adapter(trunk)(trunk, noise())
