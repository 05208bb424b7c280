"""Steps of a chain of commands, and what each depended on: a step is skipped for as long as none of that changes.

A step is done when its command ended well; what it depended on (command, input files, code, versions) is then written
to FOLDER/.steps/NAME.json. chain.py runs them.
"""

import glob
import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.results import version
from maws.files import json_lines, sha256

LIBRARIES = ("torch", "torchvision", "deepspeed", "timm", "transformers", "nltk", "pyarrow", "pillow", "numpy")


@dataclass(frozen=True)
class Step:
    """One command of the chain. Paths are relative to the folder that it runs in: the repository, for `make demo`."""

    name: str
    command: tuple[str, ...]  # as a user would type it
    inputs: tuple[str, ...]  # files that it reads; a pattern stands for all files it matches
    outputs: tuple[str, ...]  # files that exist when it is done
    code: tuple[str, ...]  # patterns of the source files that it runs
    folder: str | None = None  # its own: removed when the step must start over
    side_by_side: bool = False  # needs one core only: runs beside others that do too
    done: Callable[[Path], bool] | None = None  # a look into the outputs, where that they exist is not enough


class StepFailed(Exception):
    """A step ended badly: its name and exit code."""

    def __init__(self, step: Step, code: int, log: Path | None = None) -> None:
        super().__init__(step.name)
        self.step, self.code, self.log = step, code, log


# ----------------------------------------------------------------------------------------------------------- up to date


@dataclass
class Ledger:
    """What each step depended on when it was started and when it was done, in FOLDER/.steps/."""

    root: Path  # what the steps' paths are relative to
    folder: Path
    libraries: Sequence[str] = LIBRARIES  # a new version of one of them makes every step out of date
    digests: dict[tuple[str, int, int], str] = field(default_factory=dict)

    def fingerprint(self, step: Step) -> dict[str, Any]:
        """Everything the outputs are a function of. Kept readable, so that one can see what changed."""
        versions = {name: version(name) for name in self.libraries}
        return {
            "command": list(step.command),
            "inputs": {name: self.digest(name) for pattern in step.inputs for name in self.matches(pattern)},
            "code": self.code(step.code),
            "versions": versions | ({"python": "{}.{}".format(*sys.version_info)} if versions else {}),
        }

    def matches(self, pattern: str) -> list[str]:
        return sorted(glob.glob(pattern, root_dir=self.root, recursive=True)) if "*" in pattern else [pattern]

    def code(self, patterns: Sequence[str]) -> str:
        """One digest of all files that the patterns match, less those of patterns that begin with `!`."""
        wanted = {name for pattern in patterns if pattern[0] != "!" for name in self.matches(pattern)}
        names = sorted(
            wanted - {name for pattern in patterns if pattern[0] == "!" for name in self.matches(pattern[1:])}
        )
        total = hashlib.sha256()
        for name in names:
            if (self.root / name).is_file():
                total.update(f"{name} {self.digest(name)}\n".encode())
        return total.hexdigest()

    def digest(self, name: str) -> str | None:
        """sha256 of a file, computed once for as long as it does not change; None when it is not there."""
        path = self.root / name
        try:
            stat = path.stat()
        except OSError:
            return None
        key = (name, stat.st_size, stat.st_mtime_ns)
        if key not in self.digests:
            self.digests[key] = sha256(path)
        return self.digests[key]

    def is_done(self, step: Step) -> bool:
        return (
            self.read(step, "done") == self.fingerprint(step)
            and all((self.root / name).exists() for name in step.outputs)
            and (step.done is None or step.done(self.root))
        )

    def was_started(self, step: Step) -> bool:
        """True when what is there was begun by the very same step: it may be continued."""
        return self.read(step, "started") == self.fingerprint(step)

    def mark(self, step: Step, what: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{step.name}.{what}.json" if what != "done" else self.folder / f"{step.name}.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.fingerprint(step), indent=1))
        os.replace(temporary, path)

    def forget(self, step: Step) -> None:
        for suffix in (".json", ".started.json"):
            (self.folder / f"{step.name}{suffix}").unlink(missing_ok=True)

    def read(self, step: Step, what: str) -> Any:
        path = self.folder / (f"{step.name}.{what}.json" if what != "done" else f"{step.name}.json")
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError):
            return None


def evaluators_in(results: Path) -> set[str]:
    """The evaluators with at least one whole line in a results file."""
    return {str(line["evaluator"]) for line in json_lines(results) if "evaluator" in line}
