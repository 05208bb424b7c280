"""One build: look at the output folder, run the steps, write the manifest last.

OUTPUT/.work/            tables and markers of an unfinished build; removed at the end
OUTPUT/shards/ …         see shardset.py; complete once manifest.json is there
"""

import contextlib
import itertools
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import pyarrow.parquet as pq

from data_pipeline import evaluation_sets, languages, shardset
from data_pipeline.decisions import KEPT, Decisions, kept
from data_pipeline.dedup import Limits
from data_pipeline.errors import DataError
from data_pipeline.evaluation_sets import EvaluationSet
from data_pipeline.files import locked, sha256_file, write_bytes
from data_pipeline.job import Counts, Job, Records, Task, merge_counts, remove_temporary
from data_pipeline.progress import progress
from data_pipeline.resample import CAP, EPOCH_FACTOR, Repeats
from data_pipeline.runners import Call, Runner, run_surely
from data_pipeline.sources import File, Input, Reading, Sources, discover, identity
from data_pipeline.steps import Settings, Work, duplicates, verdicts
from data_pipeline.steps.duplicates import Search
from data_pipeline.steps.labels import choose_vocabulary, count_tags, label, senses, weigh
from data_pipeline.steps.merge import merge
from data_pipeline.steps.read import describe, probe, read
from data_pipeline.steps.shards import collect, plan, shard, verify
from data_pipeline.summary import clean
from data_pipeline.wordnet import archive_sha256

log = logging.getLogger(__name__)

WORK: Final = ".work"
PARTITION_ROWS: Final = 100_000  # records that one `merge` task sorts in memory
MAX_PARTITIONS: Final = 1 << 16  # two bytes of the hash
FEW_RECORDS: Final = 20_000  # whose pairs one task finds in about a second
SHOWN: Final = 10  # skipped files on the terminal
TABLES: Final = ("vocabulary", "dropped", "tags", "evidence", "duplicates", "evaluation")
OURS: Final = re.compile(
    rf"manifest\.json|report\.html|({'|'.join(TABLES)})\.parquet|{'|'.join(KEPT.values())}|[a-z]+\.jsonl|shards|\.work|"
    r"\.[a-z_.]+\.\d+\.tmp"
)
WAYS_OUT: Final = "choose another --output, or replace it with --overwrite"


class NothingKeptError(DataError):
    """No image came through: the output folder is left as it was found."""


def build(
    inputs: Sequence[str | Path],
    output: Path,
    settings: Settings,
    runner: Runner,
    *,
    storage: str = "{}",
    hash_input: bool = False,
    evaluation: Sequence[Path] = (),
    overwrite: bool = False,
    partition_rows: int = PARTITION_ROWS,
) -> tuple[dict[str, Any], bool]:
    """The manifest, and whether there was anything to do. The rows per partition change the speed, not the bytes."""
    sources = _discover(inputs, output, settings, storage)
    for name, why in sources.skipped[:SHOWN]:
        log.info("skipped %s: %s", clean(name), clean(why))
    if len(sources.skipped) > SHOWN:
        log.info("skipped %s more files; the manifest names them", f"{len(sources.skipped) - SHOWN:,}")
    if (output / shardset.TAKEDOWN).is_dir():
        raise DataError(f"a takedown in {output} is under way or was killed; run it again to end it, then build")
    decisions = Decisions.read(settings, output)
    sets = evaluation_sets.find(evaluation)
    made_from = _identity(sources, sets, settings, runner, hash_input) | {"decisions": decisions.hashes}
    stamps = identity.stamps(sources.inputs, everything=hash_input)
    existed = output.is_dir()
    up_to_date = _up_to_date(output, made_from | {"stamps": stamps}, overwrite)
    if up_to_date and not (output / WORK).exists():
        return shardset.read_manifest(output)[0], False
    with _locked(output):
        work = Work(output / WORK)
        if up_to_date:
            shutil.rmtree(work.folder)  # also what a build left that was killed after its last file
            return shardset.read_manifest(output)[0], False
        decisions.check()  # before anything is removed
        if overwrite:
            _remove(output)
        _prepare(work, made_from | {"stamps": stamps}, decisions)
        if blind := runner.blind(work.folder / "job.json"):
            raise DataError(
                f"--output {output} is not seen by {', '.join(blind)}: on a cluster, inputs and output must lie in a "
                "folder that every machine has under the same path"
            )
        try:
            content = _run_steps(work, output, settings, sources, sets, Job(work.folder, runner), partition_rows)
        except NothingKeptError:
            _remove(output)
            shutil.rmtree(work.folder)
            if not existed:
                output.rmdir()
            raise
        shardset.write_manifest(output, content | made_from | {"parents": []})
        shutil.rmtree(work.folder)
    return shardset.read_manifest(output)[0], True


