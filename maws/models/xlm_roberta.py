"""transformers' XLM-RoBERTa: the one place that imports it, which takes seconds (see models/text.py)."""

from torch import nn
from transformers import XLMRobertaConfig, XLMRobertaModel

from maws.models.text import BOS, EOS, PAD, TextShape


class XLMRoberta(XLMRobertaModel):
    """transformers' model without its own initial values, which cannot be written to partitioned parameters."""

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: values come from `TextTower.init_rules` (models/init.py)."""


def build_encoder(shape: TextShape) -> XLMRobertaModel:
    """The encoder of a text shape, without a pooler and without values."""
    return XLMRoberta(_config(shape), add_pooling_layer=False)


def read_pretrained(name: str) -> dict[str, nn.Parameter]:
    """The parameters of a local folder or a hub name, from safetensors only."""
    model = XLMRobertaModel.from_pretrained(name, add_pooling_layer=False, use_safetensors=True)
    return dict(model.named_parameters())


def _config(shape: TextShape) -> XLMRobertaConfig:
    """The transformers config of a text shape; 514 positions of which the first two are never used (recipes §11.5)."""
    return XLMRobertaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.heads,
        intermediate_size=4 * shape.width,
        hidden_dropout_prob=shape.dropout,
        attention_probs_dropout_prob=shape.dropout,
        max_position_embeddings=514,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        hidden_act="gelu",
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
