"""A transfer's grid: what is held out, what is chosen on what, what is told, and going on after an interruption."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.errors import DataError, UsageError, UserError
from eval import transfer, transfer_linear
from eval.__main__ import Parser
from eval.results import read
from eval.transfers import Grid, Outcome, Point, hold_out, table
from tests.eval.conftest import atto, write_run

SMALL = Grid(lr=(1e-1, 1e-3), weight_decay=(0.0,), epochs=3, held_out=0.3)


def test_the_point_is_chosen_on_the_held_out_part_and_never_on_the_evaluation_data():
    points = (Point(1e-3, 0.05, 0, held_out=0.6, test=0.5), Point(1e-4, 0.05, 0, held_out=0.4, test=0.9))
    found = Outcome("pets", "linear", 100, 20, 10, points)
    assert (found.chosen, found.score) == ((1e-3, 0.05), 0.5)
    assert found.best == (1e-4, 0.05)  # as the papers report
    assert found.grid == pytest.approx((0.7, np.std([0.5, 0.9], ddof=1)))
    assert replace(found, refits=((0, 0.55),)).score == 0.55
    text = "\n".join(table([found, replace(found, name="cars")]))
    assert "mean of 2 sets" in text and "too high by choice" in text


def test_a_point_counts_with_the_mean_over_its_seeds():
    points = (Point(1, 0, 0, 0.9, 0.1), Point(1, 0, 1, 0.1, 0.3), Point(2, 0, 0, 0.6, 0.5), Point(2, 0, 1, 0.6, 0.7))
    found = Outcome("a", "linear", 10, 5, 2, points)
    assert found.chosen == (2, 0) and found.scores == [(0, 0.5), (1, 0.7)]


def test_a_share_of_every_class_is_held_out_and_a_class_never_empties():
    labels = np.repeat(np.arange(5), [1, 2, 10, 40, 3])
    labels = np.random.default_rng(0).permutation(labels)
    held = hold_out(labels, Grid(held_out=0.25))
    assert [int(held[labels == c].sum()) for c in range(5)] == [0, 1, 2, 10, 1]
    np.testing.assert_array_equal(held, hold_out(labels, Grid(held_out=0.25)))
    with pytest.raises(DataError, match="nothing can be held out"):
        hold_out(np.arange(5), Grid())
    few = hold_out(labels, Grid(held_out=0.25, most_held_out=4))
    assert few.sum() < held.sum()


def test_the_linear_head_is_adamw_on_standardised_features():
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 5, generator=rng) * 3 + 1, torch.randint(0, 3, (40,), generator=rng)
    grid = replace(SMALL, batch=40, epochs=4)
    head = transfer_linear.fit(x, y, 3, lr=0.05, decay=0.1, grid=grid, seed=0)
    z = (x - x.mean(0)) / x.std(0, correction=0)
    weight, bias = torch.zeros(3, 5), torch.zeros(3)
    moments = [torch.zeros(3, 5), torch.zeros(3, 5), torch.zeros(3), torch.zeros(3)]
    for step in range(4):  # by hand: one batch is an epoch
        lr = 0.05 * 40 / 256 * 0.5 * (1 + np.cos(np.pi * step / 4))
        error = ((z @ weight.T + bias).softmax(1) - torch.eye(3)[y]) / 40
        for value, gradient, decay, (m, v) in (
            (weight, error.T @ z, 0.1, moments[:2]), (bias, error.sum(0), 0.0, moments[2:]),
        ):  # fmt: skip
            value.mul_(1 - lr * decay)
            m.mul_(0.9).add_(0.1 * gradient)
            v.mul_(0.999).add_(0.001 * gradient**2)
            value.sub_(lr * (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8))
    torch.testing.assert_close(head.weight, weight, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(head.bias, bias, atol=1e-5, rtol=1e-4)


@pytest.fixture
def arguments(files, tmp_path) -> list[str]:
    run = write_run(tmp_path / "wsp", atto().state_dict(), ["wsp"])
    given = ["--init-from", run, "--train", files.train, "--data", files.test, "--classes", files.classes, "--output",
             tmp_path / "out", "--method", "linear", "--set", "lr=0.1,0.001", "weight_decay=0,0.1", "epochs=3",
             "held_out=0.3", "--device", "cpu"]  # fmt: skip
    return [str(one) for one in given]


def test_a_grid_that_was_interrupted_goes_on_and_writes_no_line_twice(arguments, tmp_path, monkeypatch, capsys):
    real, calls = transfer_linear.point, []

    def dies(*given, stop=2):
        if len(calls) == stop:
            raise KeyboardInterrupt
        calls.append(given[4:6])
        return real(*given)

    monkeypatch.setattr(transfer_linear, "point", dies)
    with pytest.raises(KeyboardInterrupt):
        transfer.main(arguments, Parser)
    file = tmp_path / "out" / "test" / "points.jsonl"
    file.write_text(file.read_text() + '{"identity": "half a li')  # a writer that was killed
    monkeypatch.setattr(transfer_linear, "point", lambda *given: dies(*given, stop=99))
    assert transfer.main(arguments, Parser) == 0
    assert calls == [(0.1, 0.0), (0.1, 0.1), (0.001, 0.0), (0.001, 0.1)]  # each point once
    lines = list(read(tmp_path / "out" / "results.jsonl"))
    assert transfer.main(arguments, Parser) == 0
    assert list(read(tmp_path / "out" / "results.jsonl")) == lines and len(calls) == 4
    told = {line.metric: line for line in lines}
    assert set(told) == {"linear/top1", "linear/best_of_grid/top1", "linear/grid_mean/top1"}
    assert all(line.config["protocol"] == "transfer" for line in lines)
    assert "held-out training pictures" in told["linear/top1"].config["chosen"]["on"]
    assert told["linear/best_of_grid/top1"].config["chosen"]["on"] == "the evaluation data"
    summary = json.loads((tmp_path / "out" / "transfer.json").read_text())
    assert summary["mean"] == told["linear/top1"].value
    assert "chosen" in capsys.readouterr().out


def test_points_of_other_weights_are_not_taken_over(arguments, tmp_path):
    assert transfer.main(arguments, Parser) == 0
    other = write_run(tmp_path / "other", atto(1).state_dict(), ["wsp"])
    arguments[1] = str(other)
    assert transfer.main(arguments, Parser) == 0
    kept = [json.loads(line)["identity"] for line in (tmp_path / "out/test/points.jsonl").read_text().splitlines()]
    assert len(kept) == 8 and len(set(kept)) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"--data": ["a.parquet"]}, "names 2 sets and --data 1"),
        ({"--train": ["pets=/x", "cars=/y"], "--data": ["cars=/y", "pets=/x"]}, "give them in order"),
        ({"--data": ["x/a.parquet", "x/a.parquet"]}, "names of their own"),
        ({"--set": ["lrs=1"]}, "did you mean lr?"),
        ({"--set": ["lr=0"]}, "one lr above 0"),
        ({"--set": ["epochs=many"]}, "not a float"),
    ],
)
def test_a_call_that_cannot_be_meant_is_refused_with_the_way_out(changes, words):
    given = {"--init-from": ["run"], "--output": ["out"], "--train": ["t/a", "t/b"], "--data": ["e/a", "e/b"]} | changes
    with pytest.raises(UsageError, match=words.replace("?", r"\?")):
        transfer.main([part for flag, values in given.items() for part in (flag, *values)], Parser)


def test_sets_in_folders_of_one_name_have_the_name_of_the_folder_above_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def names(*data: str) -> list[str]:
        given = ["--init-from", "run", "--output", "out", "--train", *data, "--data", *data]
        return [pair.name for pair in transfer.pairs_of(transfer.parser(Parser).parse_args(given))]

    assert names("cub/test", "cars/test") == ["cub_test", "cars_test"]
    assert names("inat2018:val=/d", "x/pets.parquet") == ["inat2018", "pets"]
    assert names(".") == [tmp_path.name]  # never the output folder itself, or the one above


def test_what_finetuning_would_refuse_is_refused_before_a_picture_is_copied(arguments, tmp_path):
    arguments[arguments.index("linear")] = "finetune"
    for more, words in (
        (["--preset", "vit_b17"], "did you mean"), (["--train-set", "optim.lr=1"], "the grid sets this itself"),
        (["--train-set", "smothing=1"], "did you mean smoothing"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=words):
            transfer.main([*arguments, *more], Parser)
    with pytest.raises(UserError, match="holds no trained model"):
        transfer.main([arguments[0], str(tmp_path / "nothing"), *arguments[2:]], Parser)
    assert not list((tmp_path / "out").glob("*/"))


def test_every_point_of_finetuning_is_one_training_and_two_evaluations(tmp_path):
    from eval import transfer_finetune as by_finetuning

    args = transfer.parser(Parser).parse_args(
        ["--init-from", "runs/x", "--train", "t", "--data", "inat2018=/d", "--output", "o", "--preset", "debug"]
    )
    pair = transfer.Pair("inat2018", "inat2018=/d", "inat2018=/d", "", "")
    one = by_finetuning.Prepared(pair, Path("o/inat2018"), 10, 5, 3)
    steps = by_finetuning.grid_steps(one, Grid(), args, ("python",))
    trainings = [" ".join(step.command) for step in steps if "--stage" in step.command]
    assert len(steps) == 3 * 8 and len(trainings) == len(set(trainings)) == 8
    assert "--stage finetune --preset debug --init-from runs/x --run o/inat2018/lr0.00025_wd0.1_s0" in trainings[5]
    assert "optim.lr=0.00025 optim.weight_decay=0.1 optim.length=100 epochs" in trainings[5]
    assert "runs/x/release/model*.safetensors" in steps[0].inputs  # of another backbone nothing is skipped
    held, evaluation = (" ".join(step.command) for step in steps[1:3])
    assert "--data o/inat2018/held_out.parquet --classes o/inat2018/classes.json" in held
    assert "--data inat2018=/d" in evaluation and "--classes" not in evaluation


@pytest.mark.slow
def test_a_real_grid_by_finetuning(arguments, tmp_path, capsys):
    arguments[arguments.index("linear")] = "finetune"
    arguments += ["--preset", "debug", "lr=0.002,0.0001"][:2]
    arguments[arguments.index("lr=0.1,0.001")] = "lr=0.002,0.0001"
    arguments[arguments.index("weight_decay=0,0.1")] = "weight_decay=0.05"
    assert transfer.main(arguments, Parser) == 0
    lines = {line.metric: line for line in read(tmp_path / "out" / "results.jsonl")}
    assert set(lines) == {"finetune/top1", "finetune/best_of_grid/top1", "finetune/grid_mean/top1"}
    facts = lines["finetune/top1"].config
    assert (facts["transfer"]["preset"], facts["precision"], facts["preprocess"]["image_size"]) == ("debug", "fp32", 32)
    capsys.readouterr()
    assert transfer.main(arguments, Parser) == 0
    assert capsys.readouterr().out.count("skipped") == 2 * 3 + 2
