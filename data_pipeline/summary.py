"""What a person wants to know of a shard set, as tables; plain text where stdout is not a terminal."""

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Final

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_pipeline.shardset import ShardSet, VocabularyEntry

REPEAT_EDGES: Final = (1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0)
SENSES: Final = {
    "evidence": "each took the one that fits what stands around it",
    "first": "each took the one WordNet lists first",
    "all": "each took all of them",
    "unambiguous": "each took none",
}
PLAIN_WIDTH: Final = 120  # columns, where there is no terminal to ask
BAR: Final = 30  # characters of the longest bar


class Printer:
    """Tables on stdout. Text of users is never read as markup."""

    def __init__(self) -> None:
        self.tty = sys.stdout.isatty()
        self.console = Console(width=None if self.tty else PLAIN_WIDTH, highlight=False, markup=False, emoji=False)

    def line(self, text: str = "") -> None:
        self.console.print(text, soft_wrap=True)

    def table(
        self, title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], right: Sequence[int] = ()
    ) -> None:
        table = Table(
            title=Text(title, style="bold"),
            title_justify="left",
            box=box.SIMPLE_HEAD if self.tty else None,
            pad_edge=False,
            show_header=any(columns),
        )
        for position, column in enumerate(columns):
            table.add_column(column, justify="right" if position in right else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(clean(cell)) for cell in row))
        self.console.print(table)
        self.console.print()


def clean(value: object) -> str:
    """Numbers with separators; no control characters, which could rewrite the terminal."""
    if isinstance(value, int):
        return f"{value:,}"
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in str(value))


def print_counts(printer: Printer, manifest: dict[str, Any]) -> None:
    if "resampling" not in manifest:  # a labelled set (`python -m eval shards`): nothing was mapped or resampled
        rows = [("kept", manifest["samples"], ""), ("classes", manifest["classes"], "one an image")]
        printer.table("Shard set of classes", ("", "", ""), rows, right=(1,))
        return
    counts, resampling = manifest["counts"], manifest["resampling"]
    labelled, read = counts["labelled"], counts["read"]
    overview: list[tuple[str, object, str]] = [
        ("images read", read, ""),
        ("kept", counts["kept"], share(counts["kept"], read)),
        ("with labels", labelled, share(labelled, read)),
        (
            "classes",
            manifest["classes"],
            _classes(counts),
        ),
        ("labels per image", f"{counts['labels'] / labelled:.2f}" if labelled else "-", "mean over images with labels"),
        ("mean repeat", f"{resampling['mean_repeat']:.3f}", f"{resampling['method']}, {_threshold(resampling)}"),
        ("samples per epoch", round(resampling["samples_per_epoch"]), "after resampling"),
        ("shards", len(manifest["shards"]), format_bytes(sum(shard["bytes"] for shard in manifest["shards"]))),
        ("other files", len(manifest["skipped_inputs"]), "of the input, skipped: no captioned images"),
        ("hashtags", counts["hashtags"], "on images that are not copies"),
        ("  given a synset", counts["mapped_hashtags"], share(counts["mapped_hashtags"], counts["hashtags"])),
        (
            "  with several senses",
            counts["ambiguous_hashtags"],
            SENSES[manifest["parameters"].get("senses", "first")],
        ),
        ("  denied", counts.get("denied_hashtags", 0), "by the deny-list or overrides"),
        ("  unmapped", counts["unmapped_hashtags"], share(counts["unmapped_hashtags"], counts["hashtags"])),
    ]
    printer.table("Shard set", ("", "", ""), overview, right=(1,))
    for title, name in (("Images dropped", "dropped"), ("Images kept without labels", "unlabelled")):
        reasons = sorted(counts.get(name, {}).items(), key=lambda item: -item[1])
        rows = [(reason, number, share(number, read)) for reason, number in reasons if number]
        if rows:
            printer.table(title, ("reason", "images", ""), rows, right=(1, 2))
    if manifest.get("contamination"):
        _print_contamination(printer, manifest["contamination"])


def _print_contamination(printer: Printer, sets: list[dict[str, Any]]) -> None:
    columns = ("evaluation set", "pictures", "unreadable", "exact copy", "near copy", "training images", "")
    names = ("set", "pictures", "unreadable", "exact", "near", "training_images", "action")
    rows = [[one[name] for name in names] for one in sets]
    printer.table("Evaluation pictures with a copy in the corpus", columns, rows, right=(1, 2, 3, 4, 5))


def print_labels(printer: Printer, vocabulary: list[VocabularyEntry], top: int) -> None:
    """Head and tail of the label histogram."""
    if not vocabulary:
        return
    vocabulary = sorted(vocabulary, key=lambda entry: -entry.count)  # a frozen one has the order of another corpus
    most = max(1, vocabulary[0].count)

    def row(entry: VocabularyEntry) -> tuple[object, ...]:
        lemmas = ", ".join(lemma.replace("_", " ") for lemma in entry.lemmas[:3])
        return entry.index, entry.synset, entry.count, "#" * max(1, round(BAR * entry.count / most)), lemmas

    columns = ("index", "synset", "images", "", "lemmas")
    head = vocabulary[:top]
    printer.table(f"Most frequent labels (of {len(vocabulary):,})", columns, map(row, head), right=(0, 2))
    if tail := vocabulary[max(top, len(vocabulary) - top) :]:
        printer.table("Least frequent labels", columns, map(row, tail), right=(0, 2))


def print_repeats(printer: Printer, shards: ShardSet) -> None:
    """How many images are repeated how often."""
    bins: Counter[int] = Counter()
    for shard in range(shards.num_shards):
        for repeat in shards.index(shard)["repeat"].to_pylist():
            bins[sum(repeat > edge for edge in REPEAT_EDGES)] += 1
    most = max(bins.values(), default=1)
    rows = [
        (repeat_bin(number), count, "#" * max(1, round(BAR * count / most))) for number, count in sorted(bins.items())
    ]
    printer.table("Repeat factors", ("repeat", "images", ""), rows, right=(1,))


def _classes(counts: dict[str, Any]) -> str:
    if counts["min_count"]:
        return f"synsets of at least {counts['min_count']} images, of {counts['synsets']:,} named"
    return (
        f"of a frozen vocabulary, {counts['classes_without_images']:,} without images; "
        f"{counts['synsets_outside']:,} other synsets named"
    )


def share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def repeat_bin(number: int) -> str:
    if number == 0:
        return "1"
    if number == len(REPEAT_EDGES):
        return f"above {REPEAT_EDGES[-1]:g}"
    return f"up to {REPEAT_EDGES[number]:g}"


def _threshold(resampling: dict[str, Any]) -> str:
    return f"t = {resampling['threshold']:.3g}, cap {resampling['cap']:g}"


def format_bytes(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"
