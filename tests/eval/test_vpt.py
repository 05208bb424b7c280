"""VPT against inserting tokens by hand, and what training may change."""

from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from data_pipeline.errors import UsageError
from eval.adapters.adapted import Adapted, solved
from eval.adapters.training import warmup_cosine
from eval.adapters.vpt import Deep, Shallow, initial_prompts
from maws.models.vit import build_vit
from tests.eval.adapting import (
    SHAPES,
    WIDTH,
    check_that_the_trunk_is_untouched,
    noise,
    some_head,
    stirred_trunk,
    trained,
)
from tests.eval.conftest import SIDE


def start(trunk, number: int, deep: bool = True) -> torch.Tensor:
    return initial_prompts(trunk, number, torch.Generator().manual_seed(3), deep)


def insert_by_hand(trunk, prompts, images, deep: bool):
    """Jia et al., 2022: deep (eq. 4) replaces the prompt outputs before every block, shallow (eq. 5) keeps them."""
    c, n = trunk.class_tokens, prompts.shape[1]
    x = trunk.patch_embed(images) + trunk.pos_embed[:, c:]
    if c:
        x = torch.cat([(trunk.cls_token + trunk.pos_embed[:, :c]).expand(len(images), -1, -1), x], dim=1)
    first = prompts[0].expand(len(images), -1, -1)
    x = torch.cat([x[:, :c], first, x[:, c:]], dim=1)
    for number, block in enumerate(trunk.blocks):
        if deep and number:
            x = torch.cat([x[:, :c], prompts[number].expand(len(images), -1, -1), x[:, c + n :]], dim=1)
        x = block(x)
    kept = torch.cat([x[:, :c], x[:, c + n :]], dim=1)
    if trunk.shape.pool == "mean_norm":
        return trunk.norm(kept[:, c:].mean(dim=1))
    kept = trunk.norm(kept)
    return kept[:, c:].mean(dim=1) if trunk.shape.pool == "mean" else kept[:, :c].mean(dim=1)


@pytest.mark.parametrize("kind", [Deep, Shallow])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_features_and_gradients_are_those_of_tokens_inserted_by_hand(shape, kind):
    trunk, images = stirred_trunk(**shape), noise()
    adapter = kind(start(trunk, 4, kind is Deep))
    ours = adapter(trunk, images)
    expected = insert_by_hand(trunk, adapter.prompts, images, kind is Deep)
    assert_close(ours, expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(expected, trunk.pooled(trunk(images)), atol=1e-3)  # the prompts matter
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(4))
    (theirs,) = torch.autograd.grad((expected * weight).sum(), adapter.prompts)
    (gradient,) = torch.autograd.grad((ours * weight).sum(), adapter.prompts)
    assert_close(gradient, theirs, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("kind", [Deep, Shallow])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_without_prompts_it_is_the_linear_head_on_the_plain_trunk_to_the_bit(shape, kind):
    trunk, images, head = stirred_trunk(**shape), noise(), some_head()
    model = Adapted(trunk, kind(start(trunk, 0, kind is Deep)), solved(head))
    features = trunk.pooled(trunk(images))
    assert model.adapter(trunk, images).equal(features)
    assert_close(model(images), head(features), atol=1e-6, rtol=1e-6)


def test_relative_positions_are_refused():
    trunk = build_vit("atto", image_size=SIDE, positions="relative")
    for kind in (Deep, Shallow):
        with pytest.raises(UsageError, match="VPT does not know relative positions"):
            kind(start(trunk, 2))(trunk, noise())


def test_prompts_start_uniform_in_the_papers_bound():
    trunk = stirred_trunk()
    prompts, shallow = start(trunk, 500), start(trunk, 500, deep=False)
    bound = (6 / (3 * 8 * 8 + WIDTH)) ** 0.5
    assert prompts.shape == (2, 500, WIDTH) and shallow.shape == (1, 500, WIDTH)
    assert bound * 0.99 < prompts.abs().max() <= bound
    assert prompts.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)


@pytest.mark.parametrize("kind", [Deep, Shallow])
def test_training_fits_the_shots_and_leaves_the_trunk_alone(kind):
    trunk = stirred_trunk()
    check_that_the_trunk_is_untouched(trunk, kind(start(trunk, 8, kind is Deep)))


def test_the_same_seed_gives_the_same_model():
    trunk = stirred_trunk()
    models = [trained(trunk, Deep(start(trunk, 2)), seed) for seed in (0, 0, 1)]
    assert models[0].adapter.prompts.equal(models[1].adapter.prompts)
    assert models[0].head.weight.equal(models[1].head.weight)
    assert not models[0].adapter.prompts.equal(models[2].adapter.prompts)


def test_the_rate_warms_up_and_falls_to_nearly_nothing():
    multiplier = warmup_cosine(2, 20)
    rates = [multiplier(step) for step in range(20)]
    assert rates[0] < rates[1] < rates[2] == 1.0
    assert all(a > b for a, b in pairwise(rates[2:]))
    assert rates[-1] < 0.01
