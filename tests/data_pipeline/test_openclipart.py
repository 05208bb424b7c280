"""benchmarks/openclipart.py: keywords out of the RDF of SVG files, hostile ones among them, and a build from them."""

import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "openclipart.py"
SVG = """<?xml version="1.0" encoding="UTF-8" standalone="no"?>
{doctype}<svg xmlns="http://www.w3.org/2000/svg" width="10" height="10"><title>of the drawing</title>
  <metadata>
    <rdf:RDF xmlns:cc="http://web.resource.org/cc/" xmlns:dc="http://purl.org/dc/elements/1.1/"
             xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
      <cc:Work rdf:about="">
        <dc:title>{title}</dc:title>
        <dc:description>about &lt;it&gt;</dc:description>
        <dc:subject><rdf:Bag>{keywords}</rdf:Bag></dc:subject>
        <dc:publisher><cc:Agent><dc:title>Open Clip Art Library</dc:title></cc:Agent></dc:publisher>
        <dc:creator><cc:Agent><dc:title>Ann Author</dc:title></cc:Agent></dc:creator>
        <cc:license rdf:resource="http://web.resource.org/cc/PublicDomain"/>
        <dc:language>en</dc:language>
      </cc:Work>
    </rdf:RDF>
  </metadata>
  <path d="M0,0"/>{after}
"""
LAUGHS = """<!DOCTYPE svg [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">]>"""
OUTSIDE = """<!DOCTYPE svg [<!ENTITY a SYSTEM "file:///etc/passwd">]>"""
LINKED = """<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.0//EN" "http://127.0.0.1:9/svg10.dtd">"""


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("openclipart_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["openclipart_script"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["openclipart_script"]


def svg(*keywords: str, title: str = "A title", doctype: str = "", after: str = "</svg>") -> bytes:
    items = "".join(f"<rdf:li>{word}</rdf:li>" for word in keywords)
    return SVG.format(doctype=doctype, title=title, keywords=items, after=after).encode()


def test_title_keywords_and_licence_of_the_work_itself(script):
    work = script.read_work(svg("dog", " sea  lion ", "", "R&amp;D", title="Two &#x1F436; dogs"))
    assert (work.title, work.creator, work.licence, work.language) == (
        "Two 🐶 dogs",
        "Ann Author",
        "PublicDomain",
        "en",
    )
    assert work.keywords == ["dog", "sea  lion", "R&D"]


def test_what_comes_after_the_metadata_is_not_looked_at(script):
    assert script.read_work(svg("dog", after="<broken &nothing; " + "<a>" * 100_000)).keywords == ["dog"]


@pytest.mark.parametrize("doctype", [LAUGHS, OUTSIDE])
def test_entities_are_refused_before_they_are_used(script, doctype):
    with pytest.raises(script.RefusedError, match="declares the entity"):
        script.read_work(svg("&a;", doctype=doctype))


def test_a_linked_document_type_is_not_fetched(script):
    assert script.read_work(svg("dog", doctype=LINKED)).keywords == ["dog"]


@pytest.mark.parametrize("data", [b"", b"\x89PNG", b"<svg>" * 10, svg("dog")[:700], svg("a\0b")])
def test_what_is_not_xml_is_refused(script, data):
    with pytest.raises(script.RefusedError, match="not XML"):
        script.read_work(data)


def test_a_keyword_without_end_is_cut(script):
    assert [len(word) for word in script.read_work(svg("x" * 3_000_000)).keywords] == [script.MAX_TEXT]


def test_the_whole_way_from_svg_files_to_a_shard_set(script, run, make, tmp_path):
    keywords = [("dog", "pet"), ("dog",), ("cat", "hash(0x8ec)"), ("snow",), ("dog", "cat"), ("cat",),
                ("snow", "Ann Author"), ("dog",), ("cat",)]  # fmt: skip
    for folder in ("png", "svg"):
        (tmp_path / "installed" / folder / "animals").mkdir(parents=True)
    for n, words in enumerate(keywords):
        (tmp_path / "installed" / "png" / "animals" / f"{n}.png").write_bytes(make.picture(n))
        (tmp_path / "installed" / "svg" / "animals" / f"{n}.svg").write_bytes(svg(*words))
    animals = tmp_path / "installed" / "png" / "animals"
    (animals / "linked.png").symlink_to(animals / "0.png")
    for name in ("lonely", "laughing"):
        (animals / f"{name}.png").write_bytes(make.picture(len(name) + 50))
    (tmp_path / "installed" / "svg" / "animals" / "laughing.svg").write_bytes(svg("dog", doctype=LAUGHS))
    table = tmp_path / "out" / "openclipart.jsonl"
    found = script.write_table(tmp_path / "installed", table)
    assert found["pictures"] == 11
    assert found["refused_svg"] == {"no svg of that name": 1, "declares the entity": 1}
    result = run("build", "--input", table, "--output", tmp_path / "shards", "--workers", 0)
    assert result.code == 0, result.err
    records = make.records(tmp_path / "shards")
    counts = json.loads((tmp_path / "shards" / "manifest.json").read_bytes())["counts"]
    assert counts["dropped"]["no_caption"] == 2
    assert Counter(tag for record in records.values() for tag in record["hashtags"])["dog"] == 4
    assert records["animals/0"]["licence"] == "PublicDomain"


@pytest.mark.slow
def test_the_corpus_itself(script, tmp_path):
    if not script.INSTALLED.joinpath("svg").is_dir():
        pytest.skip("apt-get install openclipart-png openclipart-svg")
    found = script.write_table(script.INSTALLED, tmp_path / "t.jsonl")
    assert (found["pictures"], found["with_keywords"]) == (6900, 6778)
    rows = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    words = Counter(word.lower() for row in rows for word in row.get("hashtags") or ())
    assert words["hash"] + sum(number for word, number in words.items() if word.startswith("hash(")) > 1000
