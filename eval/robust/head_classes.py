"""Which outputs of a classifier's head are the classes of a set.

A head of ImageNet-1k has them all, whatever order its vocabulary says; another head is asked as well, if every class
that has pictures is among its outputs (by wnid, else by a name that only one class and only one output has).
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache

from data_pipeline.errors import UsageError
from eval.classes import Classes, read_classes
from eval.classifier import IMAGENET, Classifier, spellings_of
from eval.sources.source import some

Outputs = Mapping[int, int]  # class number -> output of the head; classes that it does not know are not there


@cache
def imagenet() -> Classes:
    return read_classes(IMAGENET)


def imagenet_numbers(wnids: Iterable[str]) -> list[int]:
    """Class numbers of wnids. Raises UsageError for one that is not of ImageNet-1k."""
    known = {folder: number for number, own in enumerate(imagenet().folders) for folder in own}
    wnids = list(wnids)
    if strange := [wnid for wnid in wnids if wnid not in known]:
        raise UsageError(f"{some(strange)} are no classes of ImageNet-1k; give wnids such as n01440764")
    return [known[wnid] for wnid in wnids]


def head_outputs(classes: Classes, classifier: Classifier) -> dict[int, int]:
    """The output of each class that the head has."""
    by_wnid = {wnid: place for place, wnid in enumerate(classifier.wnids) if wnid}
    by_name, named = _unshared(classifier.spellings), _unshared(spellings_of(classes))
    folders = classes.folders or ((),) * len(classes)
    places_of: dict[int, set[int]] = {number: set() for number in range(len(classes))}
    for text in by_name.keys() & named.keys():
        places_of[named[text]].add(by_name[text])
    found: dict[int, int] = {}
    for number, by_names in places_of.items():
        own = [*folders[number], *classes.names[number]]
        places = {by_wnid[text] for text in own if text in by_wnid} or by_names
        if len(places) == 1:
            found[number] = places.pop()
    if not found and not classes.named and len(classes) == classifier.classes and not any(classifier.spellings):
        return {number: number for number in range(len(classes))}  # numbers on both sides, and as many
    return found


def _unshared(spellings: Sequence[frozenset[str]]) -> dict[str, int]:
    """The names that only one has."""
    places: dict[str, list[int]] = {}
    for place, own in enumerate(spellings):
        for text in own:
            places.setdefault(text, []).append(place)
    return {text: found[0] for text, found in places.items() if len(found) == 1}


def refuse_unknown(needed: Iterable[str], where: str, classifier: Classifier) -> None:
    """Raises UsageError that names the classes with pictures that the head cannot answer."""
    needed = list(dict.fromkeys(needed))
    if not needed:
        return
    known = some(classifier.names, 3)
    raise UsageError(
        f"{where}: the head has no output for {len(needed):,} of the classes that have pictures ({some(needed, 3)}); "
        f"it has {classifier.classes:,} outputs ({known}). Give a classifier of the 1000 classes of ImageNet-1k "
        f"(finetuned here, or from `python -m maws import`), or one that knows the set's classes by wnid or name"
    )
