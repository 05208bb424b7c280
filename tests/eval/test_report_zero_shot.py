"""The report's tables of zero-shot, retrieval and mistakes: what stands beside what, and what is left out."""

import json
import re
from pathlib import Path

import pytest
import torch

from eval import report, report_runs, report_zero_shot
from eval.classes import Classes
from eval.confusion import confusion
from eval.datasets import open_data
from eval.report_scores import as_text, score_table
from eval.report_tasks import SHARE, tasks, unit
from eval.report_zero_shot import Way
from eval.results import Result
from tests.eval.conftest import picture, write_tar

LIT, WSP, MAE_WSP = ("mae", "wsp", "lit"), ("wsp",), ("mae", "wsp")
CLASSES = Classes(
    (("poodle",), ("<i>corgi</i>",), ("lion",), ("lamp",)),
    ("poodle.n.01", "corgi.n.01", "lion.n.01", "lamp.n.01"), "a test", "c" * 64,
)  # fmt: skip


def result(run, metric, value, evaluator="zeroshot", lineage=LIT, data="birds", language="en", **more) -> Result:
    config = {
        "num_classes": 4, "chosen": {"language": language} | more.pop("chosen", {}),
        "paths": {"data": [f"sets/{data}.parquet"], "classes": "imagenet1k"},
    } | more.pop("config", {})  # fmt: skip
    hashes = {"data": data[0] * 64, "classes": "c" * 64, "weights": "w"} | more.pop("hashes", {})
    given = {"n": 400, "seed": 0, "time": "2026-01-01", **more}
    return Result(
        run=run, evaluator=evaluator, metric=metric, value=value, config=config, hashes=hashes, lineage=list(lineage),
        **given,
    )  # fmt: skip


def write_run(root, name, lineage, results, seed=0):
    folder = root / name
    folder.mkdir(parents=True)
    config = {"stage": lineage[-1], "lineage": list(lineage), "seed": seed}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text('{"step": 1, "train/loss": 1.0}\n')
    (folder / "results.jsonl").write_text("".join(json.dumps(one.__dict__) + "\n" for one in results))
    return folder


def write_confusion(run, name, labels, guesses):
    scores = torch.eye(4)[torch.tensor(guesses)]
    (run / "confusion").mkdir(exist_ok=True)
    (run / "confusion" / name).write_text(confusion(scores, torch.tensor(labels), CLASSES))


@pytest.fixture
def folder(tmp_path):
    """A LiT run and WSP runs of two seeds, each with its confusion file."""
    labels, right = [0, 0, 0, 0, 1, 2, 2, 3], [0, 1, 1, 2, 1, 0, 2, 3]  # 4 of 8
    worse = [1, 1, 1, 2, 1, 0, 2, 3]  # 3 of 8
    lit = [
        result("lit", "top1", 0.5, n=8),
        result("lit", "hierarchy/mistake_height", 3.25, n=8),
        result("lit", "hierarchy/within_2", 0.5, n=8),
        result("lit", "top1", 0.25, language="it", n=8),
        result("lit", "image_to_text/R@1", 0.125, "retrieval", data="<b>flickr", n=8),
        result("lit", "image_to_text/R@10", 0.875, "retrieval", data="<b>flickr", n=8),
    ]
    write_confusion(write_run(tmp_path, "lit", LIT, lit), "zeroshot-1.json", labels, right)
    for seed in (0, 1):
        name = f"wsp{seed}"
        matched = {"matched": {"same": 3, "below": 0, "above": 1, "none": 0}}
        head = [result(name, "top1", 0.375, "wsphead", WSP, chosen=matched, seed=seed, n=8)]
        write_confusion(write_run(tmp_path, name, WSP, head, seed), "wsphead-1.json", labels, worse)
    return tmp_path


def words(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))


# --------------------------------------------------------------------------------------------------------------- tasks


def test_scores_of_two_sets_or_two_languages_never_share_a_row():
    table = score_table([
        result("lit", "top1", 0.5),
        result("lit", "top1", 0.4, data="cars"),
        result("lit", "top1", 0.3, language="it"),
        result("lit", "top1", 0.6),  # measured again
    ])  # fmt: skip
    assert [(row.on, row.cells["MAE→WSP→LiT"].mean) for row in table.rows] == [
        ("birds", 0.6), ("birds · it", 0.3), ("cars", 0.4),
    ]  # fmt: skip
    assert "top1 on birds · it" in as_text(table)
    assert [row.on for row in score_table([result("lit", "top1", 0.5)]).rows] == [""]  # one set needs no name


def test_two_sets_of_one_name_are_told_apart():
    first, second = result("lit", "top1", 0.5), result("lit", "top1", 0.4, hashes={"data": "e" * 64})
    assert sorted(task.title for task in tasks([first, second]).values()) == [
        "birds (bbbbbbbb/cccccccc)", "birds (eeeeeeee/cccccccc)",
    ]  # fmt: skip


