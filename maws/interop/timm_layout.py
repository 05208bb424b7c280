"""timm's folders (`timm.create_model("local-dir:FOLDER", pretrained=True)`), written and read: our names are timm's.

    FOLDER/config.json          architecture, the arguments of its class, and how its images are made (pretrained_cfg)
           model.safetensors    the encoder and, where there is one, a linear classifier `head`

What timm's plain VisionTransformer computes and ours does not (registers, layer scale, gated MLPs …) is refused by the
names of its tensors, and where no tensor tells, by the module that config.json makes.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import GELU, Attention, LayerNorm, Mlp, PatchEmbed
from timm.models.vision_transformer import Block
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn

from maws.checkpoint import CheckpointError
from maws.data.transforms import Preprocess
from maws.interop.archive import read_archive
from maws.interop.converted import Converted, check, check_head
from maws.interop.mae import own_norm
from maws.interop.outgoing import Inputs, Outgoing, image_tower, left_out, linear_head, refuse, same
from maws.interop.sizes import trunk_size
from maws.models.pos_embed import sincos_2d
from maws.models.vit import Shape
from maws.release import Release
from maws.weight_files import WeightFiles

ARCHITECTURES = {  # (patch, depth, width, heads): timm's name at 224 px
    (16, 12, 192, 3): "vit_tiny_patch16_224",
    (16, 12, 384, 6): "vit_small_patch16_224",
    (16, 12, 768, 12): "vit_base_patch16_224",
    (16, 24, 1024, 16): "vit_large_patch16_224",
    (14, 32, 1280, 16): "vit_huge_patch14_224",
}
OTHER = "vit_base_patch16_224"  # for other sizes, which the arguments of the class replace
EPS = 1e-6  # of every norm, recipes §1.2
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")  # that Pillow has too
BLOCK = r"blocks\.\d+\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.(weight|bias)"
PLAIN = rf"cls_token|pos_embed|(patch_embed\.proj|norm|fc_norm|head)\.(weight|bias)|{BLOCK}"
REASONS = {  # why a tensor of ours is left out
    r"text\.|text_projection|vision_projection|logit_": "timm holds an image tower alone",
    r"head\.": "timm's classifier is one linear layer",
    r"decoder_|mask_token": "timm holds the encoder alone",
}


def outgoing(release: Release, files: WeightFiles) -> Outgoing:
    """Raises CheckpointError for a model that timm's VisionTransformer cannot compute."""
    refuse(release, "timm", beyond(release.shape))
    mean = release.shape.pool == "mean_norm"
    tower = {theirs(name) if mean else name: stored for name, stored in image_tower(release, files).items()}
    tensors = {name: same(files, stored) for name, stored in tower.items()}
    head = linear_head(release, files)
    tensors |= {f"head.{part}": same(files, stored) for part, stored in head.items()}
    weights = {"model": tensors}
    classes = files.shape(head["bias"])[0] if head else 0
    config = config_of(release, classes)
    return Outgoing(weights, lambda home: {"config.json": config}, left_out(files, weights, REASONS), splits=False)


def theirs(name: str) -> str:
    """timm's name of a tensor of a tower whose last norm is for the mean of the patches."""
    return f"fc_{name}" if name.startswith("norm.") else name


def beyond(shape: Shape) -> list[str]:
    """What timm's VisionTransformer has no place for."""
    reasons = []
    if shape.class_tokens > 1:
        reasons.append(f"it has {shape.class_tokens} class tokens, timm's VisionTransformer at most one")
    if shape.positions == "relative":
        reasons.append("it adds one relative position bias to the attention of all blocks (positions=relative)")
    return reasons


def config_of(release: Release, classes: int = 0) -> dict[str, Any]:
    """config.json of a timm folder."""
    shape, side, made = release.shape, release.config["image_size"], release.preprocess
    pretrained = {
        "tag": "maws", "custom_load": False, "input_size": [3, side, side], "fixed_input_size": True,
        "interpolation": made.interpolation, "crop_pct": crop_share(made),
        "crop_mode": "squash" if made.squash else "center", "mean": list(made.mean), "std": list(made.std),
        "num_classes": classes, "pool_size": None, "first_conv": "patch_embed.proj", "classifier": "head",
    }  # fmt: skip
    return {
        "architecture": architecture(shape), "num_classes": classes, "num_features": shape.width,
        "global_pool": pool(shape), "model_args": arguments(shape, side), "pretrained_cfg": pretrained,
    }  # fmt: skip


