"""python -m data_pipeline build --input PHOTOS --output SHARDS
python -m data_pipeline inspect SHARDS
python -m data_pipeline report SHARDS [--output FILE]
"""

import argparse
import logging
import math
import sys
import time
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from data_pipeline.ending import leave, told
from data_pipeline.errors import DataError, UsageError

if TYPE_CHECKING:  # wrong flags are answered before anything large is loaded
    from data_pipeline.runners import Runner

NEAR: Final = 14  # bits, as in steps.Settings, which would be slow to load here


class Parser(argparse.ArgumentParser):
    """Errors as one line with the nearest option, through the same door as all others."""

    def error(self, message: str) -> NoReturn:
        near = [option for word in self.unknown(message) for option in get_close_matches(word, self.options(), 1)]
        hint = f"; did you mean {near[0]}?" if near else f"; `{self.prog} --help` lists all options"
        raise UsageError(message + hint)

    def options(self) -> list[str]:
        """Of this parser and of its commands: unknown options are only noticed at the top."""
        parsers = [
            choice for action in self._actions if isinstance(action.choices, dict) for choice in action.choices.values()
        ]
        return [*self._option_string_actions, *(option for parser in parsers for option in parser.options())]

    @staticmethod
    def unknown(message: str) -> list[str]:
        return (
            [word.split("=")[0] for word in message.split() if word.startswith("--")]
            if "unrecognized" in message
            else []
        )


