"""What a shard set knows of the evaluation pictures stands beside every score."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.build import build
from data_pipeline.runners.local import LocalRunner
from data_pipeline.shardset import ShardSet
from data_pipeline.steps import Settings
from eval import contamination, report, results
from eval.datasets import open_data, open_training
from eval.write_shards import write
from tests.eval.conftest import Files, corpus, write_parquet


def make_shards(folder: Path, files: Files, action: str = "remove", evaluation: bool = True) -> Path:
    """A training set with two of the 28 evaluation pictures in it."""
    train, test = corpus("train", 2), corpus("test", 4, start=100)
    rows = [
        {"key": key, "image": image, "caption": "#dog"}
        for key, image in zip([*train.keys, "a", "b"], [*train.images, *test.images[:2]], strict=True)
    ]
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "in.parquet")
    settings = Settings(eval_action=action, near_duplicates=None, senses="first")
    with LocalRunner(1) as runner:
        sets = [files.test] if evaluation else []
        build([folder / "in.parquet"], folder / "shards", settings, runner, evaluation=sets)
    return folder / "shards"


@pytest.fixture(scope="module")
def removed(tmp_path_factory, files) -> Path:
    return make_shards(tmp_path_factory.mktemp("removed") / "x", files)


def write_config(run: Path, shards: Path, init_from: str = "") -> None:
    run.mkdir(parents=True, exist_ok=True)
    sha256 = ShardSet.open(shards).sha256
    config = {"data": {"shards": str(shards)}, "shards_sha256": sha256, "init_from": init_from}
    (run / "config.json").write_text(json.dumps(config))


def test_every_result_says_how_many_of_its_pictures_were_in_the_training_data(evaluate, run, files, removed):
    write_config(run, removed)
    outcome = evaluate("knn", "--run", run, "--train", files.train, "--data", files.test, "--classes", files.classes)
    assert outcome.code == 0, outcome.err
    assert "28 pictures were looked for, 2 had one (2 exact, 0 near), which was removed" in outcome.out
    lines = list(results.read(run / "results.jsonl"))
    expected = {
        "status": "checked",
        "pictures": 28,
        "checked": 28,
        "exact": 2,
        "near": 0,
        "left_in_training": 0,
        "shards": [ShardSet.open(removed).sha256],
    }
    assert [line.contamination for line in lines] == [expected] * len(lines)
    assert contamination.sentences(lines)[0].startswith(f"{run}: copies of evaluation pictures")


def test_copies_that_were_only_reported_are_said_to_be_left_in(run, files, tmp_path):
    write_config(run, make_shards(tmp_path / "x", files, action="report"))
    found = contamination.look_up(run, open_data([files.test], classes=files.classes).test)
    assert (found["exact"], found["left_in_training"]) == (2, 2)
    assert "left in" in contamination.sentence(found)


def test_a_part_of_the_set_in_another_file_is_known_too(run, tmp_path, files, removed):
    write_config(run, removed)
    test, new = corpus("other", 2, start=100), corpus("new", 1, start=200)
    part = write_parquet(tmp_path / "part.parquet", key=test.keys, image=test.images, label=test.labels)
    found = contamination.look_up(run, open_data([part]).test)
    assert (found["status"], found["pictures"], found["exact"]) == ("checked", 14, 2)
    more = write_parquet(tmp_path / "more.parquet", key=[*test.keys, *new.keys], image=[*test.images, *new.images],
                         label=[*test.labels, *new.labels])  # fmt: skip
    found = contamination.look_up(run, open_data([more]).test)
    assert (found["status"], found["pictures"], found["checked"]) == ("partly checked", 21, 14)
    assert "14 of 21" in contamination.sentence(found)
    other = write_parquet(tmp_path / "other.parquet", key=new.keys, image=new.images, label=new.labels)
    found = contamination.look_up(run, open_data([other]).test)
    assert found["status"] == "not checked"
    assert "other pictures only" in found["why"]


def test_the_runs_it_started_from_are_asked_too(run, files, removed, tmp_path):
    unchecked = make_shards(tmp_path / "x", files, evaluation=False)
    test = open_data([files.test], classes=files.classes).test
    write_config(tmp_path / "mae", removed)
    write_config(run, removed, init_from=str(tmp_path / "mae"))
    assert contamination.look_up(run, test)["status"] == "checked"
    write_config(tmp_path / "mae", unchecked)
    found = contamination.look_up(run, test)
    assert found["status"] == "not checked"
    assert "built without --exclude-eval" in found["why"]


def test_of_a_labelled_shard_set_nothing_is_claimed_and_no_flag_is_asked_for_that_it_has_not(run, files, tmp_path):
    classes, dataset = open_training([files.train], files.classes)
    write(dataset, classes, tmp_path / "s")
    write_config(run, tmp_path / "s")
    found = contamination.look_up(run, open_data([files.test], classes=files.classes).test)
    assert found["status"] == "not checked" and "is a labelled set" in found["why"]


def test_what_cannot_be_known_is_said_to_be_not_checked(run, files, removed, tmp_path):
    test = open_data([files.test], classes=files.classes).test

    def why() -> str:
        found = contamination.look_up(run, test)
        assert found["status"] == "not checked"
        assert found["why"] in contamination.sentence(found)
        return found["why"]

    assert "no run folder" in why()
    write_config(run, removed, init_from=str(run))
    assert "starts from itself" in why()
    write_config(run, removed)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"shards_sha256": "0" * 64}))
    assert "has changed" in why()
    (run / "config.json").write_text(json.dumps(config | {"data": {"shards": str(tmp_path / "gone")}}))
    assert "no longer there" in why()
    (run / "config.json").write_text("[]")
    assert "damaged" in why()
    assert "older than the check" in contamination.sentence({})


def test_of_several_sets_it_is_told_which_one_is_meant():
    one = {"status": "checked", "pictures": 28, "checked": 28, "exact": 0, "near": 0, "left_in_training": 0}
    other = one | {"pictures": 10, "checked": 10}
    assert contamination.by_set([("data", one)]) == [contamination.sentence(one)]
    found = {"imagenet1k:val": one, "imagenet-v2:test": other, "objectnet:test": one}
    lines = [f"imagenet1k:val, objectnet:test: {contamination.sentence(one)}",
             f"imagenet-v2:test: {contamination.sentence(other)}"]  # fmt: skip
    assert contamination.by_set(found.items()) == lines
    scores = [results.Result(run="a", evaluator="robustness", metric="top1", value=0.5, n=28, seed=0, lineage=["mae"],
                             hashes={}, time="", contamination=known, config={"paths": {"data": [name]}})
              for name, known in found.items()]  # fmt: skip
    assert contamination.sentences(scores) == [f"a ({line.replace(': copies', '): copies')}." for line in lines]


def test_the_page_shows_it_beside_the_scores(tmp_path):
    known = {"status": "checked", "pictures": 28, "checked": 28, "exact": 0, "near": 0, "left_in_training": 0}
    line = {"evaluator": "knn", "metric": "top1", "value": 0.5, "n": 28, "seed": 0, "config": {}, "hashes": {},
            "lineage": ["mae"], "time": "2026-01-01"}  # fmt: skip
    results.append(tmp_path / "results.jsonl", [results.Result(run="a", contamination=known, **line)])
    results.append(tmp_path / "results.jsonl", [results.Result(run="b", **line)])
    page = report.render(tmp_path)
    assert "a: copies of evaluation pictures in the training data: 28 pictures were looked for, none has one." in page
    assert "b: copies of evaluation pictures in the training data: not checked" in page
