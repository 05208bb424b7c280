"""A comparison at equal FLOPs: the plan, the chain of commands, what is collected, and what the words may say."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.errors import DataError, UsageError
from eval import compare, correct
from eval.chain import alone
from eval.comparison import chain, outcome, plan, verdict
from eval.comparison.plan import PRESETS, Comparison, Entry, Training, check, make_plan, read_comparison
from eval.results import Result, append
from maws.config import override
from maws.stages import load
from maws.trainer import Plan
from tests.eval.conftest import NAMES, picture, write_classes, write_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare") / "shards"
    samples = [(f"{label}-{number}", picture(label, number), [label]) for label in range(7) for number in range(8)]
    return write_shards(folder, samples, [f"{name}.n.01" for name in NAMES])


def asked(shards: Path, **more) -> Comparison:
    given = {"shards": str(shards), "data": ("test.parquet",), "train": ("train.parquet",), "total": "40 steps"}
    return check(replace(PRESETS["debug"], train_labels="", classes="", **given | more))


# ---------------------------------------------------------------------------------------------------------------- plan


def test_every_arm_has_the_same_flops_within_a_step(shards, tmp_path):
    found = make_plan(asked(shards, labelled=str(shards), budgets=(0.25, 1.0)), tmp_path)
    assert {entry.arm for entry in found.entries} == set(plan.ARMS)
    for entry in found.entries:
        if entry.budget:
            one_step = max(found.unit.values())
            assert abs(entry.multiply_adds - entry.budget * found.total) <= one_step / 2, entry.arm
    assert all(entry.multiply_adds == 0 for entry in found.entries if entry.arm == "scratch")


def test_flops_are_three_times_forward_for_every_picture_of_every_step(shards, tmp_path):
    found = make_plan(asked(shards, arms=("mae", "wsp"), seeds=(0,), budgets=(1.0,)), tmp_path)
    for training in found.trainings:
        stage = load(training.stage)
        cfg = override(stage.PRESETS["debug"], [f"data.shards={shards}"])
        cfg = stage.prepare(cfg, plan.ShardSet.open(shards), tmp_path)
        by_hand = training.steps * cfg.optim.batch_size * 3 * stage.cost(cfg).trained
        assert training.multiply_adds == by_hand
    assert found.total == next(t for t in found.trainings if t.stage == "wsp").multiply_adds


def test_mae_sees_as_many_pictures_as_wsp_unless_told(shards, tmp_path):
    only = {"arms": ("wsp", "mae_wsp"), "seeds": (0,), "budgets": (1.0,), "total": "400 steps"}
    first, rest = make_plan(asked(shards, **only), tmp_path).entries[1].trainings
    assert first.steps * first.batch == pytest.approx(rest.steps * rest.batch, abs=2 * rest.batch)
    assert rest.init_from == first.run
    first, rest = make_plan(asked(shards, mae_share=0.8, **only), tmp_path).entries[1].trainings
    assert first.multiply_adds / (first.multiply_adds + rest.multiply_adds) == pytest.approx(0.8, abs=0.01)


def test_epochs_of_the_total_are_those_of_wsp(shards, tmp_path):
    found = make_plan(asked(shards, arms=("mae", "wsp"), seeds=(0,), budgets=(1.0,), total="5 epochs"), tmp_path)
    assert next(t for t in found.trainings if t.stage == "wsp").steps == 5 * (56 // 16)


def test_the_only_step_of_the_untrained_arm_has_a_learning_rate_of_0(shards, tmp_path):
    (training,) = make_plan(asked(shards, seeds=(0,)), tmp_path).entries[0].trainings
    cfg = override(load("wsp").PRESETS["debug"], training.overrides)
    made = Plan.of(cfg, steps_per_epoch=3)
    assert made.total == 1 and made.schedule(cfg.optim)(0) == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["arms=scratch,meo"], "did you mean mae?"),
        (["arms=mae"], "two arms or more"),
        (["arms=mae,supervised"], "--labelled"),
        (["budgets=0.5,2"], "the largest is 1"),
        (["seeds=1,1"], "each once"),
        (["headline=top1"], "EVALUATOR/METRIC"),
        (["budget=1"], "did you mean budgets?"),
        (["draws=many"], "not a int"),
        (["shards="], "--shards"),
        (["wsp_settings=optim.length=9 steps"], "the plan sets this"),
    ],
)
def test_a_comparison_that_cannot_be_meant_is_refused_with_the_way_out(changes, words):
    with pytest.raises(UsageError, match=re.escape(words)):
        read_comparison("debug", None, changes)


def test_a_config_file_is_on_top_of_the_preset_and_flags_on_top_of_it(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps({"seeds": [4, 5], "total": "9 steps", "budgets": [0.5, 1]}))
    found = read_comparison("debug", tmp_path / "c.json", ["seeds=7"])
    assert (found.seeds, found.total, found.preset) == ((7,), "9 steps", "debug")
    flags = {"data": ["a, b.parquet"], "seeds": [3]}
    found = read_comparison("debug", tmp_path / "c.json", ["seeds=7"], flags)
    assert (found.seeds, found.data) == ((3,), ("a, b.parquet",))  # commas are theirs
    for wrong, words in (
        ('{"seeds": 3}', "c.json: seeds: 3 is not a list of int"),
        ('{"seed": 3}', "did you mean seeds"),
    ):
        (tmp_path / "c.json").write_text(wrong)
        with pytest.raises(UsageError, match=words):
            read_comparison("debug", tmp_path / "c.json", [])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"evaluators": ("linear", "knm")}, "did you mean knn?"),
        ({"evaluator_settings": ("knn.kk=3",)}, "did you mean"),
        ({"evaluators": ("linear", "zeroshot")}, "more than an image tower"),
        ({"train": ()}, "linear learns from labelled images"),
        ({"data": ("nowhere.parquet",)}, "no evaluation data at nowhere.parquet"),
    ],
)
def test_what_the_evaluation_would_refuse_is_refused_before_anything_is_trained(changes, words, shards, tmp_path):
    with pytest.raises((UsageError, DataError), match=re.escape(words)):
        compare.compare(asked(shards, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_budget_below_one_step_is_refused(shards, tmp_path):
    with pytest.raises(UsageError, match="less than one step"):
        make_plan(asked(shards, total="1 steps", budgets=(0.25, 1.0)), tmp_path)


def test_commands_are_those_a_user_would_type(shards, tmp_path):
    found = make_plan(asked(shards, seeds=(3,), budgets=(1.0,), arms=("scratch", "mae_wsp")), tmp_path)
    steps = {step.name: " ".join(step.command) for step in chain.chain(found, ("python",))}
    assert list(steps) == ["scratch_s3", "eval-scratch_s3", "mae_for_wsp_b100_s3", "mae_wsp_b100_s3",
                           "eval-mae_wsp_b100_s3"]  # fmt: skip
    train = steps["mae_wsp_b100_s3"]
    assert f"--init-from {tmp_path}/mae_for_wsp_b100_s3 --seed 3 --resume auto data.shards={shards}" in train
    assert "maws/train.py --stage wsp --preset debug" in train
    assert "optim.length=1 steps optim.warmup=1 steps" in steps["scratch_s3"]


# ------------------------------------------------------------------------------------------------------- the chain runs


def entries(tmp_path: Path, arms=("mae", "wsp"), seeds=(0, 1, 2), budgets=(1.0,)) -> plan.Plan:
    comparison = replace(PRESETS["debug"], arms=arms, seeds=seeds, budgets=budgets, draws=500)
    made = []
    for arm in arms:
        for budget in budgets if arm != "scratch" else (0.0,):
            for seed in seeds:
                run = str(tmp_path / f"{arm}_{budget:g}_{seed}")
                made.append(
                    Entry(arm, budget, seed, (Training(run, "wsp", "debug", seed, int(8 * budget) or 1, 2, 10),))
                )
    return plan.Plan(comparison, 160, tuple(made))


FAKE = """
import json, pathlib, sys
run = pathlib.Path(sys.argv[1])
with (run.parent / "calls.txt").open("a") as file: file.write(run.name + " " + sys.argv[2] + "\\n")
if sys.argv[2] == "train":
    (run / "release").mkdir(parents=True)
    (run / "release" / "model.safetensors").write_text("weights")