def main(arguments: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    return told(lambda: _run(arguments), "interrupted: finished work is kept; the same command continues")


def _run(arguments: Sequence[str] | None) -> int:
    options = parser().parse_args(arguments)
    return options.command(options)


def parser() -> Parser:
    parser = Parser(prog="python -m data_pipeline", description="Captioned pictures -> labels from hashtags -> shards.")
    commands = parser.add_subparsers(required=True, metavar="build|inspect|explain|report|takedown")
    build = commands.add_parser(
        "build",
        allow_abbrev=False,
        help="make a shard set",
        description="Make a shard set from captioned pictures. Run again, an unfinished build continues.",
    )
    build.set_defaults(command=_build)
    add = build.add_argument
    _add_sources(build)
    add("--output", required=True, metavar="SHARDS", help="folder of the shard set, or a URL such as s3://bucket/set")
    add(
        "--work-dir",
        type=Path,
        metavar="FOLDER",
        help="where a set for a URL is built before it is sent (default: below ~/.cache/maws-open)",
    )
    add(
        "--min-count",
        default="auto",
        metavar="N",
        help="images a synset needs to be a class; auto: a thousandth of the images that name a noun, from 1 to 50",
    )
    add("--keep-unlabelled", action="store_true", help="keep images without any class (mae and lit can use them)")
    _add_decisions(build)
    _add_resampling(build)
    add("--samples-per-shard", type=_number(int, 1, 10_000), default=1000, metavar="N", help="at most (default: 1000)")
    add(
        "--resize",
        type=_number(int, 8, 10_000),
        metavar="SIDE",
        help="shrink larger pictures to this side in pixels, as jpg (default: no; jpg, png and webp stay as they "
        "are if every reader sees the same in them: upright, sRGB, 8 bits, opaque)",
    )
    add("--resize-side", choices=("short", "long"), help="the side that --resize means (default: short)")
    add("--quality", type=_number(int, 1, 100), default=90, metavar="Q", help="of a new jpg (default: 90)")
    _add_limits(build)
    _add_duplicates(build)
    add(
        "--max-caption",
        type=_number(int, 1, 20_000),
        default=10_000,
        metavar="N",
        help="characters; longer captions drop their image (default: 10000)",
    )
    _add_engine(build)
    add("--overwrite", action="store_true", help="replace the shard set that is in --output")
    inspect = commands.add_parser(
        "inspect", allow_abbrev=False, help="show and check a shard set", description="Show and check a shard set."
    )
    inspect.set_defaults(command=_inspect)
    inspect.add_argument("shards", type=Path, metavar="SHARDS")
    inspect.add_argument("--top", type=_number(int, 1, 1000), default=15, metavar="N", help="labels from each end")
    inspect.add_argument("--workers", type=_number(int, 1, 1024), metavar="N", help="processes (default: one per CPU)")
    _add_explain(commands.add_parser(
        "explain", allow_abbrev=False, help="how a sample or a hashtag got its labels, or why it got none",
        description="The way of a sample, or of a #hashtag, from caption to labels and repeat factor.",
    ))  # fmt: skip
    _add_takedown(commands.add_parser(
        "takedown", allow_abbrev=False, help="take pictures out of a finished set, for good",
        description="Take pictures out of a finished shard set, for good. Run again, a killed takedown continues.",
    ))  # fmt: skip
    _add_report(commands.add_parser(
        "report", allow_abbrev=False, help="make the data page", description="One HTML page that shows a shard set."
    ))  # fmt: skip
    return parser


def _add_sources(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        action="extend",
        required=True,
        metavar="PATH",
        help="folders of images with a .txt or .json caption beside each; Parquet and Arrow files with images; tars of "
        "a webdataset; CSV, TSV and JSON lines that name images; what img2dataset wrote. 'shards/{00000..00127}.tar', "
        "'photos/*.parquet' and s3://bucket/folder are names too; PATH::2.5 repeats its images 2.5 times as often",
    )
    add("--caption-column", metavar="NAME", help="default: caption, text, alt, alt_text or description, in any case")
    add("--image-column", metavar="NAME", help="default: image, jpg, png, …; in CSV and JSON lines path, file_name, …")
    add(
        "--storage-options",
        default="{}",
        metavar="JSON",
        help='for stores: \'{"endpoint_url": "http://…", "anon": true}\' (default: the environment, such as '
        "AWS_ACCESS_KEY_ID); never written into the set",
    )
    add("--allow-http", action="store_true", help="fetch what is named by http:// and https:// (default: drop it)")
    add(
        "--hash-input",
        action="store_true",
        help="hash inputs of more than 1 GiB too, so that every change of them is noticed (default: names and sizes)",
    )


def _add_explain(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_explain)
    parser.add_argument("shards", type=Path, metavar="SHARDS")
    parser.add_argument("what", metavar="KEY|#TAG", help="a sample, also one that was dropped, or a hashtag")


def _add_takedown(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_takedown)
    add = parser.add_argument
    add("shards", type=Path, metavar="SHARDS")
    add("--keys", nargs="+", default=[], metavar="KEY", help="samples by key, their copies included")
    add("--keys-file", type=Path, metavar="FILE", help="the same, one key a line")
    add("--hashes", nargs="+", default=[], metavar="SHA256", help="pictures by the sha256 of their file as it came in")
    add("--images", nargs="+", default=[], type=Path, metavar="FILE", help="pictures that look like these files")
    add(
        "--near",
        type=_number(int, 0, 64),
        metavar="BITS",
        help="also what looks like them: perceptual hashes that differ in at most so many of 256 bits (12: smaller and "
        "re-encoded copies)",
    )
    add("--reason", default="", metavar="TEXT", help="written into the tombstones")
    add("--date", metavar="DATE", help="written into the tombstones; none is otherwise")
    add("--runs", nargs="+", default=[], type=Path, metavar="FOLDER", help="name the runs in here that saw the set")
    add("--dry-run", action="store_true", help="only say what would go")


def _add_decisions(parser: argparse.ArgumentParser) -> None:
    """What people decide about tags and classes."""
    add = parser.add_argument
    add(
        "--vocabulary-size",
        type=_number(int, 1),
        metavar="N",
        help="classes wanted: the minimum count whose number of classes is nearest to N (equal counts stay together)",
    )
    add(
        "--vocabulary",
        metavar="SHARDS|FILE",
        help="use the classes of another shard set, index by index, and no others",
    )
    add(
        "--languages",
        nargs="+",
        default=(),
        metavar="CODE",
        help="whose nouns to look up after the English ones, in this order (fra jpn …): those of nltk's multilingual "
        "WordNet, which is got by python -m nltk.downloader omw-1.4",
    )
    add(
        "--senses",
        choices=("evidence", "first", "all", "unambiguous"),
        default="evidence",
        help="of a hashtag with several: the one that fits what stands around it (evidence, the default), the one "
        "WordNet lists first, all of them, or none",
    )
    add(
        "--overrides",
        metavar="FILE",
        help="YAML: force tags to synsets, forbid tags, synsets and branches, merge synsets",
    )
    add(
        "--deny-list",
        default="all",
        metavar="PART",
        help="part of the shipped deny-list in force: none, non-visual, sensitive or all (default); or a file like it",
    )
    add("--tombstones", metavar="FILE", help="tombstones.jsonl of a takedown: these images are left out")


def _add_resampling(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--resample",
        choices=("sqrt", "identity", "cap", "none"),
        default="sqrt",
        help="repeat images of rare synsets by the square root of t/f (sqrt, the default) or by t/f itself (identity), "
        "or thin out frequent synsets as MetaCLIP does (cap)",
    )
    add(
        "--epoch-factor",
        type=_ratio,
        metavar="X",
        help="mean repeat of labelled images, which sets the threshold: 5/3 (default), 1.5; below 1 with cap",
    )
    add("--epoch-samples", type=_number(int, 1), metavar="N", help="samples of an epoch, which sets the threshold")
    add("--threshold", type=_number(float, 0), metavar="T", help="the threshold itself: a share of the images")
    add(
        "--materialise",
        action="store_true",
        help="store copies KEY+2, KEY+3, … instead of repeat factors, for readers that know none",
    )


def _ratio(text: str) -> float:
    """5/3 or 1.5."""
    try:
        above, _, below = text.partition("/")
        value = float(above) / (float(below) if below else 1.0)
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0, such as 5/3 or 1.5")
    return value


def _add_duplicates(parser: argparse.ArgumentParser) -> None:
    """Copies in the training data, and copies of what will be tested on."""
    add = parser.add_argument
    add(
        "--near-duplicates",
        type=_bits,
        default=NEAR,
        metavar="N|off",
        help="remove pictures whose 256-bit perceptual hash is at most N bits from that of a larger or earlier one, if "
        f"they look alike too (default: {NEAR}; at most 31); off: remove only equal files",
    )
    add("--keep-duplicates", action="store_true", help="remove no duplicates at all, not even equal files")
    add(
        "--merge-captions",
        action="store_true",
        help="the copy that stays takes over the hashtags of the others, and their captions as other_captions",
    )
    add(
        "--exclude-eval",
        nargs="+",
        type=Path,
        default=[],
        metavar="PATH",
        help="sets of evaluation images (folders of pictures, Parquet with a column image, shard sets, tars): "
        "copies of them are left out of the training data, and reported",
    )
    add(
        "--eval-action",
        choices=("remove", "report"),
        help="what becomes of copies of evaluation images (default: remove)",
    )
    add(
        "--eval-near",
        type=_bits,
        default=NEAR,
        metavar="N|off",
        help=f"bits between the hashes of an evaluation image and a copy (default: {NEAR}); off: only equal files",
    )


def _bits(text: str) -> int | None:
    """A distance between hashes, or None for off."""
    if text == "off":
        return None
    if not (text.isdecimal() and int(text) <= 31):
        raise argparse.ArgumentTypeError(f"{text!r} is neither off nor a whole number from 0 to 31")
    return int(text)


def _check_duplicates(options: argparse.Namespace) -> None:
    if options.keep_duplicates and (options.merge_captions or options.near_duplicates != NEAR):
        raise UsageError("--keep-duplicates removes none: leave out --near-duplicates and --merge-captions")
    if not options.exclude_eval and (options.eval_action is not None or options.eval_near != NEAR):
        raise UsageError("--eval-action and --eval-near are about evaluation images: name them with --exclude-eval")


def _add_limits(parser: argparse.ArgumentParser) -> None:
    """What is dropped by its header. The defaults are those of images.py, which would be slow to load here."""
    add = parser.add_argument
    add("--min-side", type=_number(int, 1, 10_000), default=8, metavar="N", help="pixels a picture needs (default: 8)")
    add(
        "--max-pixels",
        type=_number(int, 1, 178_000_000),
        default=100_000_000,
        metavar="N",
        help="larger pictures are dropped (default: 100000000)",
    )
    add(
        "--max-aspect",
        type=_number(float, 1),
        default=20.0,
        metavar="X",
        help="pictures longer than X to 1 are dropped (default: 20)",
    )
    add(
        "--max-bytes",
        type=_number(int, 1, 64 << 20),
        default=64 << 20,
        metavar="N",
        help="larger files are dropped (default: 67108864, which is also the most)",
    )


def _add_engine(parser: argparse.ArgumentParser) -> None:
    """Who does the work, and what a record may cost. The shard set has the same bytes whatever is chosen here."""
    add = parser.add_argument
    add("--engine", choices=("local", "ray"), default="local", help="this machine, or a Ray cluster (default: local)")
    add("--address", metavar="A", help="of the Ray cluster: auto, host:port, or local for a Ray of our own")
    add(
        "--workers",
        type=_number(int, 0, 1024),
        metavar="N",
        help="processes (default: one per CPU); 0: this process alone, for debugging",
    )
    add(
        "--record-timeout",
        type=_number(float, 0, 86400),
        default=60.0,
        metavar="SECONDS",
        help="a record that takes longer, three times, is dropped as timed_out; 0: no limit (default: 60)",
    )
    add(
        "--worker-memory",
        type=_number(float, 0, 4096),
        default=4.0,
        metavar="GIB",
        help="a record for which a worker wants more is dropped as out_of_memory; 0: no limit (default: 4)",
    )


def _runner(options: argparse.Namespace) -> "Runner":
    from data_pipeline.runners.local import LocalRunner, usable_cpus
    from data_pipeline.watch import Limits

    limits = Limits(options.record_timeout, int(options.worker_memory * (1 << 30)))
    if options.engine == "local":
        if options.address is not None:
            raise UsageError(f"--address {options.address} is of a Ray cluster: give --engine ray too, or leave it out")
        return LocalRunner(usable_cpus() if options.workers is None else options.workers, limits)
    from data_pipeline.runners.ray import RayRunner

    return RayRunner(options.address or "auto", options.workers, limits)


def _add_report(report: argparse.ArgumentParser) -> None:
    report.set_defaults(command=_report)
    report.add_argument("shards", type=Path, metavar="SHARDS")
    report.add_argument("--output", type=Path, metavar="FILE", help="the page (default: SHARDS/report.html)")


def _number(kind: type[int] | type[float], low: float, high: float = math.inf) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and math.isfinite(value)):
            noun = "a whole number" if kind is int else "a number"
            limits = f"from {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
            raise argparse.ArgumentTypeError(f"{text!r} is not {noun} {limits}")
        return value

    return read


