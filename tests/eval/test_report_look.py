"""The report's look at features: what is drawn over what, what is left out with a note, no look among accuracies."""

import base64
import hashlib
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from eval import figures_look, report_look
from eval.report_look import section
from eval.report_look_files import as_looking, as_spectrum, look_files
from eval.report_runs import read_folder
from eval.report_scores import as_text, score_table
from eval.report_tasks import SHARE, is_look, tasks, unit
from tests.eval.test_report_zero_shot import MAE_WSP, WSP, result

MAE = ("mae",)
DATA = "d" * 64


def png(side: int = 16) -> str:
    buffer = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), 200, np.uint8)).save(buffer, "png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def cut_off(text: str) -> str:
    """The header is whole, the pixels are not."""
    whole = base64.b64decode(text.removeprefix("data:image/png;base64,"))
    return f"data:image/png;base64,{base64.b64encode(whole[:-30]).decode()}"


def about(name, lineage, **more):
    weights = hashlib.sha256(name.encode()).hexdigest()
    return {"lineage": list(lineage), "weights": weights, "data": DATA, "images": 90, "image_size": 48} | more


def spectrum(name, lineage, scale=1.0, **more):
    values = [scale / (1 + rank) for rank in range(8)]
    layers = {"block=1": values, "block=2": values, "norm": [2 * value for value in values]}
    return about(name, lineage) | {"token": "mean", "layers": layers} | more


def looking(name, lineage, heads=8, **more):
    rng = np.random.default_rng(len(name))
    query = {"x": 0.5, "y": 0.5, "row": 1, "column": 2, "heads": rng.random((heads, 3, 4)).tolist()}
    content = {
        "renormalised": True, "uniform": 20.0, "block": 2,
        "distance": {kind: (10 * rng.random((2, heads))).tolist() for kind in ("over_patches", "over_all")},
        "class_share": np.full((2, heads), 0.25).tolist(),
        "maps": [{"key": "<b>a/b.png", "picture": png(), "queries": [query, query | {"x": 0.1}]}],
    }  # fmt: skip
    return about(name, lineage) | content | more


def write_run(root, name, lineage, files, seed=0):
    """A finished run whose weights are its name."""
    folder = root / name
    (folder / "release").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"stage": lineage[-1], "lineage": list(lineage), "seed": seed}))
    (folder / "metrics.jsonl").write_text('{"step": 1, "train/loss": 1.0}\n')
    (folder / "release" / "model.safetensors").write_bytes(name.encode())
    for kind, content in files:
        (folder / kind).mkdir(exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / kind / f"{len(list((folder / kind).iterdir()))}.json").write_text(text)
    return folder


FIGURES = ("spectra", "by_layer", "differences", "distances")


def record(monkeypatch, instead=None):
    """What each figure is drawn from, by the function's name."""
    found = {}
    for name in FIGURES:
        draw = instead or getattr(figures_look, name)
        call = lambda *given, name=name, draw=draw: found.setdefault(name, []).append(given) or draw(*given)  # noqa: E731
        monkeypatch.setattr(figures_look, name, call)
    return found


@pytest.fixture
def drawn(monkeypatch):
    """Without drawing, which takes seconds."""
    return record(monkeypatch, lambda *given: "data:,")


def test_runs_stand_over_each_other_and_beside_the_baseline(tmp_path, monkeypatch):
    drawn = record(monkeypatch)
    for name, lineage, scale, seed in (("mae", MAE, 1, 0), ("wsp", WSP, 3, 0), ("wsp1", WSP, 5, 1)):
        files = [("spectrum", spectrum(name, lineage, scale)), ("attention", looking(name, lineage))]
        write_run(tmp_path, name, lineage, files, seed)
    folder = read_folder(tmp_path)
    page = section(folder, tmp_path)
    assert page is not None and not folder.notes
    ((panels, colour),) = drawn["spectra"]
    assert list(panels) == ["after block 1", "after block 2", "after the final norm"]
    assert [line.label for line in panels["after block 1"]] == ["MAE", "WSP", "WSP"]
    assert colour == {"MAE": "#0072B2", "WSP": "#D55E00"}  # as in the report's other figures
    (((titled),),) = drawn["differences"]
    assert list(titled) == ["WSP minus MAE"]  # the first seed
    assert titled["WSP minus MAE"]["norm"] == pytest.approx([np.log(3)] * 8)
    ((heads, _),) = drawn["distances"]
    assert [run.label for run in heads] == ["MAE", "WSP", "WSP"] and np.shape(heads[0].distances) == (2, 8)
    assert page.count("<img") == 3 + 1 + 2 * (1 + 2 * (1 + report_look.HEADS))  # figures; two queries, two runs
    assert "over all 8 heads, of which the first 6 are shown" in re.sub(r"\s+", " ", page)
    assert "MAE 25 %, WSP 25 %" in page
    assert "<b>a" not in page and "&lt;b&gt;a/b.png" in page
    assert set(re.findall(r'src="(.{10})', page)) == {"data:image"}


