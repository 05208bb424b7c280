"""LoRA against weights that are merged by hand, and what it leaves alone. Slow where peft is imported: 3 s."""

import copy
import sys

import pytest
import torch
from torch.testing import assert_close

from data_pipeline.errors import UsageError
from eval.adapters.lora import Lora, SplitQkv
from eval.adapters.settings import LoraConfig
from eval.base import Score
from eval.datasets import open_data
from eval.evaluators.lowshot import Config, Lowshot
from eval.features import Encoder
from maws.data.transforms import Preprocess
from tests.eval.adapting import SHAPES, WIDTH, check_that_the_trunk_is_untouched, noise, stirred_trunk
from tests.eval.conftest import SIDE

RANK, ALPHA = 3, 6.0


def lora(trunk, seed: int = 0) -> Lora:
    return Lora(trunk, torch.Generator().manual_seed(seed), RANK, ALPHA)


@pytest.mark.slow
def test_features_are_those_of_weights_merged_by_hand_in_q_and_v_alone():
    trunk, images = stirred_trunk(), noise()
    ours = lora(trunk)
    draw = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=draw)
    merged = copy.deepcopy(trunk)
    parts = list(ours.parameters())  # of every block: A and B of q, A and B of v
    for number, block in enumerate(merged.blocks):
        a_q, b_q, a_v, b_v = parts[4 * number : 4 * number + 4]
        block.attn.qkv.weight[:WIDTH] += ALPHA / RANK * b_q @ a_q
        block.attn.qkv.weight[2 * WIDTH :] += ALPHA / RANK * b_v @ a_v
    expected = merged.pooled(merged(images))
    assert_close(ours(trunk, images), expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(expected, trunk.pooled(trunk(images)), atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_at_the_start_it_is_the_plain_trunk(shape):
    trunk, images = stirred_trunk(**shape), noise()
    assert_close(lora(trunk)(trunk, images), trunk.pooled(trunk(images)), atol=1e-6, rtol=1e-6)


@pytest.mark.slow
def test_its_parameters_are_a_and_b_of_q_and_v():
    ours = lora(stirred_trunk())
    shapes = [tuple(parameter.shape) for parameter in ours.parameters()]
    assert shapes == [(RANK, WIDTH), (WIDTH, RANK)] * 4  # 2 blocks, q and v
    a, b = next(zip(*[iter(ours.parameters())] * 2, strict=True))
    assert 0 < a.abs().max() <= WIDTH**-0.5 and not b.any()


def test_splitting_takes_no_memory_and_gives_the_fused_projection():
    trunk = stirred_trunk()
    fused = trunk.blocks[0].attn.qkv
    split = SplitQkv(fused)
    assert split.k.weight.data_ptr() == fused.weight.data_ptr() + WIDTH * WIDTH * 4
    x = torch.randn(2, 5, WIDTH)
    assert_close(split(x), fused(x))


@pytest.mark.slow
def test_training_fits_the_shots_and_leaves_the_trunk_alone():
    trunk = stirred_trunk()
    kind = type(trunk.blocks[0].attn.qkv)
    check_that_the_trunk_is_untouched(trunk, lora(trunk))
    assert type(trunk.blocks[0].attn.qkv) is kind


@pytest.mark.slow
def test_the_same_seed_gives_the_same_start_and_the_global_generator_stays():
    trunk = stirred_trunk()
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    starts = [next(lora(trunk, seed).parameters()) for seed in (0, 0, 1)]
    assert starts[0].equal(starts[1]) and not starts[0].equal(starts[2])
    assert torch.rand(1).equal(expected)


def test_without_peft_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match=r"pip install 'maws-open\[lora\]'"):
        lora(stirred_trunk())


@pytest.mark.slow
def test_low_shot_scores_it(files):
    data = open_data([files.test], [files.train], files.classes)
    cfg = Config(k=(2,), seeds=1, methods=("lora",), lora=LoraConfig(steps=2, batch=8, rank=2))
    items = Lowshot(cfg, data, 0).run(Encoder(stirred_trunk(), Preprocess(SIDE)))
    (score,) = (item for item in items if isinstance(item, Score))
    assert score.metric == "2-shot/lora/top1" and score.facts["protocol"] == "lowshot/lora/fast"
    assert score.chosen["lora.lr"] == 1e-3 and "linear.l2" in score.chosen
