"""The files of the evaluators `spectrum` and `attention` in a folder of runs, read and checked for the report.

    for found, of_run in look_files(folder, "spectrum", as_spectrum): …

What is no such file, or is of weights that its run no longer has, is left out with a note. No torch.
"""

import base64
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
from PIL import Image

from data_pipeline.files import sha256_file
from data_pipeline.images import decode
from eval.report_runs import Folder, Run
from eval.report_scores import lineage_name

PNG: Final = "data:image/png;base64,"
MAX_FILE: Final = 256 << 20  # bytes; ours: the maps of a ViT-H at 518 pixels are a tenth of it

T = TypeVar("T")


@dataclass(frozen=True)
class About:
    """What two files must share to be compared, and whose they are."""

    weights: str
    lineage: tuple[str, ...]
    data: str  # sha256
    images: int
    image_size: int

    @property
    def kin(self) -> tuple[str, int, int]:
        return self.data, self.images, self.image_size


@dataclass(frozen=True)
class Spectrum:
    about: About
    token: str
    layers: dict[str, list[float]] = field(repr=False)  # singular values, largest first


@dataclass(frozen=True)
class Map:
    """What each head looks at from one patch of one picture."""

    key: str
    picture: Image.Image = field(repr=False)
    at: tuple[float, float]  # x, y in shares
    cell: tuple[int, int]  # row, column
    heads: np.ndarray = field(repr=False)  # H h w


@dataclass(frozen=True)
class Looking:
    about: About
    renormalised: bool
    distances: np.ndarray = field(repr=False)  # L H, pixels
    class_share: np.ndarray = field(repr=False)  # L H
    uniform: float
    block: int
    maps: list[Map] = field(repr=False)


def as_spectrum(content: dict[str, Any]) -> Spectrum:
    layers = {str(name): _numbers(values).tolist() for name, values in content["layers"].items()}
    if not layers or any(values != sorted(values, reverse=True) or values[-1] < 0 for values in layers.values()):
        raise ValueError("singular values out of order")
    return Spectrum(_about(content), str(content["token"]), layers)


def as_looking(content: dict[str, Any]) -> Looking:
    renormalised = content["renormalised"] is True
    distances = _numbers(content["distance"]["over_patches" if renormalised else "over_all"], 2)
    share = _numbers(content["class_share"], 2)
    if share.shape != distances.shape:
        raise ValueError("a share for some heads only")
    maps = [_map(entry, query) for entry in content["maps"] for query in entry["queries"]]
    about, block = _about(content), int(content["block"])
    return Looking(about, renormalised, distances, share, float(content["uniform"]), block, maps)


def _about(content: dict[str, Any]) -> About:
    lineage = tuple(str(stage) for stage in content["lineage"])
    data, weights = str(content["data"]), str(content["weights"])
    return About(weights, lineage, data, int(content["images"]), int(content["image_size"]))


def _map(entry: dict[str, Any], query: dict[str, Any]) -> Map:
    heads = _numbers(query["heads"], 3)
    cell = int(query["row"]), int(query["column"])
    if not all(0 <= place < side for place, side in zip(cell, heads.shape[1:], strict=True)):
        raise ValueError("a patch outside of its grid")
    return Map(str(entry["key"]), _picture(entry["picture"]), (float(query["x"]), float(query["y"])), cell, heads)


def _picture(text: str) -> Image.Image:
    if not text.startswith(PNG):
        raise ValueError("not a PNG picture")
    return decode(base64.b64decode(text.removeprefix(PNG), validate=True))  # both raise kinds of ValueError


def _numbers(values: Any, axes: int = 1) -> np.ndarray:
    """ValueError unless they are finite numbers in as many axes as asked for, none of length 0."""
    found = np.asarray(values, dtype=float)
    if found.ndim != axes or not found.size or not np.isfinite(found).all():
        raise ValueError(f"not numbers in {axes} axes")
    return found


# --------------------------------------------------------------------------------------------------------------- files


def look_files(folder: Folder, kind: str, parse: Callable[[dict[str, Any]], T]) -> Iterator[tuple[T, Run | None, bool]]:
    """What lies in RUN/kind/*.json, the run whose weights it is of, and whether of their mean (`ema`).

    A folder without a run, such as that of a release alone, gives None for it.
    """
    runs = {run.folder: run for run in folder.runs}
    for place in dict.fromkeys([*runs, folder.path, *_folders(folder.path)]):
        for file in sorted((place / kind).glob("*.json")):
            name = f"{place.name}: {kind}/{file.name}"
            try:
                if file.stat().st_size > MAX_FILE:
                    raise ValueError("too large")
                content = json.loads(file.read_bytes())
                found, weights = parse(content), str(content["weights"])
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
                folder.notes.append(f"{name} cannot be read and is left out")
                continue
            whose = runs.get(place) or next((run for run in folder.runs if run.weights_sha256 == weights), None)
            if whose is not None and whose.weights_sha256 != weights and not _is_mean(whose, weights):
                folder.notes.append(f"{name} is of weights that have since been trained again, and is left out")
                continue
            yield found, whose, whose is not None and whose.weights_sha256 != weights


def _folders(path: Path) -> list[Path]:
    return sorted(place for place in path.iterdir() if place.is_dir())


def _is_mean(run: Run, weights: str) -> bool:
    file = run.folder / "release" / "ema.safetensors"
    return file.is_file() and sha256_file(file) == weights


def label(about: About, run: Run | None, is_mean: bool, columns: dict[str, str]) -> str:
    """As the table of scores calls the run's column; `columns` by run name."""
    if run is None:
        return f"{lineage_name(about.lineage)} ({about.weights[:8]})"
    return columns.get(run.name, run.title) + (" (ema)" if is_mean else "")
