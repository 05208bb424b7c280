"""LoRA: low-rank changes of the queries and values of a frozen ViT (Hu et al., 2022), by peft.

    q = W_q x + b_q + (alpha / r) B A x,   the same for v

timm keeps query, key and value in one matrix. An adapter on that would change the keys too, and share A between the
three; so the trunk is copied as modules whose parameters are the trunk's own memory, the matrix is looked at as three,
and peft adapts `q` and `v`. A is Kaiming-uniform, B zero: the features start as those of the plain trunk (recipes 9.2).
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.errors import UsageError
from maws.models.vit import VisionTransformer


class Lora(nn.Module):
    """peft's adapters as the only parameters. Raises UsageError when peft is not installed."""

    def __init__(self, trunk: VisionTransformer, draw: torch.Generator, rank: int, alpha: float) -> None:
        super().__init__()
        peft = _peft()
        adapted = copy.deepcopy(trunk, {id(p): p for p in trunk.parameters()})  # new modules, the same parameters
        for block in adapted.blocks:
            attention: Any = block.attn
            attention.qkv = SplitQkv(attention.qkv)
        cfg = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["q", "v"], lora_dropout=0.0, bias="none")
        with torch.random.fork_rng(devices=[]):  # peft draws from the global generator
            torch.manual_seed(draw.initial_seed())
            peft.inject_adapter_in_model(cfg, adapted)
        self.weights = nn.ParameterList(p for p in adapted.parameters() if p.requires_grad)
        # Not a submodule: it holds the trunk's parameters too.
        self.adapted: VisionTransformer
        object.__setattr__(self, "adapted", adapted)

    def forward(self, trunk: VisionTransformer, images: Tensor) -> Tensor:
        """Normalised B 3 H W -> B D, with the trunk that it was made for."""
        return self.adapted.pooled(self.adapted(images))


class SplitQkv(nn.Module):
    """timm's fused projection as three linear layers on the same memory. B T D -> B T 3 D."""

    def __init__(self, fused: Any) -> None:
        super().__init__()
        biases = fused.bias.chunk(3) if fused.bias is not None else (None,) * 3
        self.q, self.k, self.v = (_view(w, b) for w, b in zip(fused.weight.chunk(3), biases, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)


def _view(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A frozen linear layer on memory that is another's."""
    out, width = weight.shape
    layer = nn.Linear(width, out, bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise UsageError(
            "LoRA needs peft, which is not installed: pip install 'maws-open[lora]'; or leave it out of lowshot.methods"
        ) from None
    return peft
