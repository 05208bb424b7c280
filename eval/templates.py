"""Sentences around a class name: `a photo of a {}.`

A template file has one template a line (empty lines and lines that start with "# " are left out), or is a JSON list.
The bundled ones are named by their file in eval/prompts/: default, drawings.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import DataError
from maws.config import nearest

BUNDLED = Path(__file__).parent / "prompts"


@dataclass(frozen=True)
class Templates:
    """Texts with one {} each."""

    texts: tuple[str, ...]
    name: str
    sha256: str  # of the file

    def __call__(self, name: str) -> list[str]:
        """Every template around one class name; a template is not a format string, so braces in a name are harmless."""
        return [text.replace("{}", name) for text in self.texts]


def bundled() -> list[str]:
    return sorted(file.stem for file in BUNDLED.glob("*.txt"))


def read_templates(name: str) -> Templates:
    """A bundled set by name, or a file."""
    file = BUNDLED / f"{name}.txt" if name in bundled() else Path(name)
    try:
        data = file.read_bytes()
        text = data.decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise DataError(
            f"cannot read templates from {file} ({reason}); give a file or a bundled set: {nearest(name, bundled())}"
        ) from None
    texts = _parse_json(text, file) if file.suffix == ".json" else _parse_lines(text)
    for template in texts:
        if template.count("{}") != 1:
            raise DataError(f"the template '{template}' of {file} must have {{}} once, where the class name goes")
    if not texts:
        raise DataError(f"{file} holds no templates")
    return Templates(tuple(texts), name, hashlib.sha256(data).hexdigest())


def _parse_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip() and not line.startswith("# ")]


def _parse_json(text: str, file: Path) -> list[str]:
    try:
        texts = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is not JSON: {error}") from None
    if not isinstance(texts, list) or not all(isinstance(template, str) for template in texts):
        raise DataError(f"{file} must be a JSON list of text")
    return texts
