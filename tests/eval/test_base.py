"""Every file in evaluators/ is an evaluator; settings reach the right one, with the right type."""

import dataclasses

import pytest

from data_pipeline.errors import UsageError
from eval import base


@pytest.mark.parametrize("name", base.names())
def test_every_file_is_an_evaluator_with_frozen_defaults(name):
    entry = base.load(name)
    assert isinstance(entry.config, base.EvaluatorConfig)
    assert isinstance(entry.make.needs_train, bool) and isinstance(entry.make.needs_text, bool)
    assert callable(entry.make.run)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(entry.config, [*base.keys(entry.config), "anything"][0].partition(".")[0], 1)


def test_the_evaluators_are_found():
    assert base.names() == [
        "attention", "finetune", "knn", "linear", "lowshot", "occlusion", "retrieval", "robustness", "spectrum",
        "wsphead", "zeroshot",
    ]  # fmt: skip


def configured(*settings: str) -> dict:
    entries = base.configure([base.load(name) for name in ("knn", "linear", "lowshot")], settings)
    return {entry.name: entry.config for entry in entries}


def test_a_setting_reaches_every_evaluator_that_has_it_or_the_named_one():
    configs = configured("k=3", "lowshot.k=2,4", "vpt.steps=7", "lowshot.linear.l2=0.5", "linear.l2=0.1,1e-3")
    assert configs["knn"].k == (3,) and configs["lowshot"].k == (2, 4)
    assert configs["lowshot"].vpt.steps == 7 and isinstance(configs["lowshot"].vpt.steps, int)
    assert configs["lowshot"].linear.l2 == (0.5,) and configs["linear"].l2 == (0.1, 0.001)


def test_a_group_can_be_set_when_an_evaluator_of_its_name_is_not_asked_for():
    (entry,) = base.configure([base.load("lowshot")], ["linear.l2=0.5", "vpt.flip=false", "methods=linear"])
    assert entry.config.linear.l2 == (0.5,)
    assert entry.config.vpt.flip is False and entry.config.methods == ("linear",)


def test_defaults_are_not_changed_by_a_setting():
    configured("k=3")
    assert base.load("knn").config.k == (1, 5, 20)


def test_a_group_itself_cannot_be_set():
    with pytest.raises(UsageError, match=r"lowshot has no setting 'vpt'; did you mean vpt\."):
        base.configure([base.load("lowshot")], ["lowshot.vpt=1"])


def test_a_seed_setting_out_of_range_is_refused():
    with pytest.raises(UsageError, match=r"--set seeds=0: .* seeds at least 1"):
        base.configure([base.load("lowshot")], ["seeds=0"])
