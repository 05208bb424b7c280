"""Our text tower as transformers describes it: config.json of XLMRobertaModel or BertModel, whose names ours are.

The two have the same tensors; XLM-R counts positions from the padding's id + 1 on, BERT from 0.
"""

from typing import Any

from maws.interop.outgoing import Made, same
from maws.models.text import BOS, EOS, PAD, TEXT_VARIANTS, TextShape
from maws.weight_files import WeightFiles

OURS = "text.encoder."  # before the names of a text tower in a release
TYPES = {"xlmr": "xlm-roberta", "bert": "bert"}  # TextShape.layout -> model_type
CLASSES = {"xlmr": "XLMRobertaModel", "bert": "BertModel"}
KNOWN = {  # hub name -> sizes, so that no network is needed for the two that everybody starts from (recipes §8.1)
    "xlm-roberta-base": TEXT_VARIANTS["xlmr_base"], "FacebookAI/xlm-roberta-base": TEXT_VARIANTS["xlmr_base"],
    "xlm-roberta-large": TEXT_VARIANTS["xlmr_large"], "FacebookAI/xlm-roberta-large": TEXT_VARIANTS["xlmr_large"],
}  # fmt: skip


def text_config(shape: TextShape, dtype: str = "float32") -> dict[str, Any]:
    """config.json of the tower, without a pooler."""
    return {
        "architectures": [CLASSES[shape.layout]], "model_type": TYPES[shape.layout], "vocab_size": shape.vocabulary,
        "hidden_size": shape.width, "num_hidden_layers": shape.depth, "num_attention_heads": shape.heads,
        "intermediate_size": shape.mlp or 4 * shape.width, "max_position_embeddings": shape.positions,
        "type_vocab_size": shape.types, "layer_norm_eps": shape.eps, "hidden_act": "gelu",
        "hidden_dropout_prob": shape.dropout, "attention_probs_dropout_prob": shape.dropout,
        "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "dtype": dtype, "torch_dtype": dtype,
    }  # fmt: skip


def text_tensors(files: WeightFiles, prefix: str = "") -> dict[str, Made]:
    """The text tower of a LiT release under transformers' names behind `prefix`."""
    own = [name for name in files.names if name.startswith(OURS)]
    return {prefix + name.removeprefix(OURS): same(files, name) for name in own}
