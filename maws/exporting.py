"""The command `export`: a run or a release as our release form, or for timm, open_clip or transformers.

    python -m maws export runs/mae --output mae_step_40000                       our release form (export.py)
    python -m maws export runs/wsp --to timm --output vit_b16_timm
    python -m maws export releases/lit --to open_clip --output lit_open_clip --dtype bfloat16

For another library the weights come from a release: the given one, a finished run's, or one that is made of a run's
checkpoint beside the output and taken away again. They are written one tensor at a time; the folder is then loaded back
with the library and compared with our model (parity.py), and appears under its name only when both agree.
"""

import argparse
import importlib
import json
import logging
import math
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from maws import export, parity
from maws.checkpoint import CheckpointError
from maws.checks.machine import free_memory
from maws.config import ConfigError, nearest
from maws.export import DTYPES
from maws.files import sync, whole_folder
from maws.interop.hf_tokenizer import write_tokenizer
from maws.interop.outgoing import Inputs, Outgoing, same, summary, values
from maws.release import Release, load_tokenizer, open_release, write_release
from maws.tensor_file import TensorFile
from maws.weight_files import MAX_SHARD, WeightFiles, Weights, parse_size, write_weights

log = logging.getLogger(__name__)

MODULES = {name: f"maws.interop.{name}_layout" for name in ("timm", "open_clip", "hf")}
LIBRARIES = {"timm": "timm", "open_clip": "open_clip_torch", "hf": "transformers"}  # what pip calls them
TARGETS = ("safetensors", *MODULES)
MARKS = ("config.json", "open_clip_config.json", "projections.safetensors")  # a folder that an export wrote has one
CARD = "MODEL_CARD.md"  # of the release that was exported: what it was trained on, and whose weights they are
OWN = ("config.json", "preprocess.json", "README.md")  # of a release, written anew with each


class Layout(Protocol):
    def outgoing(self, release: Release, files: WeightFiles) -> Outgoing: ...
    def outputs(self, folder: Path, inputs: Inputs) -> dict[str, Tensor]: ...


