"""The release form of a run: weights and everything needed to use them, in one folder that can be copied anywhere.

RUN/release/model.safetensors    fp32, timm's and MAE's parameter names; above 5 GB in several files (weight_files.py)
            ema.safetensors      the same of the mean of the weights (`optim.ema`)
            config.json          stage, lineage, model sizes, what it was trained on
            preprocess.json      how evaluation images are made
            tokenizer/           LiT only
            vocabulary.parquet   WSP and fine-tuned: what the head's outputs mean
            README.md            model card

release = open_release("runs/demo/mae_wsp"); tower = load_image_tower(release)

The mean stands in for the weights where that is asked for: `release.ema`, or the path RUN/release/ema.safetensors.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maws.checkpoint import CheckpointError
from maws.config import STAGE_NAMES
from maws.data.masks import Masking, make_mask
from maws.data.tokenizer import Tokenizer
from maws.data.tokenizer import load_tokenizer as load_tokenizer_folder
from maws.data.transforms import Preprocess
from maws.files import sync, whole_folder, write_json, write_whole
from maws.models.mae import DecoderShape, MaskedAutoencoder
from maws.models.text import TextShape, TextTower
from maws.models.two_tower import TwoTower
from maws.models.vit import Shape, VisionTransformer
from maws.objectives.masked_patches import reconstruct
from maws.seeding import stream
from maws.weight_files import MAX_SHARD, WeightFiles, Weights, find_weights, weights_sha256, write_weights

FORMAT = 1
ENCODER = r"(patch_embed|blocks|norm|cls_token|pos_embed|rel_pos_bias)(\..*)?"  # the names of an image tower


@dataclass(frozen=True)
class Release:
    """A release folder that was found whole."""

    folder: Path
    config: dict[str, Any]
    preprocess: Preprocess
    stem: str = "model"  # or "ema": which of the sets of weights is meant

    @property
    def stage(self) -> str:
        return self.config["stage"]

    @property
    def lineage(self) -> tuple[str, ...]:
        """The stages that made it, first to last, for example ("mae", "wsp")."""
        return tuple(self.config["lineage"])

    @property
    def weights(self) -> Path:
        """The file, or the index of several."""
        return find_weights(self.folder, self.stem) or self.folder / f"{self.stem}.safetensors"

    @property
    def ema(self) -> "Release | None":
        """The same model with the mean of its weights; None when the run kept none."""
        return replace(self, stem="ema") if find_weights(self.folder, "ema") else None

    @cached_property
    def sha256(self) -> str:
        """Hash of the weights: the identity of the model, kept with every score. Of several files: weight_files.py."""
        return weights_sha256(self.weights)

    @property
    def shape(self) -> Shape:
        return Shape(**self.config["model"])


def open_release(path: str | Path) -> Release:
    """A run folder or a release folder; or the file of its mean of weights, which is then what is meant.

    Raises CheckpointError that says what was looked for.
    """
    path, stem = Path(path), "model"
    if path.name in ("ema.safetensors", "ema.safetensors.index.json"):
        path, stem = path.parent, "ema"
    folder = path / "release" if (path / "release").is_dir() else path
    missing = [n for n in ("config.json", "preprocess.json") if not (folder / n).is_file()]
    if find_weights(folder, stem) is None:
        missing.insert(0, f"{stem}.safetensors")
    if missing:
        if (path / "checkpoints").is_dir():
            raise CheckpointError(
                f"{path} is a run that is not finished, so it has no release/ yet; "
                f"finish it with the command that started it and --resume auto, or make one of its newest checkpoint: "
                f"python -m maws export {path} --output FOLDER"
            )
        raise CheckpointError(
            f"{path} holds no trained model: looked for {', '.join(missing)} in {folder}; "
            f"give the folder of a finished run, or its release/ folder"
        )
    try:
        config = json.loads((folder / "config.json").read_text())
        preprocess = Preprocess.from_json(json.loads((folder / "preprocess.json").read_text()))
        if config["format"] > FORMAT:
            raise CheckpointError(f"{folder} has release format {config['format']}, this version reads up to {FORMAT}")
    except (ValueError, KeyError, TypeError) as e:
        raise CheckpointError(f"{folder} is damaged: config.json or preprocess.json cannot be used ({e})") from None
    return Release(folder, config, preprocess, stem)


def write_release(
    folder: Path, weights: Weights | Mapping[str, Tensor], config: dict[str, Any], preprocess: Preprocess,
    extras: dict[str, Path] | None = None, ema: Weights | None = None, max_shard: int = MAX_SHARD,
    verify: Callable[[Release], None] | None = None,
) -> None:  # fmt: skip
    """Put a release together under a temporary name and rename it. Rank 0 only; `extras` are copied in by name.

    The weights are taken one by one, first `weights`, then `ema`. Raises OSError when the disk is full and the like;
    nothing is left of it then, nor when `verify` raises, and what the folder held before stays.
    """
    weights = weights if isinstance(weights, Weights) else Weights.of(weights)
    with whole_folder(folder) as tmp:
        write_weights(tmp, "model", weights, max_shard)
        if ema is not None:
            write_weights(tmp, "ema", ema, max_shard)
        write_json(tmp / "config.json", {"format": FORMAT, **config})
        write_json(tmp / "preprocess.json", preprocess.to_json())
        write_whole(tmp / "README.md", model_card(config, weights.parameters))
        for name, source in (extras or {}).items():
            copy = shutil.copytree if source.is_dir() else shutil.copyfile
            copy(source, tmp / name)
        sync(tmp)
        if verify is not None:
            verify(open_release(tmp))


def model_card(config: dict[str, Any], parameters: int) -> str:
    """What a stranger who finds the folder needs to know."""
    chain = " → ".join(STAGE_NAMES.get(str(stage), str(stage)) for stage in config["lineage"])
    dtype = config.get("dtype", "float32")
    train = "\n".join(f"| {k} | {v} |" for k, v in config["train"].items())
    return (
        f"# {chain}, {config['variant']}\n\n{parameters:,} parameters in `model.safetensors` ({dtype}). "
        f"Load with `maws.release.open_release` and `load_image_tower`.\n\n"
        f"| training | |\n|---|---|\n{train}\n\nThe data's licences and biases are those of the shard set "
        f"(`shards_sha256` in config.json). No claim is made about uses outside research on the training domain.\n"
    )


def read_weights(release: Release, pattern: str = ".*") -> dict[str, Tensor]:
    """The tensors whose names match. Raises CheckpointError when the file is damaged."""
    with WeightFiles(release.weights) as files:
        return {name: files.read(name) for name in files.names if re.fullmatch(pattern, name)}


def image_tower_weights(release: Release) -> dict[str, Tensor]:
    """An image tower under timm's names, from a release of any stage."""
    prefix = "image." if release.stage == "lit" else ""
    found = read_weights(release, re.escape(prefix) + ENCODER)
    return {k.removeprefix(prefix): v for k, v in found.items()}