def check_made_alike(
    where: str,
    manifest: dict[str, Any],
    inputs: Sequence[str | Path],
    work_dir: Path,
    settings: Settings,
    runner: Runner,
    *,
    storage: str = "{}",
    hash_input: bool = False,
    evaluation: Sequence[Path] = (),
) -> None:
    """DataError if the finished set at `where` was made of something else or otherwise."""
    sources, sets = _discover(inputs, work_dir, settings, storage), evaluation_sets.find(evaluation)
    decisions = Decisions.read(settings, work_dir)
    made_from = _identity(sources, sets, settings, runner, hash_input) | {"decisions": decisions.hashes}
    unknown = {"versions": manifest.get("versions"), "stamps": {}}
    _check_same(where, manifest, made_from | unknown, "a finished shard set")


def check(shards: shardset.ShardSet, runner: Runner) -> list[str]:
    """All problems of a finished set, its shards checked side by side."""
    problems = list(shardset.verify_tables(shards.path, shards.manifest))
    entries = shards.manifest["shards"]
    calls = [Call(shardset.verify_shard, (shards.path / "shards", entry)) for entry in entries]
    found: list[list[str]] = [[] for _ in entries]
    with progress("checking", len(entries), "shards") as counter:
        for position, result in run_surely(runner, calls):
            found[position] = result
            counter.advance(1)
    return problems + [problem for result in found for problem in result]


# ----------------------------------------------------------------------------------------------------- what is there


def _discover(inputs: Sequence[str | Path], output: Path, settings: Settings, storage: str) -> Sources:
    reading = Reading(storage, settings.caption_column, settings.image_column, settings.allow_http)
    return discover(inputs, output, reading)


def _identity(
    sources: Sources, sets: Sequence[EvaluationSet], settings: Settings, runner: Runner, hash_input: bool
) -> dict[str, Any]:
    """What the output is a function of."""
    evaluation = [Input(one.name, [File(name, str(path), path.stat().st_size) for name, path in one.files])
                  for one in sets]  # fmt: skip
    return {
        "parameters": asdict(settings) | {"languages": list(settings.languages)},  # as JSON gives it back
        "inputs": identity.describe(sources.inputs, runner, everything=hash_input),
        "evaluation_sets": identity.describe(evaluation, runner, everything=True),
        "skipped_inputs": [{"path": identity.printable(name), "why": why} for name, why in sources.skipped],
        "wordnet_sha256": archive_sha256(),
        "languages_sha256": languages.sha256(settings.languages),
        "versions": {name: metadata.version(name) for name in ("pyarrow", "pillow")},
    }


def _up_to_date(output: Path, identity: dict[str, Any], overwrite: bool) -> bool:
    """True if there is nothing to do; DataError if something else is in the way."""
    if output.exists() and not output.is_dir():
        raise DataError(f"--output {output} is a file; name a folder")
    present = sorted(path.name for path in output.iterdir()) if output.is_dir() else []
    if not present:
        return False
    finished, started = "manifest.json" in present, (output / WORK / "job.json").is_file()
    foreign = [name for name in present if not OURS.fullmatch(name)]
    if not finished and not started and present != [WORK]:
        raise DataError(f"--output {output} is not empty and not a shard set ({present[0]!r} is in it); choose another")
    if overwrite:
        if foreign and not finished:
            raise DataError(
                f"--output {output} also holds {foreign[0]!r}, which is not part of a shard set; move it away"
            )
        return False
    if not finished:
        _check_same(
            output, _read_json(output / WORK / "job.json"), identity, "an unfinished build"
        ) if started else None
        return False
    manifest, _ = shardset.read_manifest(output)
    _check_same(output, manifest, identity | {"versions": manifest.get("versions")}, "a finished shard set")
    for entry in manifest["shards"]:
        path = output / "shards" / f"{entry['name']}.tar"
        if not path.is_file() or path.stat().st_size != entry["bytes"] or not path.with_suffix(".parquet").is_file():
            raise DataError(
                f"{path} is missing or has another size than the manifest says; build again with --overwrite"
            )
    return True


