"""transformers' XLM-RoBERTa and BERT: the one place that imports them, which takes seconds (see models/text.py)."""

from typing import Any

from torch import nn
from transformers import BertConfig, BertModel, XLMRobertaConfig, XLMRobertaModel

from maws.models.text import BOS, EOS, PAD, TextShape


class XLMRoberta(XLMRobertaModel):
    """transformers' model without its own initial values, which cannot be written to partitioned parameters."""

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: values come from `TextTower.init_rules` (models/init.py)."""


class Bert(BertModel):
    """The same of BERT: it counts positions from 0, and every row of its table is trained."""

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing, as above."""


def build_encoder(shape: TextShape) -> XLMRobertaModel | BertModel:
    """The encoder of a text shape, without a pooler and without values."""
    if shape.layout == "bert":
        return Bert(BertConfig(**_settings(shape)), add_pooling_layer=False)
    return XLMRoberta(XLMRobertaConfig(**_settings(shape)), add_pooling_layer=False)


def _settings(shape: TextShape) -> dict[str, Any]:
    """What transformers calls the parts of a shape; XLM-R never uses the first two of its 514 positions (§11.5)."""
    return {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.mlp or 4 * shape.width,
        "hidden_dropout_prob": shape.dropout,
        "attention_probs_dropout_prob": shape.dropout,
        "max_position_embeddings": shape.positions,
        "type_vocab_size": shape.types,
        "layer_norm_eps": shape.eps,
        "hidden_act": "gelu",
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
