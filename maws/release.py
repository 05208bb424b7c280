"""The release form of a run: weights and everything needed to use them, in one folder that can be copied anywhere.

RUN/release/model.safetensors    fp32, timm's and MAE's parameter names
            config.json          stage, lineage, model sizes, what it was trained on
            preprocess.json      how evaluation images are made
            tokenizer/           LiT only
            vocabulary.parquet   WSP only: what the head's outputs mean
            README.md            model card

release = open_release("runs/demo/mae_wsp"); tower = load_image_tower(release)
"""

import json
import re
import shutil
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from maws.checkpoint import CheckpointError
from maws.config import STAGE_NAMES
from maws.data.masks import Masking, make_mask
from maws.data.tokenizer import Tokenizer
from maws.data.tokenizer import load_tokenizer as load_tokenizer_folder
from maws.data.transforms import Preprocess
from maws.files import sha256, sync, write_json, write_whole
from maws.models.mae import DecoderShape, MaskedAutoencoder
from maws.models.text import TextShape, TextTower
from maws.models.two_tower import TwoTower
from maws.models.vit import Shape, VisionTransformer
from maws.objectives.masked_patches import reconstruct
from maws.seeding import stream

FORMAT = 1
ENCODER = r"(patch_embed|blocks|norm|cls_token|pos_embed|rel_pos_bias)(\..*)?"  # the names of an image tower


@dataclass(frozen=True)
class Release:
    """A release folder that was found whole."""

    folder: Path
    config: dict[str, Any]
    preprocess: Preprocess

    @property
    def stage(self) -> str:
        return self.config["stage"]

    @property
    def lineage(self) -> tuple[str, ...]:
        """The stages that made it, first to last, for example ("mae", "wsp")."""
        return tuple(self.config["lineage"])

    @property
    def weights(self) -> Path:
        return self.folder / "model.safetensors"

    @cached_property
    def sha256(self) -> str:
        """Hash of the weights: the identity of the model, kept with every score."""
        return sha256(self.weights)

    @property
    def shape(self) -> Shape:
        return Shape(**self.config["model"])


def open_release(path: str | Path) -> Release:
    """A run folder or a release folder. Raises CheckpointError that says what was looked for."""
    path = Path(path)
    folder = path / "release" if (path / "release").is_dir() else path
    missing = [n for n in ("model.safetensors", "config.json", "preprocess.json") if not (folder / n).is_file()]
    if missing:
        if (path / "checkpoints").is_dir():
            raise CheckpointError(
                f"{path} is a run that is not finished, so it has no release/ yet; "
                f"finish it with the command that started it and --resume auto"
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
    return Release(folder, config, preprocess)


def write_release(
    folder: Path, weights: dict[str, Tensor], config: dict[str, Any], preprocess: Preprocess,
    extras: dict[str, Path] | None = None,
) -> None:  # fmt: skip
    """Put a release together under a temporary name and rename it. Rank 0 only; `extras` are copied in by name."""
    tmp = folder.with_name(f"tmp-{folder.name}")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    save_file(weights, tmp / "model.safetensors", metadata={"format": "pt"})
    sync(tmp / "model.safetensors")
    write_json(tmp / "config.json", {"format": FORMAT, **config})
    write_json(tmp / "preprocess.json", preprocess.to_json())
    write_whole(tmp / "README.md", model_card(config, sum(w.numel() for w in weights.values())))
    for name, source in (extras or {}).items():
        copy = shutil.copytree if source.is_dir() else shutil.copyfile
        copy(source, tmp / name)
    if folder.exists():
        shutil.rmtree(folder)
    tmp.rename(folder)
    sync(folder.parent)


def model_card(config: dict[str, Any], parameters: int) -> str:
    """What a stranger who finds the folder needs to know."""
    chain = " → ".join(STAGE_NAMES.get(str(stage), str(stage)) for stage in config["lineage"])
    train = "\n".join(f"| {k} | {v} |" for k, v in config["train"].items())
    return (
        f"# {chain}, {config['variant']}\n\n{parameters:,} parameters in `model.safetensors` (float32). "
        f"Load with `maws.release.open_release` and `load_image_tower`.\n\n"
        f"| training | |\n|---|---|\n{train}\n\nThe data's licences and biases are those of the shard set "
        f"(`shards_sha256` in config.json). No claim is made about uses outside research on the training domain.\n"
    )


def read_weights(release: Release, pattern: str = ".*") -> dict[str, Tensor]:
    """The tensors whose names match. Raises CheckpointError when the file is damaged."""
    try:
        with safe_open(release.weights, "pt") as f:
            return {k: f.get_tensor(k) for k in f.keys() if re.fullmatch(pattern, k)}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as e:
        raise CheckpointError(f"{release.weights} is damaged: {e}") from None


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
    if "decoder" not in config:
        raise CheckpointError(
            f"{release.folder} is a {release.stage} release; only those of mae and lc_mae keep a decoder"
        )
    kind = _target_kind(config)
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


def _target_kind(config: dict[str, Any]) -> str:
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
        VisionTransformer(release.shape, release.config["image_size"]), text, release.config["joint_width"]
    )
    return _loaded(towers, read_weights(release), release)


def load_tokenizer(release: Release) -> Tokenizer:
    """The tokenizer of a LiT release."""
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
