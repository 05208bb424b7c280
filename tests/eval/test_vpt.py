"""VPT-deep against inserting tokens by hand, and what its training may change."""

from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from eval.adapters.vpt import Vpt, initial_prompts, prompted_features
from eval.evaluators.lowshot import VptConfig, multiplier, train_vpt
from eval.features import Encoder
from eval.logistic import LinearHead
from maws.data.transforms import Preprocess
from maws.models.vit import build_vit
from tests.eval.conftest import SIDE

CLASSES, WIDTH = 5, 32


@pytest.fixture
def trunk():
    """An encoder whose biases and norms are not at their neutral initial values."""
    vit = build_vit("atto", image_size=SIDE, seed=0).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return vit


@pytest.fixture
def head() -> LinearHead:
    g = torch.Generator().manual_seed(1)
    return LinearHead(
        torch.randn(WIDTH, generator=g),
        torch.rand(WIDTH, generator=g) + 0.5,
        torch.randn(CLASSES, WIDTH, generator=g),
        torch.randn(CLASSES, generator=g),
    )


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))


def start(trunk, number: int) -> torch.Tensor:
    return initial_prompts(trunk, number, torch.Generator().manual_seed(3))


def insert_by_hand(trunk, prompts, images):
    """Jia et al., 2022, eq. 4: [x, _, E] = L([x, P, E]), the prompt outputs replaced before every block."""
    patches = trunk.patch_embed(images) + trunk.pos_embed[:, 1:]
    x = torch.cat([(trunk.cls_token + trunk.pos_embed[:, :1]).expand(len(images), 1, -1), patches], dim=1)
    n = prompts.shape[1]
    for number, block in enumerate(trunk.blocks):
        own = prompts[number].expand(len(images), -1, -1)
        rest = x[:, 1:] if number == 0 else x[:, 1 + n :]
        x = block(torch.cat([x[:, :1], own, rest], dim=1))
    return trunk.norm(x)[:, 0]


def test_features_are_those_of_tokens_inserted_by_hand(trunk, images):
    prompts = start(trunk, 4).requires_grad_()
    expected = insert_by_hand(trunk, prompts, images)
    assert_close(prompted_features(trunk, prompts, images), expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(expected, trunk(images)[:, 0], atol=1e-3)  # the prompts matter
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(4))
    (theirs,) = torch.autograd.grad((expected * weight).sum(), prompts)
    (ours,) = torch.autograd.grad((prompted_features(trunk, prompts, images) * weight).sum(), prompts)
    assert_close(ours, theirs, atol=1e-5, rtol=1e-3)


def test_no_prompts_is_the_linear_head_on_the_plain_trunk(trunk, head, images):
    model = Vpt(trunk, start(trunk, 0), head)
    assert_close(model(images), head(trunk.forward_features(images)[:, 0]), atol=1e-4, rtol=1e-4)


def test_prompts_start_uniform_in_the_papers_bound(trunk):
    prompts = start(trunk, 500)
    bound = (6 / (3 * 8 * 8 + WIDTH)) ** 0.5
    assert prompts.shape == (2, 500, WIDTH)
    assert bound * 0.99 < prompts.abs().max() <= bound
    assert prompts.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)


def encoder_and_shots(trunk):
    encode = Encoder(trunk, Preprocess(SIDE))
    images = torch.randint(0, 256, (20, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)
    return encode, images, torch.arange(20) % CLASSES


def test_training_fits_the_shots_and_leaves_the_trunk_alone(trunk, head):
    encode, images, labels = encoder_and_shots(trunk)
    before = {name: value.clone() for name, value in trunk.state_dict().items()}
    cfg = VptConfig(steps=60, batch=20, lr=1e-2, head_lr=0.3, flip=False)
    model = train_vpt(encode, Vpt(trunk, start(trunk, 8), head), images, labels, cfg, seed=0)
    untrained = Vpt(trunk, start(trunk, 8), head)
    shots = encode.prepare(images)
    loss = torch.nn.functional.cross_entropy
    assert loss(model(shots), labels) < 0.3 * loss(untrained(shots), labels)
    for name, value in trunk.state_dict().items():
        assert value.equal(before[name]), name
    assert all(parameter.grad is None for parameter in trunk.parameters())


def test_the_trunk_stays_in_evaluation_mode(trunk, head):
    model = Vpt(trunk, start(trunk, 2), head)
    model.train()
    assert model.training and not any(module.training for module in trunk.modules())


def test_the_same_seed_gives_the_same_model(trunk, head):
    encode, images, labels = encoder_and_shots(trunk)
    cfg = VptConfig(steps=3, batch=8)
    models = [train_vpt(encode, Vpt(trunk, start(trunk, 2), head), images, labels, cfg, seed) for seed in (0, 0, 1)]
    assert models[0].prompts.equal(models[1].prompts) and models[0].weight.equal(models[1].weight)
    assert not models[0].prompts.equal(models[2].prompts)


def test_the_rate_warms_up_and_falls_to_nearly_nothing():
    cfg = VptConfig(steps=20, warmup=0.1)
    rates = [multiplier(step, cfg) for step in range(20)]
    assert rates[0] < rates[1] < rates[2] == 1.0
    assert all(a > b for a, b in pairwise(rates[2:]))
    assert rates[-1] < 0.01
