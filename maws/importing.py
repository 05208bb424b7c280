"""Weights that others released, as a release of ours that every stage, evaluator and export reads like its own.

    python -m maws import vit_l16_maws.pt --from maws --output release/maws_l16
    python -m maws import clip.pt --from maws_clip --tokenizer xlm-roberta-base/ --output release/clip_b16

The file's tensors stay on the disk; each is converted, checked and written alone, so memory holds about the largest one
of them. What was written is then loaded where memory allows it, compared with what the file's own tensors compute
(import_check.py), and only then given its name: `--output` is there whole or not at all.
"""

import argparse
import logging
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from maws.checkpoint import CheckpointError
from maws.config import STAGE_NAMES, ConfigError, nearest
from maws.data.masks import Masking
from maws.data.transforms import Preprocess
from maws.files import sha256
from maws.import_check import check
from maws.import_tokenizer import beside, staged_tokenizer
from maws.interop import FOLDERS, LAYOUTS, open_foreign
from maws.interop.converted import Converted, ConvertedClip
from maws.interop.key_report import renamed
from maws.release import Release, describe, write_release
from maws.tensor_file import Spec, specs_of
from maws.weight_files import Weights, parse_size

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TARGETS = ("norm_pixels", "pixels")
LINEAGE = {  # stages that made what a layout holds, where the layout tells
    "mae": ["mae"], "long_seq_mae": ["mae"], "lut": ["lc_mae"], "swag": ["wsp"], "maws_clip": ["mae", "wsp", "lit"],
}  # fmt: skip
SOURCES = {
    "mae": "github.com/facebookresearch/mae, whose licence is CC-BY-NC 4.0",
    "maws": "github.com/facebookresearch/maws, whose weights are CC-BY-NC 4.0",
    "maws_clip": "github.com/facebookresearch/maws, whose weights are CC-BY-NC 4.0",
    "long_seq_mae": "github.com/facebookresearch/long_seq_mae",
    "lut": "github.com/naver-ai/lut",
    "swag": "github.com/facebookresearch/SWAG",
}
AT_ONCE = 1 << 22  # values looked at for nan


@dataclass(frozen=True, kw_only=True)
class Import:
    """What is asked for; the names are those of the command's flags."""

    file: Path
    output: Path
    layout: str = "auto"
    tokenizer: Path | None = None
    entry: str = ""
    heads: int = 0
    dtype: str = "float32"
    lineage: str = ""
    target: str = "norm_pixels"
    max_shard: str = "5GB"
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Raises ConfigError for what cannot be done as asked, before anything is read."""
        if self.layout not in (known := ("auto", *LAYOUTS, *FOLDERS)):
            raise ConfigError(f"--from {self.layout} is no known layout; {nearest(self.layout, known)}")
        if self.dtype not in DTYPES:
            raise ConfigError(f"--dtype {self.dtype} is not known; {nearest(self.dtype, list(DTYPES))}")
        if self.target not in TARGETS:
            raise ConfigError(f"--target {self.target} is not known; {nearest(self.target, TARGETS)}")
        for stage in filter(None, self.lineage.split(",")):
            if stage not in STAGE_NAMES:
                raise ConfigError(f"--lineage {stage} is no stage; {nearest(stage, list(STAGE_NAMES))}")
        if self.heads < 0:
            raise ConfigError(f"--heads {self.heads} is no number of attention heads; leave it out, or give 1 or more")
        parse_size(self.max_shard)
        if self.entry and self.layout in FOLDERS:
            raise ConfigError(f"--entry {self.entry} is for files of torch.save; {self.layout}'s have none")
        if self.output.exists() and not self.overwrite:
            raise ConfigError(
                f"--output {self.output} is there already; add --overwrite to replace it, or name another"
            )
        if self.file.resolve().is_relative_to(self.output.resolve()):
            raise ConfigError(f"--output {self.output} would replace what is imported; name another")
        if self.output.exists() and not (self.output / "preprocess.json").is_file():
            raise ConfigError(f"--output {self.output} is no release, so --overwrite does not delete it; name another")


def run(options: argparse.Namespace) -> int:
    names = Import.__dataclass_fields__
    with _terminated_as_interrupted():
        import_weights(Import(**{name: value for name, value in vars(options).items() if name in names}))
    return 0


def import_weights(asked: Import) -> Path:
    """Write the release. Raises CheckpointError for weights, DataError for a tokenizer that cannot be used."""
    foreign = open_foreign(asked.file, asked.layout, asked.entry, asked.heads)
    found, dtype = without_unknown_heads(foreign.converted), DTYPES[asked.dtype]
    tensors = found.weights | (found.heads if isinstance(found, Converted) else {})
    names = renamed(foreign.tensors, tensors) if foreign.tensors else []  # a library tells no names of the file
    log.info("%s", "\n".join([*found.report(), *names]))
    if asked.target != TARGETS[0] and (isinstance(found, ConvertedClip) or found.decoder is None):
        raise ConfigError(f"--target {asked.target}: {asked.file} has no decoder that would predict it")
    if asked.tokenizer and isinstance(found, Converted):
        raise ConfigError(f"--tokenizer {asked.tokenizer}: {asked.file} has no text tower that would read it")

    def compare(release: Release) -> None:
        for line in check(release, found, foreign.tensors, dtype):
            log.info("compared with the file: %s", line)

    with TemporaryDirectory(prefix="maws-import-") as scratch:
        facts, preprocess = facts_of(asked, found), found.preprocess or Preprocess(found.image_size)
        extras = {"README.md": Path(scratch) / "README.md"}
        extras["README.md"].write_text(card(facts, sum(value.numel() for value in tensors.values())))
        if isinstance(found, ConvertedClip):
            extras |= staged_tokenizer(asked.tokenizer or beside(asked.file), found.text, Path(scratch))
        weights, size = streamed(tensors, dtype), parse_size(asked.max_shard)
        try:
            asked.output.parent.mkdir(parents=True, exist_ok=True)
            write_release(asked.output, weights, facts, preprocess, extras, max_shard=size, verify=compare)
        except OSError as e:
            raise CheckpointError(f"{asked.output} could not be written: {e}; nothing of it is left") from None
    log.info("%s: written", asked.output)
    return asked.output


def without_unknown_heads(found: Converted | ConvertedClip) -> Converted | ConvertedClip:
    """With those heads that a release has a place for, a classifier of one layer; the others are said to be dropped."""
    if isinstance(found, ConvertedClip) or found.heads.keys() <= {"head.weight", "head.bias"}:
        return found
    if found.kind == "classifier":
        reason = "the classifier has another layer before it, for which a release has no place"
    else:
        reason = "releases of autoencoders hold encoder and decoder"
    return replace(found, heads={}, dropped=found.dropped | dict.fromkeys(found.heads, reason))


def streamed(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Weights:
    """Values on their way to the disk, one at a time. Raises CheckpointError for one with nan or infinity."""

    def values() -> Iterator[tuple[str, Tensor]]:
        for name in specs:
            value = tensors[name].detach().to(specs[name].dtype)
            if not all(bool(torch.isfinite(part).all()) for part in value.reshape(-1).split(AT_ONCE)):
                raise CheckpointError(
                    f"{name} has values that are nan or infinite as {specs[name].dtype}: the file is damaged, the "
                    f"training had diverged, or --dtype is too narrow for it"
                )
            yield name, value

    specs = {
        name: Spec(dtype if spec.dtype.is_floating_point else spec.dtype, spec.shape)
        for name, spec in specs_of(tensors).items()
    }
    return Weights(specs, values())


def facts_of(asked: Import, found: Converted | ConvertedClip) -> dict[str, Any]:
    """The release's config.json."""
    lineage = asked.lineage.split(",") if asked.lineage else lineage_of(found)
    return {
        "stage": stage_of(found), "lineage": lineage, "variant": found.variant or "own", "model": describe(found.shape),
        "image_size": found.image_size, **_more(asked, found),
        "train": {
            "imported_from": asked.file.absolute().name, "layout": found.layout, "sha256": file_hash(asked.file),
            **({"entry": asked.entry} if asked.entry else {}),
        },
        "shards_sha256": "", "init_sha256": "", "dtype": asked.dtype,
    }  # fmt: skip


