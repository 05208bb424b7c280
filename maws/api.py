"""Models for other people's code: by name, with weights of a run, a release, or a file of another project.

    model = maws.create_model("vit_l16", pretrained="runs/wsp")          # images B 3 H W -> features B D
    model = maws.create_model("vit_l16", pretrained="maws_vit_l16.pt", image_size=512)
    model, preprocess, tokenizer = maws.create_clip("vit_b16_xlmr_b", pretrained="release/maws_clip_b16")

    image = model.encode_image(preprocess(Image.open("fox.jpg"))[None])  # 1 E, unit length
    text = model.encode_text(tokenizer(["a fox", "une pomme"]))          # 2 E, unit length
    probabilities = (model.logit_scale * image @ text.T).softmax(dim=1)

Nothing is downloaded. All of a module's parameters come from the file, or none: partial loads are refused.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from data_pipeline.images import upright
from maws.checkpoint import CheckpointError
from maws.config import ConfigError, nearest
from maws.data.tokenizer import Tokenizer, fits, load_tokenizer
from maws.data.transforms import Preprocess, normalise
from maws.import_tokenizer import beside
from maws.interop import FOLDERS, read_foreign, saved_by
from maws.interop.converted import Converted, ConvertedClip
from maws.interop.outgoing import linear_head
from maws.models.init import fill
from maws.models.pos_embed import resize_positions
from maws.models.text import PAD, TEXT_VARIANTS, TextTower
from maws.models.two_tower import CLIP_VARIANTS, TwoTower
from maws.models.vit import VARIANTS, Shape, VisionTransformer
from maws.release import Release, load_two_tower, open_release
from maws.tower_file import TowerFile
from maws.weight_files import WeightFiles

Tokenize = Callable[[str | Sequence[str]], Tensor]
CLASSIFIER = ("head.weight", "head.bias")  # of a linear classifier: S D and S


class Transform:
    """A picture as a model wants it: PIL image of any kind, turned as its EXIF says and on white where it is
    transparent, to normalised float32 3 H W.
    """

    def __init__(self, preprocess: Preprocess) -> None:
        self.preprocess = preprocess

    def __call__(self, image: Image.Image) -> Tensor:
        return normalise(self.preprocess(upright(image))[None], self.preprocess)[0]

    def __repr__(self) -> str:
        return f"Transform({self.preprocess})"


class ImageModel(VisionTransformer):
    """An image tower that returns one vector for each image; parameters under timm's names.

    `forward_features` gives all tokens (B T D), `preprocess` makes its images, `head` is a classifier or the identity.
    """

    preprocess: Transform

    def forward(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Normalised B 3 H W to features B D, or to scores B S with a classifier."""
        return self.head(self.pooled(self.forward_features(images, ids_keep)))


