import math

import pytest
import torch
from torch.testing import assert_close

from maws.models import init
from maws.models.text import TEXT_VARIANTS, TextTower
from maws.models.two_tower import TwoTower
from maws.models.vit import build_vit


@pytest.fixture(scope="module")
def towers() -> TwoTower:
    towers = TwoTower(build_vit("atto", seed=None), TextTower(TEXT_VARIANTS["atto"]), 24)
    init.fill(towers, towers.init_rules(), seed=0)
    return towers.eval()


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