def test_heights_are_no_shares_and_less_is_better():
    lengths = ("height", "distance", "mistake_height", "mistake_distance", "chance_height")
    assert all(unit(f"hierarchy/{name}") != SHARE for name in lengths)
    assert all(unit(name) == SHARE for name in ("hierarchy/within_2", "hierarchy/compared", "top1", "mean_per_class"))
    name = "hierarchy/mistake_height"
    table = score_table([result("a", name, 9.5, lineage=WSP), result("b", name, 7.5, lineage=MAE_WSP)])
    (row,) = table.hierarchy
    assert table.rows == [] and table.differences == [] and row.best == "MAE→WSP"
    cell = row.cells["WSP"]
    assert (cell.mean, cell.low, cell.high) == (9.5, 9.5, 9.5)  # no interval for a share of images


# -------------------------------------------------------------------------------------------------------------- tables


def test_names_and_head_stand_side_by_side_for_each_set_and_language(folder):
    read = report_runs.read_folder(folder)
    table = score_table(read.results, [run.entrant() for run in read.runs])
    by_name, by_head = report_zero_shot.ways(table)
    assert (by_name, by_head) == (Way("zeroshot", "MAE→WSP→LiT"), Way("wsphead", "WSP"))
    english, italian = report_zero_shot.side_by_side(table)
    assert (english.task.language, italian.task.language) == ("en", "it")
    assert (english.top1[by_name].mean, english.top1[by_head].mean) == (0.5, 0.375)
    assert english.chance == 0.25 and english.best == by_name and by_head not in italian.top1
    ((task, text),) = report_zero_shot.mapped(read.results)
    assert task == english.task
    assert text == "3 by their own synset, 1 by the nearest synset above, which others may share"
    again = [*read.results, result("lit", "top1", 0.5, hashes={"data": "e" * 64})]  # another set of that name
    ((task, _),) = report_zero_shot.mapped(again)
    assert task.title in {row.task.title for row in score_table(again).rows} and task.title != english.task.title


def test_the_examples_find_tars_that_were_given_by_braces(tmp_path):
    for number in range(2):
        write_tar(tmp_path / f"{number}.tar", [("a.png", picture(number, 0)), ("a.cls", str(number).encode())])
    given = {"data": [str(tmp_path / "{0..1}.tar")], "classes": None}
    of = open_data([Path(given["data"][0])]).test.sha256
    data = report._evaluation_data([result("lit", "top1", 0.5, config={"paths": given}, hashes={"data": of})])
    assert data is not None and len(data.test) == 2


def test_retrieval_has_a_line_per_direction_and_a_column_per_k(folder):
    table = score_table(report_runs.read_folder(folder).results)
    (line,) = report_zero_shot.lines(table.retrieval)
    assert report_zero_shot.recalls(table.retrieval) == ["R@1", "R@10"]
    assert line.what == "image_to_text" and {name: cell.mean for name, cell in line.cells.items()} == {
        "R@1": 0.125, "R@10": 0.875,
    }  # fmt: skip


def test_confusions_are_shown_once_for_repeats_with_other_seeds(folder):
    found = report_zero_shot.confusions(report_runs.read_folder(folder), shown=2)
    assert [(one.run, one.way, one.accuracy, one.images, one.others) for one in found] == [
        ("wsp0", "by WSP head", 0.375, 8, 1), ("lit", "by name", 0.5, 8, 1),
    ]  # fmt: skip
    first = found[1].pairs[0]
    assert (first["names"], first["count"], first["distance"]) == (["poodle", "<i>corgi</i>"], 2, 2)


@pytest.mark.parametrize(
    ("content", "note"),
    [
        ("{", "cannot be read"),
        ('{"classes": [], "pairs": [{"names": ["a"]}], "images": 1, "classes_sha256": ""}', "cannot be read"),
        ('{"classes": [{"right": 7}], "pairs": [], "images": 8, "classes_sha256": "CCC"}', "was made again"),
    ],
)
def test_a_confusion_file_of_other_scores_or_of_no_use_is_left_out_and_noted(folder, content, note):
    (folder / "lit" / "confusion" / "zeroshot-1.json").write_text(content.replace("CCC", "c" * 64))
    read = report_runs.read_folder(folder)
    assert [one.run for one in report_zero_shot.confusions(read)] == ["wsp0"]
    assert len(read.notes) == 1 and "lit: confusion/zeroshot-1.json" in read.notes[0] and note in read.notes[0]


def test_the_page_has_the_tables_and_escapes_what_is_in_them(folder):
    page = report.render(folder)
    text = words(page)
    assert "&lt;i&gt;corgi&lt;/i&gt;" in page and "<i>corgi" not in page
    assert "&lt;b&gt;flickr" in page and "<b>flickr" not in page
    assert "evaluation set language classes by name MAE→WSP→LiT by WSP head WSP chance n" in text
    assert "birds en 4 50.0 ±" in text and "it 4 25.0 ±" in text
    assert "image → text MAE→WSP→LiT 12.5 ±" in text
    assert "birds zeroshot MAE→WSP→LiT 3.25" in text
    assert "poodle &lt;i&gt;corgi&lt;/i&gt; 2 50 % 2 dog.n.01" in text
    assert "Classes of birds in the head's vocabulary: 3 by their own synset" in text


def test_a_page_without_such_scores_has_no_empty_tables(tmp_path):
    write_run(tmp_path, "wsp", WSP, [result("wsp", "top1", 0.5, "linear", WSP)])
    page = report.render(tmp_path)
    assert "side by side</h2>" not in page and "<h2>Retrieval" not in page and "What is taken for what" not in page