class Clip(nn.Module):
    """An image and a text tower for inference. Embeddings have unit length; see `TwoTower` for the parts."""

    def __init__(self, towers: TwoTower) -> None:
        super().__init__()
        self.towers = towers

    @property
    def logit_scale(self) -> Tensor:
        """What cosines are multiplied with before a softmax: a number."""
        return self.towers.scale()[0]

    def encode_image(self, images: Tensor) -> Tensor:
        """Normalised images B 3 H W to B E."""
        return self.towers.encode_image(images)

    def encode_text(self, ids: Tensor) -> Tensor:
        """Token ids B T to B E. The attention mask is all that is not padding (recipes §8.2)."""
        return self.towers.encode_text(ids, (ids != PAD).long())

    def forward(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings of images and texts, and the scale of their product."""
        return self.encode_image(images), self.encode_text(ids), self.logit_scale


def create_model(
    name: str, pretrained: str | Path | None = None, *, image_size: int = 0, classifier: bool = False, seed: int = 0
) -> ImageModel:
    """An image tower by the name of its size (`python -m maws models`), in evaluation mode, float32, on the CPU.

    `pretrained` is a run, a release, or what `python -m maws import` reads; None draws random weights from `seed`.
    `image_size` resizes the position table (bicubic) to another side in pixels; `classifier=True` keeps the
    file's linear head, so that the model returns its scores.

    Raises ConfigError for an unknown name or impossible size, CheckpointError for weights of another model.
    """
    if name not in VARIANTS:
        raise ConfigError(f"there is no model {name!r}; {nearest(name, list(VARIANTS))}")
    if pretrained is None:
        if classifier:
            raise ConfigError("classifier=True takes a trained head along: give the weights with pretrained=")
        return _random_model(VARIANTS[name], image_size, seed)
    found = _image_weights(Path(pretrained))
    if reasons := _other_sizes(found.shape, VARIANTS[name]):
        raise CheckpointError(f"{pretrained} is no {name}: {reasons}")
    return _image_model(found, image_size, classifier, str(pretrained))


def create_clip(
    name: str = "", pretrained: str | Path | None = None, *, tokenizer: str | Path | None = None, seed: int = 0
) -> tuple[Clip, Transform, Tokenize]:
    """Both towers of a LiT model, what makes its images, and its tokenizer, in evaluation mode, float32, on the CPU.

    `pretrained` is a LiT run, a release, a file of maws_clip or a folder of open_clip; then `name` may be left out and
    is checked if given. None draws random weights for one of CLIP_VARIANTS. `tokenizer` is a folder with XLM-R's
    sentencepiece.bpe.model or tokenizer.json, where the weights bring none along.

    Raises ConfigError for an unknown name or a tokenizer that is missing, CheckpointError for weights of another model.
    """
    if name and name not in CLIP_VARIANTS:
        raise ConfigError(f"there is no pair of towers {name!r}; {nearest(name, list(CLIP_VARIANTS))}")
    if pretrained is None:
        if not name:
            raise ConfigError(f"give the name of a pair of towers ({', '.join(CLIP_VARIANTS)}) or pretrained=PATH")
        towers, preprocess, folder = _random_clip(name, seed)
    else:
        towers, preprocess, folder = _trained_clip(Path(pretrained))
        if name and (reasons := _other_pair(towers, name)):
            raise CheckpointError(f"{pretrained} is no {name}: {reasons}")
    text = towers.text.shape
    tokens = _tokenizer(Path(tokenizer) if tokenizer else folder, text.context, text.vocabulary, pretrained or name)
    return Clip(towers.eval().requires_grad_(False)), Transform(preprocess), tokens


# --------------------------------------------------------------------------------------------------------------- image


class _ImageWeights(NamedTuple):
    """Where an image tower is read from, whatever the file."""

    shape: Shape
    image_size: int
    preprocess: Preprocess
    read: Callable[[Iterable[str]], dict[str, Tensor]]  # the tower's tensors under timm's names
    head: dict[str, Tensor]


def _is_foreign(path: Path) -> bool:
    """A file of another project, or a folder that timm or open_clip saved; a release's `ema.safetensors` is ours."""
    if path.is_dir():
        return saved_by(path) in FOLDERS
    return path.is_file() and path.name not in ("ema.safetensors", "ema.safetensors.index.json")


def _image_weights(path: Path) -> _ImageWeights:
    if _is_foreign(path):
        converted = read_foreign(path)
        if isinstance(converted, ConvertedClip):
            trunk = {n.removeprefix("image."): v for n, v in converted.weights.items() if n.startswith("image.")}
            return _foreign(converted, trunk, {})
        heads = {n: v.float() for n, v in converted.heads.items()}
        return _foreign(converted, converted.weights, heads if heads.keys() == set(CLASSIFIER) else {})
    release = open_release(path)

    def read(names: Iterable[str]) -> dict[str, Tensor]:
        with TowerFile(release) as file:
            return {name: file.read(name).float() for name in names}

    return _ImageWeights(release.shape, release.config["image_size"], release.preprocess, read, _head(release))


def _foreign(converted: Converted | ConvertedClip, trunk: dict[str, Tensor], head: dict[str, Tensor]) -> _ImageWeights:
    side = converted.image_size
    preprocess = converted.preprocess or Preprocess(side)
    return _ImageWeights(converted.shape, side, preprocess, lambda names: {n: trunk[n].float() for n in names}, head)


def _head(release: Release) -> dict[str, Tensor]:
    """A linear classifier of a release; nothing for heads of other kinds."""
    with WeightFiles(release.weights) as files:
        return {f"head.{part}": files.read(name).float() for part, name in linear_head(release, files).items()}


def _image_model(found: _ImageWeights, image_size: int, classifier: bool, where: str) -> ImageModel:
    side = image_size or found.image_size
    model = _empty(found.shape, side)
    old = found.image_size // found.shape.patch
    values = found.read(model.state_dict())
    if found.shape.positions != "relative":
        values["pos_embed"] = resize_positions(values["pos_embed"], found.shape.class_tokens, (old, old), model.grid)
    elif side != found.image_size:
        raise ConfigError(f"image_size={side}: {where} has relative positions of {found.image_size} px, which are kept")
    if classifier:
        if not found.head:
            raise CheckpointError(f"{where} has no linear classifier; leave classifier=True out to get features")
        model.head = nn.Linear(found.shape.width, len(found.head["head.bias"]), device="meta")
        values |= found.head
    model.load_state_dict(values, strict=True, assign=True)
    resized = side != found.image_size
    preprocess = replace(found.preprocess, image_size=side, resize=0) if resized else found.preprocess
    model.preprocess = Transform(preprocess)
    return model.eval()


def _empty(shape: Shape, side: int) -> ImageModel:
    try:
        with torch.device("meta"):
            return ImageModel(shape, side)
    except ValueError as error:
        raise ConfigError(f"image_size={side}: {error}") from None


def _random_model(shape: Shape, image_size: int, seed: int) -> ImageModel:
    side = image_size or shape.image
    try:
        model = ImageModel(shape, side)
    except ValueError as error:
        raise ConfigError(f"image_size={side}: {error}") from None
    fill(model, model.init_rules(), seed)
    model.preprocess = Transform(Preprocess(side))
    return model.eval()


def _other_sizes(there: Shape, here: Shape) -> str:
    """Why weights are not of the model asked for, with the name of the one they are of; empty when they are."""
    sizes = [(n, getattr(there, n), getattr(here, n)) for n in ("patch", "depth", "width", "heads")]
    wrong = ", ".join(f"{n} {a} there and {b} here" for n, a, b in sizes if a != b)
    known = next((n for n, s in VARIANTS.items() if all(getattr(s, k) == a for k, a, _ in sizes)), "")
    return wrong + (f"; it is {known}" if wrong and known else "")


# ---------------------------------------------------------------------------------------------------------------- clip


def _trained_clip(path: Path) -> tuple[TwoTower, Preprocess, Path | None]:
    if _is_foreign(path):
        converted = read_foreign(path)
        if not isinstance(converted, ConvertedClip):
            raise CheckpointError(f"{path} holds an image tower alone ({converted.layout}); use maws.create_model")
        return converted.build().float(), converted.preprocess or Preprocess(converted.image_size), beside(path)
    release = open_release(path)
    folder = release.folder / "tokenizer"
    return load_two_tower(release), release.preprocess, folder if folder.is_dir() else None


def _random_clip(name: str, seed: int) -> tuple[TwoTower, Preprocess, None]:
    shape = CLIP_VARIANTS[name]
    image = VARIANTS[shape.image]
    towers = TwoTower(VisionTransformer(image, image.image), TextTower(TEXT_VARIANTS[shape.text]), shape.joint_width)
    fill(towers, towers.init_rules(), seed)
    return towers, Preprocess(image.image), None


def _other_pair(towers: TwoTower, name: str) -> str:
    """Why towers are not the pair asked for; empty when they are."""
    pair = CLIP_VARIANTS[name]
    wanted: Any = TEXT_VARIANTS[pair.text]
    text = [(n, getattr(towers.text.shape, n), getattr(wanted, n)) for n in ("width", "depth", "heads")]
    joint = towers.vision_projection.shape[1]
    wrong = [
        _other_sizes(towers.image.shape, VARIANTS[pair.image]),
        *(f"text {n} {a} there and {b} here" for n, a, b in text if a != b),
        f"joint width {joint} there and {pair.joint_width} here" if joint != pair.joint_width else "",
    ]
    return "; ".join(filter(None, wrong))


def _tokenizer(folder: Path | None, context: int, vocabulary: int, what: str | Path) -> Tokenize:
    if folder is None:
        raise ConfigError(
            f"{what} brings no tokenizer along; give the folder of XLM-R's sentencepiece.bpe.model or tokenizer.json "
            f"(of FacebookAI/xlm-roberta-base, for example) as tokenizer="
        )
    tokenizer: Tokenizer = load_tokenizer(folder, context)
    if not fits(tokenizer, vocabulary):
        raise ConfigError(f"{folder} has {tokenizer.vocabulary:,} ids, the text tower of {what} knows {vocabulary:,}")

    def tokenize(texts: str | Sequence[str]) -> Tensor:
        """Texts to ids, B T with T = context + 2, padded with 1."""
        return tokenizer([texts] if isinstance(texts, str) else list(texts))[0]

    return tokenize
