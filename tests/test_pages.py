"""What the pages in docs/ say exists: commands with their flags and settings, links, files, class sets."""

import re

import pytest
from pages import ROOT, accept, commands

from eval import class_files

PAGES = ("lit", "zero_shot", "weights", "training", "evaluation", "finetuning", "comparing")
TEXTS = {name: (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in PAGES}


@pytest.mark.parametrize(
    ("page", "command"), [(page, command) for page, text in TEXTS.items() for command in commands(text)]
)
def test_flags_names_and_settings_of_a_page_are_accepted(page, command):
    accept(command)


@pytest.mark.parametrize("page", PAGES)
def test_links_and_files_that_a_page_names_exist(page):
    text = TEXTS[page]
    for name in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / "docs" / name).exists(), name
    for name in re.findall(r"[`(]((?:maws|eval|data_pipeline|tests|demo|benchmarks|ds_configs)/[\w./-]*)[`)]", text):
        assert (ROOT / name).exists(), name
    headings = {
        re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= headings


def test_the_class_sets_that_the_page_lists_are_those_that_are_bundled():
    table = TEXTS["zero_shot"].split("### Class sets that are there")[1].split("###")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("|")][2:]
    listed = {name for row in rows for name in row.replace("·", " ").split()}
    assert listed == {name for name in class_files.bundled() if "." not in name}


def test_every_page_is_reached_from_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    everything = readme + "".join(TEXTS.values()) + (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert f"docs/{page.name}" in readme or f"({page.name}" in everything, page.name
