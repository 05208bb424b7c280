"""What people decide about hashtags and synsets: a file of their own, and the deny-list that ships with the package.

    force:  {jaguar: jaguar.n.01}             this tag always means this synset, whatever the policy and the deny-list
    forbid: [giveaway, sake.n.01, {branch: disease.n.01}]      a tag, a synset, a synset with all below it: no label
    merge:  {sofa_bed.n.01: sofa.n.01}        one class for both

The deny-list (deny_list.yaml, a reason beside each entry) has two parts. `non_visual`: what no picture shows, such as
units and grammar; a synset goes if every way down to it passes a listed branch, so that nouns with a visible side stay.
`sensitive`: what must not be read off a picture of a person; a synset goes if any way down to it passes a listed one.
`--deny-list none|non-visual|sensitive|all|FILE` chooses.

A tag keeps the senses that are left: #whale is the animal once giant.n.04, a large person, is denied. But where the
most usual of them is non-visual, the tag is dropped whole: whoever writes #no rarely means nobelium. Of 116 ambiguous
hashtags of the demo corpus read by hand, this rule labels 90, 53 of them right; the next sense instead, 106 and 57.
"""

import difflib
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np
import pyarrow as pa

from data_pipeline import hashtags
from data_pipeline.errors import UsageError
from data_pipeline.files import write_bytes
from data_pipeline.wordnet import WordNet, squash

DENY_LIST: Final = Path(__file__).with_name("deny_list.yaml")
NON_VISUAL: Final = "denied_non_visual"
PARTS: Final = {"non_visual": NON_VISUAL, "sensitive": "denied_sensitive"}  # part -> reason of a drop
CHOICES: Final = ("none", "non-visual", "sensitive", "all")
FORBIDDEN: Final = "forbidden"
REASONS: Final = (FORBIDDEN, *PARTS.values())
MAX_BYTES: Final = 16 << 20  # of a file


@dataclass(frozen=True)
class Overrides:
    """Decisions by row of the WordNet table; plain data, so that tasks can be given it."""

    force: Mapping[str, int]  # squashed tag -> synset
    forbidden_tags: frozenset[str]  # squashed
    removed: Mapping[int, str]  # synset -> reason
    merge: Mapping[int, int]
    sha256: str  # of all of the above in ids of WordNet

    def apply(self, tag: str, senses: Sequence[int], competing: bool = False) -> tuple[tuple[int, ...], str | None]:
        """The senses a tag may still have, the most usual first, and why none of those it had is left.

        `competing` is for a policy that reads the context: non-visual senses stay beside visible ones, so that they can
        win, and it is the caller who drops the tag where the chosen one is in `removed`.
        """
        squashed = squash(tag)
        if squashed in self.forbidden_tags:
            return (), FORBIDDEN
        if squashed in self.force:
            return (self.force[squashed],), None
        left = [sense for sense in senses if self.removed.get(sense) in (None, NON_VISUAL)]
        visible = [sense for sense in left if sense not in self.removed]
        if visible and (competing or left[0] == visible[0]):
            return tuple(
                dict.fromkeys(self.merge.get(sense, sense) for sense in (left if competing else visible))
            ), None
        reasons = [self.removed[sense] for sense in (left if visible else senses) if sense in self.removed]
        return (), FORBIDDEN if FORBIDDEN in reasons else next(iter(reasons), None)

    def is_forced(self, tag: str) -> bool:
        return squash(tag) in self.force

    def save(self, path: Path) -> None:
        facts = vars(self) | {"forbidden_tags": sorted(self.forbidden_tags)}
        write_bytes(path, json.dumps(facts, sort_keys=True).encode())

    @staticmethod
    def open(path: Path) -> "Overrides":
        facts = json.loads(path.read_bytes())
        removed, merge = ({int(row): value for row, value in facts[name].items()} for name in ("removed", "merge"))
        return Overrides(facts["force"], frozenset(facts["forbidden_tags"]), removed, merge, facts["sha256"])

    @staticmethod
    def load(path: Path | None, deny: str, wordnet: WordNet, shipped: Path = DENY_LIST) -> "Overrides":
        """`path` is the user's file, `deny` one of CHOICES (parts of `shipped`) or a file like it."""
        names = _names(wordnet)
        removed = _denied(deny, shipped, names)
        found = _Own.read(path, names) if path is not None else _Own({}, set(), set(), {})
        for row in found.forbidden:
            removed[row] = FORBIDDEN
        merge = _resolve(found.merge, path, names)
        force = {tag: merge.get(row, row) for tag, (row, _) in found.force.items()}
        for tag, (row, line) in found.force.items():
            if tag in found.tags or force[tag] in found.forbidden:
                _refuse(path, line, f"{tag!r} is forced to {names.name(row)} and forbidden at once")
        for row, (into, line) in found.merge.items():
            if reason := removed.get(merge[row]):
                _refuse(path, line, f"{names.name(into)} is no class ({reason}); merge into another synset")
        merge = {row: into for row, into in merge.items() if row not in removed}
        return Overrides(
            force, frozenset(found.tags), removed, merge, _identity(names, force, found.tags, removed, merge)
        )


