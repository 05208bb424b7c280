import torch
from torch.testing import assert_close

from maws.config import IMAGENET_MEAN, IMAGENET_STD
from maws.models import init
from maws.models.text import TEXT_VARIANTS, TextTower
from maws.models.two_tower import TwoTower
from maws.models.vit import build_vit, normalise
from maws.objectives.contrastive import Contrastive


def images(n: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))


def test_the_contrastive_loss_is_symmetric_cross_entropy_over_all_pairs():
    towers = TwoTower(build_vit("atto", seed=None), TextTower(TEXT_VARIANTS["atto"]), 24)
    objective = Contrastive(towers, IMAGENET_MEAN, IMAGENET_STD)
    init.fill(objective, objective.init_rules(), seed=0)
    objective.eval()
    ids = torch.randint(4, 300, (4, 6))
    batch = {"image": images(4), "token_ids": ids, "token_mask": torch.ones_like(ids)}
    image, text, scale = towers(normalise(batch["image"], IMAGENET_MEAN, IMAGENET_STD), ids, torch.ones_like(ids))
    similarity = (scale * image @ text.T).softmax(dim=1), (scale * image @ text.T).softmax(dim=0)
    want = -sum(s[i, i].log() for s in similarity for i in range(4)) / 8
    assert_close(objective(batch)["loss"], want)
