"""Commands in the boxes of README.md and docs/: read out, and given to the parser they are for."""

import importlib
import re
import shlex
from pathlib import Path

from data_pipeline.errors import UserError
from eval import classify, listing
from eval.__main__ import MODULES, Parser
from eval.__main__ import parser as commands_of_eval
from maws import config, guard, stages, train
from maws.__main__ import parser as commands_of_maws

ROOT = Path(__file__).resolve().parents[1]


def commands(text: str) -> list[str]:
    """Every line of a page's console boxes, without prompt and comment."""
    blocks = re.findall(r"^```console\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    assert all(line.startswith("$ ") for line in lines), "a line of a box that is no command"
    return [re.sub(r"\s+# .*$", "", line.removeprefix("$ ")) for line in lines]


def accept(command: str) -> None:
    """Fails unless flags, names and settings of a command exist; files need not be there."""
    words = shlex.split(command.split(" | ")[-1].split(" > ")[0])
    if words[:3] == ["python", "-m", "maws"]:
        options, rest = commands_of_maws().parse_known_args(words[3:])
        assert not rest, rest
        if options.command in ("plan", "verify-resume"):
            config.override(stages.preset(options.stage, options.preset), options.settings)
    elif words[:3] == ["python", "-m", "eval"]:
        _accept_evaluation(words[3:])
    else:
        args = train.parse(words[words.index("maws/train.py") + 1 :])
        cfg = config.override(stages.preset(args.stage, args.preset), args.settings)
        guard.check(cfg.faults)


def _accept_evaluation(words: list[str]) -> None:
    from eval import base
    from eval.classes import read_classes

    if words[0] == "classify":
        args = classify.parser(Parser).parse_args(words[1:])
    elif words[0] in ("prepare", "shards", "compare", "transfer"):
        importlib.import_module(f"eval.{MODULES.get(words[0], words[0])}").parser(Parser).parse_args(words[1:])
        return
    elif words[0] == "classes":
        assert listing.page(words[1:], Parser)
        return
    else:
        args = commands_of_eval().parse_args(words)
        base.configure([base.load(name) for name in args.evaluators], args.settings)
    if args.classes and re.fullmatch(r"[\w-]+", args.classes):  # a bundled set
        try:
            read_classes(args.classes, args.language)
        except UserError as error:
            assert "omw" in str(error).lower(), error  # names that nltk's multilingual WordNet has, which is not here
