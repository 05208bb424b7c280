"""What was taken for what: a JSON file beside the results, the most confused classes first.

    {"images": 362, "classes_sha256": …,
     "classes": [{"label": 0, "name": "joker", "synset": "joker.n.01", "images": 1, "right": 1, "accuracy": 1.0}, …],
     "pairs": [{"truth": 3, "guess": 7, "names": ["fox", "wolf"], "synsets": […], "count": 12, "share": 0.4,
                "distance": 4, "common": "canine.n.02"}, …]}

`pairs` are mistakes alone: `share` is of the pictures of the right class, `distance` and `common` are those of
hierarchy.py, null where a class has no synset. Letters: B images, S classes.
"""

import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from eval.classes import Classes
from eval.hierarchy import Hierarchy


def confusion(scores: Tensor, labels: Tensor, classes: Classes) -> str:
    """The file's text. scores B S, labels B; the guess is the highest score, of equals the first."""
    guesses = scores.argmax(dim=1)
    images = torch.bincount(labels, minlength=len(classes)).tolist()
    right = torch.bincount(labels[guesses == labels], minlength=len(classes)).tolist()
    found = {
        "images": len(labels),
        "classes_sha256": classes.sha256,
        "classes": [
            {
                "label": label,
                "name": classes.name(label),
                "synset": classes.synsets[label],
                "images": images[label],
                "right": right[label],
                "accuracy": right[label] / images[label] if images[label] else None,
            }
            for label in range(len(classes))
        ],
        "pairs": list(_mistakes(labels, guesses, images, classes)),
    }
    return _one_a_line(found)


def _mistakes(labels: Tensor, guesses: Tensor, images: list[int], classes: Classes) -> Iterator[dict[str, Any]]:
    """Every pair of classes that was confused, most often first; of equal counts, the larger share first."""
    wrong = guesses != labels
    pairs, counts = torch.unique(torch.stack([labels[wrong], guesses[wrong]], dim=1), dim=0, return_counts=True)
    hierarchy = Hierarchy(classes.synsets)
    rows = [(count, truth, guess) for (truth, guess), count in zip(pairs.tolist(), counts.tolist(), strict=True)]
    for count, truth, guess in sorted(rows, key=lambda row: (-row[0], -row[0] / images[row[1]], row[1:])):
        common = hierarchy.common(truth, guess)
        yield {
            "truth": truth,
            "guess": guess,
            "names": [classes.name(truth), classes.name(guess)],
            "synsets": [classes.synsets[truth], classes.synsets[guess]],
            "count": count,
            "share": count / images[truth],
            "distance": common.distance if common else None,
            "common": common.synset if common else None,
        }


def _one_a_line(content: dict[str, Any]) -> str:
    """JSON that a person can read: a class or a pair a line."""
    lines = []
    for name, value in content.items():
        text = json.dumps(value, ensure_ascii=False)
        if isinstance(value, list) and value:
            text = "[\n" + ",\n".join(json.dumps(item, ensure_ascii=False) for item in value) + "\n]"
        lines.append(f"{json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"
