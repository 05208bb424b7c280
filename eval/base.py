"""The shape of an evaluator, and finding one by its file name.

    eval/evaluators/knn.py:  class Config(EvaluatorConfig) · class Knn: run(encode) -> (name, value), (name, value), …

An evaluator never prints or writes: it yields scores and the files that belong to them, and runs the same from a
trainer and from the command line.
"""

import dataclasses
import importlib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar, cast

from data_pipeline.errors import UsageError
from eval.datasets import Dataset
from eval.features import Encoder
from maws.config import nearest

C = TypeVar("C")


class Score(NamedTuple):
    """A result over `n` images: a fraction in 0..1, or in the unit that report_tasks.unit gives its metric.

    `seed` when it differs from the command's.
    """

    metric: str
    value: float
    n: int
    seed: int | None = None
    chosen: Mapping[str, Any] = types.MappingProxyType({})  # hyper-parameters the evaluator chose, and on what
    hashes: Mapping[str, str] = types.MappingProxyType({})  # of files the score depends on, beside weights and data
    dataset: str = "data"  # which of the data's `sets` it is a score on
    facts: Mapping[str, Any] = types.MappingProxyType({})  # more for the result's config: its protocol, …
    right: bytes = b""  # a bit for every image that is right (eval/correct.py): for paired tests of two runs


class File(NamedTuple):
    """Something to keep beside the results, such as the images of a split."""

    name: str
    text: str


@dataclass(frozen=True, kw_only=True)
class EvaluatorConfig:
    """What `--set key=value` can change; every evaluator extends it in its own file."""


class Evaluated(Protocol):
    """What an evaluation is about: datasets.Data, captions.Captioned, pictures.Pictures or published.sets.Sets."""

    @property
    def sets(self) -> Mapping[str, Dataset]:
        """By the names that results have for them; all but `train` are evaluated on."""
        ...

    @property
    def hashes(self) -> Mapping[str, str]: ...

    @property
    def facts(self) -> Mapping[str, Any]:
        """What a score means nothing without."""
        ...

    def summary(self) -> str:
        """A line for people."""
        ...


class Evaluator(Protocol):
    """What every file in evaluators/ holds, in a class named like the file."""

    needs_train: ClassVar[bool]  # learns from labelled images
    needs_text: ClassVar[bool]  # asks the text tower

    def __init__(self, cfg: Any, data: Any, seed: int) -> None: ...

    def run(self, encode: Encoder) -> Iterator[Score | File]: ...


@dataclass(frozen=True)
class Entry:
    """An evaluator as found by name."""

    name: str
    config: EvaluatorConfig
    make: type[Evaluator] = field(repr=False)

    @property
    def data(self) -> str:
        """What it is given, as its class says: "labelled" (datasets.Data) if nothing, "captioned" (captions.Captioned),
        "pictures" (pictures.Pictures: labels are not asked for) or "published" (published.Sets: several sets by name).
        """
        return getattr(self.make, "data", "labelled")


def names() -> list[str]:
    return sorted(file.stem for file in (Path(__file__).parent / "evaluators").glob("[a-z]*.py"))


def load(name: str) -> Entry:
    """The evaluator in evaluators/`name`.py with its defaults."""
    if name not in names():
        raise UsageError(f"there is no evaluator '{name}'; {nearest(name, names())}")
    module = importlib.import_module(f"eval.evaluators.{name}")
    return Entry(name, module.Config(), getattr(module, name.capitalize()))


# ----------------------------------------------------------------------------------------------------------- overrides


def configure(entries: Sequence[Entry], settings: Sequence[str]) -> list[Entry]:
    """Apply `key=value` to every evaluator that has the key; `knn.k=1,5` means one evaluator."""
    configs = {entry.name: entry.config for entry in entries}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise UsageError(f"--set {setting}: expected key=value, such as --set vpt.steps=20")
        scope, dot, rest = key.partition(".")
        if dot and scope in names() and scope not in configs and not any(key in keys(c) for c in configs.values()):
            raise UsageError(f"--set {setting}: '{scope}' is not among the evaluators asked for: {', '.join(configs)}")
        inside = {scope: rest} if dot and scope in configs else dict.fromkeys(configs, key)
        takers = [name for name, field_ in inside.items() if field_ in keys(configs[name])]
        if not takers:
            known = list(dict.fromkeys(known for name in inside for known in keys(configs[name])))
            asked = rest if scope in inside else key
            raise UsageError(f"--set {setting}: {', '.join(inside)} has no setting '{asked}'; {nearest(asked, known)}")
        for name in takers:
            configs[name] = _replace(configs[name], inside[name].split("."), text, setting)
    return [dataclasses.replace(entry, config=configs[entry.name]) for entry in entries]


def keys(config: Any) -> list[str]:
    """Every setting of a config, groups written with a dot."""
    found: list[str] = []
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        found += [f"{item.name}.{key}" for key in keys(value)] if dataclasses.is_dataclass(value) else [item.name]
    return found


def _replace(config: C, path: Sequence[str], text: str, setting: str) -> C:
    name, *rest = path
    value = getattr(config, name)
    if rest:
        changed = _replace(value, rest, text, setting)
    else:
        changed = _parse(text, typing.get_type_hints(type(config))[name], setting)
    try:
        return cast(C, dataclasses.replace(cast(Any, config), **{name: changed}))
    except ValueError as error:
        raise UsageError(f"--set {setting}: {error}") from None


def _parse(text: str, kind: Any, setting: str) -> Any:
    """Read `text` as the type of the field."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if text.lower() == "none" and types.NoneType in arguments:
            return None
        return _parse(text, next(a for a in arguments if a is not types.NoneType), setting)
    if origin is tuple:
        return tuple(_parse(part.strip(), arguments[0], setting) for part in text.split(",") if part.strip())
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise UsageError(f"--set {setting}: expected true or false")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise UsageError(f"--set {setting}: '{text}' is not {wanted}") from None
