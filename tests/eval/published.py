"""Small pictures and lists laid out like published sets, and reading them back."""

import dataclasses
from pathlib import Path

from eval.datasets import open_data
from eval.published import registry
from tests.eval.conftest import picture


def put(root: Path, *names: str) -> dict[str, bytes]:
    """Pictures that differ, by the name below the folder."""
    made = {name: picture(len(name), number, side=8) for number, name in enumerate(names)}
    for name, data in made.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return made


def text(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def savemat(path: Path, **variables) -> None:
    from scipy.io import savemat

    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, variables)


def opened(reference: str) -> tuple[dict[str, tuple[int, bytes]], list[str]]:
    """Label and bytes of each picture by key, and the names of the classes."""
    data = open_data([Path(reference)])
    names = [data.classes.name(label) for label in range(len(data.classes))]
    return {key: (int(data.test.labels[row]), data.test.read(row)) for row, key in enumerate(data.test.keys)}, names


def shrunk(name: str, images: int, classes: int, split: str | None = None):
    """The set as if it had been published with so few pictures."""
    published = registry.find(name)
    split = split or published.evaluate
    assert split is not None
    part = dataclasses.replace(published.splits[split], images=images, classes=None)
    return dataclasses.replace(published, num_classes=classes, splits={split: part}), split