def architecture(shape: Shape) -> str:
    return ARCHITECTURES.get((shape.patch, shape.depth, shape.width, shape.heads), OTHER)


def pool(shape: Shape) -> str:
    return "token" if shape.pool == "cls" else "avg"


def arguments(shape: Shape, side: int) -> dict[str, Any]:
    """Of timm's VisionTransformer. `fc_norm`: is the norm for the mean of the patches, or for every token before it?"""
    return {
        "img_size": side, "patch_size": shape.patch, "embed_dim": shape.width, "depth": shape.depth,
        "num_heads": shape.heads, "class_token": shape.class_tokens == 1, "global_pool": pool(shape),
        "fc_norm": shape.pool == "mean_norm",
    }  # fmt: skip


def crop_share(made: Preprocess) -> float:
    """timm resizes to floor(side / crop_pct): the share for which that is `made.resize`."""
    wanted = made.resize or made.image_size
    share = made.image_size / wanted
    while math.floor(made.image_size / share) < wanted:
        share = math.nextafter(share, 0)
    return share


def outputs(folder: Path, inputs: Inputs) -> dict[str, Tensor]:
    """What timm computes from a folder: pooled features of the images, and scores where there is a head."""
    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    features = model.forward_head(model.forward_features(inputs.pixels), pre_logits=True)
    return {"features": features} | ({"scores": model(inputs.pixels)} if model.num_classes else {})


def read_folder(path: Path, heads: int = 0) -> Converted:
    """A timm folder, or a file of a plain ViT's weights, under our names; a classifier `head` is kept.

    Sizes of a file alone are read from its tensors (heads by the width, the first token as the image).
    Raises CheckpointError for whatever is not such a ViT, naming what is not.
    """
    path = Path(path)
    file = path if path.is_file() else weights_file(path, ("model.safetensors", "pytorch_model.bin", "model.pth"))
    archive = read_archive(file)
    config = read_config(file.parent / "config.json") if path.is_dir() or (path.parent / "config.json").exists() else {}
    try:
        module = module_of(f"local-dir:{file.parent}") if "architecture" in config else None
        converted = to_ours(archive.tensors, module, heads=heads)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    converted.dropped.update(archive.beside)
    return converted if module is None else replace(converted, preprocess=preprocess_of(module, converted.image_size))


def weights_file(folder: Path, names: tuple[str, ...]) -> Path:
    """The first of these files that is there. Raises CheckpointError when none is."""
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise CheckpointError(f"{folder} holds no weights; looked for {', '.join(names)}")
    return found


