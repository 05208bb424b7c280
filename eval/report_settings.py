"""How a score was measured, as far as it decides what it may stand beside: scores under other settings have other rows.

    vpt.steps=8 · vpt.steps=100        bf16 · fp32        trained on another set        448 px

The size and the cut of the pictures are a model's own and no setting, unless somebody asked for another size. No torch.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from eval.results import Result
from maws.config import flatten

SELECTS = {"k", "methods", "seeds", "protocol", "features"}  # which scores there are: their metrics say it
FILES = {"splits", "chosen"}  # of lowshot: where they lie says nothing; `config.splits` has which splits they are
# Groups of settings of one way among several: they bear on the scores of that way alone, whose metrics name it.
WAYS = {
    "linear": {"mae", "wsp", "ridge"},
    "lowshot": {"linear", "ridge", "msn", "vpt", "adaptformer", "lora"},
}
FITTED = {"linear", "ridge", "msn"}  # ways of lowshot; the others, adapters, start from linear
NOT_SAID = "not said"  # by a result of an older version
MOST = 4  # settings of a row's name, and values of a setting


def setting(result: Result) -> str:
    """All of it, as text that is equal for equal settings."""
    config = result.config
    own = config.get(result.evaluator)
    values = flatten(own) if isinstance(own, dict) else {}
    values = {key: _alone(value) for key, value in values.items() if _bears_on(result, key)}
    values |= {"precision": config.get("precision", "fp32"), "px": config.get("image_size_asked") or 0}
    if train := result.hashes.get("train"):
        values["trained on"] = str(train)[:8]
    if result.evaluator == "lowshot":
        values["splits"] = config.get("splits", "drawn")
    return json.dumps(values, sort_keys=True, default=str)


def _alone(value: Any) -> Any:
    """A list of one value is that value: some settings were a number before they could be several."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _bears_on(result: Result, key: str) -> bool:
    """Can this setting of the evaluator change this score?"""
    ways = {part.removesuffix("-shallow") for part in result.metric.split("/")}
    group, dot, _ = key.partition(".")
    if ".paper." in key and result.config[result.evaluator].get("budget") != "paper":
        return False
    if key in SELECTS or (result.evaluator == "lowshot" and (key in FILES or (key == "budget" and ways & FITTED))):
        return False
    if not dot or group not in WAYS.get(result.evaluator, ()):
        return True
    return group in ways or (group == "linear" and not ways & FITTED)


def differing(settings: Iterable[str]) -> dict[str, str]:
    """What sets each of several settings apart, in a few words; nothing where there is one only."""
    read: dict[str, dict[str, Any]] = {text: json.loads(text) for text in dict.fromkeys(settings)}
    names = sorted({name for values in read.values() for name in values})
    apart = [
        name for name in names if len({json.dumps(values[name]) for values in read.values() if name in values}) > 1
    ]
    return {text: _told(values, names, apart) for text, values in read.items()}


def _told(values: dict[str, Any], names: Sequence[str], apart: Sequence[str]) -> str:
    """Settings that differ, the first few; of those that a result of an older version lacks, how many there are."""
    words = [_words(name, values[name]) for name in apart if name in values]
    more = [f"{len(words) - MOST} more"] if len(words) > MOST else []
    lacking = sum(name not in values for name in names)
    lacks = [f"{lacking} {NOT_SAID}"] if lacking else []
    return ", ".join([*words[:MOST], *more, *lacks])


def _words(name: str, value: Any) -> str:
    if name == "precision":
        return str(value)
    if name == "px":
        return f"{value} px" if value else "own size"
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    if isinstance(value, list) and len(value) > MOST:
        text = f"{value[0]}…{value[-1]}"
    return f"{name} {text}" if name == "trained on" else f"{name}={text}"
