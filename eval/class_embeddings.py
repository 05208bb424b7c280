"""The zero-shot classifier: one unit vector per class, kept beside the features.

    classifier = class_embeddings(encode, classes, templates)          # S E

Per class: all templates x all names, embedded, each l2-normalised, averaged, l2-normalised (recipes 9.3). The file is
RUN/features/classes-*.safetensors, one per (weights, tokenizer, texts). Letters: S classes, E joint width.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from data_pipeline.files import write_bytes
from eval import distributed
from eval.classes import Classes
from eval.features import Encoder
from eval.templates import Templates
from eval.texts import embed_batches
from maws.release import Release

log = logging.getLogger(__name__)

FORMAT = 1  # of the file


def class_embeddings(encode: Encoder, classes: Classes, templates: Templates) -> Tensor:
    """One unit vector per class, S E, float32 on the encoder's device."""
    texts = class_texts(classes, templates)
    if encode.cache is None or encode.release is None:
        return _compute(encode, texts)
    identity = _identity(encode.release, encode.sha256, texts)
    file = encode.cache / f"classes-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.safetensors"
    found = distributed.from_first(lambda: _load(file, identity))  # all ranks compute, or none
    if found is None:
        found = _compute(encode, texts)
        if distributed.is_first():
            _save(file, identity, found)
    return found.to(encode.device)


def class_texts(classes: Classes, templates: Templates) -> list[list[str]]:
    """What is said of each class: every template around every name of it."""
    return [[text for name in names for text in templates(name)] for names in classes.names]


def _compute(encode: Encoder, texts: Sequence[Sequence[str]]) -> Tensor:
    owner = torch.tensor([label for label, own in enumerate(texts) for _ in own], device=encode.device)
    counts = torch.bincount(owner, minlength=len(texts))
    sums: Tensor | None = None  # of the texts' vectors: 80,000 of them need not be kept
    for rows, vectors in embed_batches(encode, [text for own in texts for text in own]):
        sums = vectors.new_zeros(len(texts), vectors.shape[1]) if sums is None else sums
        sums.index_add_(0, owner[rows], vectors)
    assert sums is not None  # every class has a name, and every set of templates has one
    return F.normalize(sums / counts[:, None], dim=1)


def _identity(release: Release, weights: str, texts: Sequence[Sequence[str]]) -> str:
    tokenizer = hashlib.sha256()
    for file in sorted((release.folder / "tokenizer").rglob("*")):
        if file.is_file():
            tokenizer.update(file.relative_to(release.folder).as_posix().encode() + b"\0" + file.read_bytes())
    content = {
        "format": FORMAT,
        "weights": weights,
        "text": release.config.get("text"),  # the number of tokens, for one, is not in the weights
        "tokenizer": tokenizer.hexdigest(),
        "texts": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
    }
    return json.dumps(content, sort_keys=True)


def _load(file: Path, identity: str) -> Tensor | None:
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as stored:
            matches = (stored.metadata() or {}).get("identity") == identity
            return stored.get_tensor("classes") if matches else None
    except (SafetensorError, OSError) as error:
        log.warning("warning: the kept class embeddings %s are damaged (%s) and are made again", file, error)
        return None


def _save(file: Path, identity: str, classes: Tensor) -> None:
    try:
        write_bytes(file, save({"classes": classes.cpu().contiguous()}, {"identity": identity}))
    except OSError as error:
        log.warning("warning: class embeddings are not kept, cannot write %s (%s)", file, error)