def _check_same(output: Path | str, old: dict[str, Any], new: dict[str, Any], what: str) -> None:
    differences = list(_differences(old, new))
    if differences:
        raise DataError(f"--output {output} holds {what} made otherwise: {'; '.join(differences[:5])}; {WAYS_OUT}")


def _differences(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    before, after = old.get("parameters", {}), new["parameters"]
    for name in after:
        if before.get(name) != after[name]:
            yield f"--{name.replace('_', '-')} was {before.get(name)}, now {after[name]}"
    files_before = {file["path"]: file for file in old.get("inputs", [])}
    files_after = {file["path"]: file for file in new["inputs"]}
    for path in sorted(files_before.keys() | files_after.keys()):
        if path not in files_after:
            yield f"the input {path} is gone"
        elif path not in files_before:
            yield f"the input {path} is new"
        elif files_before[path] != files_after[path]:
            yield f"the input {path} has changed"
    if old.get("evaluation_sets", []) != new["evaluation_sets"]:
        yield "the evaluation sets of --exclude-eval are others"
    for path, stamp in new["stamps"].items():
        if old.get("stamps", {}).get(path, stamp) != stamp:  # only an unfinished build knows them
            yield f"the input {path} has other times or checksums than when the build started"
    if old.get("inputs") != new["inputs"] and files_before == files_after:
        yield "the inputs come in another order or number"
    for name, sha256 in new["decisions"].items():
        if old.get("decisions", {}).get(name) != sha256 and before.get(name) == after.get(name):
            yield f"the file of --{name.replace('_', '-')} has changed"
    for name in ("wordnet_sha256", "languages_sha256", "versions"):
        if old.get(name) != new[name]:
            yield f"{name} was {old.get(name)}, now {new[name]}"


def _remove(output: Path) -> None:
    """Take away a shard set or an unfinished one, but neither the lock nor files of others."""
    write_bytes(output / WORK / "job.json", b"{}")  # killed in here, it is an unfinished build of nothing
    tables = (f"{table}.parquet" for table in TABLES)
    for name in ("manifest.json", *tables, *KEPT.values(), "quarantine.jsonl", "report.html"):
        (output / name).unlink(missing_ok=True)
    for path in (output / "shards", *(path for path in (output / WORK).iterdir() if path.is_dir())):
        if path.is_dir():
            shutil.rmtree(path)
    (output / WORK / "job.json").unlink()


@contextlib.contextmanager
def _locked(output: Path) -> Iterator[None]:
    """One build per folder at a time; the lock ends with the process, however it ends."""
    busy = f"another build is writing to {output}; wait for it or choose another --output"
    with locked(output / WORK / "lock", f"--output {output}", busy):
        yield


def _prepare(work: Work, identity: dict[str, Any], decisions: Decisions) -> None:
    remove_temporary(work.folder.parent)
    if (work.folder / "job.json").is_file():
        log.info("continuing the unfinished build in %s", work.folder.parent)
    else:
        write_bytes(work.folder / "job.json", json.dumps(identity).encode())
    decisions.lay_down(work)
    if not (work.wordnet / "complete").is_file():
        decisions.wordnet.save(work.wordnet)
        write_bytes(work.wordnet / "complete", b"")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}); start over with --overwrite") from None


# --------------------------------------------------------------------------------------------------------------- steps


