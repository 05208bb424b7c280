"""open_clip's folders (`open_clip.create_model_and_transforms("local-dir:FOLDER")`), written and read.

    FOLDER/open_clip_config.json         both towers, and how images are made
           open_clip_model.safetensors
           tokenizer.json, …             open_clip.get_tokenizer("local-dir:FOLDER") reads them
           text/config.json              the text tower for transformers, without weights
           image/config.json             the image tower for timm, where timm has no name for its sizes

| open_clip | ours |
|---|---|
| visual.trunk.* | image.*: timm's ViT |
| visual.head.proj.weight (E, Dv) | vision_projection (Dv, E) |
| text.transformer.* | text.encoder.*: transformers' XLM-R or BERT |
| text.proj.weight (E, Dt) | text_projection (Dt, E) |
| logit_scale (), logit_bias () | logit_scale (1,), logit_bias (1,) |

open_clip keeps where the towers' config.json lie as paths: those of a folder that was moved have to be edited.
Its own XLM-R models take the mean of the tokens (`mean_pooler`), ours the first one's last hidden state.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maws.checkpoint import CheckpointError
from maws.config import ConfigError
from maws.data.transforms import Preprocess
from maws.interop import timm_layout
from maws.interop.archive import read_archive
from maws.interop.converted import Converted, ConvertedClip, check_clip
from maws.interop.hf_text import KNOWN, text_config, text_tensors
from maws.interop.outgoing import Inputs, Outgoing, image_tower, left_out, refuse, same, scalar, transposed
from maws.interop.timm_layout import read_config, weights_file
from maws.models.text import PAD, TextShape
from maws.models.two_tower import MAX_LOGIT_SCALE
from maws.models.vit import Shape
from maws.pretrained_text import shape_from
from maws.release import Release
from maws.weight_files import WeightFiles

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model"
FILES = (f"{WEIGHTS}.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
POOLERS = {"first": "cls_last_hidden_state_pooler", "mean": "mean_pooler"}  # TextShape.pool -> open_clip's
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of OpenAI's CLIP, for a config that says nothing
STD = (0.26862954, 0.26130258, 0.27577711)
README = """# An image tower and a text tower for open_clip

```python
import open_clip
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:{home}")
tokenizer = open_clip.get_tokenizer("local-dir:{home}")
model.eval()  # open_clip leaves the text tower's dropout on
```

`open_clip_config.json` names the towers' own `config.json` by their paths. After moving this folder, write its new
place into that file, for example with `sed -i "s#{home}#$PWD#g" open_clip_config.json` inside the folder.
"""


def outgoing(release: Release, files: WeightFiles) -> Outgoing:
    """Raises CheckpointError for a release without a text tower, or an image tower that timm cannot compute."""
    if release.stage != "lit":
        refuse(release, "open_clip", ["it has no text tower; --to timm or hf takes an image tower alone"])
    refuse(release, "open_clip", [*timm_layout.beyond(release.shape), *beyond(release.shape)])
    tensors = {f"visual.trunk.{name}": same(files, own) for name, own in image_tower(release, files).items()}
    tensors["visual.head.proj.weight"] = transposed(files, "vision_projection")
    tensors |= text_tensors(files, "text.transformer.")
    tensors["text.proj.weight"] = transposed(files, "text_projection")
    tensors["logit_scale"] = scalar(files, "logit_scale", MAX_LOGIT_SCALE)  # open_clip bounds it in training alone
    if "logit_bias" in files.names:
        tensors["logit_bias"] = scalar(files, "logit_bias")
    weights = {WEIGHTS: tensors}
    biased = "logit_bias" in tensors
    return Outgoing(
        weights, lambda home: documents(release, home, biased), left_out(files, weights, {}), notes(release), "",
        splits=False,
    )  # fmt: skip


def beyond(shape: Shape) -> list[str]:
    """What open_clip cannot be told of timm's tower."""
    return ["it norms the mean of its patches (pool=mean_norm)"] if shape.pool == "mean_norm" else []


def notes(release: Release) -> tuple[str, ...]:
    said = ["open_clip_config.json names this folder by its path: see README.md before moving it"]
    made = release.preprocess
    if made.resize not in (0, made.image_size):
        said.append(f"ours resizes images to {made.resize} before the crop, open_clip to {made.image_size} at once")
    return tuple(said)


