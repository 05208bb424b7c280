"""Text towers of both layouts compute what transformers' own compute, and take weights whole or not at all."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from maws.checkpoint import CheckpointError
from maws.config import ConfigError, override
from maws.data.transforms import Preprocess
from maws.models import init
from maws.models.text import TEXT_VARIANTS, TextShape, TextTower
from maws.models.two_tower import TwoTower
from maws.models.vit import Shape, VisionTransformer
from maws.pretrained_text import load_pretrained, pretrained_sha256, shape_from
from maws.release import describe, write_release
from maws.stages import lit

XLMR = TextShape(width=24, depth=2, heads=3, vocabulary=50, context=9, positions=16, mlp=40, dropout=0.0)
BERT = replace(XLMR, layout="bert", types=2, positions=12, eps=1e-12)
IDS = torch.tensor([[0, 7, 31, 9, 2], [0, 44, 2, 1, 1]])
MASK = (IDS != 1).long()


def gather(params: list[nn.Parameter]) -> nullcontext[None]:
    return nullcontext()


def built(shape: TextShape, seed: int = 0) -> TextTower:
    tower = TextTower(shape)
    init.fill(tower, tower.init_rules(), seed)
    with torch.no_grad():
        for p in tower.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.2)
    return tower.eval()


def loaded(folder: Path, pool: str = "") -> TextTower:
    shape = shape_from(str(folder))
    tower = TextTower(replace(shape, pool=pool) if pool else shape)
    load_pretrained(tower, str(folder), gather, writer=True)
    return tower.eval()


@pytest.fixture(params=["xlmr", "bert"])
def published(request, tmp_path):
    """A folder as transformers writes it, of a model with a head and its own initial values; and that model's trunk."""
    import transformers

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3,
             "intermediate_size": 40, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}  # fmt: skip
    if request.param == "xlmr":
        config = transformers.XLMRobertaConfig(**sizes, max_position_embeddings=16, type_vocab_size=1)
        model = transformers.XLMRobertaForMaskedLM(config)
        trunk = model.roberta
    else:
        config = transformers.BertConfig(**sizes, max_position_embeddings=12)
        trunk = model = transformers.BertModel(config)
    model.save_pretrained(tmp_path)
    return tmp_path, trunk.eval()


def test_a_folder_of_transformers_gives_the_outputs_of_transformers(published):
    folder, theirs = published
    with torch.no_grad():
        hidden = theirs(input_ids=IDS, attention_mask=MASK).last_hidden_state
        assert_close(loaded(folder)(IDS, MASK), hidden[:, 0])
        mean = torch.stack([hidden[0].mean(0), hidden[1, :3].mean(0)])
        assert_close(loaded(folder, pool="mean")(IDS, MASK), mean)


def test_the_layouts_differ_by_the_two_unused_rows_of_the_position_table():
    bert = built(replace(BERT, types=1, eps=1e-5))
    xlmr = TextTower(replace(XLMR, positions=14))
    state = {k: v.clone() for k, v in bert.state_dict().items()}
    table = "encoder.embeddings.position_embeddings.weight"
    state[table] = torch.cat([torch.randn(2, 24), state[table]])
    xlmr.load_state_dict(state)
    assert_close(xlmr.eval()(IDS, MASK), bert(IDS, MASK))


