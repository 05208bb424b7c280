"""transformers' folders (`AutoModel.from_pretrained(FOLDER)`), written.

| release | class | what it gives |
|---|---|---|
| image tower | ViTModel | last_hidden_state: our tokens; take the first, or the mean of the others (`pool`) |
| with a linear head | ViTForImageClassification | logits; id2label from the vocabulary |
| MAE with its decoder | ViTMAEForPreTraining | logits: the predicted patches |
| LiT, both towers read at the first token | VisionTextDualEncoderModel | image_embeds, text_embeds, logits |
| LiT, else | image/ (ViTModel), text/ (XLMRobertaModel or BertModel), projections.safetensors | see its README.md |

VisionTextDualEncoderModel reads each tower through a pooler, a linear layer and an activation, of which ours has none.
The image's is set to the identity (`pooler_act` linear). The text's activation is tanh, always: its linear layer is
the identity times 2^-20, where tanh(x) = x to float32's last bit (for hidden states below 500), and the projection
takes 2^20 back; powers of 2 round nothing. float16 has no room for that: use float32 or bfloat16.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from maws.interop.hf_text import text_config, text_tensors
from maws.interop.hf_vit import autoencoder_config, decoder_tensors, image_config, image_tensors
from maws.interop.outgoing import (
    Inputs,
    Made,
    Outgoing,
    constant,
    image_tower,
    left_out,
    linear_head,
    refuse,
    same,
    scalar,
    transposed,
)
from maws.interop.vocabulary import label_names
from maws.models.mae import DecoderShape
from maws.models.text import TextShape
from maws.models.two_tower import MAX_LOGIT_SCALE
from maws.models.vit import Shape
from maws.release import Release, target_kind
from maws.weight_files import WeightFiles

PIL = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}  # numbers of PIL's resampling
SMALL = 2.0**-20  # of the text's pooler
REASONS = {
    r"decoder_|mask_token": "ViTMAEForPreTraining holds a plain decoder of pixels alone",
    r"head\.": "ViTForImageClassification holds one linear layer on the class token",
    r"text\.|text_projection|vision_projection": "it belongs to the other files of this folder",
    r"logit_bias": "transformers' class has no place for it: add it to the logits",
}
README = """# An image tower and a text tower for transformers

transformers has no class that reads these towers as they were trained: VisionTextDualEncoderModel takes the first token
of each, through a pooler. The two towers are its ViTModel (`image/`) and {text_class} (`text/`), and
`projections.safetensors` has what joins them.

```python
import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

image = AutoModel.from_pretrained("image", add_pooling_layer=False).eval()
text = AutoModel.from_pretrained("text", add_pooling_layer=False).eval()
processor, tokenizer = AutoImageProcessor.from_pretrained("image"), AutoTokenizer.from_pretrained("text")
joint = load_file("projections.safetensors")

pixels = processor(pictures, return_tensors="pt").pixel_values
tokens = image(pixels).last_hidden_state
image_features = {image_pool} @ joint["vision_projection"]
words = tokenizer(captions, padding=True, truncation=True, max_length={length}, return_tensors="pt")
hidden, mask = text(**words).last_hidden_state, words.attention_mask[..., None]
text_features = {text_pool} @ joint["text_projection"]
image_features, text_features = (torch.nn.functional.normalize(x, dim=1) for x in (image_features, text_features))
scores = joint["logit_scale"].exp() * image_features @ text_features.T{bias}
```
"""
POOLED = {"cls": "tokens[:, 0]", "mean": "tokens[:, 1:].mean(1)"}
READ = {"first": "hidden[:, 0]", "mean": "(hidden * mask).sum(1) / mask.sum(1)"}


def outgoing(release: Release, files: WeightFiles) -> Outgoing:
    """Raises CheckpointError for an image tower that ViTModel cannot compute."""
    refuse(release, "transformers", beyond(release.shape))
    if release.stage == "lit":
        dual = release.shape.pool == "cls" and TextShape(**release.config["text"]).pool == "first"
        return _dual(release, files) if dual else _two_folders(release, files)
    if _plain_decoder(release):
        return _autoencoder(release, files)
    return _image(release, files)


def beyond(shape: Shape) -> list[str]:
    """What ViTModel has no place for."""
    reasons = []
    if shape.class_tokens != 1:
        reasons.append(f"it has {shape.class_tokens} class tokens, ViTModel always one")
    if shape.positions == "relative":
        reasons.append("it adds relative position biases to its attention (positions=relative), ViTModel none")
    if shape.pool == "mean_norm":
        reasons.append("it norms the mean of its patches (pool=mean_norm), ViTModel every token")
    return reasons


def _image(release: Release, files: WeightFiles) -> Outgoing:
    """ViTModel, or ViTForImageClassification where the head is one layer on the class token."""
    shape, names, head = release.shape, image_tower(release, files), linear_head(release, files)
    config = image_config(shape, release.config["image_size"], _dtype(release))
    notes = ["an image is the mean of the patches: last_hidden_state[:, 1:].mean(1)"] if shape.pool == "mean" else []
    tensors = image_tensors(files, names, "vit." if head and not notes else "")
    if head and not notes:
        tensors |= {f"classifier.{part}": same(files, stored) for part, stored in head.items()}
        labels = label_names(release, files.shape(head["bias"])[0])
        kind = "multi_label" if release.config.get("loss") == "sigmoid" else "single_label"
        config |= {
            "architectures": ["ViTForImageClassification"], "problem_type": f"{kind}_classification",
            "id2label": {str(i): name for i, name in enumerate(labels)},
            "label2id": {name: i for i, name in enumerate(labels)},
        }  # fmt: skip
    weights = {"model": tensors}
    found = {"config.json": config, "preprocessor_config.json": image_processor(release)}
    return Outgoing(weights, lambda home: found, left_out(files, weights, REASONS), tuple(notes))


def _plain_decoder(release: Release) -> bool:
    """Is there MAE's decoder as transformers builds it?"""
    config = release.config
    if "decoder" not in config or config.get("encode_mask_tokens") or release.shape.class_tokens != 1:
        return False
    plain = DecoderShape(**config["decoder"]).reduction == "none"
    return plain and target_kind(config) in ("norm_pixels", "pixels")


