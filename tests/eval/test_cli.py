"""`python -m eval` from the outside: results, messages, exit codes."""

import json
import subprocess
import sys

import pytest

from eval import results
from eval.classes import read_classes
from eval.templates import read_templates
from tests.eval.conftest import atto, corpus, write_parquet, write_run

FAST = ("--set", "lowshot.k=1,5", "lowshot.seeds=2", "vpt.steps=2", "vpt.batch=8", "vpt.prompts=2")


@pytest.fixture
def paths(files):
    return ("--train", files.train, "--data", files.test, "--classes", files.classes)


def test_several_evaluators_in_one_call(evaluate, run, paths):
    outcome = evaluate("linear,knn", "lowshot", "--run", run, *paths, *FAST)
    assert outcome.code == 0, outcome.err
    lines = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    metrics = {(line["evaluator"], line["metric"]) for line in lines}
    assert metrics == {
        *(("linear", metric) for metric in ("top1", "top5", "mean_per_class")),
        *(("knn", metric) for metric in ("top1@k=1", "top1@k=5", "top1@k=20", "prototype/top1")),
        *(("lowshot", f"{k}-shot/{method}/top1") for k in (1, 5) for method in ("linear", "vpt")),
    }
    assert f"results: {run / 'results.jsonl'}" in outcome.out
    assert "prototype/top1" in outcome.out and "chance" in outcome.out and "14.29" in outcome.out
    assert len(list((run / "splits").iterdir())) == 4
    assert len(list((run / "features").iterdir())) == 2


def test_the_fields_of_a_result(evaluate, run, paths, files):
    assert evaluate("lowshot", "--run", run, *paths, *FAST, "k=1", "--seed", 7).code == 0
    line = json.loads((run / "results.jsonl").read_text().splitlines()[0])
    assert list(line) == [
        "run", "evaluator", "metric", "value", "n", "seed", "config", "hashes", "lineage", "time", "contamination",
    ]  # fmt: skip
    assert line["contamination"]["status"] == "not checked"  # of this run only the weights are there
    assert (line["run"], line["evaluator"], line["metric"]) == (str(run), "lowshot", "1-shot/linear/top1")
    assert 0 <= line["value"] <= 1 and line["n"] == 28 and line["seed"] == 7 and line["lineage"] == ["wsp"]
    config = line["config"]
    assert config["lowshot"]["k"] == [1] and config["lowshot"]["vpt"]["steps"] == 2
    assert config["chance"] == pytest.approx(1 / 7) and config["num_classes"] == 7
    assert config["images"] == {"train": 42, "data": 28}
    assert config["paths"]["data"] == [str(files.test)]
    assert config["precision"] == "fp32" and config["preprocess"]["image_size"] == 32
    assert config["chosen"]["linear.l2"] and "torch" in config["versions"]
    assert set(line["hashes"]) == {"weights", "data", "train", "classes", "split"}
    assert all(len(value) == 64 for value in line["hashes"].values())


def test_results_are_appended_and_the_same_seed_gives_the_same_scores(evaluate, run, paths, tmp_path):
    output = tmp_path / "elsewhere" / "all.jsonl"
    for _ in range(2):
        assert evaluate("linear", "lowshot", "--run", run, *paths, *FAST, "--results", output).code == 0
    lines = [(r.metric, r.seed, r.value) for r in results.read(output)]
    assert len(lines) == 22 and lines[:11] == lines[11:]
    assert not (run / "results.jsonl").exists()


def test_zeroshot_needs_no_training_data(evaluate, lit_run, files):
    arguments = ("zeroshot", "--run", lit_run, "--data", files.test, "--classes", files.classes)
    outcome = evaluate(*arguments, "--templates", "drawings")
    assert outcome.code == 0, outcome.err
    lines = list(results.read(lit_run / "results.jsonl"))
    assert [line.metric for line in lines[:3]] == ["top1", "top5", "mean_per_class"]
    assert all(line.metric.startswith("hierarchy/") for line in lines[3:]) and lines[3:]
    assert len(list((lit_run / "confusion").glob("zeroshot-*.json"))) == 1
    assert set(lines[0].hashes) == {"weights", "data", "classes", "templates"}
    assert lines[0].config["zeroshot"] == {"templates": "drawings"} and lines[0].lineage == ["mae", "wsp", "lit"]
    assert evaluate(*arguments).code == 0
    assert [line.hashes["templates"] for line in results.read(lit_run / "results.jsonl")][-1] != lines[0].hashes[
        "templates"
    ]


