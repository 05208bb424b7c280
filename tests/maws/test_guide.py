"""Every command of docs/models.md does what the page says, on a small shard set; what the pages name is there."""

import json
import re
import shlex
from pathlib import Path

import pytest
from training import train_in_turn

from maws import config, stages
from maws.__main__ import main
from maws.release import open_release

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs" / "models.md"
TEXT = GUIDE.read_text(encoding="utf-8")
TRAINING = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    """The words of every line of the boxes."""
    blocks = re.findall(r"^<!-- test: run -->\n```console\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    assert len(blocks) == TEXT.count("```console")
    return [shlex.split(line.removeprefix("$ ")) for block in blocks for line in block.splitlines()]


@pytest.mark.timeout(600)
def test_the_commands_one_after_the_other(shards_path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").symlink_to(shards_path)
    trainings = []
    for words in commands():
        if words[:3] == ["python", "-m", "maws"]:
            assert main(words[3:]) == 0, words
        else:
            assert words[:2] == ["python", "maws/train.py"]
            trainings.append(words[2:])
    assert "85,798,656" in capsys.readouterr().out
    train_in_turn(trainings, folder=tmp_path)
    assert open_release("runs/pca").config["target"]["components"] == 24
    assert open_release("runs/lc_mae_wsp").lineage == ("lc_mae", "wsp")
    parity = json.loads(Path("runs/lc_mae_wsp/handover.json").read_text())["parity"]
    assert parity["difference"] <= parity["tolerance"] == 1e-4


@pytest.mark.parametrize("of", [("mae",), ("lc_mae", "simmim"), ("wsp",)], ids=" ".join)
def test_presets_that_the_page_names_exist(of):
    presets = {name for stage in of for name in stages.load(stage).PRESETS}
    heading = " and ".join(f"`{stage}`" for stage in of)
    own = re.sub(
        r"^```.*?^```$", "", TEXT.split(f"\n## {heading}")[1].split("\n## ")[0], flags=re.MULTILINE | re.DOTALL
    )
    words = {word for quoted in re.findall(r"`([^`]+)`", own) for word in quoted.split()}
    named = {w for w in words if re.fullmatch(r"(vit_|long_b|pixio|lc_simmim)[a-z0-9._]*", w)}
    assert named and named <= presets
    rows = re.search(r"`((?:block50|infonce) [^`]*)`", own)
    for row in rows[1].replace("…", "").split() if rows else []:
        assert any(name.endswith(f"_{row}") for name in presets), row


def test_the_table_of_the_page_holds_the_command_s_numbers(capsys):
    assert main(["models", "--json"]) == 0
    facts = {model["name"]: model for model in json.loads(capsys.readouterr().out)}
    rows = [line.replace(",", "").split() for line in TEXT.splitlines() if re.match(r"vit_\S+ +\d+ +\d+ ", line)]
    assert len(rows) == 5
    columns = ("image_size", "patch", "tokens", "depth", "width", "heads", "parameters", "decoder_parameters")
    for name, *numbers in rows:
        assert [int(n) for n in numbers[:8]] == [facts[name][column] for column in columns]
        macs = [facts[name][column] / 1e9 for column in ("mae_macs", "mae_macs_skipping", "wsp_macs", "lit_macs")]
        assert [float(n) for n in numbers[8:]] == pytest.approx(macs, abs=0.051)


def test_links_and_files_that_the_page_names_exist():
    for name in re.findall(r"\]\((?!http)([^)#]+)\)", TEXT):
        assert (GUIDE.parent / name).exists(), name
    for name in re.findall(r"`((?:maws|eval|data_pipeline|tests|demo|benchmarks)/[\w./-]*)`", TEXT):
        assert (ROOT / name).exists(), name


def test_settings_of_faults_that_the_training_page_names_exist():
    named = set(re.findall(r"`((?:faults|checkpoint|probe|log)\.\w+)", TRAINING))
    known = config.flatten(config.to_json(stages.preset("mae", "debug")))
    assert len(named) > 15 and named <= known.keys()