def run(options: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    check_options(options)
    if options.to == "safetensors" and not is_release(options.run):
        export.export(
            options.run, options.output, options.checkpoint, options.dtype, options.ema,
            parse_size(options.max_shard or str(MAX_SHARD)), options.overwrite, options.shards, options.init_from,
        )  # fmt: skip
        return 0
    with source(options) as release:
        size = parse_size(options.max_shard or str(MAX_SHARD))
        if options.to == "safetensors":
            write_again(release, options.output, options.dtype, size)
        else:
            write_for(options.to, release, options.output, options.dtype, size, options.check)
    return 0


def check_options(options: argparse.Namespace) -> None:
    """Raises ConfigError for what cannot be done as asked, before anything is read."""
    output = options.output
    if options.to not in TARGETS:
        raise ConfigError(f"--to {options.to} is not known; {nearest(options.to, list(TARGETS))}")
    if options.dtype not in DTYPES:
        raise ConfigError(f"--dtype {options.dtype} is not known; {nearest(options.dtype, list(DTYPES))}")
    if output.exists() and not options.overwrite:
        raise ConfigError(f"--output {output} is there already; add --overwrite to replace it, or name another")
    if output.exists() and not any((output / mark).is_file() for mark in MARKS):
        raise ConfigError(f"--output {output} is no release, so --overwrite does not delete it; name another")
    if options.run.is_file() and not options.run.name.startswith("ema.safetensors"):
        raise ConfigError(
            f"{options.run} is a file; give a run or a release (python -m maws import {options.run} --output FOLDER "
            f"makes one of other people's weights)"
        )
    if options.run.resolve().is_relative_to(output.resolve()):
        raise ConfigError(f"--output {output} would replace what is exported; name another")
    if options.max_shard and options.to in ("timm", "open_clip"):
        raise ConfigError(f"--max-shard {options.max_shard}: {options.to} reads one file of weights; leave it out")
    if is_release(options.run) and options.checkpoint != "latest":
        raise ConfigError(f"--checkpoint is for a run, and {options.run} is a release; leave it out")


def is_release(path: Path) -> bool:
    """A release folder, or a finished run without its checkpoints."""
    folder = path / "release" if (path / "release").is_dir() else path
    return not (path / "checkpoints").is_dir() and (path.is_file() or (folder / "preprocess.json").is_file())


@contextmanager
def source(options: argparse.Namespace) -> Iterator[Release]:
    """The release that is asked for. Raises ConfigError when it has no mean of the weights and that is wanted."""
    finished = options.checkpoint == "latest" and (options.run / "release").is_dir()
    if is_release(options.run) or finished:
        release = open_release(options.run)
        if options.ema and release.stem != "ema" and release.ema is None:
            raise ConfigError(f"--ema: {release.folder} holds no mean of the weights; the run had optim.ema=0")
        yield (release.ema or release) if options.ema else release
        return
    beside = options.output.with_name(f"tmp-release-{options.output.name}")
    try:
        export.export(
            options.run, beside, options.checkpoint, "float32", options.ema, overwrite=True, shards=options.shards,
            init_from=options.init_from,
        )  # fmt: skip
        yield open_release(beside)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def write_again(release: Release, output: Path, dtype: str, max_shard: int = MAX_SHARD) -> None:
    """A release as a release: in another type, or in files of another size; what lies beside the weights is copied."""
    mean = release.ema if release.stem == "model" else None
    facts = {k: v for k, v in release.config.items() if k != "format"} | {"dtype": dtype}
    facts |= {"weights": "ema"} if release.stem == "ema" else {}
    with WeightFiles(release.weights) as files, WeightFiles((mean or release).weights) as means:
        own = OWN[:-1] if "imported_from" in release.config["train"] else OWN  # the card of an import names its source
        extras = {p.name: p for p in release.folder.iterdir() if p.name not in own and ".safetensors" not in p.name}
        beside = _as_they_are(means, dtype) if mean is not None else None
        weights = _as_they_are(files, dtype)
        try:
            write_release(output, weights, facts, release.preprocess, extras, beside, max_shard)
        except OSError as error:
            raise CheckpointError(f"{output} could not be written: {error}; nothing of it is left") from None
    log.info("%s: %s parameters of %s", output, f"{weights.parameters:,}", release.folder)


def _as_they_are(files: WeightFiles, dtype: str) -> Weights:
    """In the order of the file, so that the same values make the same file."""
    if files.path.suffix == ".safetensors":
        with TensorFile(files.path) as file:
            names = file.names
    else:
        names = list(json.loads(files.path.read_text())["weight_map"])
    return values({name: same(files, name) for name in names}, files, DTYPES[dtype])


def write_for(
    target: str, release: Release, output: Path, dtype: str = "float32", max_shard: int = MAX_SHARD, check: bool = True
) -> dict[str, float]:
    """Write a release for a library and, unless told not to, prove it: the largest difference of each output.

    Raises CheckpointError, and leaves nothing, where the library cannot hold the model or computes something else.
    """
    layout = cast(Layout, importlib.import_module(MODULES[target]))
    release = Release(release.folder, release.config | {"dtype": dtype}, release.preprocess, release.stem)
    with WeightFiles(release.weights) as files:
        outgoing = layout.outgoing(release, files)
        log.info("\n".join(summary(outgoing, files)))
        if outgoing.tokenizer is not None:
            load_tokenizer(release)  # says what to do without one, before anything is written
        try:
            with whole_folder(output) as folder:
                size = max_shard if outgoing.splits else sys.maxsize
                _write_weights(folder, outgoing, files, DTYPES[dtype], size)
                if outgoing.tokenizer is not None:
                    context = release.config["text"]["context"]
                    write_tokenizer(release.folder / "tokenizer", folder / outgoing.tokenizer, context)
                if (card := release.folder / "README.md").is_file():
                    shutil.copyfile(card, folder / CARD)
                _write_documents(folder, outgoing.documents(folder.resolve()))
                found = prove(target, layout, release, folder, DTYPES[dtype]) if check else {}
                _write_documents(folder, outgoing.documents(output.resolve()))
        except OSError as error:
            raise CheckpointError(f"{output} could not be written: {error}; nothing of it is left") from None
    log.info("%s: %s", output, f"{release.folder} for {LIBRARIES[target]}, {dtype}")
    return found


def prove(target: str, layout: Layout, release: Release, folder: Path, dtype: torch.dtype) -> dict[str, float]:
    """Load a folder back with its library and compare. {} where the library or the memory for it is missing."""
    with WeightFiles(release.weights) as files:
        needed = 6 * sum(math.prod(files.shape(name)) for name in files.names)  # bytes: float32, and room to load it
    if needed > (free := free_memory()):
        log.info("not checked: that takes about %.0f GB of memory, and %.0f are free", needed / 1e9, free / 1e9)
        return {}
    inputs = parity.fixed_inputs(release)
    try:
        with torch.no_grad(), _quiet():
            theirs = layout.outputs(folder, inputs)
    except ImportError as error:
        log.info("not checked: %s; pip install %s", error, LIBRARIES[target])
        return {}
    except Exception as error:  # a library refuses a folder in ways of its own
        raise CheckpointError(f"{LIBRARIES[target]} does not load the folder back: {error}; it is not kept") from error
    found = parity.differences(parity.ours(release, inputs, theirs, dtype), theirs)
    told = ", ".join(f"{name} {difference:.1e}" for name, difference in found.items())
    log.info("loaded back with %s; largest differences, of the largest value: %s", LIBRARIES[target], told)
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what libraries tell of their loading."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(before)


def _write_weights(folder: Path, outgoing: Outgoing, files: WeightFiles, dtype: torch.dtype, max_shard: int) -> None:
    for name, tensors in outgoing.weights.items():
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        write_weights(place.parent, place.name, values(tensors, files, dtype), max_shard)


def _write_documents(folder: Path, documents: dict[str, Any]) -> None:
    for name, content in documents.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content if isinstance(content, str) else json.dumps(content, indent=2) + "\n")
        sync(file)
