"""The text tower: transformers' XLM-RoBERTa, or its BERT with XLM-R's tokens (recipes §8.1).

Axes: B captions, T tokens, D width.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from maws.models.init import Constant, InitRules, Normal

PAD, BOS, EOS, UNKNOWN = 1, 0, 2, 3  # fairseq's numbering, recipes §8.2


LAYOUTS = {"xlmr": PAD + 1, "bert": 0}  # -> the row of the position table that <s> takes
POOLS = ("first", "mean")


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

    def __post_init__(self) -> None:
        """Raises ValueError for sizes that no tower has."""
        if self.layout not in LAYOUTS or self.pool not in POOLS:
            raise ValueError(
                f"a text tower has layout {' or '.join(LAYOUTS)} and pool {' or '.join(POOLS)}, "
                f"not {self.layout!r} and {self.pool!r}"
            )
        if self.width % self.heads:
            raise ValueError(f"a text tower of width {self.width} cannot have {self.heads} heads of the same size")
        if not 0 < self.context <= self.longest:
            raise ValueError(
                f"a text tower with {self.positions} positions reads captions of 1 to {self.longest} pieces, "
                f"not {self.context}"
            )

    @property
    def longest(self) -> int:
        """Pieces of the longest caption that the position table has rows for."""
        return self.positions - LAYOUTS[self.layout] - 2


TEXT_VARIANTS: dict[str, TextShape] = {
    "xlmr_base": TextShape(width=768, depth=12, heads=12),
    "xlmr_large": TextShape(width=1024, depth=24, heads=16),
    "nano": TextShape(width=128, depth=3, heads=4, vocabulary=4000, context=30, dropout=0.0),  # ours: the demo
    "atto": TextShape(width=32, depth=1, heads=2, vocabulary=300, context=14, dropout=0.0),  # ours: tests and debug
}


class TextTower(nn.Module):
    """Token ids in, one vector for each caption out: the last hidden state pooled, without a pooler or further norm."""

    def __init__(self, shape: TextShape) -> None:
        from maws.models.xlm_roberta import build_encoder  # imports transformers: seconds, which other stages save

        super().__init__()
        self.shape = shape
        self.encoder = build_encoder(shape)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Encode ids (B T) under an attention mask (B T, 1 = a token) as B D.

        The mask is never left out: without it padding changes the result (recipes §8.2).
        """
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state  # B T D
        if self.shape.pool == "first":
            return hidden[:, 0]
        there = mask[..., None].to(hidden.dtype)  # B T 1
        return (hidden * there).sum(1) / there.sum(1).clamp(min=1)

    def init_rules(self, prefix: str = "") -> InitRules:
        """XLM-R's own, which are BERT's: normal with deviation 0.02, zero biases, unit norms."""
        p = prefix.replace(".", r"\.")
        return [
            (p + r".*LayerNorm\.weight", Constant(1.0)),
            (p + r".*\.bias", Constant(0.0)),
            (p + r".*\.weight", Normal(0.02)),
        ]