def _check_resampling(options: argparse.Namespace) -> None:
    from data_pipeline.resample import CAP

    ways = {
        "--epoch-factor": options.epoch_factor,
        "--epoch-samples": options.epoch_samples,
        "--threshold": options.threshold,
    }
    given = [name for name, value in ways.items() if value is not None]
    if options.resample == "none" and given:
        raise UsageError(f"--resample none repeats nothing: leave out {' and '.join(given)}")
    if len(given) > 1:
        raise UsageError(f"{given[0]} sets the threshold: give it or {given[1]}, not both")
    if options.resample == "cap" and not given:
        raise UsageError(
            "--resample cap thins out: say how far with --epoch-factor (up to 1), --epoch-samples or --threshold"
        )
    factor = options.epoch_factor
    if factor is not None and options.resample == "cap" and factor > 1:
        raise UsageError(f"--epoch-factor {factor:g}: --resample cap repeats nothing, it is at most 1")
    if factor is not None and options.resample != "cap" and not 1 <= factor <= CAP:
        raise UsageError(f"--epoch-factor {factor:g}: it is from 1, and no image is repeated more than {CAP:g} times")


def _is_url(text: str) -> bool:
    return "://" in text and not text.startswith(("file://", "local://"))


def _build(options: argparse.Namespace) -> int:
    _check_resampling(options)
    _check_duplicates(options)
    if options.vocabulary is not None and (options.vocabulary_size is not None or options.min_count != "auto"):
        raise UsageError("--vocabulary says which classes there are: leave out --vocabulary-size and --min-count")
    if options.work_dir is not None and not _is_url(options.output):
        raise UsageError("--work-dir is for an --output that is a URL: a folder holds its own work")
    if options.resize_side is not None and options.resize is None:
        raise UsageError("--resize-side is the side that --resize means: give --resize too, or leave it out")
    if options.min_count != "auto" and not (options.min_count.isdecimal() and int(options.min_count) > 0):
        raise UsageError(f"--min-count {options.min_count!r} is neither auto nor a whole number from 1")

    from data_pipeline.build import build  # here: wrong flags are answered before pyarrow is loaded
    from data_pipeline.shardset import ShardSet
    from data_pipeline.sources.location import local, storage_options
    from data_pipeline.steps import Settings
    from data_pipeline.summary import Printer, print_counts, print_labels

    storage_options(options.storage_options)
    settings = Settings(
        senses=options.senses,
        caption_column=options.caption_column,
        image_column=options.image_column,
        allow_http=options.allow_http,
        min_count=options.min_count if options.min_count == "auto" else str(int(options.min_count)),
        keep_unlabelled=options.keep_unlabelled,
        resample=options.resample,
        epoch_factor=options.epoch_factor,
        epoch_samples=options.epoch_samples,
        threshold=options.threshold,
        materialise=options.materialise,
        vocabulary=options.vocabulary,
        vocabulary_size=options.vocabulary_size,
        overrides=options.overrides,
        deny_list=options.deny_list,
        languages=tuple(options.languages),
        tombstones=options.tombstones,
        samples_per_shard=options.samples_per_shard,
        resize=options.resize,
        resize_side=options.resize_side or Settings.resize_side,
        quality=options.quality,
        min_side=options.min_side,
        max_pixels=options.max_pixels,
        max_aspect=options.max_aspect,
        max_bytes=options.max_bytes,
        keep_duplicates=options.keep_duplicates,
        near_duplicates=None if options.keep_duplicates else options.near_duplicates,
        merge_captions=options.merge_captions,
        eval_near=options.eval_near,
        eval_action=options.eval_action or Settings.eval_action,
        max_caption=options.max_caption,
    )
    start = time.monotonic()
    given = {
        "storage": options.storage_options,
        "hash_input": options.hash_input,
        "evaluation": options.exclude_eval,
        "overwrite": options.overwrite,
    }
    output = local(options.output)
    with _runner(options) as runner:
        if output is None:
            from data_pipeline.upload import build_to_url

            manifest, made = build_to_url(
                options.input, options.output, settings, runner, work_dir=options.work_dir, **given
            )
        else:
            manifest, made = build(options.input, output, settings, runner, **given)
    printer = Printer()
    if not made:
        printer.line(f"{options.output} is up to date, nothing to do ({manifest['samples']:,} samples)")
        return 0
    print_counts(printer, manifest)
    if output is not None:
        print_labels(printer, ShardSet.open(output).vocabulary, 5)
    look = "" if output is None else f"; look with: python -m data_pipeline inspect {output}"
    printer.line(
        f"{options.output}: {manifest['samples']:,} samples in {len(manifest['shards'])} shards, written and read back "
        f"in {time.monotonic() - start:.1f} s{look}"
    )
    return 0


