"""Parts of a data set that its folders make."""

from eval.datasets import Dataset


def grouped(dataset: Dataset, depth: int) -> dict[str, list[int]]:
    """Rows by the first `depth` folders of their keys, in the order in which they come."""
    found: dict[str, list[int]] = {}
    for row, key in enumerate(dataset.keys):
        found.setdefault("/".join(key.split("/")[:depth]), []).append(row)
    return found
