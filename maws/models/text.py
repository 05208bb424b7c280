"""The text tower: transformers' XLM-RoBERTa, read at its first token (recipes §8.1).

Axes: B captions, T tokens, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from maws.models.init import Constant, Gather, InitRules, Normal

PAD, BOS, EOS, UNKNOWN = 1, 0, 2, 3  # fairseq's numbering, recipes §8.2


@dataclass(frozen=True)
class TextShape:
    """Sizes of a text tower; `context` counts the pieces of a caption without the two special tokens."""

    width: int
    depth: int
    heads: int
    vocabulary: int = 250_002
    context: int = 100
    dropout: float = 0.1
    layout: str = "xlmr"  # or "bert": positions are counted from 0 instead of 2
    mlp: int = 0  # width of the feed-forward layers; 0: 4 * width
    positions: int = 514  # rows of the position table
    types: int = 1  # token types; all tokens are of type 0
    eps: float = 1e-5  # of every norm
    pool: str = "first"  # what a caption is: its first token, or the "mean" of all that are not padding


TEXT_VARIANTS: dict[str, TextShape] = {
    "xlmr_base": TextShape(width=768, depth=12, heads=12),
    "xlmr_large": TextShape(width=1024, depth=24, heads=16),
    "nano": TextShape(width=128, depth=3, heads=4, vocabulary=4000, context=30, dropout=0.0),  # ours: the demo
    "atto": TextShape(width=32, depth=1, heads=2, vocabulary=300, context=14, dropout=0.0),  # ours: tests and debug
}


class TextTower(nn.Module):
    """Token ids in, the last hidden state of the first token out; no pooler, no further norm."""

    def __init__(self, shape: TextShape) -> None:
        from maws.models.xlm_roberta import build_encoder  # imports transformers: seconds, which other stages save

        super().__init__()
        self.shape = shape
        self.encoder = build_encoder(shape)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Encode ids (B T) under an attention mask (B T, 1 = a token) as B D.

        The mask is never left out: without it padding changes the result (recipes §8.2).
        """
        return self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0]

    def init_rules(self, prefix: str = "") -> InitRules:
        """XLM-R's own: normal with deviation 0.02, zero biases, unit norms."""
        p = prefix.replace(".", r"\.")
        return [
            (p + r".*LayerNorm\.weight", Constant(1.0)),
            (p + r".*\.bias", Constant(0.0)),
            (p + r".*\.weight", Normal(0.02)),
        ]


@torch.no_grad()
def load_pretrained(tower: TextTower, name: str, gather: Gather, writer: bool) -> None:
    """Give a (possibly partitioned) text tower the weights of a local folder or hub name, from safetensors only.

    Raises ValueError when a tensor does not fit.
    """
    from maws.models.xlm_roberta import read_pretrained

    source = read_pretrained(name) if writer else {}
    for key, param in tower.encoder.named_parameters():
        with gather([param]):
            if writer:
                if key not in source or source[key].shape != param.shape:
                    raise ValueError(f"{name} has no tensor {key} of shape {tuple(param.shape)}")
                param.copy_(source[key])
