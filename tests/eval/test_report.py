"""The report: right numbers, honest words, one file that needs no other, and a line in place of what is missing."""

import importlib.util
import json
import re
import shutil
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from data_pipeline.errors import DataError
from eval import report, report_runs, report_scores, report_training
from eval.__main__ import main
from eval.report_intervals import DRAWS, IMAGES, SEEDS, T95, t_interval, wilson_interval
from eval.report_scores import (
    Entrant,
    as_text,
    chance,
    lineage_name,
    score_table,
    verdict,
)
from eval.results import Result
from maws.weight_files import Weights, weights_sha256, write_weights

_spec = importlib.util.spec_from_file_location("synthetic", Path(__file__).with_name("synthetic.py"))
assert _spec and _spec.loader
synthetic = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(synthetic)


def result(run, value, evaluator="linear", metric="top1", seed=0, lineage=("wsp",), **more) -> Result:
    given = {"n": 362, "config": {"num_classes": 362}, "hashes": {}, "time": "2026-01-01", **more}
    return Result(run=run, evaluator=evaluator, metric=metric, value=value, seed=seed, lineage=list(lineage), **given)


def entrants(**lineage_and_seed) -> list[Entrant]:
    return [Entrant(name, lineage, seed, "recipe", 100) for name, (lineage, seed) in lineage_and_seed.items()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return synthetic.write_folder(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture(scope="module")
def page(folder):
    return report.render(folder)


class Links(HTMLParser):
    """Tags of a page, and everything that a browser would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loaded: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loaded += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]
        if tag not in ("meta", "img", "br", "link", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes nothing"


# ----------------------------------------------------------------------------------------------------------- intervals


def test_quantiles_are_those_of_students_t():
    assert np.allclose(T95, stats.t.ppf(0.975, np.arange(1, len(T95) + 1)), atol=6e-4)


def test_interval_over_seeds_equals_scipys():
    values = [0.41, 0.44, 0.40, 0.47]
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    found = t_interval(values, SEEDS)
    assert (found.mean, found.low, found.high) == pytest.approx((np.mean(values), low, high), abs=1e-4)


@pytest.mark.parametrize(("right", "n"), [(0, 10), (3, 10), (10, 10), (120, 362)])
def test_interval_over_images_equals_scipys(right, n):
    expected = stats.binomtest(right, n).proportion_ci(method="wilson")
    found = wilson_interval(right / n, n)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-4)


def test_the_interval_is_over_seeds_where_there_are_several_else_over_draws_else_over_images():
    draws = [result("a", v, "lowshot", "5-shot/linear/top1", seed=s) for s, v in enumerate((0.1, 0.2, 0.3))]
    one = score_table(draws, entrants(a=(("wsp",), 0))).rows[0].cells["WSP"]
    assert (one.over, one.count, one.mean) == (DRAWS, 3, pytest.approx(0.2))
    more = [result("b", v, "lowshot", "5-shot/linear/top1", seed=s) for s, v in enumerate((0.3, 0.4, 0.5))]
    two = score_table([*draws, *more], entrants(a=(("wsp",), 0), b=(("wsp",), 1))).rows[0].cells["WSP"]
    assert (two.over, two.count, two.mean) == (SEEDS, 2, pytest.approx(0.3))
    assert score_table([result("a", 0.5)]).rows[0].cells["WSP"].over == IMAGES


# --------------------------------------------------------------------------------------------------------------- table


def test_runs_of_one_lineage_share_a_column_and_other_recipes_do_not():
    a, b, c = Entrant("a", ("wsp",), 0, "x"), Entrant("b", ("wsp",), 1, "x"), Entrant("c", ("wsp",), 0, "longer")
    table = score_table([result("a", 0.1), result("b", 0.2), result("c", 0.9)], [a, b, c])
    assert table.runs == {"WSP (a)": ["a", "b"], "WSP (c)": ["c"]}
    assert table.rows[0].cells["WSP (a)"].mean == pytest.approx(0.15)


def test_a_score_measured_again_replaces_the_older_one():
    assert score_table([result("a", 0.1), result("a", 0.3)]).rows[0].cells["WSP"].mean == 0.3


def test_metrics_stand_in_the_order_of_evaluators_and_of_the_numbers_in_their_names():
    metrics = [("zeroshot", "top1"), ("knn", "top1@k=20"), ("knn", "top1@k=5"), ("linear", "top5"), ("linear", "top1")]
    table = score_table([result("a", 0.1, e, m) for e, m in metrics])
    assert [(row.evaluator, row.metric) for row in table.rows] == [
        ("linear", "top1"),
        ("linear", "top5"),
        ("knn", "top1@k=5"),
        ("knn", "top1@k=20"),
        ("zeroshot", "top1"),
    ]


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("top1", 1 / 362),
        ("top5", 5 / 362),
        ("5-shot/vpt/top1", 1 / 362),
        ("top1@k=20", 1 / 362),
        ("prototype/top1", 1 / 362),
        ("mean_per_class", None),
    ],
)
def test_chance(metric, expected):
    assert chance(result("a", 0.1, metric=metric)) == (None if expected is None else pytest.approx(expected))


def test_lineages_read_as_arrows():
    assert lineage_name(("mae", "wsp", "lit")) == "MAE→WSP→LiT"


def test_the_table_for_the_terminal_is_aligned():
    lines = as_text(score_table([result("a", 0.5), result("b", 0.25, lineage=("mae", "wsp"))])).splitlines()
    assert lines[0].split() == ["evaluator", "metric", "WSP", "MAE→WSP", "chance", "n"]
    assert "50.0 ±5.1i" in lines[2] and "25.0 ±4.4i" in lines[2] and lines[2].endswith("0.28  362")
    assert len({len(line) for line in lines}) == 1


# ------------------------------------------------------------------------------------------------------------- verdict


def test_a_mean_of_several_errors_stands_without_an_interval(tmp_path):
    """It is no share of pictures, and one value has no other interval: it does not stand there as ±0.0 either."""
    mce = result("a", 0.338, "robustness", "mce")
    line = next(line for line in report_scores.as_text(score_table([mce])).splitlines() if "mce" in line)
    assert line.split()[:3] == ["robustness", "mce", "33.8"] and "±" not in line
    (tmp_path / "results.jsonl").write_text(json.dumps(asdict(mce)) + "\n")
    cell = re.search(r"<td[^>]*>33\.8.*?</td>", report.render(tmp_path))
    assert cell and "±" not in cell[0] and "interval" not in cell[0]


def compared(*pairs: tuple[float, float]) -> str:
    who = {f"a{s}": (("mae", "wsp"), s) for s in range(len(pairs))} | {
        f"b{s}": (("wsp",), s) for s in range(len(pairs))
    }
    results = [
        result(f"{name}{s}", value, lineage=lineage)
        for s, (ours, theirs) in enumerate(pairs)
        for name, value, lineage in (("a", ours, ("mae", "wsp")), ("b", theirs, ("wsp",)))
    ]
    return verdict(score_table(results, entrants(**who)), 100)


def test_a_difference_within_the_noise_is_called_that():
    text = compared((0.40, 0.38), (0.39, 0.40))
    assert "it includes zero, so these seeds cannot tell the two apart" in text
    assert text.startswith("At equal WSP steps (100), MAE→WSP is 0.5 points above WSP in linear top1 (mean of 2 pairs")


def test_a_clear_difference_is_stated_with_its_direction():
    assert "3.0 points above WSP" in compared((0.40, 0.37), (0.41, 0.38))
    text = compared((0.30, 0.37), (0.31, 0.38), (0.29, 0.355))
    assert "points below WSP" in text and "larger than the noise between seeds" in text


def test_a_tie_is_called_level():
    assert "MAE→WSP is level with WSP in linear top1" in compared((0.40, 0.38), (0.38, 0.40))


def test_one_pair_is_an_observation():
    assert "an observation, not a finding" in compared((0.5, 0.1))


def test_equal_differences_say_nothing_of_the_noise_between_seeds():
    text = compared((0.40, 0.37), (0.41, 0.38))
    assert "equal differences have no interval over seeds" in text and "larger than the noise" not in text


def test_runs_of_unequal_length_or_seed_are_not_compared():
    ours, theirs = Entrant("a", ("mae", "wsp"), 0, "x", 100), Entrant("b", ("wsp",), 0, "y", 200)
    results = [result("a", 0.5, lineage=("mae", "wsp")), result("b", 0.4)]
    assert score_table(results, [ours, theirs]).differences == []
    other_seed = Entrant("b", ("wsp",), 1, "x", 100)
    assert "cannot be compared yet" in verdict(score_table(results, [ours, other_seed]))


# ---------------------------------------------------------------------------------------------------------------- page


def test_the_page_loads_nothing_and_runs_nothing(page):
    links = Links(page)
    assert not links.open
    assert not {"script", "link", "iframe", "object", "embed", "form"} & set(links.tags)
    assert links.loaded and all(link.startswith("data:image/") for link in links.loaded)
    assert "url(" not in page and "@import" not in page
    assert "default-src 'none'" in page
    assert not re.search(r"\son\w+=", page)
    assert page.count("<style>") == 1 and page.index("</style>") < page.index("</head>")


def test_what_users_wrote_is_escaped(page):
    assert "&lt;b&gt;thing&lt;/b&gt;" in page
    assert "<b>thing" not in page


def test_the_page_compares_lineages_side_by_side_with_intervals(page):
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))
    assert re.search(r"evaluator metric MAE WSP MAE→WSP chance n", text)
    assert "MAE→WSP minus WSP, paired by training seed" in text
    assert "The training set has 60 captioned pictures" in text
    assert "362 evaluation pictures of 362 classes" in text
    assert "dropped: no hashtags 3" in text


def test_the_same_folder_gives_the_same_page(folder, page):
    assert report.render(folder) == page


def test_missing_parts_say_which_command_makes_them(page):
    assert "No finished MAE run yet" in page and "--stage mae --preset demo" in page
    assert "No zero-shot result of a finished LiT run yet" in page and "python -m eval zeroshot" in page


def test_a_shard_set_alone_gives_a_page(tmp_path):
    synthetic.write_shards(tmp_path / "shards")
    page = report.render(tmp_path)
    assert "No results yet" in page and "No run has logged a loss yet" in page and "thing_0.n.01" in page


def test_a_run_alone_gives_a_page(tmp_path):
    run = synthetic.write_run(tmp_path, "mae", ["mae"])
    page = report.render(run)
    assert "No shard set" in page and "200 steps" in page


def test_scores_of_weights_that_were_trained_again_are_left_out_and_counted(tmp_path):
    synthetic.write_run(tmp_path, "wsp", ["wsp"], done=True)
    old = {**result("runs/wsp", 0.9).__dict__, "hashes": {"weights": "0" * 64}}
    (tmp_path / "wsp" / "results.jsonl").write_text(json.dumps(old) + '\n{"run": "half a li')
    folder = report_runs.read_folder(tmp_path)
    assert folder.results == []
    assert folder.notes == ["1 results of weights that have since been trained again are left out"]


def test_a_run_whose_weights_are_in_several_files_is_finished(tmp_path):
    run = synthetic.write_run(tmp_path, "wsp", ["wsp"])
    tensors = {f"w{i}": torch.full((64,), float(i)) for i in range(3)}
    (run / "release").mkdir()
    write_weights(run / "release", "model", Weights.of(tensors), max_shard=300)
    assert len(list((run / "release").glob("*.safetensors"))) == 3
    found = report_runs.read_folder(tmp_path).runs[0]
    assert found.is_done
    assert found.weights_sha256 == weights_sha256(run / "release" / "model.safetensors.index.json")
    (run / "release" / "model-00002-of-00003.safetensors").unlink()
    broken = report_runs.read_folder(tmp_path)
    assert not broken.runs[0].is_done and "wsp: its weights cannot be read" in broken.notes[0]


def test_a_step_logged_twice_counts_once(tmp_path):
    run = synthetic.write_run(tmp_path, "mae", ["mae"], steps=20)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "train/loss": 7.0}\n{"step": 30, "train/lo')
    assert report_runs.read_folder(tmp_path).runs[0].series("train/loss")[0] == [10, 20]
    assert report_runs.read_folder(tmp_path).runs[0].last("train/loss") == 7.0


def test_a_damaged_config_costs_its_run_not_the_page(tmp_path, folder):
    shutil.copytree(folder, tmp_path / "demo")
    (tmp_path / "demo" / "wsp" / "config.json").write_text("{")
    assert "wsp: its config.json cannot be read" in report.render(tmp_path / "demo")


# ------------------------------------------------------------------------------------------------- how training went


@pytest.fixture
def eventful(tmp_path):
    """A run of 200 steps that was set back once, started twice, and lost two samples."""
    run = synthetic.write_run(tmp_path, "mae", ["mae"])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    with (run / "metrics.jsonl").open("w") as file:
        for number, line in enumerate(lines):
            speed = 20.0 if number == 0 else 100.0 + number  # the first line warms up
            more = {
                "time": 1000.0 + 5 * number, "train/step_ms": 400.0, "train/images_per_second": speed,
                "train/grad_norm": 0.5 if number else 8.0, "data/wait_share": 0.02, "memory/process_gib": 1.0 + number,
            }  # fmt: skip
            file.write(json.dumps({**line, **more}) + "\n")
        file.write(json.dumps({"step": 200, "probe/knn_top1": 0.25, "probe/knn_chance": 0.03125}) + "\n{half")
    events = [
        {"event": "start", "step": 0, "time": 1000.0, "reached": 0},
        {"event": "rewind", "step": 85, "to": 80, "time": 1040.0, "why": "loss is nan"},
        {"event": "start", "step": 100, "time": 1060.0, "reached": 110},
        {"event": "done", "step": 200, "time": 1100.0},
    ]
    (run / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events) + '{"event": "sto')
    (run / "quarantine.jsonl").write_text(
        '{"step": 1, "key": "a"}\n{"step": 2, "key": "b"}\n{"step": 2, "key": "b"}\n{"'
    )
    return run


def test_how_a_training_went_is_what_its_files_say(eventful):
    (run,) = report_runs.read_folder(eventful).runs
    found = report_training.course(run)
    assert found.goodput == pytest.approx(199 * 0.4 / 100)  # step 85 is left out; 100 seconds from start to done
    assert (found.restarts, found.rewinds, found.lost_steps) == (1, 1, 6 + 10)
    assert found.bad_samples == 2
    assert found.images_per_second == 110.0  # the median of 101 … 119
    assert found.grad_norm == (0.5, 8.0) and found.data_wait == 0.02 and found.memory_gib == 20.0
    assert found.probes == [("knn_top1", 0.25, 0.03125)] and found.mfu is None and found.marks == [85]


def test_the_page_tells_how_training_went(eventful):
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", report.render(eventful)))
    assert "How training went run images/s data wait memory goodput restarts set back steps lost bad samples" in text
    assert "mae 110 2.0 % 20.0 GiB 79.6 % 1 1 16 2 0.5 up to 8 25.0 % knn top1, chance 3.1" in text
    assert "MFU" not in text


def test_an_older_run_that_wrote_down_less_has_dashes_and_no_error(tmp_path):
    synthetic.write_run(tmp_path, "mae", ["mae"])
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", report.render(tmp_path)))
    assert "bad samples gradient norm mae 150 – – – – – – 0 –" in text


def test_events_that_cannot_be_read_cost_their_run_its_line_and_not_the_page(eventful):
    (eventful / "events.jsonl").unlink()
    (eventful / "events.jsonl").mkdir()
    page = report.render(eventful)
    assert "mae: how its training went could not be read" in page and "How training went" not in page


def test_a_panel_has_a_curve_for_each_run_that_has_its_number(eventful, tmp_path):
    synthetic.write_run(tmp_path, "wsp", ["wsp"])
    courses = [report_training.course(run) for run in report_runs.read_folder(tmp_path).runs]
    panels = report_training.panels(courses)
    assert {title: len(curves) for title, curves in panels.items()} == {"images a second": 2, "gradient norm": 1}
    assert panels["images a second"][0].marks == [85]
    assert 10 not in panels["images a second"][0].steps  # the line that warms up


# -------------------------------------------------------------------------------------------------------- command line


def test_the_command_writes_the_page_and_prints_its_path(folder, tmp_path, capsys):
    output = tmp_path / "page.html"
    assert report.main([str(folder), "--output", str(output)]) == 0
    assert capsys.readouterr().out == f"{output}\n"
    assert output.read_text().startswith("<!doctype html>")


def test_a_folder_with_nothing_in_it_is_an_error_of_one_line(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {tmp_path} holds no run, no results and no shard set; make a run with")
    assert captured.err.count("\n") == 1


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"no folder at .*nowhere; give the folder that holds your runs"):
        report.write_report(tmp_path / "nowhere")


def test_scores_need_no_torch():
    """`make demo` prints the table: its modules must stay light."""
    import subprocess
    import sys

    code = "import sys, eval.report_runs, eval.report_scores; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert report_scores.__doc__ and "no torch" in report_scores.__doc__
