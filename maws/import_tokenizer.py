"""The tokenizer that an imported text tower was trained with: found, checked against the tower, made ready to copy.

No file of weights holds it. Of XLM-R's, which all released maws_clip models read, the numbering is checked too.
"""

import logging
import shutil
from pathlib import Path

from data_pipeline.errors import DataError
from maws.data.tokenizer import JSON_FILE, MODEL_FILE, fits, load_tokenizer
from maws.models.text import TextShape

log = logging.getLogger(__name__)

XLMR_IDS = 250_002
HELLO = "Hello world!", [35378, 8999, 38]  # XLM-R's pieces of it


def staged_tokenizer(source: Path | None, text: TextShape, scratch: Path) -> dict[str, Path]:
    """The tokenizer's folder for the release, {} without one, of which a warning then tells.

    Raises DataError for a tokenizer of another vocabulary or numbering than the text tower's.
    """
    if source is None:
        log.warning(
            "warning: weights hold no tokenizer, and without one the release cannot read text. Import again with "
            "--tokenizer FOLDER --overwrite; for XLM-R's %s ids that is the folder of FacebookAI/xlm-roberta-base with "
            "its %s or %s", f"{XLMR_IDS:,}", MODEL_FILE, JSON_FILE,
        )  # fmt: skip
        return {}
    folder = scratch / "tokenizer"
    folder.mkdir()
    file = tokenizer_file(source)
    shutil.copyfile(file, folder / file.name)
    tokenizer = load_tokenizer(folder, text.context)
    if not fits(tokenizer, text.vocabulary):
        raise DataError(
            f"--tokenizer {source} has {tokenizer.vocabulary:,} ids, the text tower "
            f"{text.vocabulary:,} rows: it is not the one this tower was trained with"
        )
    if text.vocabulary == XLMR_IDS and (ids := tokenizer.encode(HELLO[0])) != HELLO[1]:
        raise DataError(
            f"--tokenizer {source} has XLM-R's number of ids and not its numbering: '{HELLO[0]}' is {ids}, "
            f"and {HELLO[1]} in XLM-R; give the one of FacebookAI/xlm-roberta-base"
        )
    return {"tokenizer": folder}


def tokenizer_file(path: Path) -> Path:
    """The one file of a tokenizer's folder that is needed, or the file itself."""
    for name in (MODEL_FILE, JSON_FILE):
        if path.name == name and path.is_file():
            return path
        if (path / name).is_file():
            return path / name
    raise DataError(f"--tokenizer {path} is neither {MODEL_FILE} nor {JSON_FILE}, nor a folder with one of them")


def beside(weights: Path) -> Path | None:
    """The tokenizer that a library saved into the folder of its weights; None for a file of weights alone."""
    return weights if any((weights / name).is_file() for name in (MODEL_FILE, JSON_FILE)) else None
