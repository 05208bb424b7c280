"""Copies over the whole corpus and copies of evaluation images: against plain loops, and with real pictures."""

import functools
import hashlib
import io
import random
import shutil
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageFilter

from data_pipeline import schema
from data_pipeline.build import _remove_duplicates
from data_pipeline.build import build as build_shards
from data_pipeline.evaluation_sets import EvaluationSet, content_hash
from data_pipeline.job import Job
from data_pipeline.look import SIZE
from data_pipeline.runners.local import LocalRunner
from data_pipeline.shardset import ShardSet
from data_pipeline.steps import Settings, Work, duplicates, read_unique

# ------------------------------------------------------------------------------ many made-up hashes against plain loops


class Picture(NamedTuple):
    content: bytes
    hash: bytes | None
    look: bytes | None


class Record(NamedTuple):
    key: str
    picture: Picture
    size: tuple[int, int]
    place: tuple[int, int]  # task, row

    @property
    def preference(self):
        return -self.size[0] * self.size[1], self.place, hashlib.sha256(self.key.encode()).digest()


def make_pictures(rng: random.Random, number: int) -> list[Picture]:
    """Families around a few hashes and two looks, with equal files, equal hashes and pictures without a hash."""
    families = [(rng.getrandbits(256), rng.choice((20, 220))) for _ in range(12)]
    found: list[Picture] = []
    for n in range(number):
        draw = rng.random()
        if found and draw < 0.2:
            found.append(rng.choice(found))
        elif draw < 0.25:
            found.append(Picture(rng.randbytes(32), None, None))
        else:
            bits, level = rng.choice(families)
            for bit in rng.sample(range(256), rng.choice((0, 0, 2, 5, 9, 16))):
                bits ^= 1 << bit
            level = level if rng.random() < 0.8 else 120
            look = bytes(level + rng.randint(0, 2) for _ in range(SIZE))
            found.append(Picture(hashlib.sha256(bytes([n % 256]) + look).digest(), bits.to_bytes(32), look))
    return found


def are_near(a: Picture, b: Picture, limit: int) -> int | None:
    """The distance, if it counts."""
    if a.content == b.content:
        return -1  # nearer than any other
    if a.hash is None or b.hash is None or a.look is None or b.look is None:
        return None
    distance = (int.from_bytes(a.hash) ^ int.from_bytes(b.hash)).bit_count()
    alike = max(abs(x - y) for x, y in zip(a.look, b.look, strict=True)) <= 32
    return distance if distance <= limit and alike else None


@dataclass(frozen=True)
class Items:
    """A piece of an evaluation set, in which a picture's bytes stand for what would be computed from them."""

    pictures: tuple[Picture, ...]

    def read(self):
        for number, picture in enumerate(self.pictures):
            yield f"item{number:03d}", picture


def expected(records: list[Record], sets: list[list[Picture]], settings: Settings):
    """Removed key -> (reason, what it is a copy of, distance), and (set, item, key) of copies of evaluation images."""
    near = -2 if settings.near_duplicates is None else settings.near_duplicates
    evaluation = -2 if settings.eval_near is None else settings.eval_near
    removed, copies = {}, {}
    for record in sorted(records, key=lambda r: hashlib.sha256(r.key.encode()).digest()):
        for number, pictures in enumerate(sets):
            for position, picture in enumerate(pictures):
                distance = are_near(record.picture, picture, evaluation)
                if distance is not None:
                    copies[number, position, record.key] = distance
    best = {}
    for (number, position, key), distance in copies.items():  # in the order of samples
        match = (distance, number, position)
        best[key] = min(best.get(key, match), match)
    if settings.eval_action == "remove":
        for key, (distance, number, position) in best.items():
            removed[key] = ("evaluation_image", f"set{number}: item{position:03d}", max(distance, 0))
    kept: list[Record] = []
    for record in sorted(records, key=lambda r: r.preference) if not settings.keep_duplicates else ():
        if record.key in removed:
            continue
        found = [(d, n) for n, k in enumerate(kept) if (d := are_near(record.picture, k.picture, near)) is not None]
        if found:
            distance, at = min(found)
            reason = "exact_duplicate" if distance < 0 else "near_duplicate"
            removed[record.key] = (reason, kept[at].key, max(distance, 0))
        else:
            kept.append(record)
    return removed, copies


