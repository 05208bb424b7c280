"""Sentences around a class name: `a photo of a {}.`

A template file has one template a line (empty lines and lines that start with "# " are left out), or is a JSON list, or
a class file with "templates". The bundled ones are named by their file in eval/prompts/: default, drawings, imagenet7,
and every class set that has some.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from data_pipeline.errors import DataError
from eval import class_files
from eval.class_files import PROMPTS
from eval.classes import Classes
from eval.languages import ENGLISH
from maws.config import nearest

AUTO: Final = "auto"  # the classes' own templates, else DEFAULT in their language
DEFAULT: Final = "default"
BARE: Final = "{}"  # the name alone, where nothing is known in a language


@dataclass(frozen=True)
class Templates:
    """Texts with one {} each."""

    texts: tuple[str, ...]
    name: str
    sha256: str  # of the file; of the texts, where they come with classes

    def __call__(self, name: str) -> list[str]:
        """Every template around one class name; a template is not a format string, so braces in a name are harmless."""
        return [text.replace("{}", name) for text in self.texts]


@cache
def bundled() -> list[str]:
    """Files of templates alone."""
    return sorted(file.stem for file in PROMPTS.glob("*.txt"))


def templates_for(classes: Classes, asked: str = AUTO) -> Templates:
    """What was asked for, in the language of the classes; "auto" leaves it to the classes. Raises DataError."""
    if asked != AUTO:
        return read_templates(asked, classes.language)
    if classes.templates:
        return _with_classes(classes.templates, f"those of {classes.source}")
    if classes.language == ENGLISH or f"{DEFAULT}.{classes.language}" in bundled():
        return read_templates(DEFAULT, classes.language)
    return _with_classes((BARE,), "the bare name")


def read_templates(name: str, language: str = ENGLISH) -> Templates:
    """A bundled set by name, in the language where it is there in it, or a file. Raises DataError."""
    file = _find(name, language)
    try:
        data = file.read_bytes()
        text = data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        known = [*bundled(), *class_files.bundled()]
        raise DataError(
            f"cannot read templates from {file} ({reason}); give a file or a bundled set: {nearest(name, known)}"
        ) from None
    texts = _parse_json(text, file) if file.suffix == ".json" else class_files.lines(text)
    if file.stem in class_files.bundled() and file.parent == PROMPTS:
        return _with_classes(tuple(texts), file.stem)
    return Templates(_checked(tuple(texts), str(file)), name, hashlib.sha256(data).hexdigest())


def _find(name: str, language: str) -> Path:
    sets = {stem: PROMPTS / f"{stem}.txt" for stem in bundled()} | class_files.bundled()
    for stem in (f"{name}.{language}", name):
        if stem in sets:
            return sets[stem]
    return Path(name)


def _with_classes(texts: tuple[str, ...], name: str) -> Templates:
    return Templates(_checked(texts, name), name, hashlib.sha256(json.dumps(texts).encode()).hexdigest())


def _checked(texts: tuple[str, ...], source: str) -> tuple[str, ...]:
    for template in texts:
        if template.count("{}") != 1:
            raise DataError(f"the template '{template}' of {source} must have {{}} once, where the class name goes")
    if not texts:
        raise DataError(f"{source} holds no templates")
    return texts


def _parse_json(text: str, file: Path) -> list[str]:
    try:
        content: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is not JSON: {error}") from None
    texts = content.get("templates") if isinstance(content, dict) else content
    if not isinstance(texts, list) or not all(isinstance(template, str) for template in texts):
        raise DataError(f"{file} must be a JSON list of text, or have one as 'templates'")
    return texts