def documents(release: Release, home: Path, biased: bool) -> dict[str, Any]:
    """The files beside the weights, of a folder that lies at `home`."""
    shape, side, text = release.shape, release.config["image_size"], TextShape(**release.config["text"])
    name = timm_name(release)
    vision = {
        "timm_model_name": name or f"local-dir:{home / 'image'}", "timm_model_pretrained": False,
        "timm_pool": timm_layout.pool(shape), "timm_proj": "linear", "timm_proj_bias": False, "image_size": side,
    }  # fmt: skip
    words = {
        "hf_model_name": str(home / "text"), "hf_model_pretrained": False, "hf_proj_type": "linear",
        "hf_pooler_type": POOLERS[text.pool], "hf_tokenizer_name": str(home), "context_length": text.context + 2,
        "vocab_size": text.vocabulary, "width": text.width,
    }  # fmt: skip
    model = {"embed_dim": release.config["joint_width"], "vision_cfg": vision, "text_cfg": words}
    if biased:
        model["init_logit_bias"] = -10.0  # any number: it makes the parameter, whose value is in the weights
    made = release.preprocess
    preprocess = {
        "size": [side, side], "mode": "RGB", "mean": list(made.mean), "std": list(made.std),
        "interpolation": made.interpolation, "resize_mode": "squash" if made.squash else "shortest",
    }  # fmt: skip
    found = {CONFIG: {"model_cfg": model, "preprocess_cfg": preprocess}, "text/config.json": text_config(text)}
    if not name:
        found["image/config.json"] = timm_layout.config_of(release)
    return found | {"README.md": README.format(home=home)}


def timm_name(release: Release) -> str:
    """timm's own name of a tower of these sizes, with which the folder needs no path; "" when there is none."""
    shape, side = release.shape, release.config["image_size"]
    plain = side == 224 and shape.class_tokens == 1
    return timm_layout.ARCHITECTURES.get((shape.patch, shape.depth, shape.width, shape.heads), "") if plain else ""


def outputs(folder: Path, inputs: Inputs) -> dict[str, Tensor]:
    """What open_clip computes from a folder: normalised features, and the scores of all pairs."""
    import open_clip

    model = open_clip.create_model(f"local-dir:{folder}").eval()
    ids = torch.where(inputs.mask > 0, inputs.ids, PAD)  # its mask is where ids are not padding
    image, text, scale, *bias = model(inputs.pixels, ids)
    return {"images": image, "texts": text, "scores": scale * image @ text.T + (bias[0] if bias else 0)}


def read_folder(path: Path, heads: int = 0) -> ConvertedClip:
    """An open_clip folder, or its file of weights, under our names.

    Raises CheckpointError for towers that ours are not: the image tower has to be a plain ViT of timm's, the text tower
    XLM-R or BERT of transformers', each with one linear projection.
    """
    path = Path(path)
    file = path if path.is_file() else weights_file(path, FILES)
    config = read_config(file.parent / CONFIG)
    archive = read_archive(file)
    try:
        converted = to_ours(archive.tensors, config.get("model_cfg", config), file.parent, heads)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    converted.dropped.update(archive.beside)
    return replace(converted, preprocess=preprocess_of(config.get("preprocess_cfg", {}), converted.image_size))


def to_ours(tensors: Mapping[str, Tensor], model: dict[str, Any], folder: Path, heads: int = 0) -> ConvertedClip:
    _check_kinds(tensors)
    vision, words = model.get("vision_cfg", {}), model.get("text_cfg", {})
    trunk = {n.removeprefix("visual.trunk."): t for n, t in tensors.items() if n.startswith("visual.trunk.")}
    image = _image(trunk, vision, folder, heads)
    inner = "text.transformer."
    text = {n.removeprefix(inner): t for n, t in tensors.items() if n.startswith(inner)}
    shape = _text_shape(words, folder)
    weights = {f"image.{name}": value for name, value in image.weights.items()}
    weights |= {f"text.encoder.{n}": value for n, value in text.items() if n != "embeddings.position_ids"}
    weights["vision_projection"] = _projection(tensors, "visual.head.proj.weight", image.shape.width)
    weights["text_projection"] = _projection(tensors, "text.proj.weight", shape.width)
    weights |= {n: tensors[n].reshape(1) for n in ("logit_scale", "logit_bias") if n in tensors}
    width = weights["vision_projection"].shape[1]
    check_clip(weights, image.shape, image.image_size, shape, width)
    dropped = {n: "a constant" for n in tensors if n.endswith("embeddings.position_ids")}
    return ConvertedClip("open_clip", image.shape, image.image_size, shape, width, weights, dropped)


