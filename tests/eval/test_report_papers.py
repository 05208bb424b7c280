"""Scores beside the papers' figures: which are comparable, and by how much they differ."""

import json

import pytest

from eval.published import registry
from eval.report_papers import FIGURES, figures, pairs, task
from eval.results import Result
from maws.config import STAGE_NAMES
from maws.models.vit import VARIANTS


def scored(value=0.8, evaluator="linear", metric="top1", lineage=("mae", "wsp"), whole=True, data=("imagenet1k", "val"),
           variant="vit_b16", size=224, seed=0, run="runs/x", **config) -> Result:  # fmt: skip
    name, split = data
    config = {
        "published": {
            "data": {"name": name, "split": split, "whole": whole},
            "train": {"name": name, "split": "train", "whole": True},
        },
        "model": {"variant": variant, "image_size": size}, **config,
    }  # fmt: skip
    return Result(
        run=run, evaluator=evaluator, metric=metric, value=value, n=50000, seed=seed, config=config,
        hashes={"data": "d", "classes": "c"}, lineage=list(lineage), time="2026-11-22T00:00:00+00:00",
    )  # fmt: skip


def test_a_score_stands_beside_the_figure_of_its_size_and_stages():
    alike = [pair for pair in pairs([scored(0.801)]) if pair.alike]
    assert [(p.paper.where, p.paper.model, p.paper.value) for p in alike] == [("Table 9", "MAWS", 82.8)]
    assert alike[0].delta == pytest.approx(-2.7)


def test_the_mean_over_draws_is_compared():
    draws = [
        scored(value, "lowshot", "5-shot/vpt/top1", variant="vit_h14", seed=seed)
        for seed, value in enumerate((0.7, 0.8))
    ]
    found = [pair for pair in pairs(draws) if pair.alike]
    assert [(p.paper.value, p.ours.count) for p in found] == [(79.8, 2)]
    assert found[0].delta == pytest.approx(75.0 - 79.8)


@pytest.mark.parametrize(
    "score",
    [
        scored(whole=False),
        scored(data=("imagenet1k", "train")),
        scored(evaluator="knn", metric="top1@k=20"),
        scored(metric="top5"),
        scored(published=None),
        scored(published={"data": "imagenet1k"}),
    ],
    ids=["part of the set", "another split", "no paper has it", "another metric", "own data", "damaged"],
)
def test_what_is_not_the_papers_evaluation_has_no_figures(score):
    assert pairs([score]) == []


def test_scores_of_other_features_settings_and_languages_are_not_averaged():
    linear = [scored(value, metric=f"{kind}/top1") for kind, value in (("cls", 0.8), ("mean", 0.7))]
    found = [(p.ours.score, p.ours.value, p.ours.count) for p in pairs(linear) if p.alike]
    assert found == [("cls/top1", 80.0, 1), ("mean/top1", 70.0, 1)]
    precise = [scored(value, precision=precision) for precision, value in (("fp32", 0.8), ("bf16", 0.7))]
    assert [(p.ours.how, p.ours.value) for p in pairs(precise) if p.alike] == [("fp32", 80.0), ("bf16", 70.0)]
    named = [
        scored(value, "zeroshot", lineage=("mae", "wsp", "lit"), chosen={"language": spoken})
        for spoken, value in (("en", 0.7), ("fr", 0.6))
    ]
    assert [(p.ours.how, p.ours.value) for p in pairs(named) if p.alike] == [("", 70.0), ("fr", 60.0)]


@pytest.mark.parametrize(
    "train",
    [None, {"whole": False}, {"name": "places365"}, {"split": "val"}],
    ids=["own pictures", "a part of it", "another set", "the evaluation pictures"],
)
def test_a_probe_is_compared_only_where_it_learnt_from_the_whole_training_split(train):
    own = scored().config["published"]
    known = own | {"train": own["train"] | train} if train else {"data": own["data"]}
    assert pairs([scored()]) and pairs([scored(published=known)]) == []
    zeroshot = {"evaluator": "zeroshot", "lineage": ("mae", "wsp", "lit")}
    assert pairs([scored(**zeroshot, published=known)])


def test_a_set_of_which_some_pictures_could_not_be_read_has_no_figures():
    assert pairs([scored(images={"data": 50000, "train": 3})])
    assert pairs([scored(images={"data": 50001, "train": 3})]) == []


def test_the_fine_tuned_model_is_compared_by_its_pretraining():
    tuned = scored(0.9, "finetune", lineage=("mae", "wsp", "finetune"), variant="vit_l16", size=512)
    found = [pair for pair in pairs([tuned]) if pair.alike]
    assert sorted((p.paper.value, p.paper.resolution) for p in found) == [(88.796, 518), (88.8, 518)]


def test_partial_fine_tuning_is_a_task_of_its_own():
    assert task(scored(evaluator="finetune", trainable="half")) == ("partial-half", "top1")
    assert task(scored(evaluator="finetune", trainable="last 1")) == ("partial-1", "top1")
    assert task(scored(evaluator="finetune", trainable="all")) == ("finetune", "top1")


def test_every_figure_names_its_table_and_a_size_that_there_is():
    assert len(figures()) > 100
    for figure in figures():
        assert figure.variant in VARIANTS and 0 < figure.value < 100 and figure.where, figure
        assert set(figure.lineage) <= STAGE_NAMES.keys(), figure
    listed = [json.dumps(one, sort_keys=True) for one in json.loads(FIGURES.read_bytes())]
    assert len(set(listed)) == len(listed)


def test_every_figure_is_on_a_split_that_scores_can_be_on():
    """Else it would stand in the file and never on a page."""
    factors = {f"si-score-{factor}/test" for factor in registry.find("si-score").splits}
    for data in {figure.data for figure in figures()} - factors:
        name, split = data.split("/")
        assert registry.find(name).name == name and registry.find(name).evaluate == split, data
