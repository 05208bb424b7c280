"""Scores that were measured in different ways never share a row, and the row says what differs."""

from eval.report_scores import Entrant, as_text, newest, score_table
from eval.results import Result


def scored(run, value, evaluator="lowshot", metric="5-shot/vpt/top1", seed=0, train="t", **config) -> Result:
    hashes = {"data": "d", "classes": "c", "train": train}
    return Result(run=run, evaluator=evaluator, metric=metric, value=value, n=362, seed=seed, config=config,
                  hashes=hashes, lineage=["wsp"], time="2026-11-22")  # fmt: skip


ENTRANTS = [Entrant("a", ("wsp",), 0, "one recipe", 100), Entrant("b", ("mae", "wsp"), 0, "another", 100)]


def rows(*results):
    return [(row.on, sorted(row.cells)) for row in score_table(results, ENTRANTS).rows]


def test_equal_settings_share_a_row_that_says_nothing_of_them():
    steps = {"lowshot": {"vpt": {"steps": 8}, "k": [1, 5]}, "precision": "fp32"}
    others = {"lowshot": {"vpt": {"steps": 8}, "k": [5]}, "precision": "fp32"}  # k says which scores there are
    assert rows(scored("a", 0.4, **steps), scored("b", 0.5, **others)) == [("", ["MAE→WSP", "WSP"])]


def test_a_longer_schedule_is_another_row():
    short, long = {"lowshot": {"vpt": {"steps": 8}}}, {"lowshot": {"vpt": {"steps": 100}}}
    assert rows(scored("a", 0.4, **short), scored("b", 0.5, **long)) == [
        ("vpt.steps=100", ["MAE→WSP"]), ("vpt.steps=8", ["WSP"]),
    ]  # fmt: skip


def test_settings_of_another_way_keep_no_scores_apart():
    def both(**ways):
        return {"lowshot": {"budget": "fast", "linear": {"l2": [0.1]}} | ways}

    fast, long = both(vpt={"steps": 8}), both(vpt={"steps": 9}, budget="paper")
    linear = "5-shot/linear/top1"
    assert len(rows(scored("a", 0.4, metric=linear, **fast), scored("b", 0.5, metric=linear, **long))) == 1
    assert len(rows(scored("a", 0.4, **fast), scored("b", 0.5, **long))) == 2
    assert len(rows(scored("a", 0.4, **fast), scored("b", 0.5, **both(vpt={"steps": 8}, linear={"l2": [1]})))) == 2
    short = {"linear": {"l2": [0.1], "mae": {"epochs": 9}}}
    for metric, number in (("top1", 1), ("mae/top1", 2)):
        given = [scored("a", 0.4, "linear", metric, **short), scored("b", 0.5, "linear", metric, linear={"l2": [0.1]})]
        assert len(rows(*given)) == number


def test_splits_are_told_apart_by_what_they_hold_and_not_by_where_they_lie():
    drawn, given = {"lowshot": {"splits": None}}, {"lowshot": {"splits": "runs/a/splits", "chosen": "runs/a/c.json"}}
    assert rows(scored("a", 0.4, **drawn), scored("b", 0.5, **given, splits="drawn")) == [("", ["MAE→WSP", "WSP"])]
    others = rows(scored("a", 0.4, **drawn), scored("b", 0.5, **given, splits="12ab"))
    assert [on for on, _ in others] == ["splits=12ab", "splits=drawn"]


def test_what_an_older_version_did_not_say_is_counted_and_long_lists_are_cut():
    older = {"linear": {"l2": [0.1, 1.0, 10.0], "held_out": 0.2}}
    newer = {"linear": {"l2": [0.01, 0.1, 1.0, 10.0, 100.0], "held_out": [0.2], "tolerance": 1e-4, "search_images": 9}}
    both = [scored("a", 0.4, "linear", "top1", **older), scored("b", 0.5, "linear", "top1", **newer)]
    assert [on for on, _ in rows(*both)] == ["l2=0.01…100.0", "l2=0.1,1.0,10.0, 2 not said"]
    many = [scored(run, 0.4, "linear", "top1", linear=dict.fromkeys("abcdef", n)) for n, run in enumerate("ab")]
    assert [on for on, _ in rows(*many)] == [f"a={n}, b={n}, c={n}, d={n}, 2 more" for n in (0, 1)]


def test_precision_size_and_training_data_are_settings():
    plain = scored("a", 0.4, precision="fp32")
    assert rows(plain, scored("b", 0.4, precision="bf16")) == [("bf16", ["MAE→WSP"]), ("fp32", ["WSP"])]
    assert rows(plain, scored("b", 0.4, image_size_asked=448))[1] == ("448 px", ["MAE→WSP"])
    assert [on for on, _ in rows(plain, scored("b", 0.4, train="u"))] == ["trained on t", "trained on u"]


def test_the_newest_of_each_setting_is_kept_and_one_run_may_have_several():
    results = [
        scored("a", value, precision=precision) for value, precision in ((0.1, "fp32"), (0.2, "bf16"), (0.3, "fp32"))
    ]
    assert [result.value for result in newest(results)] == [0.3, 0.2]
    assert "bf16" in as_text(score_table(results, ENTRANTS))


def test_of_errors_the_lowest_is_the_best_and_single_severities_are_left_out():
    errors = {"mce": (0.9, 1.2), "corruption/fog": (0.5, 0.6), "corruption/fog/3": (0.5, 0.6), "ce/fog": (1.1, 1.3)}
    results = [
        scored(run, value, "robustness", metric)
        for metric, both in errors.items()
        for run, value in zip("ba", both, strict=True)
    ]
    table = score_table(results, ENTRANTS)
    assert {row.metric: row.best for row in table.rows} == dict.fromkeys(("mce", "corruption/fog", "ce/fog"), "MAE→WSP")
    assert all(cell.low == cell.high for row in table.rows for cell in row.cells.values())  # no share of pictures
    assert "±" not in as_text(table).split("mce")[1].splitlines()[0]
