"""The data page: what it says is what the shard set holds, whatever strangers wrote."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline import report_figures, report_survey, schema
from data_pipeline.__main__ import main
from data_pipeline.errors import DataError
from data_pipeline.files import sha256_file
from data_pipeline.report import render, write_report
from data_pipeline.shardset import ShardSet, write_manifest
from data_pipeline.takedown import Wanted, takedown

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&\u202e #dog #snow"


class Page(HTMLParser):
    """Elements with their attributes, and the text of each section by line."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, str] = {}
        self._section = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "section":
            self._section = dict(attrs)["id"] or ""

    def handle_data(self, data: str) -> None:
        self.text[self._section] = self.text.get(self._section, "") + " " + " ".join(data.split())

    def section(self, name: str) -> str:
        return " ".join(self.text[name].split())


def amend(folder: Path, tables: dict[str, pa.Table], **content: object) -> None:
    """Put tables beside the shards and values into the manifest, as a build would that makes them."""
    manifest = {key: value for key, value in ShardSet.open(folder).manifest.items() if key != "digest"}
    manifest.setdefault("files", {})
    for name, table in tables.items():
        pq.write_table(table, folder / name)
        manifest["files"][name] = sha256_file(folder / name)
    write_manifest(folder, manifest | content)


@pytest.fixture(scope="module")
def built(make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built once; never changed."""
    rows = make.rows(20)  # few enough to be all shown
    rows[3]["caption"] = HOSTILE
    rows[4] |= {"source": "<b>shop</b>", "licence": "CC-BY-4.0", "language": "de"}
    rows += [
        {"key": "bad", "image": b"no picture", "caption": "#dog", "language": "en"},
        {"key": "tiny", "image": make.picture(901, size=(4, 5)), "caption": "#dog", "source": "a shop"},
        {"key": "silent", "image": make.picture(900), "caption": "nothing to see", "language": "en"},
        {"key": "<i>odd</i>", "image": b"", "caption": "#snow", "language": "en"},
    ]
    folder = tmp_path_factory.mktemp("report")
    columns = {"source": None, "licence": None}  # of all rows: the first decides which columns there are
    source = make.parquet(folder / "in.parquet", [columns | row for row in rows])
    assert main(["build", "--input", str(source), "--output", str(folder / "shards"), "--workers", "1"]) == 0
    return folder / "shards"


@pytest.fixture(scope="module")
def text(built) -> str:
    return render(ShardSet.open(built))


@pytest.fixture(scope="module")
def page(text) -> Page:
    return Page(text)


@pytest.fixture
def shards(built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that a test may change; its figures, which take most of the time, are left out."""
    monkeypatch.setattr(report_figures, "draw", lambda *_: report_figures.Picture("data:image/", "data:image/"))
    return shutil.copytree(built, tmp_path / "shards")


def test_the_page_counts_what_the_manifest_counts(built, page):
    manifest = ShardSet.open(built).manifest
    counts = manifest["counts"]
    way = page.section("way")
    assert counts["read"] == 24
    assert re.search(rf"\bread {counts['read']} 100.0 %", way)
    assert re.search(rf"\bin the set {counts['kept']} ", way)
    assert re.search(rf"\bwith labels {counts['labelled']} ", way)
    assert f"{counts['read']} = {counts['kept']} + {sum(counts['dropped'].values())}" in way
    for reason, number in counts["dropped"].items():
        assert not number or f"{number} " in page.section("dropped").split(reason)[0]
    for entry in ShardSet.open(built).vocabulary:
        assert f"{entry.synset} {entry.count} " in page.section("labels")
    assert f"{manifest['resampling']['samples_per_epoch']:,.0f} samples" in page.section("repeats")


def test_drops_come_with_examples(page):
    dropped = page.section("dropped")
    assert "unsupported_format bad" in dropped
    assert "no_hashtags silent" in dropped
    assert re.search(r"too_small key source detail tiny a shop 4 x 5", dropped)


def test_nothing_that_strangers_wrote_becomes_markup(text, page):
    assert HOSTILE.split('"')[0] in page.section("samples")  # it is shown
    assert "<b>shop</b>" in page.section("sources")
    assert "\u202e" not in text  # but cannot turn the text around it
    allowed = {"src", "srcset", "href", "content", "style", "class", "id", "title", "alt", "media", "name", "charset",
               "lang", "http-equiv", "colspan", "open"}  # fmt: skip
    for tag, attributes in page.elements:
        assert tag not in ("script", "iframe", "object", "link", "base", "form", "i")
        assert set(attributes) <= allowed, (tag, attributes)


def test_the_page_loads_nothing(text, page):
    policy = next(a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")
    for _, attributes in page.elements:
        for name in ("src", "srcset"):
            assert (attributes.get(name) or "data:image/").startswith("data:image/")
        assert (attributes.get("href") or "#").startswith("#")
    assert "url(" not in text
    assert "@import" not in text


def test_the_same_set_gives_the_same_page(built, text):
    assert render(ShardSet.open(built)) == text


def test_a_set_without_the_tables_of_today_has_a_page(shards):
    old = ("samples", "classes", "shards", "vocabulary_sha256", "resampling", "parameters", "inputs", "skipped_inputs",
           "wordnet_sha256", "versions", "parents")  # fmt: skip
    manifest = {name: value for name, value in ShardSet.open(shards).manifest.items() if name in old}
    counts = ShardSet.open(shards).manifest["counts"]
    manifest["counts"] = {
        name: counts[name]
        for name in ("read", "kept", "dropped", "labelled", "labels", "min_count", "hashtags", "mapped_hashtags",
                     "ambiguous_hashtags", "unmapped_hashtags", "named_by_wordnet", "synsets", "classes")
    }  # fmt: skip
    for path in shards.glob("*.parquet"):
        if path.name != "vocabulary.parquet":
            path.unlink()
    write_manifest(shards, manifest)
    page = Page(render(ShardSet.open(shards)))
    assert "no list of what was dropped" in page.section("dropped")
    assert all("This set has no" in page.section(name) for name in ("tags", "copies"))
    assert "compared with no evaluation set" in page.section("evaluation")


def test_a_table_that_is_not_the_manifests_is_refused(shards):
    amend(shards, {"tags.parquet": pa.Table.from_pylist([], schema=schema.TAGS)})
    with (shards / "tags.parquet").open("ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match=r"tags\.parquet is damaged"):
        render(ShardSet.open(shards))
    (shards / "tags.parquet").unlink()
    with pytest.raises(DataError, match=r"tags\.parquet is missing"):
        render(ShardSet.open(shards))


def test_tags_at_risk_are_those_that_probably_got_a_wrong_sense(shards):
    def tag(name: str, occurrences: int, chosen: list[int], confidence: float | None, reason: str | None = None):
        synsets = [f"{name}.n.{n:02d}" for n in range(1, len(chosen) + 1)]
        return dict(zip(schema.TAGS.names, (name, occurrences, synsets, chosen, confidence, reason), strict=True))

    table = [
        tag("sure", 1000, [1000, 0], 0.99),  # 10 at risk
        tag("torn", 100, [60, 40], 0.55),  # 45
        tag("plain", 5000, [5000], None),
        tag("<b>zzz</b>", 700, [], None, "unmapped"),
    ]
    weighed = pa.Table.from_pylist(table, schema=schema.TAGS)
    amend(shards, {"tags.parquet": weighed}, parameters={"senses": "evidence"})
    tags = Page(render(ShardSet.open(shards))).section("tags")
    assert re.search(r"#torn 100 2 55 % 45 torn\.n\.01 60 torn\.n\.02 40 #sure 1,000 2 99 % 10 sure\.n\.01", tags)
    assert "#plain" not in tags
    assert "#<b>zzz</b> 700" in tags


def test_copies_are_counted_and_shown_in_pairs(shards, make):
    kept = ShardSet.open(shards).index(0)["key"].to_pylist()
    small = make.picture(7, kind="jpeg")

    def pair(key: str, of: str, kind: str, distance: int, small: bytes | None) -> dict[str, object]:
        return {"key": key, "kept": of, "kind": kind, "distance": distance, "picture": small, "kept_picture": small}

    table = [
        pair("copy1", kept[0], "exact", 0, None),
        pair("copy2", kept[0], "near", 9, small),
        pair("copy3", kept[1], "near", 4, small),
        pair("copy4", "not in the set", "near", 4, None),
    ]
    amend(shards, {"duplicates.parquet": pa.Table.from_pylist(table)})
    page = Page(render(ShardSet.open(shards)))
    copies = page.section("copies")
    assert "nearly the same picture as another 3 the same bytes as another picture 1" in copies
    assert re.search(r"bits pictures 4 2 9 1", copies)
    assert f"copies removed {kept[0]} 2 " in copies
    assert [copies.index(f"removed copy{n}") for n in (2, 3, 4, 1)] == sorted(
        copies.index(f"removed copy{n}") for n in (1, 2, 3, 4)
    )
    shown = [
        a["src"] for tag, a in page.elements if tag == "img" and (a.get("alt") or "").startswith(("removed", "kept"))
    ]
    assert len(shown) == 2 + 2 + 1  # the exact copy's twin is still in the set, that of copy4 is not


def test_contamination_is_told_per_evaluation_set(shards):
    key = ShardSet.open(shards).index(0)["key"][0].as_py()
    sets = [
        {"set": "val<1>", "sha256": "00", "pictures": 200, "unreadable": 0, "exact": 3, "near": 1, "training_images": 5,
         "action": "removed", "near_distance": 10},
        {"set": "other", "sha256": "01", "pictures": 50, "unreadable": 2, "exact": 0, "near": 5, "training_images": 6,
         "action": "reported", "near_distance": 10},
    ]  # fmt: skip

    def item(name: str, item: str, kind: str | None, action: str | None) -> dict[str, object]:
        return {
            "set": name,
            "item": item,
            "kind": kind,
            "training_key": kind and key,
            "distance": kind and 3,
            "action": action,
        }

    table = [
        item("val<1>", "a.png", "exact", "removed"),
        item("other", "b.png", "near", "reported"),
        item("other", "c.png", None, None),
    ]
    amend(shards, {"evaluation.parquet": pa.Table.from_pylist(table)}, contamination=sets)
    found = Page(render(ShardSet.open(shards))).section("evaluation")
    assert "val<1> 200 3 1 2.0 % 5 taken out" in found
    assert "other 50 0 5 10.0 % 6 left in" in found
    assert "2 pictures of other could not be decoded" in found
    assert f"val<1> : a.png in training {key} exact" in found
    assert f"other : b.png in training {key} near, 3 bits apart" in found
    assert "c.png" not in found


def test_coverage_counts_the_labels_of_the_head():
    assert report_figures.needed(np.array([50.0, 30.0, 15.0, 5.0]), 0.5) == 1
    assert report_figures.needed(np.array([49.0, 31.0, 15.0, 5.0]), 0.5) == 2
    assert report_figures.needed(np.array([50.0, 30.0, 15.0, 5.0]), 0.95) == 3
    assert report_figures.needed(np.ones(10), 1.0) == 10


def test_the_command_says_where_the_page_is(shards, run, tmp_path):
    result = run("report", shards)
    assert result.code == 0, result.err
    assert result.out == f"the data page: {shards / 'report.html'}\n"
    assert (shards / "report.html").read_text("utf-8").startswith("<!doctype html>")
    result = run("report", shards, "--output", tmp_path / "page.html")
    assert result.out == f"the data page: {tmp_path / 'page.html'}\n"
    assert (tmp_path / "page.html").read_bytes() == (shards / "report.html").read_bytes()


def test_what_cannot_be_read_or_written_is_one_line(shards, run, tmp_path):
    result = run("report", tmp_path / "nowhere")
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert "no shard set" in result.err
    with pytest.raises(DataError, match="cannot write"):
        write_report(shards, shards / "manifest.json" / "page.html")


def test_text_that_is_no_text_can_be_shown(shards):
    """A lone surrogate in a json escape is valid JSON and no UTF-8."""
    amend(shards, {}, parameters={"note": json.loads('"\\ud800"')})
    assert "\N{REPLACEMENT CHARACTER}" in Page(write_report(shards).read_text("utf-8")).section("made")


def test_places_of_samples_are_those_that_counting_gives(build, make):
    shards = ShardSet.open(build(make.rows(23), "--samples-per-shard", 5)[1])
    every = [(shard, row) for shard, size in enumerate(shards.shard_sizes) for row in range(size)]
    assert list(report_survey.spread_samples(shards, 100)) == every
    assert list(report_survey.spread_samples(shards, 7)) == [every[n * 23 // 7] for n in range(7)]
    drawn = report_survey.draw_samples(shards, 9)
    assert len(set(drawn)) == 9
    assert set(drawn) <= set(every)
    keys = {shards.index(shard)["key"][row].as_py(): (shard, row) for shard, row in every}
    some = dict(list(keys.items())[3:20:4])
    assert report_survey.find_keys(shards, [*some, "nobody"]) == some


def test_a_large_set_is_read_in_part_and_the_page_says_so(build, make, monkeypatch: pytest.MonkeyPatch):
    shards = ShardSet.open(build(make.rows(40), "--samples-per-shard", 5)[1])
    whole = report_survey.survey(shards)
    assert (whole.samples, whole.records, whole.is_whole) == (40, 40, True)
    assert whole.images.tolist() == [entry.count for entry in shards.vocabulary]
    monkeypatch.setattr(report_figures, "draw", lambda *_: report_figures.Picture("data:image/", "data:image/"))
    monkeypatch.setattr(report_survey, "MAX_SHARDS", 2)
    monkeypatch.setattr(report_survey, "MAX_RECORDS", 8)
    part = report_survey.survey(shards)
    assert (part.shards, part.samples, part.records, part.is_whole) == (2, 10, 8, False)
    page = Page(render(shards))
    assert "≈ come from 10 samples of 2 shards" in page.section("")
    assert "From 8 samples, spread evenly" in page.section("sources")
    for entry in shards.vocabulary:  # counted by the build, over all
        assert f"{entry.synset} {entry.count} " in page.section("labels")


def test_building_again_takes_the_page_of_the_old_set_away(build, make, run):
    rows = make.rows(12)
    folder = build(rows)[1]
    assert run("report", folder).code == 0
    build(rows[:6], "--overwrite")
    assert not (folder / "report.html").exists()


def test_what_was_taken_down_is_shown_nowhere(shards, run, make):
    first, second = ShardSet.open(shards).index(0)["key"].to_pylist()[:2]
    small = make.picture(7, kind="jpeg")
    row = {"kind": "near", "distance": 2, "picture": small, "kept_picture": small}
    table = [row | {"key": "copy1", "kept": first}, row | {"key": "copy2", "kept": second}]
    amend(shards, {"duplicates.parquet": pa.Table.from_pylist(table)})
    assert run("report", shards).code == 0
    takedown(shards, Wanted(keys=[first]))
    assert not (shards / "report.html").exists()
    left = pq.read_table(shards / "duplicates.parquet").to_pylist()
    assert [(row["key"], row["picture"], row["kept_picture"]) for row in left] == [
        ("copy1", None, None),
        ("copy2", small, small),
    ]
    page = Page(render(ShardSet.open(shards)))
    assert first not in page.section("samples")
    assert "taken down on request 1 " in page.section("way") + " "
    assert "1 samples were taken out" in page.section("dropped")