def load_image_tower(release: Release) -> VisionTransformer:
    """The frozen image tower of any stage's release, in evaluation mode, fp32, on the CPU."""
    tower = VisionTransformer(release.shape, release.config["image_size"])
    return _loaded(tower, image_tower_weights(release), release)


def load_masked_autoencoder(release: Release) -> "Reconstructor":
    """Encoder and decoder of an MAE or LC-MAE release. Raises CheckpointError for others, and targets not of pixels."""
    config = release.config
    if "decoder" not in config and "imported_from" in config.get("train", {}):
        raise CheckpointError(
            f"{release.folder} was imported from {config['train']['imported_from']}, which holds an encoder and no "
            f"decoder, so there is nothing to paint with (the released MAE files of facebookresearch/maws and mae are "
            f"encoders only, github.com/facebookresearch/maws/issues/4); import a file of the whole autoencoder"
        )
    if "decoder" not in config:
        raise CheckpointError(
            f"{release.folder} is a {release.stage} release; only those of mae and lc_mae keep a decoder"
        )
    kind = target_kind(config)
    if kind not in ("norm_pixels", "pixels"):
        raise CheckpointError(
            f"{release.folder} predicts {kind}, which cannot be painted; only MAE releases with "
            f"target.kind=norm_pixels or pixels can"
        )
    mae = MaskedAutoencoder(
        release.shape, config["image_size"], DecoderShape(**config["decoder"]),
        encode_mask_tokens=config.get("encode_mask_tokens", False),
    )  # fmt: skip
    masking = Masking(**config["mask"]) if "mask" in config else Masking(ratio=config["mask_ratio"])
    return Reconstructor(_loaded(mae, read_weights(release), release), masking, norm_pix=kind == "norm_pixels")


def target_kind(config: dict[str, Any]) -> str:
    """Before there were other targets, a release said norm_pix and mask_ratio instead of target and mask."""
    if "target" in config:
        return config["target"]["kind"]
    return "norm_pixels" if config["norm_pix"] else "pixels"


def load_two_tower(release: Release) -> TwoTower:
    """Image and text tower of a LiT release. Raises CheckpointError for another stage."""
    if release.stage != "lit":
        raise CheckpointError(
            f"{release.folder} is a {' → '.join(release.lineage)} release and has no text tower; zero-shot by names "
            f"needs a LiT run: deepspeed maws/train.py --stage lit --init-from {release.folder.parent} …"
        )
    text = TextTower(TextShape(**release.config["text"]))
    towers = TwoTower(
        VisionTransformer(release.shape, release.config["image_size"]), text, release.config["joint_width"],
        bias=release.config.get("loss") == "siglip",
    )  # fmt: skip
    return _loaded(towers, read_weights(release), release)


def load_tokenizer(release: Release) -> Tokenizer:
    """The tokenizer of a LiT release. Raises CheckpointError for one that was imported without, DataError as below."""
    imported = release.config.get("train", {}).get("imported_from")
    if imported and not (release.folder / "tokenizer").is_dir():
        raise CheckpointError(
            f"{release.folder} has no tokenizer, because {imported} holds none: import it again with --tokenizer "
            f"FOLDER --overwrite (python -m maws import), or copy the sentencepiece.bpe.model of "
            f"FacebookAI/xlm-roberta-base to {release.folder / 'tokenizer'}"
        )
    return load_tokenizer_folder(release.folder / "tokenizer", release.config["text"]["context"])


class Reconstructor(nn.Module):
    """A masked autoencoder of pixels to look at."""

    def __init__(self, autoencoder: MaskedAutoencoder, masking: Masking, norm_pix: bool) -> None:
        super().__init__()
        self.autoencoder, self.masking, self.norm_pix = autoencoder, masking, norm_pix

    def reconstruct(self, images: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Normalised images (B 3 H W) with their masked patches filled in, and the mask (B N, 1 = was removed)."""
        grid = self.autoencoder.grid
        ids = [torch.from_numpy(make_mask(self.masking, stream(seed, "mask", i), grid)) for i in range(len(images))]
        return reconstruct(self.autoencoder, images, torch.stack(ids), self.masking.keep(grid), self.norm_pix)


def _loaded(module: Any, weights: dict[str, Tensor], release: Release) -> Any:
    try:
        module.load_state_dict(weights, strict=True)
    except RuntimeError as e:
        raise CheckpointError(f"{release.weights} does not fit its config.json: {e}") from None
    return module.eval().requires_grad_(False)


def describe(shape: Any) -> dict[str, Any]:
    """A shape for config.json."""
    return asdict(shape)