def _identity(
    names: "_Names", force: Mapping[str, int], tags: Iterable[str], removed: Mapping[int, str], merge: Mapping[int, int]
) -> str:
    ids = names.ids
    facts = {
        "force": {tag: ids[row] for tag, row in force.items()},
        "tags": sorted(tags),
        "removed": {ids[row]: reason for row, reason in removed.items()},
        "merge": {ids[row]: ids[into] for row, into in merge.items()},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


# --------------------------------------------------------------------------------------------------------------- names


class _Names:
    """Synsets by name, and what lies below them."""

    def __init__(self, wordnet: WordNet) -> None:
        self._all: list[str] = wordnet.synsets["synset"].to_pylist()
        self.ids: list[str] = wordnet.synsets["wnid"].to_pylist()
        self._lemmas = wordnet.synsets["lemmas"]
        self.rows = {name: row for row, name in enumerate(self._all)}
        hypernyms = wordnet.synsets["hypernyms"].combine_chunks()
        lengths = np.diff(hypernyms.offsets.to_numpy())
        self._parent = hypernyms.flatten().to_numpy()  # of each pair (parent, child)
        self._child = np.repeat(np.arange(len(lengths)), lengths)
        self.tops: list[int] = np.flatnonzero(lengths == 0).tolist()

    def name(self, row: int) -> str:
        return self._all[row]

    def row(self, name: str, path: Path | None, line: int) -> int:
        if name not in self.rows:
            near = difflib.get_close_matches(name, self._alike(name), 1, 0.0)
            _refuse(path, line, f"{name!r} is no synset of WordNet" + (f"; did you mean {near[0]}?" if near else ""))
        return self.rows[name]

    def below(self, roots: Iterable[int], stop: frozenset[int] = frozenset()) -> set[int]:
        """Everything under `roots`, these included, without entering `stop`."""
        allowed, found = ~self._marked(stop), self._marked(roots)
        found &= allowed
        new = found
        while new.any():  # a level of the tree at a time
            new = self._marked(self._child[new[self._parent]]) & allowed & ~found
            found = found | new
        return set(np.flatnonzero(found).tolist())

    def children(self, rows: Iterable[int]) -> list[int]:
        return self._child[self._marked(rows)[self._parent]].tolist()

    def _marked(self, rows: Iterable[int] | np.ndarray) -> np.ndarray:
        marked = np.zeros(len(self._all), bool)
        marked[rows if isinstance(rows, np.ndarray) else list(rows)] = True
        return marked

    def proper(self, rows: Iterable[int]) -> list[int]:
        """Those whose every lemma begins with a capital."""
        rows = sorted(rows)
        every = self._lemmas.take(pa.array(rows, pa.int64())).to_pylist()
        return [row for row, lemmas in zip(rows, every, strict=True) if all(lemma[:1].isupper() for lemma in lemmas)]

    def _alike(self, name: str) -> list[str]:
        """Candidates for a typing error: the same lemma, else the same first letters, so that the search is short."""
        word = name.split(".")[0].lower()
        for length in (len(word), 3, 2, 1):
            prefix = word[:length]
            if found := [other for other in self._all if other.split(".")[0][:length] == prefix and prefix]:
                same = [other for other in found if other.split(".")[0] == word]
                return same or found
        return []


@functools.lru_cache(maxsize=1)
def _names(wordnet: WordNet) -> _Names:
    return _Names(wordnet)


def _resolve(merge: Mapping[int, tuple[int, int]], path: Path | None, names: _Names) -> dict[int, int]:
    """Each synset with the one its merges end at. Raises UsageError for a ring."""
    resolved: dict[int, int] = {}
    for row, (into, line) in merge.items():
        seen = {row}
        while into in merge:
            if into in seen:
                _refuse(path, line, f"the merges of {names.name(row)} go in a ring")
            seen.add(into)
            into = merge[into][0]
        resolved[row] = into
    return resolved


# ----------------------------------------------------------------------------------------------------------- deny-list


def _denied(deny: str, shipped: Path, names: _Names) -> dict[int, str]:
    """Synsets that are no class, and which part of the list says so; `sensitive` is named first."""
    if deny == "none":
        return {}
    if deny not in CHOICES and not Path(deny).is_file():
        raise UsageError(f"--deny-list {deny!r}: neither {', '.join(CHOICES)} nor a file")
    path = shipped if deny in CHOICES else Path(deny)
    parts = {"non-visual": ["non_visual"], "sensitive": ["sensitive"]}.get(deny, list(PARTS))
    removed: dict[int, str] = {}
    found = dict(_read_deny_list(path, names))
    for part in parts:
        entries = found.get(part, _Denied())
        rows = entries.by_every_way(names) if part == "non_visual" else entries.by_any_way(names)
        removed |= dict.fromkeys(rows, PARTS[part])
    return dict(sorted(removed.items()))


class _Denied:
    """The entries of one part, gathered."""

    def __init__(self) -> None:
        self.branches: set[int] = set()
        self.synsets: set[int] = set()
        self.kept: set[int] = set()

    def by_any_way(self, names: _Names) -> set[int]:
        """All below a listed branch that is reached without passing one that is kept."""
        stop = frozenset(self.kept - self.branches)
        return names.below(self.branches, stop) | self.synsets

    def by_every_way(self, names: _Names) -> set[int]:
        """All that cannot be reached from the top, or from a branch that is kept, without passing a listed one."""
        reached = names.below([*names.tops, *self.kept], frozenset(self.branches))
        return (set(range(len(names.ids))) - reached) | self.synsets


def _read_deny_list(path: Path, names: _Names) -> Iterator[tuple[str, _Denied]]:
    """Entries `branch`, `below` (a branch without its own top), `synset`, `names` (proper names of a branch), each with
    `why`, and `keep`: branches inside that stay."""
    for part, (node, line) in _mapping(_compose(path), path).items():
        if part not in PARTS:
            _refuse(path, line, f"{part!r} is no part of a deny-list; parts are {', '.join(PARTS)}")
        denied = _Denied()
        for entry_node in _sequence(node, path, part):
            entry = _mapping(entry_node, path)
            line = entry_node.start_mark.line + 1
            kinds = [kind for kind in ("branch", "below", "synset", "names") if kind in entry]
            if len(kinds) != 1 or "why" not in entry or entry.keys() - {*kinds, "why", "keep"}:
                _refuse(path, line, "an entry has one of branch, below, synset and names, a `why`, and perhaps `keep`")
            rows, kept = (
                [names.row(name, path, at) for name, at in _names_of(entry[kind][0], path)] if kind in entry else []
                for kind in (kinds[0], "keep")
            )
            if kinds[0] == "synset":
                denied.synsets.update(rows)
            elif kinds[0] == "names":
                inside = names.below(rows) - names.below(kept)
                denied.synsets.update(names.proper(inside))
            else:
                denied.branches.update(rows if kinds[0] == "branch" else names.children(rows))
                denied.kept.update(kept)
        yield part, denied


# ------------------------------------------------------------------------------------------------------ the user's file


@dataclass(frozen=True)
class _Own:
    """A user's file; the numbers beside rows are lines."""

    force: dict[str, tuple[int, int]]
    tags: set[str]
    forbidden: set[int]
    merge: dict[int, tuple[int, int]]

    @staticmethod
    def read(path: Path, names: _Names) -> "_Own":
        own = _Own({}, set(), set(), {})
        for part, (node, line) in _mapping(_compose(path), path).items():
            if part == "force":
                for tag, (value, at) in _mapping(node, path).items():
                    own.force[_tag(tag, path, at)] = (names.row(_text(value, path), path, at), at)
            elif part == "forbid":
                own._forbid(node, path, names)
            elif part == "merge":
                for name, (value, at) in _mapping(node, path).items():
                    own.merge[names.row(name, path, at)] = (names.row(_text(value, path), path, at), at)
            else:
                near = difflib.get_close_matches(part, ("force", "forbid", "merge"), 1, 0.0)
                _refuse(path, line, f"{part!r} is no part of this file; did you mean {near[0]}?")
        return own

    def _forbid(self, node: Any, path: Path, names: _Names) -> None:
        for item in _sequence(node, path, "forbid"):
            line = item.start_mark.line + 1
            if item.id == "mapping":
                entry = _mapping(item, path)
                if list(entry) != ["branch"]:
                    _refuse(path, line, f"{', '.join(entry)!r}: write a tag, a synset, or {{branch: SYNSET}}")
                self.forbidden.update(names.below([names.row(_text(entry["branch"][0], path), path, line)]))
            elif "." in (text := _text(item, path)):
                self.forbidden.add(names.row(text, path, line))
            else:
                self.tags.add(_tag(text, path, line))


def _tag(text: str, path: Path, line: int) -> str:
    """The squashed form by which tags are compared."""
    tag = hashtags.normalise(text).removeprefix("#")
    if squash(tag) == "" or hashtags.from_column([tag]) != [tag]:
        near = hashtags.from_column([text])
        _refuse(path, line, f"{text!r} cannot be a hashtag" + (f"; did you mean {near[0]}?" if near else ""))
    return squash(tag)


# ---------------------------------------------------------------------------------------------------------------- yaml


def _compose(path: Path) -> Any:
    """The YAML nodes of a file: every text as it is written (`no` stays a word), with its line; nothing is executed."""
    import yaml  # here: only what reads such a file pays for it

    try:
        if path.stat().st_size > MAX_BYTES:
            raise UsageError(f"{path} has more than {MAX_BYTES:,} bytes; is it the right file?")
        node = yaml.compose(path.read_text("utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise UsageError(f"cannot read {path} ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not text in UTF-8") from None
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UsageError(f"{path}{where}: this is not YAML ({getattr(error, 'problem', None) or error})") from None
    if node is None:
        raise UsageError(f"{path} is empty")
    return node


def _mapping(node: Any, path: Path) -> dict[str, tuple[Any, int]]:
    """Key -> value and line. A key twice is an error, not a silent choice."""
    line = node.start_mark.line + 1
    if node.id != "mapping":
        _refuse(path, line, "here `name: value` is expected")
    found: dict[str, tuple[Any, int]] = {}
    for key, value in node.value:
        text, at = _text(key, path), key.start_mark.line + 1
        if text in found:
            _refuse(path, at, f"{text!r} is there twice")
        found[text] = (value, at)
    return found


def _sequence(node: Any, path: Path, part: str) -> list[Any]:
    if node.id != "sequence":
        _refuse(path, node.start_mark.line + 1, f"{part} is a list: one entry a line, each after a dash")
    return node.value


def _names_of(node: Any, path: Path) -> list[tuple[str, int]]:
    """One name or a list of names, with their lines."""
    nodes = node.value if node.id == "sequence" else [node]
    return [(_text(item, path), item.start_mark.line + 1) for item in nodes]


def _text(node: Any, path: Path) -> str:
    if node.id != "scalar" or not node.value:
        _refuse(path, node.start_mark.line + 1, "here a single name is expected")
    return node.value


def _refuse(path: Path | None, line: int, problem: str) -> NoReturn:
    raise UsageError(f"{path}, line {line}: {problem}")