def _explain(options: argparse.Namespace) -> int:
    from data_pipeline.explain import explain
    from data_pipeline.summary import Printer

    explain(options.shards, options.what, Printer())
    return 0


def _takedown(options: argparse.Namespace) -> int:
    keys = list(options.keys)
    if options.keys_file is not None:
        try:
            keys += [line.strip() for line in options.keys_file.read_text("utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--keys-file {options.keys_file}: cannot read it ({error})") from None
    if not (keys or options.hashes or options.images):
        raise UsageError("say what is to go: --keys, --keys-file, --hashes or --images")

    from data_pipeline.summary import Printer
    from data_pipeline.takedown import Wanted, print_outcome, takedown

    outcome = takedown(
        options.shards,
        Wanted(keys, options.hashes, options.images, options.near),
        reason=options.reason,
        date=options.date,
        runs=options.runs,
        dry_run=options.dry_run,
    )
    print_outcome(Printer(), options.shards, outcome, options.dry_run)
    return DataError.exit_code if outcome.unknown and not outcome.samples else 0


def _inspect(options: argparse.Namespace) -> int:
    from data_pipeline.build import check
    from data_pipeline.runners.local import LocalRunner, usable_cpus
    from data_pipeline.shardset import ShardSet
    from data_pipeline.sources.identity import WORTH_A_POOL
    from data_pipeline.summary import Printer, print_counts, print_labels, print_repeats

    shards, printer = ShardSet.open(options.shards), Printer()
    print_counts(printer, shards.manifest)
    print_labels(printer, shards.vocabulary, options.top)
    size = sum(shard["bytes"] for shard in shards.manifest["shards"])
    with LocalRunner(options.workers or (usable_cpus() if size > WORTH_A_POOL else 1)) as runner:
        problems = check(shards, runner)
    if problems:
        for problem in problems:
            print(f"error: {problem}", file=sys.stderr)
        return DataError.exit_code
    print_repeats(printer, shards)
    printer.line(
        f"checked: {shards.num_shards} shards, their indexes and the vocabulary have the sha256 of the manifest"
    )
    printer.line(f"sha256 of the set: {shards.sha256}")
    return 0


def _report(options: argparse.Namespace) -> int:
    from data_pipeline.report import write_report

    print(f"the data page: {write_report(options.shards, options.output)}")
    return 0


if __name__ == "__main__":
    leave(main())