def _autoencoder(release: Release, files: WeightFiles) -> Outgoing:
    """ViTMAEForPreTraining."""
    config, kind = release.config, target_kind(release.config)
    masking = config.get("mask", {"kind": "random", "ratio": config.get("mask_ratio", 0.75)})
    weights = {"model": image_tensors(files, image_tower(release, files), "vit.") | decoder_tensors(files)}
    found = {
        "config.json": autoencoder_config(
            release.shape, config["image_size"], DecoderShape(**config["decoder"]), masking["ratio"],
            kind == "norm_pixels", _dtype(release),
        ),
        "preprocessor_config.json": image_processor(release),
    }  # fmt: skip
    others = masking["kind"] != "random"
    notes = (f"it was trained with {masking['kind']} masks; transformers hides patches at random",) if others else ()
    return Outgoing(weights, lambda home: found, left_out(files, weights, REASONS), notes)


def _dual(release: Release, files: WeightFiles) -> Outgoing:
    """VisionTextDualEncoderModel, whose poolers are made to change nothing (see above)."""
    shape, text = release.shape, TextShape(**release.config["text"])
    tensors = image_tensors(files, image_tower(release, files), "vision_model.") | _pooler("vision_model.", shape.width)
    tensors |= text_tensors(files, "text_model.") | _pooler("text_model.", text.width, SMALL)
    tensors["visual_projection.weight"] = transposed(files, "vision_projection")
    tensors["text_projection.weight"] = transposed(files, "text_projection", 1 / SMALL)
    tensors["logit_scale"] = scalar(files, "logit_scale", MAX_LOGIT_SCALE)  # transformers does not bound it
    weights, dtype = {"model": tensors}, _dtype(release)
    pooler = {"pooler_act": "linear", "pooler_output_size": shape.width}
    config = {
        "architectures": ["VisionTextDualEncoderModel"], "model_type": "vision-text-dual-encoder", "dtype": dtype,
        "torch_dtype": dtype, "projection_dim": release.config["joint_width"], "logit_scale_init_value": 2.6592,
        "vision_config": image_config(shape, release.config["image_size"]) | pooler, "text_config": text_config(text),
    }  # fmt: skip
    found = {"config.json": config, "preprocessor_config.json": image_processor(release)}
    notes = ("its poolers are set to change nothing, in float32 and bfloat16; do not load it as float16",)
    return Outgoing(weights, lambda home: found, left_out(files, weights, REASONS), notes, "")


def _pooler(prefix: str, width: int, scale: float = 1.0) -> dict[str, Made]:
    dense = f"{prefix}pooler.dense."
    return {f"{dense}weight": constant(scale * torch.eye(width)), f"{dense}bias": constant(torch.zeros(width))}