def test_a_baseline_can_be_chosen(tmp_path, drawn):
    for name, lineage in (("mae", MAE), ("wsp", WSP), ("mae_wsp", MAE_WSP)):
        write_run(tmp_path, name, lineage, [("spectrum", spectrum(name, lineage))])
    section(read_folder(tmp_path), tmp_path, baseline="wsp")
    assert list(drawn["differences"][0][0]) == ["MAE minus WSP", "MAE→WSP minus WSP"]


def test_what_cannot_be_compared_has_parts_of_its_own(tmp_path, drawn):
    given = [
        spectrum("mae", MAE), spectrum("mae", MAE, token="cls"), spectrum("mae", MAE, image_size=96),
        spectrum("mae", MAE, data="e" * 64), spectrum("mae", MAE, images=5),
    ]  # fmt: skip
    write_run(tmp_path, "mae", MAE, [("spectrum", one) for one in given])
    page = section(read_folder(tmp_path), tmp_path)
    assert page is not None and len(drawn["spectra"]) == len(given)
    assert "differences" not in drawn  # of one run there are none
    assert page.count("There are no more pictures (5) than dimensions (8)") == 1


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("spectrum", "{"),
        ("spectrum", "[]"),
        ("spectrum", spectrum("mae", MAE, layers={})),
        ("spectrum", spectrum("mae", MAE, layers={"norm": [1.0, 2.0]})),
        ("spectrum", spectrum("mae", MAE, layers={"norm": [1.0, "x"]})),
        ("spectrum", {"lineage": ["mae"]}),
        ("attention", looking("mae", MAE, distance={"over_patches": [[1.0], [float("nan")]]})),
        ("attention", looking("mae", MAE, class_share=[[0.5]])),
        ("attention", looking("mae", MAE, maps=[{"key": "a", "picture": "http://x/y.png", "queries": [{}]}])),
        ("attention", looking("mae", MAE, maps=[{"key": "a", "picture": png()[:60], "queries": [{"row": 9}]}])),
        ("attention", looking("mae", MAE, maps=[looking("mae", MAE)["maps"][0] | {"picture": cut_off(png(64))}])),
    ],
)
def test_a_file_that_cannot_be_used_costs_a_note_and_not_the_page(tmp_path, kind, content):
    write_run(tmp_path, "mae", MAE, [(kind, content)])
    folder = read_folder(tmp_path)
    assert "Nothing was looked into yet" in str(section(folder, tmp_path))
    assert folder.notes == [f"mae: {kind}/0.json cannot be read and is left out"]


def test_files_of_other_weights_are_left_out_but_not_those_of_their_mean(tmp_path, drawn):
    run = write_run(tmp_path, "mae", MAE, [("spectrum", spectrum("older", MAE)), ("spectrum", spectrum("ema", MAE))])
    (run / "release" / "ema.safetensors").write_bytes(b"ema")
    folder = read_folder(tmp_path)
    page = str(section(folder, tmp_path))
    assert folder.notes == ["mae: spectrum/0.json is of weights that have since been trained again, and is left out"]
    assert [is_mean for _, _, is_mean in look_files(folder, "spectrum", as_spectrum)] == [True]
    assert "Nothing was looked into" not in page and len(drawn["spectra"]) == 1


def test_a_release_without_a_run_has_the_name_of_its_lineage(tmp_path, drawn):
    write_run(tmp_path, "mae", MAE, [("spectrum", spectrum("mae", MAE))])
    (tmp_path / "imported" / "spectrum").mkdir(parents=True)
    content = spectrum("foreign", WSP)
    (tmp_path / "imported" / "spectrum" / "a.json").write_text(json.dumps(content))
    section(read_folder(tmp_path), tmp_path)
    labels = [line.label for line in drawn["spectra"][0][0]["after block 1"]]
    assert labels == ["MAE", f"WSP ({content['weights'][:8]})"]