def test_zeroshot_with_a_bundled_set_in_another_language(evaluate, lit_run, files):
    arguments = ("zeroshot", "--run", lit_run, "--data", files.test, "--classes", "imagenet1k")
    assert evaluate(*arguments, "--language", "it", "--templates", "default").code == 0
    line = next(results.read(lit_run / "results.jsonl"))
    assert line.config["paths"]["classes"] == "imagenet1k" and line.config["num_classes"] == 1000
    assert line.config["language"] == "it"
    assert line.config["chosen"] == {"templates": "default", "language": "it"}
    assert line.hashes["classes"] == read_classes("imagenet1k", "it").sha256
    assert line.hashes["templates"] == read_templates("default.it").sha256


def test_class_sets_are_listed(evaluate):
    every = evaluate("classes")
    assert every.code == 0 and "imagenet1k     1000     80         en ar it ja zh  objects" in every.out
    one = evaluate("classes", "oxford-pets")
    assert "Oxford-IIIT Pets: 37 classes, language en" in one.out and "openai/CLIP data/prompts.md" in one.out
    assert "  a photo of a {}, a type of pet." in one.out and "\n36  yorkshire terrier\n" in one.out
    assert "\n0    una tinca" in evaluate("classes", "imagenet1k", "--language", "it").out


def test_a_lit_run_has_an_image_tower_for_probes(evaluate, lit_run, paths):
    assert evaluate("knn", "zeroshot", "--run", lit_run, *paths).code == 0


def test_a_release_folder_alone_will_do(evaluate, run, paths, tmp_path):
    moved = (run / "release").rename(tmp_path / "released")
    assert evaluate("knn", "--run", moved, *paths, "--results", tmp_path / "r.jsonl").code == 0


def refused(outcome, code: int, *messages: str) -> None:
    assert outcome.code == code, outcome.err
    last = outcome.err.strip().splitlines()[-1]
    assert last.startswith("error: ") and "Traceback" not in outcome.err
    for message in messages:
        assert message in last


def test_wrong_usage_is_told(evaluate, run, paths, files):
    refused(evaluate("knn", "--run", run, *paths, "--tain", "x"), 2, "unrecognized arguments: --tain x")
    refused(evaluate("knn", "--data", files.test), 2, "the following arguments are required: --run")
    refused(evaluate(), 2, "the following arguments are required: EVALUATOR")
    refused(evaluate("linaer", "--run", run, *paths), 2, "no evaluator 'linaer'; did you mean linear?")
    refused(evaluate("knn", "--run", run, "--data", files.test), 2, "knn learns from labelled images", "--train PATH")
    refused(evaluate("knn", "--run", run, *paths, "--templates", "default"), 2, "--templates belongs to zeroshot")
    refused(evaluate("classes", "imagenet2k"), 2, "neither a bundled class set nor a file; did you mean imagenet1k?")
    refused(evaluate("classes", "cifar10", "--run", "x"), 2, "--run x; see `python -m eval classes --help`")
    bare = ("knn", "--run", run, "--train", files.train, "--data", files.test)
    refused(evaluate(*bare, "--classes", "food1001"), 2, "--classes food1001: neither", "did you mean food101?")
    refused(evaluate(*bare, "--language", "fr"), 2, "--language translates class names: say which with --classes")
    refused(evaluate(*bare, "--classes", "food101", "--language", "fr"), 2, "food101 have no synsets", "there in: en")
    refused(evaluate("knn", "--run", run, *paths, "--device", "abacus"), 2, "--device abacus cannot be used here")
    refused(evaluate("knn", "--run", run, *paths, "--seed", "x"), 2, "argument --seed: invalid int value: 'x'")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("k", "--set k: expected key=value"),
        ("temperatur=1", "knn, lowshot has no setting 'temperatur'; did you mean temperature?"),
        ("vpt.step=1", "knn, lowshot has no setting 'vpt.step'; did you mean vpt.steps?"),
        ("knn.seeds=1", "knn has no setting 'seeds'"),
        ("linear.l2=x", "--set linear.l2=x: 'x' is not a number"),
        ("vpt.steps=1.5", "'1.5' is not a whole number"),
        ("knn.k=0", "--set knn.k=0: k must be one or more whole numbers from 1"),
        ("methods=vpt,adapter", "unknown method 'adapter', there are: linear, ridge, msn, vpt"),
        ("zeroshot.templates=x", "'zeroshot' is not among the evaluators asked for: knn, lowshot"),
        ("vpt.flip=maybe", "expected true or false"),
    ],
)
def test_wrong_settings_are_told(evaluate, run, paths, setting, message):
    refused(evaluate("knn", "lowshot", "--run", run, *paths, "--set", setting), 2, message)


