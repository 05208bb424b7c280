import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from maws.config import IMAGENET_MEAN, IMAGENET_STD
from maws.models import init
from maws.models.mae import DecoderShape, MaskedAutoencoder, patchify
from maws.models.text import TEXT_VARIANTS, TextTower
from maws.models.two_tower import TwoTower
from maws.models.vit import VARIANTS, build_vit, normalise
from maws.objectives.contrastive import Contrastive
from maws.objectives.masked_pixels import MaskedPixels, reconstruct
from maws.objectives.multi_label import MultiLabel


def images(n: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))


@pytest.fixture
def multi_label() -> MultiLabel:
    objective = MultiLabel(build_vit("atto", seed=None), 7, IMAGENET_MEAN, IMAGENET_STD)
    init.fill(objective, objective.init_rules(), seed=0)
    torch.nn.init.normal_(objective.head[-1].weight)  # the last layer starts at zero, which would hide mistakes
    return objective.eval()


def masked_pixels(norm_pix: bool) -> MaskedPixels:
    mae = MaskedAutoencoder(VARIANTS["atto"], 32, DecoderShape(16, 1, 2))
    objective = MaskedPixels(mae, 4, IMAGENET_MEAN, IMAGENET_STD, norm_pix)
    init.fill(objective, objective.init_rules(), seed=0)
    return objective.eval()


@pytest.mark.parametrize("norm_pix", [True, False])
def test_the_masked_loss_is_the_mean_over_masked_patches_only(norm_pix):
    objective = masked_pixels(norm_pix)
    batch = {"image": images(3), "ids_shuffle": torch.rand(3, 16).argsort(dim=1)}
    x = normalise(batch["image"], IMAGENET_MEAN, IMAGENET_STD)
    prediction = objective.autoencoder(x, batch["ids_shuffle"], 4)
    patches, errors = patchify(x, 8), []
    for i in range(3):
        for place, patch in enumerate(batch["ids_shuffle"][i, 4:]):
            target = patches[i, patch]
            if norm_pix:
                target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
            errors.append((prediction[i, place] - target).square().mean())
    assert_close(objective(batch)["loss"], torch.stack(errors).mean())


def test_wsp_loss_of_masked_images_is_that_of_the_visible_patches_and_depends_on_no_other(multi_label):
    batch = {"image": images(3), "synset_ids": torch.tensor([[0, 2], [1, -1], [6, 3]])}
    ids = torch.tensor([[0, 5, 7], [1, 2, 3], [15, 8, 4]])
    want = multi_label(batch | {"ids_keep": ids})
    assert not torch.allclose(want["loss"], multi_label(batch)["loss"])
    hidden = torch.ones(3, 16).scatter(1, ids, 0.0).view(3, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    painted = torch.where(hidden.bool(), 255 - batch["image"], batch["image"])
    assert_close(multi_label(batch | {"image": painted, "ids_keep": ids})["loss"], want["loss"])


def test_a_head_that_starts_at_the_prior_predicts_the_shares_of_the_synsets():
    counts = [1, 2, 3, 0, 10, 4, 4]  # a count of 0 cannot be predicted as impossible: it is taken as 1
    objective = MultiLabel(build_vit("atto", seed=None), 7, IMAGENET_MEAN, IMAGENET_STD, "linear", counts)
    rules = objective.init_rules()
    init.fill(objective, rules, seed=0)
    init.check(objective, rules)
    scores = objective.logits(normalise(images(2), IMAGENET_MEAN, IMAGENET_STD)).softmax(dim=1)
    assert_close(scores, torch.tensor([1, 2, 3, 1, 10, 4, 4]).float().expand(2, 7) / 25)


def test_reconstruction_keeps_visible_patches_and_gives_masked_ones_their_own_statistics_back():
    objective = masked_pixels(norm_pix=True)
    x, ids = torch.randn(2, 3, 32, 32), torch.rand(2, 16).argsort(dim=1)
    filled, mask = reconstruct(objective.autoencoder, x, ids, 4)
    before, after = patchify(x, 8), patchify(filled, 8)
    assert_close(after[mask == 0], before[mask == 0])
    prediction = objective.autoencoder(x, ids, 4)[1, 0]
    own = before[1, ids[1, 4]]
    assert_close(after[1, ids[1, 4]], prediction * (own.var() + 1e-6).sqrt() + own.mean())
    assert mask.sum(dim=1).tolist() == [12, 12]


def test_every_image_weighs_the_same_whatever_its_number_of_synsets(multi_label):
    batch = {"image": images(2), "synset_ids": torch.tensor([[4, -1, -1], [0, 2, 6]])}
    target = torch.tensor([[0, 0, 0, 0, 1, 0, 0], [1, 0, 1, 0, 0, 0, 1]]) / torch.tensor([[1], [3]])
    logits = multi_label.logits(normalise(batch["image"], IMAGENET_MEAN, IMAGENET_STD))
    assert_close(multi_label(batch)["loss"], F.cross_entropy(logits, target))


def test_mixing_images_mixes_their_targets_by_the_same_weight(multi_label):
    batch = {"image": images(3), "synset_ids": torch.tensor([[4, -1], [0, 2], [5, 1]])}
    mixed = batch | {"mix_with": torch.tensor([1, 2, 0]), "mix_weight": torch.full((3,), 0.7)}
    x = normalise(batch["image"], IMAGENET_MEAN, IMAGENET_STD)
    dense = torch.tensor([[0, 0, 0, 0, 1, 0, 0], [0.5, 0, 0.5, 0, 0, 0, 0], [0, 0.5, 0, 0, 0, 0.5, 0]])
    logits = multi_label.logits(0.7 * x + 0.3 * x[[1, 2, 0]])
    assert_close(multi_label(mixed)["loss"], F.cross_entropy(logits, 0.7 * dense + 0.3 * dense[[1, 2, 0]]))


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