def _check_kinds(tensors: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError for towers of open_clip's own classes, and for tensors of neither tower."""
    if any(name.startswith(("visual.conv1", "visual.class_embedding")) for name in tensors):
        raise CheckpointError(
            "its image tower is open_clip's own VisionTransformer: a norm before the blocks (visual.ln_pre), for which "
            "ours has no place, and patches without a bias; only image towers of timm (visual.trunk.*) can be read"
        )
    if any(name.startswith(("transformer.resblocks", "text.transformer.resblocks")) for name in tensors):
        raise CheckpointError(
            "its text tower is open_clip's own TextTransformer; ours are XLM-R and BERT of transformers "
            "(text.transformer.encoder.layer.*)"
        )
    known = r"visual\.trunk\..*|visual\.head\.proj\.weight|text\.transformer\..*|text\.proj\.weight|logit_(scale|bias)"
    if unknown := [name for name in tensors if not re.fullmatch(known, name)]:
        raise CheckpointError(f"our two towers have no place for {', '.join(unknown[:8])}")


def _image(trunk: Mapping[str, Tensor], vision: dict[str, Any], folder: Path, heads: int) -> Converted:
    """The image tower, read as timm's with the pool that open_clip sets."""
    name = str(vision.get("timm_model_name"))
    if name.startswith("local-dir:") and not Path(name.removeprefix("local-dir:")).is_dir():
        name = f"local-dir:{folder / 'image'}"  # the folder was moved
    found = timm_layout.to_ours(trunk, timm_layout.module_of(name), str(vision.get("timm_pool", "avg")), heads)
    if found.heads:
        raise CheckpointError(f"its projection is timm's classifier ({', '.join(found.heads)}), which has a bias")
    return found


def _text_shape(words: dict[str, Any], folder: Path) -> TextShape:
    pooler = words.get("hf_pooler_type", "mean_pooler")
    pool = next((ours for ours, theirs in POOLERS.items() if theirs == pooler), None)
    if pool is None:
        raise CheckpointError(f"its text tower pools by {pooler}; ours by {' or '.join(POOLERS.values())}")
    name = str(words.get("hf_model_name"))
    places = [str(place) for place in (Path(name), folder / "text") if (place / "config.json").is_file()]
    try:
        shape = KNOWN.get(name) or shape_from((places or [name])[0])
        return replace(shape, context=int(words.get("context_length", 77)) - 2, pool=pool)
    except (ConfigError, ValueError, TypeError) as error:
        raise CheckpointError(f"the sizes of its text tower, which are in config.json of {name}: {error}") from None


def _projection(tensors: Mapping[str, Tensor], name: str, width: int) -> Tensor:
    """The weight of a linear layer as the matrix of x @ W; nothing in its place changes nothing."""
    if name not in tensors:
        return torch.eye(width)
    return tensors[name].T.contiguous()


def preprocess_of(said: dict[str, Any], side: int) -> Preprocess:
    """Of open_clip's preprocess_cfg, whose defaults are OpenAI's mean and deviation."""
    mode, interpolation = said.get("resize_mode") or "shortest", said.get("interpolation") or "bicubic"
    if mode not in ("shortest", "squash") or interpolation not in timm_layout.INTERPOLATIONS:
        raise CheckpointError(f"its images are resized by {mode!r} and {interpolation!r}, which ours cannot be")
    mean, std = (tuple(said.get(name) or usual) for name, usual in (("mean", MEAN), ("std", STD)))
    if len(mean) != 3 or len(std) != 3:
        raise CheckpointError(f"its mean {mean} and std {std} are not those of three channels")
    return Preprocess(side, 0, mean, std, interpolation, mode == "squash")
