"""How a score was measured, as far as it decides what it may stand beside: scores under other settings have other rows.

    vpt.steps=8 · vpt.steps=100        bf16 · fp32        trained on another set        448 px

The size and the cut of the pictures are a model's own and no setting, unless somebody asked for another size. No torch.
"""

import json
from collections.abc import Iterable
from typing import Any

from eval.results import Result
from maws.config import flatten

SELECTS = {"k", "methods", "seeds", "protocol", "features"}  # which scores there are: their metrics say it
NOT_SAID = "not said"  # by a result of an older version


def setting(result: Result) -> str:
    """All of it, as text that is equal for equal settings."""
    config = result.config
    own = config.get(result.evaluator)
    values = {k: v for k, v in flatten(own).items() if k not in SELECTS} if isinstance(own, dict) else {}
    values |= {"precision": config.get("precision", "fp32"), "px": config.get("image_size_asked") or 0}
    if train := result.hashes.get("train"):
        values["trained on"] = str(train)[:8]
    return json.dumps(values, sort_keys=True, default=str)


def differing(settings: Iterable[str]) -> dict[str, str]:
    """What sets each of several settings apart, in words; nothing where there is one only."""
    read: dict[str, dict[str, Any]] = {text: json.loads(text) for text in dict.fromkeys(settings)}
    names = sorted({name for values in read.values() for name in values})
    apart = [name for name in names if len({json.dumps(values.get(name, NOT_SAID)) for values in read.values()}) > 1]
    return {
        text: ", ".join(_words(name, values.get(name, NOT_SAID)) for name in apart) for text, values in read.items()
    }


def _words(name: str, value: Any) -> str:
    if name == "precision":
        return str(value)
    if name == "px":
        return f"{value} px" if value else "own size"
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"{name} {text}" if name == "trained on" else f"{name}={text}"
