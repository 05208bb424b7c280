"""Scores beside the papers' figures: which are comparable, and by how much they differ."""

import json

import pytest

from eval.report_papers import FIGURES, figures, pairs, task
from eval.results import Result
from maws.models.vit import VARIANTS


def scored(value=0.8, evaluator="linear", metric="top1", lineage=("mae", "wsp"), whole=True, data=("imagenet1k", "val"),
           variant="vit_b16", size=224, seed=0, run="runs/x", **config) -> Result:  # fmt: skip
    name, split = data
    config = {
        "published": {"data": {"name": name, "split": split, "whole": whole}},
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


def test_the_fine_tuned_model_is_compared_by_its_pretraining():
    tuned = scored(0.9, "finetune", lineage=("mae", "wsp", "finetune"), variant="vit_l16", size=512)
    found = [pair for pair in pairs([tuned]) if pair.alike]
    assert [(p.paper.value, p.paper.resolution) for p in found] == [(88.8, 518)]


def test_partial_fine_tuning_is_a_task_of_its_own():
    assert task(scored(evaluator="finetune", trainable="half")) == ("partial-half", "top1")
    assert task(scored(evaluator="finetune", trainable="last 1")) == ("partial-1", "top1")
    assert task(scored(evaluator="finetune", trainable="all")) == ("finetune", "top1")


def test_every_figure_names_its_table_and_a_size_that_there_is():
    assert len(figures()) > 100
    for figure in figures():
        assert figure.variant in VARIANTS and 0 < figure.value < 100 and figure.where, figure
    listed = [json.dumps(one, sort_keys=True) for one in json.loads(FIGURES.read_bytes())]
    assert len(set(listed)) == len(listed)