def _two_folders(release: Release, files: WeightFiles) -> Outgoing:
    """Both towers, each for its own class, and what joins them under our names."""
    shape, text, dtype = release.shape, TextShape(**release.config["text"]), _dtype(release)
    joint = {n: same(files, n) for n in ("vision_projection", "text_projection")}
    joint["logit_scale"] = scalar(files, "logit_scale", MAX_LOGIT_SCALE)
    if "logit_bias" in files.names:
        joint["logit_bias"] = scalar(files, "logit_bias")
    weights = {
        "image/model": image_tensors(files, image_tower(release, files)), "text/model": text_tensors(files),
        "projections": joint,
    }  # fmt: skip
    config = text_config(text, dtype)
    readme = README.format(
        text_class=config["architectures"][0], image_pool=POOLED[shape.pool], text_pool=READ[text.pool],
        length=text.context + 2, bias=' + joint["logit_bias"]' if "logit_bias" in joint else "",
    )  # fmt: skip
    found = {
        "image/config.json": image_config(shape, release.config["image_size"], dtype), "text/config.json": config,
        "image/preprocessor_config.json": image_processor(release), "README.md": readme,
    }  # fmt: skip
    note = "transformers has no class that pools like it: two towers and projections.safetensors, see README.md"
    return Outgoing(weights, lambda home: found, left_out(files, weights, REASONS), (note,), "text")


def _dtype(release: Release) -> str:
    return release.config.get("dtype", "float32")


def image_processor(release: Release) -> dict[str, Any]:
    """preprocessor_config.json: short side or both sides resized, the centre cut, mean and deviation taken out."""
    made, side = release.preprocess, release.preprocess.image_size
    resize = made.resize or side
    return {
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "do_center_crop": True, "do_rescale": True,
        "do_normalize": True, "do_convert_rgb": True, "rescale_factor": 1 / 255, "resample": PIL[made.interpolation],
        "size": {"height": resize, "width": resize} if made.squash else {"shortest_edge": resize},
        "crop_size": {"height": side, "width": side}, "image_mean": list(made.mean), "image_std": list(made.std),
    }  # fmt: skip


def outputs(folder: Path, inputs: Inputs) -> dict[str, Tensor]:
    """What transformers computes from a folder."""
    from transformers import (
        AutoConfig,
        AutoModelForImageClassification,
        AutoModelForPreTraining,
        VisionTextDualEncoderModel,
    )

    if not (folder / "config.json").is_file():
        return _outputs_of_two(folder, inputs)
    (kind,) = AutoConfig.from_pretrained(folder, local_files_only=True).architectures or [""]
    if kind == "VisionTextDualEncoderModel":
        both = _load(VisionTextDualEncoderModel, folder)(inputs.ids, inputs.pixels, inputs.mask)
        return {"images": both.image_embeds, "texts": both.text_embeds, "scores": both.logits_per_image}
    if kind == "ViTForImageClassification":
        model = _load(AutoModelForImageClassification, folder)
        return {"tokens": model.vit(inputs.pixels).last_hidden_state, "scores": model(inputs.pixels).logits}
    if kind == "ViTMAEForPreTraining":
        made = _load(AutoModelForPreTraining, folder)(inputs.pixels, noise=inputs.noise)
        hidden = int(made.mask[0].sum())
        masked = inputs.noise.argsort(dim=1)[:, -hidden:, None]  # B M 1
        return {"predictions": made.logits.take_along_dim(masked, dim=1)}
    return {"tokens": _tower(folder)(inputs.pixels).last_hidden_state}


def _load(cls: Any, folder: Path, **more: Any) -> Any:
    from transformers.utils import logging

    logging.disable_progress_bar()
    return cls.from_pretrained(folder, local_files_only=True, dtype=torch.float32, **more).eval()


def _tower(folder: Path) -> Any:
    from transformers import AutoModel

    return _load(AutoModel, folder, add_pooling_layer=False)


def _outputs_of_two(folder: Path, inputs: Inputs) -> dict[str, Tensor]:
    """The lines of README.md."""
    from safetensors.torch import load_file

    joint = {name: value.float() for name, value in load_file(folder / "projections.safetensors").items()}
    readme = (folder / "README.md").read_text()
    image_pool = next(how for how in POOLED if f"image_features = {POOLED[how]}" in readme)
    tokens = _tower(folder / "image")(inputs.pixels).last_hidden_state
    pooled = tokens[:, 0] if image_pool == "cls" else tokens[:, 1:].mean(1)
    hidden = _tower(folder / "text")(inputs.ids, inputs.mask).last_hidden_state
    mask = inputs.mask[..., None]
    first = f"text_features = {READ['first']}" in readme
    read = hidden[:, 0] if first else (hidden * mask).sum(1) / mask.sum(1)
    image = F.normalize(pooled @ joint["vision_projection"], dim=1)
    text = F.normalize(read @ joint["text_projection"], dim=1)
    scores = joint["logit_scale"].exp() * image @ text.T + joint.get("logit_bias", 0)
    return {"images": image, "texts": text, "scores": scores}
