"""What people decided, in files: overrides, a deny-list, a frozen vocabulary, tombstones. A build copies what they say
into its work folder, so that all its tasks go by the same text, and the manifest names each file's sha256.
"""

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from data_pipeline import vocabulary
from data_pipeline.errors import UsageError
from data_pipeline.files import sha256_bytes, write_bytes
from data_pipeline.overrides import CHOICES, DENY_LIST, Overrides
from data_pipeline.steps import Settings, Work
from data_pipeline.tombstones import NAME, Tombstones
from data_pipeline.wordnet import WordNet, open_wordnet


@dataclass
class Decisions:
    """The files of one build by option, as read at its start."""

    settings: Settings
    output: Path
    files: dict[str, tuple[Path, bytes]]
    _overrides: Overrides | None = field(default=None, init=False)

    @staticmethod
    def read(settings: Settings, output: Path) -> "Decisions":
        asked = {
            "overrides": settings.overrides,
            "deny_list": None if settings.deny_list == "none" else settings.deny_list,
            "vocabulary": settings.vocabulary,
            "tombstones": settings.tombstones,
        }
        files: dict[str, tuple[Path, bytes]] = {}
        for name, value in asked.items():
            if value is None:
                continue
            path = DENY_LIST if name == "deny_list" and value in CHOICES else Path(value)
            path = vocabulary.locate(path) if name == "vocabulary" else path
            option = f"--{name.replace('_', '-')}"
            if name != "tombstones" and path.resolve().is_relative_to(output.resolve()):
                raise UsageError(
                    f"{option} {value} is part of --output {output}, which is to be written; copy it first"
                )
            try:
                files[name] = path, path.read_bytes()
            except OSError as error:
                choices = f" and none of {', '.join(CHOICES)}" if name == "deny_list" else ""
                raise UsageError(f"{option} {value}: cannot read {path} ({error.strerror}){choices}") from None
        return Decisions(settings, output, files)

    @functools.cached_property
    def wordnet(self) -> WordNet:
        return open_wordnet(self.settings.languages)

    @property
    def hashes(self) -> dict[str, str]:
        return {name: sha256_bytes(data) for name, (_, data) in self.files.items()}

    def check(self) -> None:
        """Raises UsageError or DataError where a file says what cannot be, or where pictures taken down come back."""
        stones = self.output / NAME
        if "tombstones" not in self.files and stones.is_file():
            raise UsageError(
                f"pictures were taken down from {self.output}: add --tombstones {stones}, so that none comes back, or "
                "choose another --output"
            )
        wordnet = self.wordnet
        own = self.files.get("overrides")
        self._overrides = Overrides.load(own[0] if own else None, self.settings.deny_list, wordnet)
        if self.settings.vocabulary is not None:
            vocabulary.read(Path(self.settings.vocabulary), wordnet)
        if "tombstones" in self.files:
            Tombstones.parse(*self.files["tombstones"])

    def lay_down(self, work: Work) -> None:
        """Where the tasks find them."""
        assert self._overrides is not None, "checked first"
        self._overrides.save(work.overrides)
        places = {"tombstones": work.tombstones, "vocabulary": work.frozen}
        for name, (_, data) in self.files.items():
            write_bytes(places.get(name) or work.folder / KEPT[name], data)


KEPT: Final = {"overrides": "overrides.yaml", "deny_list": "deny_list.yaml"}  # copies that stay with the shard set


def kept(folder: Path) -> list[Path]:
    """The copies in a folder, of a build or of a shard set."""
    return [folder / name for name in KEPT.values() if (folder / name).is_file()]


def read_again(folder: Path, deny: str, wordnet: WordNet) -> Overrides:
    """The overrides of a finished shard set; `deny` is the choice its manifest names."""
    own, shipped = (folder / name for name in KEPT.values())
    choice = deny if deny in CHOICES else str(shipped)
    return Overrides.load(own if own.is_file() else None, choice, wordnet, shipped)
