"""Networks built under `deepspeed.zero.Init` on two ranks hold the values of networks built densely."""

from dataclasses import replace

import torch
from ranks import run_ranks
from torch import nn

from maws.config import Duration, EngineConfig, OptimConfig
from maws.models import init
from maws.models.mae import DecoderShape, MaskedAutoencoder
from maws.models.text import TEXT_VARIANTS, TextTower
from maws.models.two_tower import TwoTower
from maws.models.vit import Options, Shape, VisionTransformer

SHAPE = Shape(patch=4, depth=2, width=48, heads=2, image=16)


def networks() -> dict[str, nn.Module]:
    """One of each kind of network."""
    several = replace(SHAPE, class_tokens=3)
    relative = replace(SHAPE, positions="relative")
    return {
        "mae": MaskedAutoencoder(SHAPE, 16, DecoderShape(24, 1, 2, "conv", restore=True)),
        "several class tokens": MaskedAutoencoder(several, 16, DecoderShape(24, 1, 2), encode_mask_tokens=True),
        "relative positions": VisionTransformer(relative, 16, Options(fp32_attention=True)),
        "BERT's layout": TextTower(replace(TEXT_VARIANTS["atto"], layout="bert", types=2, pool="mean")),
        "two towers": TwoTower(VisionTransformer(SHAPE, 16), TextTower(TEXT_VARIANTS["atto"]), 24),
    }


def compare() -> dict[str, object]:
    """On each rank: what is partitioned, how far it is from dense, and whether a lost initialisation is noticed."""
    from maws.engine import Runtime

    runtime = Runtime(EngineConfig(), OptimConfig(batch_size=2, lr=1.0, length=Duration(1, "steps")))
    dense = networks()
    with runtime.partitioned():
        split = networks()
    found: dict[str, object] = {}
    for name, module in split.items():
        rules = module.init_rules()  # type: ignore[operator]
        init.fill(dense[name], rules, seed=3)
        init.fill(module, rules, seed=3, gather=runtime.gather, writer=torch.distributed.get_rank() == 0)
        init.check(module, rules, runtime.gather, at_most=1000)
        far, own = 0.0, dict(dense[name].named_parameters())
        for key, param in module.named_parameters():
            assert param.numel() == 0, f"{key} is not partitioned"
            with runtime.gather([param]):
                far = max(far, float((param.detach() - own[key].detach()).abs().max()))
        found[name] = far
    lost = split["mae"].get_parameter("blocks.0.mlp.fc1.weight")
    with runtime.gather([lost]), torch.no_grad():
        nn.init.kaiming_uniform_(lost, a=5**0.5)
    try:
        init.check(split["mae"], split["mae"].init_rules(), runtime.gather, at_most=1000)  # type: ignore[operator]
    except RuntimeError as e:
        found["lost"] = str(e)
    return found


def test_networks_split_over_two_ranks_start_with_the_values_of_dense_ones(tmp_path):
    for found in run_ranks("test_zero_init", "compare", tmp_path):
        assert "blocks.0.mlp.fc1.weight has standard deviation" in found.pop("lost")
        assert found == dict.fromkeys(networks(), 0.0)