elif (run.parent / "broken").exists():
    sys.exit("the disk is full")
else:
    (run / "results.jsonl").write_text(json.dumps({"evaluator": "linear"}) + "\\n")
"""


def test_a_chain_goes_on_where_it_stopped_and_skips_what_is_done(tmp_path, monkeypatch, capsys):
    found = entries(tmp_path / "out", seeds=(0,))
    real = chain.chain

    def faked(made, start):
        kinds = ["eval" if step.name.startswith("eval-") else "train" for step in real(made, start)]
        runs = [entry.run for entry in made.entries for _ in (0, 1)]
        steps = zip(real(made, start), kinds, runs, strict=True)
        return [
            replace(
                step,
                command=("python", "-S", "-c", FAKE, run, kind),
                inputs=tuple(name for name in step.inputs if name.endswith("safetensors")),
            )
            for step, kind, run in steps
        ]

    monkeypatch.setattr(chain, "chain", faked)
    monkeypatch.setattr(chain, "estimate", lambda made: "")
    monkeypatch.setattr(compare, "check_evaluation", lambda asked: None)
    monkeypatch.setattr(plan, "make_plan", lambda asked, output: replace(found, comparison=asked))
    monkeypatch.setattr(compare, "finish", lambda made, output: print("finished"))
    settings = replace(found.comparison, evaluators=("linear",))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "broken").write_text("")
    assert compare.compare(settings, tmp_path / "out") == 1
    before = (tmp_path / "out" / "calls.txt").read_text().splitlines()
    (tmp_path / "out" / "broken").unlink()
    assert compare.compare(settings, tmp_path / "out") == 0
    after = (tmp_path / "out" / "calls.txt").read_text().splitlines()[len(before) :]
    trained = [line for line in [*before, *after] if line.endswith("train")]
    assert sorted(trained) == ["mae_1_0 train", "wsp_1_0 train"]  # each once, whatever failed meanwhile
    assert "finished" in capsys.readouterr().out
    assert compare.compare(settings, tmp_path / "out") == 0
    assert capsys.readouterr().out.count("skipped") == 4


def test_two_calls_at_once_are_refused(tmp_path):
    with alone(tmp_path, "compare"):
        with pytest.raises(DataError, match="at work"):
            with alone(tmp_path, "compare"):
                pass


# ------------------------------------------------------------------------------------------------------------- collect


def score(entry: Entry, right: np.ndarray, metric: str = "top1", weights: str = "w", draw: int = 0, **config) -> None:
    hashes = {"weights": weights, "data": "d", "classes": "c"}
    result = Result(
        run=entry.run, evaluator="linear", metric=metric, value=float(right.mean()), n=len(right), seed=draw,
        config={"chance": 0.1} | config, hashes=hashes, lineage=["wsp"], time="",
    )  # fmt: skip
    folder = Path(entry.run)
    folder.mkdir(exist_ok=True)
    append(folder / "results.jsonl", [correct.keep(folder, result, correct.packed(torch.from_numpy(right)))])


def fill(found: plan.Plan, shares: dict[str, float], images: int = 400, noise: float = 0.0) -> plan.Plan:
    for entry in found.entries:
        rng = np.random.default_rng([entry.seed, list(shares).index(entry.arm)])
        hard = np.random.default_rng(9).random(images)  # how hard an image is, for all alike
        score(entry, hard + 0.1 * rng.standard_normal(images) < shares[entry.arm] + noise * rng.standard_normal())
    return found


def test_results_that_were_made_twice_or_of_older_weights_count_once(tmp_path):
    found = entries(tmp_path)
    for entry in found.entries:
        score(entry, np.zeros(50, bool), weights="older")
        score(entry, np.arange(50) < 20)
        score(entry, np.arange(50) < 25)
    (metric,) = outcome.collect(found)
    assert [list(cell.values.values()) for cell in metric.cells] == [[0.5] * 3, [0.5] * 3]
    with (Path(found.entries[0].run) / "results.jsonl").open("a") as file:
        file.write('{"run": "half a li')
    assert outcome.collect(found)[0].cells == metric.cells


def test_scores_of_other_settings_are_not_taken_for_further_draws(tmp_path):
    found = entries(tmp_path)
    for entry in found.entries:
        for hits, settings in ((20, {"iterations": 5}), (30, {"iterations": 9}), (25, {"iterations": 5})):
            score(entry, np.arange(50) < hits, linear=settings)
    (metric,) = outcome.collect(found)
    assert {cell.mean for cell in metric.cells} == {0.5}  # what was measured last, not the mean of two ways


def test_several_draws_count_with_their_mean_image_by_image(tmp_path):
    found = entries(tmp_path, seeds=(0,))
    for entry in found.entries:
        score(entry, np.arange(50) < 20)
        score(entry, np.arange(50) < (30 if entry.arm == "wsp" else 20), draw=1)
    (metric,) = outcome.collect(found)
    assert [cell.mean for cell in metric.cells] == [0.4, 0.5]
    (pair,) = metric.pairs
    assert pair.images is not None and pair.images.mcnemar is None and pair.images.only_first == 10


def test_a_difference_beyond_noise_is_clear_and_one_within_it_is_not(tmp_path):
    found = fill(
        entries(tmp_path, ("mae", "wsp", "mae_wsp"), range(5)), {"mae": 0.3, "wsp": 0.5, "mae_wsp": 0.505}, noise=0.01
    )
    (metric,) = outcome.collect(found)
    pairs = {(pair.first, pair.second): pair for pair in metric.pairs}
    assert pairs["wsp", "mae"].conclusion == pairs["mae_wsp", "mae"].conclusion == "apart"
    near = next(pair for pair in metric.pairs if {pair.first, pair.second} == {"wsp", "mae_wsp"})
    assert near.conclusion != "apart"
    words = " ".join(verdict.verdict(metric, found))
    assert "WSP is" in words and "above MAE" in words
    assert not re.search(r"WSP is [\d.]+ points above MAE→WSP|MAE→WSP is [\d.]+ points above WSP", words)
    assert "5 training seeds" in words and "400 evaluation images" in words and "better" not in words


def test_one_seed_says_nothing_of_the_way_of_training(tmp_path):
    found = fill(entries(tmp_path, seeds=(0,)), {"mae": 0.3, "wsp": 0.6})
    (metric,) = outcome.collect(found)
    (pair,) = metric.pairs
    assert pair.conclusion == "apart for these weights"
    assert pair.images is not None and pair.images.mcnemar is not None and pair.over_seeds.t is None
    words = " ".join(verdict.verdict(metric, found))
    assert "No arm can be put above another" in words and "these weights, not for the ways of training" in words


def test_no_interval_with_zero_in_it_ever_makes_an_arm_better():
    for low, high, low_seeds, high_seeds in ((-1, 3, 1, 3), (1, 3, -1, 3), (None, None, 1, 3), (-2, 1, None, None)):
        over = outcome.paired.OverSeeds(3, 2.0, 0.5, 0.001, 0.25)
        images = outcome.paired.OverImages(9, 5, 1, None, 0.001)
        pair = outcome.Pair("wsp", "mae", 1.0, (0, 1, 2), 2.0, low, high, low_seeds, high_seeds, images, over,
                            {"t": 0.001, "images": 0.001, "signs": 0.25})  # fmt: skip
        assert pair.conclusion != "apart"
        assert " above " not in verdict.about(pair)


def test_the_curve_is_read_off_between_rungs_on_a_logarithmic_axis(tmp_path):
    found = entries(tmp_path, ("mae", "wsp"), (0,), (0.25, 0.5, 1.0))
    heights = {
        ("mae", 0.25): 10,
        ("mae", 0.5): 30,
        ("mae", 1.0): 60,
        ("wsp", 0.25): 5,
        ("wsp", 0.5): 6,
        ("wsp", 1.0): 20,
    }
    for entry in found.entries:
        score(entry, np.arange(100) < heights[entry.arm, entry.budget])
    (reach,) = outcome.reaches(outcome.collect(found)[0], ("mae", "wsp"))
    full = found.entries[-1].multiply_adds
    assert (reach.arm, reach.other) == ("mae", "wsp")
    assert reach.multiply_adds == pytest.approx(full * 0.25 * 2**0.5)  # half way from 10 to 30, in the logarithm
    assert reach.ratio == pytest.approx(4 / 2**0.5)


def test_scores_on_different_data_are_refused(tmp_path):
    found = fill(entries(tmp_path), {"mae": 0.3, "wsp": 0.6})
    run = Path(found.entries[0].run)
    (run / "results.jsonl").write_text((run / "results.jsonl").read_text().replace('"data": "d"', '"data": "e"'))
    with pytest.raises(DataError, match="different evaluation data"):
        outcome.collect(found)


def test_answers_are_kept_beside_the_results_and_belong_to_them(tmp_path):
    entry = entries(tmp_path).entries[0]
    right = np.random.default_rng(0).random(21) < 0.5
    score(entry, right)
    folder = Path(entry.run)
    (result,) = [outcome.measure(entry)[0].result]
    np.testing.assert_array_equal(correct.read(folder, result), right)
    assert correct.read(folder, replace(result, hashes={"weights": "other"})) is None
    assert correct.read(folder, replace(result, value=result.value + 0.1)) is None
    (folder / result.config["correct"]).write_text("[]")
    assert correct.read(folder, result) is None
    assert correct.read(folder, replace(result, config={"correct": "../../etc/passwd"})) is None


# ---------------------------------------------------------------------------------------------------------------- page


def test_the_page_and_the_section_hold_the_verdict_and_need_no_other_file(tmp_path, capsys):
    from eval.report_compare import section

    found = fill(
        entries(tmp_path, ("scratch", "mae", "wsp"), (0, 1), (0.5, 1.0)), {"scratch": 0.1, "mae": 0.3, "wsp": 0.6}
    )
    compare.finish(found, tmp_path)
    page = (tmp_path / "compare.html").read_text()
    content = json.loads((tmp_path / "compare.json").read_text())
    assert all(sentence.replace("'", "&#39;") in page for sentence in content["verdict"])
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert content["verdict"][0] in str(section(None, tmp_path))  # type: ignore[arg-type]
    assert section(None, tmp_path / "elsewhere") is None  # type: ignore[arg-type]
    printed = capsys.readouterr().out
    assert content["verdict"][1] in printed and content["caveats"][0] in printed


# ---------------------------------------------------------------------------------------------------------------- real


@pytest.mark.slow
def test_a_real_comparison_of_two_arms(shards, files, tmp_path, capsys):
    classes = write_classes(tmp_path / "classes.json")
    arguments = [
        "--preset", "debug", "--output", tmp_path / "out", "--shards", shards, "--train", files.train,
        "--data", files.test, "--classes", classes, "--arms", "scratch", "mae_wsp", "--seeds", "0",
        "--set", "budgets=1", "total=6 steps", "train_labels=",
    ]  # fmt: skip
    assert compare.main([str(argument) for argument in arguments]) == 0
    content = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert {cell["arm"] for cell in content["metrics"][0]["cells"]} == {"scratch", "mae_wsp"}
    assert all(cell["low"] is not None for cell in content["metrics"][0]["cells"])
    capsys.readouterr()
    assert compare.main([str(argument) for argument in arguments]) == 0
    assert capsys.readouterr().out.count("skipped") == 5
