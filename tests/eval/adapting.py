"""Small trunks, pictures and splits for the tests of adapters."""

from typing import Any

import torch
from torch import Tensor, nn

from eval.adapters.adapted import Adapted, solved
from eval.adapters.training import Fast, Pictures, train_fast
from eval.datasets import Dataset
from eval.features import Encoder
from eval.logistic import LinearHead
from maws.data.transforms import Preprocess
from maws.models.vit import VisionTransformer, build_vit
from tests.eval.conftest import SIDE, corpus

WIDTH, CLASSES = 32, 7
# Every way of having class tokens and of pooling.
SHAPES: list[dict[str, Any]] = [
    {},
    {"class_tokens": 2},
    {"class_tokens": 0, "pool": "mean"},
    {"pool": "mean"},
    {"pool": "mean_norm"},
]


def stirred_trunk(**changes: Any) -> VisionTransformer:
    """A frozen encoder whose biases and norms are not at their neutral initial values."""
    vit = build_vit("atto", image_size=SIDE, seed=0, **changes).eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(0)
    for parameter in vit.parameters():
        parameter += 0.05 * torch.randn(parameter.shape, generator=draw)
    return vit


def noise(count: int = 3) -> Tensor:
    """Normalised pictures."""
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))


def some_head() -> LinearHead:
    draw = torch.Generator().manual_seed(1)
    return LinearHead(
        torch.randn(WIDTH, generator=draw),
        torch.rand(WIDTH, generator=draw) + 0.5,
        torch.randn(CLASSES, WIDTH, generator=draw),
        torch.randn(CLASSES, generator=draw),
    )


def some_shots(trunk: VisionTransformer, per_class: int = 3) -> Pictures:
    images = corpus("shot", per_class)
    labels = torch.tensor(images.labels)
    dataset = Dataset("training", tuple(images.keys), labels.numpy(), images.images.__getitem__, "", {})
    return Pictures(dataset, Encoder(trunk, Preprocess(SIDE)), range(len(labels)), labels)


def trained(trunk: VisionTransformer, adapter: nn.Module, seed: int = 0, **changes: Any) -> Adapted:
    cfg = Fast(**{"steps": 3, "batch": 8} | changes)
    shots = some_shots(trunk)
    return train_fast(Adapted(trunk, adapter, solved(some_head())), shots, cfg, cfg.lr[0], cfg.weight_decay[0], seed)


def check_that_the_trunk_is_untouched(trunk: VisionTransformer, adapter: nn.Module) -> None:
    """Weights, gradients and mode are as before, every parameter of the adapter has moved, and the shots fit better."""
    before = {name: value.clone() for name, value in trunk.state_dict().items()}
    parameters = {name: value.detach().clone() for name, value in adapter.named_parameters()}
    mark = torch.ones_like(trunk.norm.weight)
    trunk.norm.weight.grad = mark  # a gradient of somebody else's
    shots = some_shots(trunk)
    pictures = shots.encode.prepare(shots.all())
    untrained = Adapted(trunk, adapter, solved(some_head())).eval()
    loss = torch.nn.functional.cross_entropy
    first = loss(untrained(pictures), shots.labels)
    model = trained(trunk, adapter, steps=40, batch=21, lr=(1e-2,), head_lr=0.1)
    assert loss(model(pictures), shots.labels) < 0.5 * first
    for name, value in trunk.state_dict().items():
        assert value.equal(before[name]), name
    assert trunk.norm.weight.grad is mark and mark.eq(1).all()
    assert all(p.grad is None for name, p in trunk.named_parameters() if name != "norm.weight")
    assert not any(module.training for module in trunk.modules())
    for name, value in adapter.named_parameters():
        assert not value.equal(parameters[name]), name