def test_a_tower_of_torchs_own_layers_gives_the_same_first_token(tmp_path):
    """recipes §11.5: q, k and v in one matrix, post-norm, exact GELU, positions from 2, padding left out."""
    tower = built(XLMR)
    ours: dict[str, Tensor] = dict(tower.encoder.named_parameters())
    layer = nn.TransformerEncoderLayer(24, 3, 40, 0.0, "gelu", layer_norm_eps=1e-5, batch_first=True)
    theirs = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    state: dict[str, Tensor] = {}
    names = {"out_proj": "attention.output.dense", "norm1": "attention.output.LayerNorm", "norm2": "output.LayerNorm",
             "linear1": "intermediate.dense", "linear2": "output.dense"}  # fmt: skip
    for i in range(2):
        for kind in ("weight", "bias"):
            qkv = [ours[f"encoder.layer.{i}.attention.self.{n}.{kind}"] for n in ("query", "key", "value")]
            state[f"layers.{i}.self_attn.in_proj_{kind}"] = torch.cat(qkv)
            for a, b in names.items():
                a = f"self_attn.{a}" if a == "out_proj" else a
                state[f"layers.{i}.{a}.{kind}"] = ours[f"encoder.layer.{i}.{b}.{kind}"]
    theirs.load_state_dict(state)
    table = {n: ours[f"embeddings.{n}_embeddings.weight"] for n in ("word", "position", "token_type")}
    positions = torch.tensor([[2, 3, 4, 5, 6], [2, 3, 4, 1, 1]])
    x = table["word"][IDS] + table["position"][positions] + table["token_type"][0]
    x = F.layer_norm(x, (24,), ours["embeddings.LayerNorm.weight"], ours["embeddings.LayerNorm.bias"])
    with torch.no_grad():
        assert_close(tower(IDS, MASK), theirs(x, src_key_padding_mask=MASK == 0)[:, 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [XLMR, BERT, replace(BERT, pool="mean")])
def test_padding_changes_nothing_under_a_mask_and_much_without(shape):
    tower = built(shape)
    with torch.no_grad():
        alone = tower(IDS[1:, :3], MASK[1:, :3])
        assert_close(tower(IDS, MASK)[1:], alone)
        assert (tower(IDS, torch.ones_like(IDS))[1:] - alone).abs().max() > 0.05


def test_the_first_token_and_the_mean_are_not_the_same_thing():
    first, mean = built(XLMR), built(replace(XLMR, pool="mean"))
    with torch.no_grad():
        assert (first(IDS, MASK) - mean(IDS, MASK)).abs().max() > 0.1


def test_every_parameter_of_both_layouts_has_an_initial_value():
    for shape in (XLMR, BERT):
        tower = TextTower(shape)
        init.fill(tower, tower.init_rules(), 0)
        init.check(tower, tower.init_rules(), at_most=1000)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5}, "width 24 cannot have 5 heads"),
        ({"layout": "gpt"}, "layout xlmr or bert"),
        ({"pool": "max"}, "pool first or mean"),
        ({"context": 13}, "reads captions of 1 to 12 pieces, not 13"),
    ],
)
def test_a_shape_that_no_tower_has_is_refused(change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        replace(XLMR, **change)


# ---------------------------------------------------------------------------------------------------- config.json
GOOD = {"model_type": "bert", "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "vocab_size": 50,
        "intermediate_size": 40, "max_position_embeddings": 12, "type_vocab_size": 2}  # fmt: skip


def test_a_shape_is_read_from_config_json_and_the_pool_from_sentence_transformers(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(GOOD))
    assert shape_from(str(tmp_path)) == replace(BERT, context=10, dropout=0.1)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    assert shape_from(str(tmp_path)).pool == "mean"
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(CheckpointError, match="pools by pooling_mode_max_tokens"):
        shape_from(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD | {"model_type": "gpt2"}, "model_type is 'gpt2'; text towers are of xlm-roberta or bert"),
        (GOOD | {"model_type": ["bert"]}, r"model_type is \['bert'\]"),
        (GOOD | {"hidden_act": "relu"}, "hidden_act is 'relu'; text towers here have 'gelu'"),
        (GOOD | {"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        (GOOD | {"is_decoder": True}, "is_decoder is True"),
        (GOOD | {"quantization_config": {"bits": 4}}, "quantization_config is"),
        (GOOD | {"model_type": "xlm-roberta", "pad_token_id": 0}, "pad_token_id is 0"),
        (GOOD | {"hidden_size": "24"}, "hidden_size is '24'; expected a whole number"),
        (GOOD | {"hidden_size": 10**12}, "hidden_size is 1000000000000"),
        (GOOD | {"num_hidden_layers": True}, "num_hidden_layers is True"),
        (GOOD | {"vocab_size": None}, "vocab_size is None"),
        (GOOD | {"layer_norm_eps": -1}, "layer_norm_eps is -1"),
        (GOOD | {"num_attention_heads": 5}, "width 24 cannot have 5 heads"),
        (GOOD | {"max_position_embeddings": 2}, "not 0"),
        ("[]", "expected a JSON object"),
        ("[" * 10**5, "recursion"),
        ("{", "cannot be read as JSON"),
        (" " * (2**20 + 1), "at most 1,048,576"),
    ],
)
def test_a_config_json_that_is_no_text_towers_is_refused_by_name(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text if isinstance(text, str) else json.dumps(text))
    with pytest.raises(CheckpointError, match=message) as error:
        shape_from(str(tmp_path))
    assert "config.json" in str(error.value) or "recursion" in message


# -------------------------------------------------------------------------------------------------------- weights
@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder of the bert layout with our own writer's hands off it."""
    (tmp_path / "config.json").write_text(json.dumps(GOOD))
    save_file({k: v.clone() for k, v in built(BERT).encoder.state_dict().items()}, tmp_path / "model.safetensors")
    return tmp_path


def change(folder: Path, **tensors: Tensor | None) -> None:
    state = load_file(folder / "model.safetensors")
    for name, value in tensors.items():
        name = next(k for k in state if k.endswith(name.replace("__", ".")))
        state.pop(name) if value is None else state.update({name: value})
    save_file(state, folder / "model.safetensors")


def test_heads_and_poolers_are_left_and_listed_whatever_stands_before_the_names(folder):
    state = load_file(folder / "model.safetensors")
    more = {"pooler.dense.weight": torch.ones(2), "embeddings.position_ids": torch.arange(3)}
    for prefix in ("", "bert.", "roberta."):
        save_file(
            {prefix + k: v for k, v in (state | more).items()} | {"cls.bias": torch.ones(2)},
            folder / "model.safetensors",
        )
        tower = TextTower(shape_from(str(folder)))
        dropped = load_pretrained(tower, str(folder), gather, writer=True)
        assert sorted(dropped) == sorted(["cls.bias", *(prefix + name for name in more)])
        assert_close(tower.eval()(IDS, MASK), built(BERT)(IDS, MASK))


def test_weights_in_several_files_and_in_half_precision_arrive(folder):
    state = {k: v.half() for k, v in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    places = {k: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, k in enumerate(state)}
    for file in set(places.values()):
        save_file({k: v for k, v in state.items() if places[k] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    for name, value in loaded(folder).encoder.named_parameters():
        assert value.dtype == torch.float32 and torch.equal(value, state[name].float())
    assert len(pretrained_sha256(str(folder))) == 64


def test_a_pickle_is_read_without_running_it(folder, tmp_path):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({f"bert.{k}": v for k, v in state.items()}, folder / "pytorch_model.bin")
    assert_close(loaded(folder)(IDS, MASK), built(BERT)(IDS, MASK))
    import hashlib

    assert pretrained_sha256(str(folder)) == hashlib.sha256((folder / "pytorch_model.bin").read_bytes()).hexdigest()

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"embeddings.word_embeddings.weight": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="wants to run"):
        loaded(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"layer__1__intermediate__dense__bias": torch.ones(41)},
         r"encoder.layer.1.intermediate.dense.bias is \(41,\) there and \(40,\) here"),
        ({"layer__0__output__dense__weight": None}, "it has no tensor encoder.layer.0.*output.dense.weight"),
        ({"token_type_embeddings__weight": None}, "it has no tensor embeddings.token_type_embeddings.weight"),
        ({"word_embeddings__weight": None}, "holds no text tower: looked for embeddings.word_embeddings.weight"),
        ({"layer__0__attention__self__key__bias": torch.full((24,), torch.nan)}, "key.bias holds .* not finite"),
        ({"layer__0__attention__self__key__bias": torch.ones(24, dtype=torch.int8)}, "key.bias holds no floating"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_refused_before_one_is_written(folder, tensors, message):
    change(folder, **tensors)
    tower = built(BERT, seed=5)
    before = {k: v.clone() for k, v in tower.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(tower, str(folder), gather, writer=True)
    assert all(torch.equal(v, before[k]) for k, v in tower.state_dict().items())


def test_sizes_that_no_tensor_shows_are_compared_too(folder):
    with pytest.raises(CheckpointError, match="heads 3 there and 2 here: leave"):
        load_pretrained(TextTower(replace(BERT, heads=2)), str(folder), gather, writer=True)


def test_a_missing_table_of_token_types_is_zeros_in_xlm_rs_layout(tmp_path):
    """torchtext's towers have none (recipes §11.5)."""
    state = {k: v for k, v in built(XLMR).encoder.state_dict().items() if "token_type" not in k}
    save_file(state, tmp_path / "model.safetensors")
    sizes = {"model_type": "xlm-roberta", "type_vocab_size": 1, "max_position_embeddings": 16, "layer_norm_eps": 1e-5}
    (tmp_path / "config.json").write_text(json.dumps(GOOD | sizes))
    table = loaded(tmp_path).encoder.get_parameter("embeddings.token_type_embeddings.weight")
    assert table.shape == (1, 24) and not table.any()


def test_ranks_that_do_not_write_open_no_file():
    tower = built(XLMR)
    before = {k: v.clone() for k, v in tower.state_dict().items()}
    assert load_pretrained(tower, "/no/such/folder", gather, writer=False) == []
    assert all(torch.equal(v, before[k]) for k, v in tower.state_dict().items())


def test_a_folder_without_weights_says_what_was_looked_for(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(GOOD))
    with pytest.raises(CheckpointError, match=r"model.safetensors, .*, pytorch_model.bin"):
        load_pretrained(TextTower(BERT), str(tmp_path), gather, writer=True)


def test_the_text_tower_of_a_lit_release_starts_another(tmp_path):
    image = VisionTransformer(Shape(patch=4, depth=1, width=24, heads=2, image=16), 16)
    towers = TwoTower(image, built(BERT), 12)
    init.fill(image, image.init_rules(), 0)
    config = {"stage": "lit", "lineage": ["mae", "lit"], "variant": "x", "model": describe(image.shape),
              "image_size": 16, "text": describe(BERT), "joint_width": 12, "loss": "clip", "train": {}}  # fmt: skip
    with torch.no_grad():
        for p in (towers.vision_projection, towers.text_projection, towers.logit_scale):
            p.zero_()
    write_release(tmp_path / "release", dict(towers.state_dict()), config, Preprocess(image_size=16))
    assert shape_from(str(tmp_path)) == BERT
    tower = TextTower(BERT)
    dropped = load_pretrained(tower, str(tmp_path), gather, writer=True)
    assert {"vision_projection", "text_projection", "logit_scale", "image.cls_token"} <= set(dropped)
    assert_close(tower.eval()(IDS, MASK), towers.text(IDS, MASK))


def test_a_run_that_is_not_finished_says_how_to_make_a_release_of_it(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text(json.dumps({"stage": "lit", "text": {"variant": "nano"}}))
    with pytest.raises(CheckpointError, match="is a run that is not finished"):
        shape_from(str(tmp_path))


# ------------------------------------------------------------------------------------------------------ stage lit
def test_stage_lit_takes_the_sizes_of_the_folder_where_no_variant_is_named(folder):
    cfg = override(
        lit.PRESETS["debug"], ["text.variant=", f"text.pretrained={folder}", "text.context=7", "text.pool=mean"]
    )
    assert lit._text_shape(cfg) == replace(BERT, context=7, pool="mean", dropout=0.1)
    with pytest.raises(ConfigError, match=r"text.context=11, .* captions of 1 to 10 pieces, not 11"):
        lit._text_shape(override(cfg, ["text.context=11"]))
    assert lit._text_shape(lit.PRESETS["debug"]) == TEXT_VARIANTS["atto"]