def test_without_files_the_page_says_which_command_makes_them(tmp_path):
    write_run(tmp_path, "mae", MAE, [])
    page = str(section(read_folder(tmp_path), tmp_path))
    assert f"python -m eval spectrum attention --run {tmp_path}/RUN --data DATA" in page


def test_without_a_finished_run_there_is_no_section(tmp_path):
    run = write_run(tmp_path, "mae", MAE, [])
    (run / "release" / "model.safetensors").unlink()
    assert section(read_folder(tmp_path), tmp_path) is None


def test_the_choice_between_both_distances_is_the_files():
    content = looking("mae", MAE)
    for renormalised, kind in ((True, "over_patches"), (False, "over_all")):
        found = as_looking(content | {"renormalised": renormalised})
        assert found.distances.tolist() == content["distance"][kind]


def test_the_patch_that_asks_is_framed_also_at_the_edge():
    for cell in ((0, 0), (1, 1), (2, 3)):
        text = figures_look.marked(Image.new("RGB", (16, 12)), cell, (3, 4))
        pixels = np.array(Image.open(io.BytesIO(base64.b64decode(text.partition(",")[2]))).convert("RGB"))
        framed = (pixels == figures_look.MARK).all(-1)
        assert pixels.shape == (90, 120, 3)
        rows, cols = np.nonzero(framed)
        top, left = 30 * cell[0], 30 * cell[1]
        assert abs(rows.min() - top) <= 2 and abs(cols.min() - left) <= 2
        assert abs(rows.max() - (top + 29)) <= 2 and abs(cols.max() - (left + 29)) <= 2
        assert not framed[top + 5 : top + 25, left + 5 : left + 25].any()


def test_features_that_do_not_vary_are_drawn_too():
    nothing = figures_look.Line("MAE", [0.0, 0.0])
    assert figures_look.spectra({"a": [nothing]}, {"MAE": "#0072B2"}).startswith("data:image/svg")
    assert figures_look.by_layer({"rank": [nothing], "% of it": [nothing]}, ["1", "norm"], {"MAE": "#0072B2"})
    assert figures_look.differences({"a": {"block=1": [], "norm": []}})
    assert figures_look.distances([figures_look.Heads("MAE", [[0.0]], 0.0)], {"MAE": "#0072B2"})


# --------------------------------------------------------------------------------------------------------------- units

LOOKS = {"attention_distance/block=3": "pixels", "effective_rank/norm": "dimensions",
         "variance@k=10/block=1": "% of variance"}  # fmt: skip


def test_looks_have_units_of_their_own():
    assert {metric: unit(metric) for metric in LOOKS} == LOOKS
    assert all(map(is_look, LOOKS))
    for metric in ("top1", "5-shot/vpt/top1", "R@5", "top1@k=20", "hierarchy/mistake_distance"):
        assert not is_look(metric)
    assert unit("top1@k=20") == SHARE


def test_no_look_stands_among_accuracies():
    results = []
    for run, lineage in (("wsp", WSP), ("mae_wsp", MAE_WSP)):
        looks = [(metric, "attention" if "attention" in metric else "spectrum") for metric in LOOKS]
        results += [result(run, metric, 20.0, evaluator, lineage) for metric, evaluator in looks]
        results.append(result(run, "top1", 0.5, "linear", lineage))
    table = score_table(results)
    assert [row.metric for row in table.everything] == ["top1"]
    assert [difference.metric for difference in table.differences] == ["top1"]
    assert not any(metric in as_text(table) for metric in LOOKS)
    assert {row.metric: row.unit for row in table.looks} == LOOKS
    for row in table.looks:
        assert row.best is None and row.chance is None
        assert all(cell.low == cell.high == 20.0 and not cell.over for cell in row.cells.values()), "no interval"


def test_pictures_without_classes_do_not_rename_the_set_in_the_tables():
    scored = result("wsp", "top1", 0.5, "linear", WSP)
    looked = result("wsp", "effective_rank/norm", 20.0, "spectrum", WSP, config={})
    del looked.hashes["classes"]
    looked.config["paths"] = scored.config["paths"]
    assert [task.title for task in tasks([scored, looked]).values()] == ["birds", "birds"]