def read_config(file: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError for anything else."""
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} is damaged: it holds no JSON object")
    return config


def module_of(name: str) -> nn.Module:
    """timm's module by name, without values. Raises CheckpointError when timm does not make it."""
    try:
        with torch.device("meta"):
            return timm.create_model(name, pretrained=False)
    except Exception as error:  # whatever a config.json that is not trusted leads to
        raise CheckpointError(f"timm does not make {name}: {error}") from None


def to_ours(tensors: Mapping[str, Tensor], module: nn.Module | None, pooled: str = "", heads: int = 0) -> Converted:
    """A plain ViT's tensors; `module` is what timm makes of them, `pooled` its pool where that is not the module's."""
    if unknown := [name for name in tensors if not re.fullmatch(PLAIN, name)]:
        more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
        raise CheckpointError(f"our ViT has no place for {', '.join(unknown[:8])}{more}")
    head = {name: value for name, value in tensors.items() if name.startswith("head.")}
    weights = {own_norm(name): value for name, value in tensors.items() if name not in head}
    how = pool_of(module, pooled) if module is not None else "mean_norm" if "fc_norm.weight" in tensors else ""
    known = 0 if module is None else module.blocks[0].attn.num_heads  # type: ignore[index]
    if heads and known not in (0, heads):
        raise CheckpointError(f"{heads} heads are asked for, and its config.json makes {known}; leave the number out")
    shape, side = trunk_size(weights, known or heads)
    shape = replace(shape, positions=_positions(weights, shape), pool=how or ("cls" if shape.class_tokens else "mean"))
    check(weights, shape, side)
    check_head(head, shape.width)
    return Converted("timm", shape, side, weights, None, head)


def pool_of(module: nn.Module, pooled: str = "") -> str:
    """How timm's module makes one vector of its tokens, in our words ("" where it leaves them all).

    Raises CheckpointError for a module that computes something else than our ViT, although its tensors may fit.
    """
    if type(module) is not TimmVisionTransformer:
        raise CheckpointError(f"it is timm's {type(module).__name__}; ours is the plain VisionTransformer")
    if problems := _other_computation(module):
        raise CheckpointError(f"ours computes something else: {'; '.join(problems)}")
    normed = type(module.fc_norm) is not nn.Identity  # the mean of the patches, and not every token
    how = {"avg": "mean_norm"} if normed else {"token": "cls", "avg": "mean", "": ""}
    pooled = pooled or module.global_pool
    if pooled not in how or (pooled == "avg" and module.pool_include_prefix):
        also = " and norms the result" if normed else ""
        raise CheckpointError(
            f"it pools its tokens by {pooled!r}{also}; ours takes the class token, or the patches' mean, normed or not"
        )
    return how[pooled]


def _other_computation(module: TimmVisionTransformer) -> list[str]:
    """What timm can switch on in this class and ours has not."""
    block: Any = module.blocks[0]
    parts: list[tuple[Any, type, str]] = [
        (module.patch_embed, PatchEmbed, "patch embedding"), (module.patch_embed.norm, nn.Identity, "norm of patches"),
        (module.norm_pre, nn.Identity, "norm before the blocks"),
        (block, Block, "block"), (block.attn, Attention, "attention"), (block.mlp, Mlp, "MLP"),
    ]  # fmt: skip
    found = [f"its {what} is timm's {type(part).__name__}" for part, wanted, what in parts if type(part) is not wanted]
    if found:
        return found
    gelu = block.mlp.act
    if not isinstance(gelu, (nn.GELU, GELU)) or getattr(gelu, "approximate", "none") != "none":
        found.append(f"its activation is {gelu}, ours the exact GELU")
    last = [m for m in (module.norm, module.fc_norm) if type(m) is not nn.Identity]
    norms = {(type(m) in (nn.LayerNorm, LayerNorm), getattr(m, "eps", 0)) for m in (block.norm1, block.norm2, *last)}
    if norms != {(True, EPS)}:
        found.append(f"its norms are {last[0] if last else block.norm1}, ours LayerNorm with eps={EPS}")
    if len(last) != 1:
        found.append(f"it has {len(last)} norms after its blocks, ours one: of every token, or of the mean (fc_norm)")
    if module.has_class_token and module.no_embed_class:
        found.append("its class token has no position (no_embed_class)")
    return found


def _positions(weights: Mapping[str, Tensor], shape: Shape) -> str:
    """sincos for a table that is MAE's fixed one, else learned."""
    side = shape.image // shape.patch
    if shape.width % 4:
        return "learned"
    fixed = sincos_2d(shape.width, (side, side), shape.class_tokens)
    return "sincos" if torch.allclose(weights["pos_embed"][0].float(), fixed, atol=1e-6) else "learned"


def preprocess_of(module: Any, side: int) -> Preprocess:
    """How timm makes the images of a module. Raises CheckpointError where ours cannot."""
    said = module.pretrained_cfg
    known = said["crop_mode"] in ("center", "squash") and said["interpolation"] in INTERPOLATIONS
    if len(said["mean"]) != 3 or len(said["std"]) != 3 or not known:
        seen = ", ".join(f"{name} {said[name]}" for name in ("crop_mode", "interpolation", "mean", "std"))
        raise CheckpointError(f"its images are made in a way that ours cannot be: {seen}")
    resize = math.floor(side / said["crop_pct"])
    return Preprocess(
        side, 0 if resize == side else resize, tuple(said["mean"]), tuple(said["std"]), said["interpolation"],
        squash=said["crop_mode"] == "squash",
    )  # fmt: skip