def run_steps(folder, records, sets, settings, partitions, pieces=1):
    """The steps of a build on made-up records: removed and the evaluation table."""
    work = Work(folder)
    rows = []
    for record in records:
        order = hashlib.sha256(record.key.encode()).digest()
        rows.append(
            {
                "order": order, "key": record.key, "task": record.place[0], "row": record.place[1],
                "partition": int.from_bytes(order[:2], "big") * partitions >> 16, "caption": f"of {record.key}",
                "hashtags": [record.key], "other_captions": [], "content_sha256": record.picture.content,
                "perceptual_hash": record.picture.hash, "look": record.picture.look, "width": record.size[0],
                "height": record.size[1], "image_path": "/nowhere", "image_offset": 0, "image_size": 0,
            }
        )  # fmt: skip
    rows.sort(key=lambda row: row["order"])
    for partition in range(partitions):
        mine = [row for row in rows if row["partition"] == partition]
        path = work.table("unique", partition)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(mine, schema=schema.RECORDS), path)
    named = []
    for number, pictures in enumerate(sets):
        size = -(-len(pictures) // pieces)
        named.append(EvaluationSet(f"set{number}", tuple(Items(tuple(pictures)) for _ in range(1) if size), ()))
    with LocalRunner(1) as runner:
        counts = _remove_duplicates(work, settings, named, Job(folder / "job", runner), partitions)
    removed = pa.concat_tables([pq.read_table(work.table("removed", n)) for n in range(partitions)]).to_pylist()
    evaluation = pq.read_table(work.evaluation).to_pylist() if sets else []
    return {row["key"]: (row["reason"], row["kept"], row["distance"]) for row in removed}, evaluation, counts


@pytest.fixture
def plain_pictures(monkeypatch):
    """Evaluation pictures bring hash and look along."""

    class Sha256:
        def __init__(self, picture):
            self.picture = picture

        def digest(self):
            return self.picture.content

    monkeypatch.setattr(duplicates, "_look_at", lambda picture: (picture.hash, picture.look, None))
    monkeypatch.setattr(duplicates.hashlib, "sha256", _either(hashlib.sha256, Sha256))


def _either(real, ours):
    return lambda data, **options: ours(data) if isinstance(data, Picture) else real(data, **options)


@pytest.mark.parametrize(
    ("seed", "settings"),
    [
        (0, Settings()),
        (1, Settings(near_duplicates=31, eval_near=31)),
        (2, Settings(near_duplicates=None, eval_near=20)),
        (3, Settings(near_duplicates=9, eval_near=None)),
        (4, Settings(near_duplicates=None, eval_near=None)),
        (5, Settings(eval_action="report")),
        (6, Settings(keep_duplicates=True, eval_near=16)),
        (7, Settings(near_duplicates=0, eval_near=0)),
        (8, Settings(near_duplicates=4, eval_near=18, eval_action="report")),
    ],
)
def test_what_is_removed_for_what_is_what_a_plain_loop_finds(seed, settings, tmp_path, plain_pictures):
    rng = random.Random(seed)
    pictures = make_pictures(rng, 160)
    records = [
        Record(f"k{n}", picture, rng.choice([(10, 10), (10, 20), (20, 10), (30, 30)]), (n % 3, n))
        for n, picture in enumerate(pictures[:120])
    ]
    sets = [pictures[120:140], pictures[140:]]
    removed, evaluation, counts = run_steps(tmp_path, records, sets, settings, 3)
    wanted, copies = expected(records, sets, settings)
    assert {key: found[0] for key, found in removed.items()} == {key: found[0] for key, found in wanted.items()}
    assert len(wanted) > 20
    of = {record.key: record for record in records}
    for key, (reason, kept, distance) in removed.items():
        if reason == "evaluation_image":
            assert (reason, kept, distance) == wanted[key]
        else:  # one that stays, is preferred, and is as near as it is said to be
            limit = -2 if settings.near_duplicates is None else settings.near_duplicates
            found = are_near(of[key].picture, of[kept].picture, limit)
            assert found == (-1 if reason == "exact_duplicate" else distance)
            assert kept not in removed
            assert of[kept].preference < of[key].preference
    for reason in ("exact_duplicate", "near_duplicate", "evaluation_image"):
        assert counts["dropped"].get(reason, 0) == sum(found[0] == reason for found in wanted.values())
    for number, pictures_of_set in enumerate(sets):
        rows = [row for row in evaluation if row["set"] == f"set{number}"]
        mine = {(position, key): distance for (n, position, key), distance in copies.items() if n == number}
        assert {row["item"] for row in rows} == {f"item{n:03d}" for n in range(len(pictures_of_set))}
        assert {row["item"] for row in rows if row["kind"]} == {f"item{position:03d}" for position, _ in mine}
        assert {row["training_key"] for row in rows if row["kind"]} == {key for _, key in mine}
        for row in rows:
            if row["kind"]:
                distance = mine[int(row["item"][4:]), row["training_key"]]
                assert (row["kind"], row["distance"]) == ("exact" if distance < 0 else "near", max(distance, 0))
        summary = counts["contamination"][number]
        assert summary["sha256"] == content_hash(picture.content for picture in pictures_of_set)
        assert summary["training_images"] == len({key for _, key in mine})
        exact = {position for (position, _), distance in mine.items() if distance < 0}
        near = {position for position, _ in mine} - exact
        assert (summary["pictures"], summary["exact"], summary["near"]) == (len(rows_of(rows)), len(exact), len(near))


def rows_of(rows):
    return {row["item"] for row in rows}


def test_the_cut_of_the_work_changes_nothing(tmp_path, plain_pictures, monkeypatch):
    rng = random.Random(11)
    pictures = make_pictures(rng, 170)
    records = [Record(f"k{n}", picture, (10, 10), (0, n)) for n, picture in enumerate(pictures[:140])]
    settings = Settings(near_duplicates=20, eval_near=31, merge_captions=True)
    found = []
    for partitions, block in ((1, 1 << 20), (5, 40)):
        monkeypatch.setattr(duplicates, "BLOCK_HASHES", block)
        folder = tmp_path / f"{partitions}-{block}"
        result = run_steps(folder, records, [pictures[140:]], settings, partitions)
        texts = [row for n in range(partitions) for row in read_unique(Work(folder), n).to_pylist()]
        kept = [(row["key"], row["hashtags"], row["other_captions"]) for row in texts]
        found.append((result, kept, Work(folder).duplicates.read_bytes(), Work(folder).evaluation.read_bytes()))
    assert all(other == found[0] for other in found[1:])
    assert len(found[0][0][0]) > 30


def test_a_placeholder_with_thousands_of_copies_is_one_group(tmp_path, plain_pictures):
    """Not their four million pairs: what `pair` writes stays empty."""
    look = bytes(SIZE)
    placeholder = Picture(b"c" * 32, b"\5" * 32, look)
    records = [Record(f"k{n}", placeholder, (10, 10), (0, n)) for n in range(2900)]
    records += [  # saved again: other bytes, the same hash
        Record(f"again{n}", Picture(n.to_bytes(32), b"\5" * 32, look), (10, 10), (1, n)) for n in range(100)
    ]
    removed, _, counts = run_steps(tmp_path, records, [], Settings(), 4)
    assert counts["dropped"] == {"exact_duplicate": 2899, "near_duplicate": 100}
    assert {kept for _, kept, _ in removed.values()} == {"k0"}
    pairs = [pa.ipc.open_file(path).read_all() for path in sorted((tmp_path / "pairs").iterdir())]
    assert len(pairs) == 16
    assert sum(map(len, pairs)) == 0


# -------------------------------------------------------------------------------------------------------- real pictures


@functools.cache
def photo(seed: int, size: int = 160) -> Image.Image:
    """Soft shapes of a few sizes: as much structure as a photograph has."""
    noise = random.Random(seed)
    small = Image.frombytes("RGB", (12, 12), noise.randbytes(432)).resize((size, size), Image.Resampling.BICUBIC)
    fine = Image.frombytes("RGB", (40, 40), noise.randbytes(4800)).resize((size, size), Image.Resampling.BICUBIC)
    return Image.blend(small, fine, 0.4).filter(ImageFilter.GaussianBlur(1))


def encoded(image: Image.Image, kind: str = "png", **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def dropped(manifest) -> dict[str, int]:
    return {reason: number for reason, number in manifest["counts"]["dropped"].items() if number}


def row(key: str, image: bytes, caption: str = "#dog") -> dict:
    return {"key": key, "image": image, "caption": caption, "language": "en"}


def copies_of(seed: int) -> dict[str, bytes]:
    image = photo(seed)
    grey = image.convert("L").convert("RGB")
    return {
        "jpeg95": encoded(image, "jpeg", quality=95),
        "jpeg50": encoded(image, "jpeg", quality=50),
        "webp": encoded(image, "webp", quality=80),
        "half": encoded(image.resize((80, 80), Image.Resampling.LANCZOS), "jpeg", quality=80),
        "third": encoded(image.resize((53, 53), Image.Resampling.BILINEAR), "png"),
        "other": encoded(photo(seed + 1000)),
        "grey": encoded(grey),
        "mirrored": encoded(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
    }


COPIES = ("jpeg95", "jpeg50", "webp", "half", "third")


def test_saved_again_and_shrunk_pictures_are_found_and_the_largest_stays(build, make):
    rows = [row(f"{kind}{seed}", data) for seed in range(6) for kind, data in copies_of(seed).items()]
    rows += [row(f"original{seed}", encoded(photo(seed, 160))) for seed in range(6)]
    rows += [row(f"same{seed}", encoded(photo(seed, 160))) for seed in range(6)]
    manifest, output = build(rows)
    kept = {key.rstrip("0123456789") for key in make.records(output)}
    assert kept == {"jpeg", "other", "grey", "mirrored"}  # of equal size the first: jpeg95
    assert dropped(manifest) == {"near_duplicate": 6 * 6}
    table = pq.read_table(output / "duplicates.parquet").to_pylist()
    assert len(table) == 36
    assert {one["kept"] for one in table} == {f"jpeg95{seed}" for seed in range(6)}
    shown = [one for one in table if one["picture"]]
    assert len(shown) == 36
    assert all(max(Image.open(io.BytesIO(one["kept_picture"])).size) == 96 for one in shown)


def test_the_kept_copy_is_the_largest_then_the_earliest(build, make):
    image = photo(3)
    rows = [
        row("b-small", encoded(image.resize((100, 100), Image.Resampling.LANCZOS))),
        row("d-large", encoded(image, "jpeg", quality=95)),
        row("a-large-later", encoded(image)),
    ]
    _, output = build(rows)
    assert set(make.records(output)) == {"d-large"}


def test_near_duplicates_can_be_left_and_all_can(run, make, tmp_path):
    rows = [row(kind, data) for kind, data in copies_of(1).items()] + [row("again", copies_of(1)["webp"])]
    file = make.parquet(tmp_path / "in.parquet", rows)
    options = ("--input", file, "--workers", 1)
    assert run("build", *options, "--output", tmp_path / "a", "--near-duplicates", "off").code == 0
    assert set(make.records(tmp_path / "a")) == {*copies_of(1)}
    assert run("build", *options, "--output", tmp_path / "b", "--keep-duplicates").code == 0
    assert len(make.records(tmp_path / "b")) == len(rows)
    assert not (tmp_path / "b" / "duplicates.parquet").exists()
    manifest = ShardSet.open(tmp_path / "a").manifest
    assert dropped(manifest) == {"exact_duplicate": 1}
    assert set(manifest["files"]) >= {"duplicates.parquet"}


def test_the_kept_copy_takes_over_captions_and_hashtags(build, make):
    image = photo(5)
    rows = [
        row("c", encoded(image, "jpeg", quality=70), "third #dog #tree"),
        row("a", encoded(image), "first #snow"),
        row("b", encoded(image), "second #cat #dog"),
        row("d", encoded(photo(6)), "alone #horse"),
    ]
    _, output = build(rows, "--merge-captions")
    records = make.records(output)
    assert set(records) == {"c", "d"}
    assert records["c"]["hashtags"] == ["dog", "tree", "snow", "cat"]
    assert records["c"]["other_captions"] == ["first #snow", "second #cat #dog"]
    assert "other_captions" not in records["d"]
    names = {entry.index: entry.synset for entry in ShardSet.open(output).vocabulary}
    assert {"dog.n.01", "tree.n.01", "snow.n.01"} <= {names[label] for label in records["c"]["labels"]} | {
        *records["c"]["synsets"]
    }


def test_what_thousands_of_copies_say_fits_the_json_of_one(build, make):
    image = encoded(photo(5))
    rows = [row(f"k{n}", image, f"{'x' * 3000} {n} #dog #{'y' * 80}tag{n}x") for n in range(60)]
    _, output = build(rows, "--merge-captions")
    record = make.records(output)["k0"]
    assert 10 < len(record["other_captions"]) <= 32
    assert 60 <= len(record["hashtags"]) <= 121


@pytest.mark.slow
def test_bytes_do_not_depend_on_workers_partitions_or_pieces(run, make, tmp_path, monkeypatch):
    pictures = [(kind + str(seed), data) for seed in range(3) for kind, data in copies_of(seed).items()]
    random.Random(0).shuffle(pictures)
    file = make.parquet(tmp_path / "in.parquet", [row(*one) for one in pictures], row_group_size=5)
    folder = tmp_path / "test"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(encoded(photo(2), "jpeg", quality=85))
    options = ("--input", file, "--exclude-eval", folder, "--merge-captions")
    found = []
    for workers, partition_rows in ((1, 1000), (2, 4)):
        defaults = build_shards.__kwdefaults__ | {"partition_rows": partition_rows}
        monkeypatch.setattr("data_pipeline.build.build.__kwdefaults__", defaults)
        output = tmp_path / f"out{workers}"
        assert run("build", *options, "--output", output, "--workers", workers).code == 0
        found.append(make.hashes(output))
    assert found[0] == found[1]


# -------------------------------------------------------------------------------------------------- evaluation pictures


def evaluation_folder(folder):
    """Two class folders: a copy saved again, an equal file, two that are not in the corpus, and something broken."""
    for name, data in {
        "cats/near.jpg": encoded(photo(1), "jpeg", quality=60),
        "dogs/equal.png": encoded(photo(2)),
        "dogs/new.png": encoded(photo(50)),
        "cats/new.png": encoded(photo(51)),
        "cats/broken.jpg": encoded(photo(3), "jpeg")[:300],
        "cats/notes.txt": b"not a picture",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def corpus() -> list[dict]:
    return [row(f"k{seed}", encoded(photo(seed))) for seed in range(5)]


def test_copies_of_evaluation_images_are_removed_and_reported(build, make, tmp_path):
    folder = evaluation_folder(tmp_path / "val")
    manifest, output = build(corpus(), "--exclude-eval", folder)
    assert set(make.records(output)) == {"k0", "k3", "k4"}
    assert dropped(manifest) == {"evaluation_image": 2}
    (summary,) = manifest["contamination"]
    assert {name: summary[name] for name in ("set", "pictures", "unreadable", "exact", "near", "training_images")} == {
        "set": "val",
        "pictures": 5,
        "unreadable": 1,
        "exact": 1,
        "near": 1,
        "training_images": 2,
    }
    assert summary["action"] == "removed"
    found = {one["item"]: one for one in pq.read_table(output / "evaluation.parquet").to_pylist()}
    assert (found["dogs/equal.png"]["kind"], found["dogs/equal.png"]["training_key"]) == ("exact", "k2")
    assert (found["cats/near.jpg"]["kind"], found["cats/near.jpg"]["training_key"]) == ("near", "k1")
    assert found["cats/new.png"]["kind"] is None
    assert found["cats/broken.jpg"]["problem"] is not None
    listed = {one["key"]: one for one in pq.read_table(output / "dropped.parquet").to_pylist()}
    assert listed["k2"]["reason"] == "evaluation_image"
    assert listed["k2"]["detail"] == "val: dogs/equal.png"


def test_copies_of_evaluation_images_can_stay_and_still_be_reported(build, make, tmp_path):
    folder = evaluation_folder(tmp_path / "val")
    manifest, output = build(corpus(), "--exclude-eval", folder, "--eval-action", "report")
    assert len(make.records(output)) == 5
    assert (manifest["contamination"][0]["exact"], manifest["contamination"][0]["near"]) == (1, 1)
    assert manifest["contamination"][0]["action"] == "reported"


def test_a_set_is_the_same_in_whatever_files_it_lies(run, make, tmp_path):
    """As a folder, as Parquet without captions, as a shard set and as its tars alone."""
    rows = [row(f"t{n}", encoded(photo(n))) for n in (1, 2, 60)]
    folder = tmp_path / "folder"
    folder.mkdir()
    for one in rows:
        (folder / f"{one['key']}.png").write_bytes(one["image"])
    table = pa.table({"image": [one["image"] for one in rows], "label": [0, 1, 1]})
    parquet = make.parquet(tmp_path / "parquet" / "val.parquet", table, row_group_size=2)
    assert run("build", "--input", make.parquet(tmp_path / "t.parquet", rows), "--output", tmp_path / "set",
               "--workers", 1, "--samples-per-shard", 2).code == 0  # fmt: skip
    tars = tmp_path / "tars"
    tars.mkdir()
    for tar in (tmp_path / "set" / "shards").glob("*.tar"):
        shutil.copy(tar, tars)
    file = make.parquet(tmp_path / "in.parquet", corpus())
    result = run("build", "--input", file, "--output", tmp_path / "out", "--workers", 1,
                 "--exclude-eval", folder, parquet, tmp_path / "set", tars)  # fmt: skip
    assert result.code == 0, result.err
    found = ShardSet.open(tmp_path / "out").manifest["contamination"]
    assert [one["set"] for one in found] == ["folder", "val", "set", "tars"]
    assert len({one["sha256"] for one in found}) == 1
    assert [(one["pictures"], one["exact"]) for one in found] == [(3, 2)] * 4
    assert set(make.records(tmp_path / "out")) == {"k0", "k3", "k4"}


def test_an_evaluation_set_without_pictures_is_refused(run, make, tmp_path):
    file = make.parquet(tmp_path / "in.parquet", corpus())
    (tmp_path / "empty").mkdir()
    for path, words in ((tmp_path / "empty", "holds no pictures"), (tmp_path / "nowhere", "no such file or folder")):
        result = run("build", "--input", file, "--output", tmp_path / "out", "--exclude-eval", path)
        assert result.code == 1
        assert words in result.err
        assert str(path) in result.err
    assert not (tmp_path / "out").exists()


def test_another_evaluation_set_means_another_shard_set(run, make, tmp_path):
    file = make.parquet(tmp_path / "in.parquet", corpus())
    folder = evaluation_folder(tmp_path / "val")
    options = ("build", "--input", file, "--output", tmp_path / "out", "--workers", 1)
    assert run(*options, "--exclude-eval", folder).code == 0
    assert "up to date" in run(*options, "--exclude-eval", folder).out
    (folder / "cats" / "new.png").unlink()
    for changed in ((*options, "--exclude-eval", folder), options):
        result = run(*changed)
        assert result.code == 1
        assert "the evaluation sets of --exclude-eval are others" in result.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--near-duplicates", "32"), "neither off nor a whole number from 0 to 31"),
        (("--keep-duplicates", "--merge-captions"), "--keep-duplicates removes none"),
        (("--eval-action", "report"), "name them with --exclude-eval"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(options, words, run, tmp_path):
    result = run("build", "--input", tmp_path, "--output", tmp_path / "out", *options)
    assert result.code == 2
    assert words in result.err