def test_missing_and_unfinished_runs_are_told(evaluate, paths, tmp_path):
    refused(evaluate("knn", "--run", tmp_path / "no", *paths), 1, "holds no trained model")
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    refused(evaluate("knn", "--run", tmp_path / "begun", *paths), 1, "is a run that is not finished")


def test_pictures_that_are_not_there_are_told_before_weights_are_read(evaluate, files, tmp_path):
    train, run = ("--train", files.train), ("--run", tmp_path / "no run")
    refused(evaluate("knn", *run, *train, "--data", tmp_path / "no"), 1, "--data ", "no: no such file or folder")
    refused(evaluate("knn", *run, *train), 2, "the following arguments are required: --data")
    refused(evaluate("knn", *run, *train, "--data", f"imagenet1k={tmp_path}"), 1, "holds no trained model")


def test_zeroshot_of_a_run_without_text_tower_is_refused_before_any_work(evaluate, run, paths):
    outcome = evaluate("knn", "zeroshot", "--run", run, *paths)
    refused(outcome, 2, "zeroshot needs a text tower, and", "is a wsp run; stages with a text tower: lit")
    assert not (run / "results.jsonl").exists() and not (run / "features").exists()


def test_zeroshot_without_class_names_is_refused(evaluate, lit_run, files):
    refused(evaluate("zeroshot", "--run", lit_run, "--data", files.test), 2, "give them with --classes classes.json")


def test_data_errors_are_told(evaluate, run, files, tmp_path):
    train, test = corpus("train", 2), corpus("test", 1)
    bare = write_parquet(tmp_path / "bare.parquet", key=test.keys, image=test.images)
    common = ("knn", "--run", run, "--train", files.train, "--classes", files.classes)
    refused(evaluate(*common, "--data", bare), 1, "has no 'label' column")
    broken = write_parquet(tmp_path / "b.parquet", key=test.keys, image=[b"x", *test.images[1:]], label=test.labels)
    refused(
        evaluate(*common, "--data", broken), 1, "more than 1% of the 7 pictures", "'test-red-0' (unsupported_format)"
    )
    pictures = write_parquet(tmp_path / "p.parquet", key=train.keys, image=train.images)
    labels = write_parquet(tmp_path / "l.parquet", key=train.keys[1:], label=train.labels[1:])
    outcome = evaluate(
        "knn", "--run", run, "--train", pictures, "--train-labels", labels, "--data", files.test,
        "--classes", files.classes,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    result = next(results.read(run / "results.jsonl"))
    assert result.config["left_out"]["train"] == {"not_in_labels_file": 1} and result.config["images"]["train"] == 13


def test_the_report_gets_its_arguments(evaluate, tmp_path):
    outcome = evaluate("report", tmp_path / "nothing")
    assert outcome.code != 0 and "Traceback" not in outcome.err


def test_as_a_command(files, tmp_path):
    """The real process, without a classes.json; a wrong flag is told in one line, before anything heavy is imported."""
    run = write_run(tmp_path / "mae", atto().state_dict(), ["mae"])
    command = [sys.executable, "-m", "eval", "knn", "--train", files.train, "--data", files.test, "--run", run]
    good = subprocess.run(command, capture_output=True, text=True)
    assert good.returncode == 0, good.stderr
    assert "training data: 42 pictures" in good.stderr and "encoder: mae" in good.stderr
    bad = subprocess.run([*command, "--tain"], capture_output=True, text=True)
    assert bad.returncode == 2
    assert bad.stderr == "error: unrecognized arguments: --tain; see `python -m eval --help`\n"


def test_a_misspelt_class_set_or_template_file_is_told_before_torch_is_imported():
    code = (
        "import sys; from eval.__main__ import main; "
        "a = [main(['zeroshot', '--run', 'r', '--data', 'd', *more]) for more in "
        "(['--classes', 'food1'], ['--templates', 'drawing'])]; assert a == [2, 1] and 'torch' not in sys.modules, a"
    )
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    assert "did you mean food101?" in outcome.stderr and "did you mean drawings?" in outcome.stderr