def _run_steps(
    work: Work,
    output: Path,
    settings: Settings,
    sources: Sources,
    sets: Sequence[EvaluationSet],
    job: Job,
    partition_rows: int,
) -> dict[str, Any]:
    """The content of the manifest that comes from the data."""
    partitions = min(MAX_PARTITIONS, -(-sources.rows // partition_rows) or 1)
    tasks = len(sources.pieces)
    reads = [
        Task(
            read,
            (work, settings, number, piece, partitions),
            (work.records(number), work.images(number), work.table("dropped_read", number)),
            piece.rows,
            Records(piece.rows, probe, describe),
        )
        for number, piece in enumerate(sources.pieces)
    ]
    counts = merge_counts(job.run("read", reads, "images"))
    if left_out := job.quarantined("read"):
        write_bytes(work.quarantine, b"".join(json.dumps(one, sort_keys=True).encode() + b"\n" for one in left_out))
    counts = merge_counts([counts, *job.run("merge", _each_partition(merge, work, (tasks,), partitions, MERGE_FILES))])
    found = _remove_duplicates(work, settings, sets, job, partitions)
    contamination = found.pop("contamination", [])
    counts = merge_counts([counts, found])
    if settings.senses == "evidence":
        counts |= job.run("evidence", [Task(weigh, (work, settings, partitions), (work.evidence,))])[0]
    mapped = job.run("senses", _each_partition(senses, work, (settings,), partitions, SENSES_FILES))
    counts = merge_counts([counts, *mapped])
    job.run("tags", [Task(count_tags, (work, partitions), (work.tags,))])
    chosen = job.run("vocabulary", [
        Task(choose_vocabulary, (work, settings, partitions, counts["named_by_wordnet"]),
             (work.vocabulary, work.classes))
    ])[0]  # fmt: skip
    labels = job.run("label", _each_partition(label, work, (settings,), partitions, LABEL_FILES))
    counts = merge_counts([counts, *labels])
    if counts["kept"] == 0:
        raise NothingKeptError(
            f"no image was kept of {counts['read']:,}: {_reasons(counts)}; {_advice(counts, settings)}"
        )
    planned = job.run("plan", [Task(plan, (work, settings, partitions), (work.plan,))])[0]
    repeats = Repeats(planned["threshold"], planned["labelled"], settings.resample)
    shards = _write_shards(work, output, job, repeats, settings.materialise)
    job.run("collect", [Task(collect, (work, tasks, partitions), (work.dropped,))])
    write_bytes(output / "vocabulary.parquet", work.vocabulary.read_bytes())
    return {
        "samples": sum(entry["samples"] for entry in shards),
        "classes": chosen["classes"],
        "shards": shards,
        "vocabulary_sha256": sha256_file(output / "vocabulary.parquet"),
        "files": _hand_over(work, output),
        "contamination": contamination,
        "counts": counts | chosen,
        "resampling": _resampling(settings, planned, sum(entry["samples"] for entry in shards)),
    }


MERGE_FILES: Final = ("unique", "dropped_merge")
SENSES_FILES: Final = ("mapped", "synsets", "tags")
LABEL_FILES: Final = ("labelled", "rarest", "dropped_label")


def _each_partition(
    function: Callable[..., Counts], work: Work, arguments: tuple[Any, ...], partitions: int, files: tuple[str, ...]
) -> list[Task]:
    """One task per partition, function(work, *arguments, partition), that writes `files`."""
    return [
        Task(function, (work, *arguments, partition), tuple(work.table(name, partition) for name in files))
        for partition in range(partitions)
    ]


def _remove_duplicates(
    work: Work, settings: Settings, sets: Sequence[EvaluationSet], job: Job, partitions: int
) -> Counts:
    """Copies and evaluation images go into work.table("removed", partition), schema.REMOVED."""
    if settings.keep_duplicates and not sets:
        return {}
    sizes = [pq.read_metadata(work.table("unique", partition)).num_rows for partition in range(partitions)]
    near = None if settings.keep_duplicates else settings.near_duplicates
    limits = Limits(*(-1 if limit is None else limit for limit in (near, settings.eval_near if sets else None)))
    pieces = [(number, piece) for number, one in enumerate(sets) for piece in one.pieces]
    search = Search(
        limits,
        remove_copies=not settings.keep_duplicates,
        remove_evaluation=settings.eval_action == "remove",
        merge_captions=settings.merge_captions,
        starts=(0, *itertools.accumulate(sizes)),
        sets=tuple(one.name for one in sets),
        pieces=len(pieces),
    )

    def run(step: str, function: Callable[..., Counts], arguments: Sequence[tuple[Any, ...]], file: str) -> None:
        outputs = [(duplicates.file_path(work, file, number),) for number in range(len(arguments))]
        calls = zip(arguments, outputs, strict=True)
        job.run(step, [Task(function, (work, search, *given), paths) for given, paths in calls])

    by_partition = [(partition,) for partition in range(partitions)]
    run("fingerprint", duplicates.fingerprint, by_partition, "fingerprints")
    read = [(number, *given) for number, given in enumerate(pieces)]
    run("evaluation", duplicates.fingerprint_evaluation, read, "fingerprints_eval")
    run("group", duplicates.group, [(bucket,) for bucket in range(search.buckets)], "bands")
    if search.starts[-1] <= FEW_RECORDS:
        files = tuple(duplicates.file_path(work, "pairs", block) for block in range(search.blocks))
        job.run("pair", [Task(duplicates.pair_all, (work, search), files)])
    else:
        run("pair", duplicates.pair, [(block,) for block in range(search.blocks)], "pairs")
    verdicts_file = work.table("verdicts", 0)
    counts = job.run("resolve", [Task(verdicts.resolve, (work, search), (verdicts_file,))])[0]
    if search.merge_captions:
        run("gather", verdicts.gather, by_partition, "texts")
    job.run("remove", _each_partition(verdicts.remove, work, (search,), partitions, ("removed",)))
    return dict(counts)


def _hand_over(work: Work, output: Path) -> dict[str, str]:
    """Tables that belong to the shard set beside the shards; their sha256 by name."""
    tables = (work.dropped, work.tags, work.evidence, work.duplicates, work.evaluation)
    files = [path for path in (*tables, *kept(work.folder), work.tombstones, work.quarantine) if path.is_file()]
    for path in files:
        write_bytes(output / path.name, path.read_bytes())
    return {path.name: sha256_file(output / path.name) for path in files}


def _write_shards(work: Work, output: Path, job: Job, repeats: Repeats, materialise: bool) -> list[Counts]:
    folder = output / "shards"
    slices: dict[int, list[dict[str, int]]] = {}
    for row in pq.read_table(work.plan).to_pylist():
        slices.setdefault(row["shard"], []).append(row)
    width = max(5, len(str(len(slices) - 1)))
    names = [f"{number:0{width}d}" for number in slices]
    writes = [
        Task(
            shard,
            (work, folder, name, parts, repeats, materialise),
            (folder / f"{name}.tar", folder / f"{name}.parquet"),
            sum(part["stop"] - part["start"] for part in parts),
        )
        for name, parts in zip(names, slices.values(), strict=True)
    ]
    shards = job.run("shard", writes, "images")
    checks = [Task(verify, (folder, entry), (), entry["samples"]) for entry in shards]
    job.run("verify", checks, "images")
    return shards


def _resampling(settings: Settings, planned: Counts, samples: int) -> dict[str, Any]:
    solved = settings.resample != "none" and settings.threshold is None and settings.epoch_samples is None
    return {
        "method": settings.resample,
        "threshold": planned["threshold"],
        "epoch_factor": (settings.epoch_factor or EPOCH_FACTOR) if solved else None,
        "cap": CAP,
        "images": planned["labelled"],  # that f(h) is a share of
        "mean_repeat": planned["mean_repeat"],
        "samples_per_epoch": samples if settings.materialise else planned["samples_per_epoch"],
        "materialised": settings.materialise,
    }


def _reasons(counts: Counts) -> str:
    return ", ".join(f"{number:,} {reason}" for reason, number in counts["dropped"].items() if number)


def _advice(counts: Counts, settings: Settings) -> str:
    dropped = counts["dropped"]
    if dropped.get("not_in_vocabulary"):
        return f"no synset of the others is a class of --vocabulary {settings.vocabulary}; use --keep-unlabelled"
    if dropped.get("below_min_count"):
        return f"lower --min-count (now {settings.min_count}) or use --keep-unlabelled"
    if any(dropped.get(reason) for reason in ("no_hashtags", "no_synset", "no_caption")):
        return "captions need hashtags that are English nouns; --keep-unlabelled keeps images without"
    return "look at the reasons above"