def lineage_of(found: Converted | ConvertedClip) -> list[str]:
    """The stages that made it, where the layout tells."""
    known = LINEAGE.get(found.layout, ["imported"])
    return [*known, "finetune"] if found.layout == "mae" and found.kind == "classifier" else known


def stage_of(found: Converted | ConvertedClip) -> str:
    """The stage whose releases look like this."""
    if isinstance(found, ConvertedClip):
        return "lit"
    if found.decoder is not None:
        return "lc_mae" if found.layout == "lut" else "mae"
    return "imported"


def _more(asked: Import, found: Converted | ConvertedClip) -> dict[str, Any]:
    """What only releases of this stage say."""
    if isinstance(found, ConvertedClip):
        loss = "siglip" if "logit_bias" in found.weights else "clip"
        return {"text": describe(found.text), "joint_width": found.joint_width, "loss": loss}
    if found.decoder is not None:
        reduced = found.decoder.reduction != "none"  # then 2 x 2 patches are hidden together
        mask = Masking(kind="unit", unit=2) if reduced else Masking()
        return {
            "decoder": describe(found.decoder), "mask": describe(mask), "target": {"kind": asked.target},
            "encode_mask_tokens": False, **({"mim": "mae"} if found.layout == "lut" else {}),
        }  # fmt: skip
    return {"classes": len(found.heads["head.bias"])} if found.heads else {}


def file_hash(path: Path) -> str:
    """sha256 of a file; of a folder that of its weights."""
    if path.is_file():
        return sha256(path)
    found = sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".bin", ".pth", ".pt"))
    return sha256(found[0]) if len(found) == 1 else ", ".join(f"{sha256(p)} {p.name}" for p in found)


def card(facts: Mapping[str, Any], parameters: int) -> str:
    """What a stranger who finds the folder needs to know."""
    train, chain = facts["train"], " → ".join(STAGE_NAMES.get(str(stage), str(stage)) for stage in facts["lineage"])
    source = f" The layout is that of {SOURCES[train['layout']]}." if train["layout"] in SOURCES else ""
    return (
        f"# {chain}, {facts['variant']}, imported\n\n{parameters:,} parameters in `model.safetensors` "
        f"({facts['dtype']}). Load with `maws.release.open_release` and `load_image_tower`.\n\n"
        f"| imported | |\n|---|---|\n| file | {train['imported_from']} |\n| sha256 | {train['sha256']} |\n"
        f"| layout | {train['layout']} |\n\nTrained by others, not by this code.{source} The weights stay under the "
        f"licence of whoever released them: ask there what they may be used for, and what they were trained on.\n"
    )


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """A polite kill (SIGTERM) also takes away what was written so far."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
