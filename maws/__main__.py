"""python -m maws models [NAME …]

Everything beside training (which is `deepspeed maws/train.py`). To add a command: one line in COMMANDS, one function
that declares its arguments, and a module whose `run(options)` does the work and returns the exit code.
"""

import argparse
import importlib
import logging
import re
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Final, NamedTuple, NoReturn

from data_pipeline.ending import leave, told
from data_pipeline.errors import UsageError


class Command(NamedTuple):
    help: str  # one line in the list of commands
    arguments: Callable[[argparse.ArgumentParser], None]
    module: str  # has `run(options) -> int`; imported when the command is used, so that wrong flags are told at once
    example: str = ""  # a command line, for the command's own help


class Parser(argparse.ArgumentParser):
    """Errors as one line with the nearest name, through the same door as all others."""

    def error(self, message: str) -> NoReturn:
        known, asked = list[str](), list[str]()
        if wrong := re.match(re.escape(f"argument {'|'.join(COMMANDS)}: invalid choice: ") + "'([^']*)'", message):
            known, asked, message = list(COMMANDS), [wrong[1]], f"there is no command {wrong[1]!r}"
        elif "unrecognized" in message:
            known = [option for parser in (self, *self.commands()) for option in parser._option_string_actions]
            asked = re.findall(r"--[\w-]+", message)
        near = [name for word in asked for name in get_close_matches(word, known, 1)]
        raise UsageError(message + (f"; did you mean {near[0]}?" if near else f"; see `{self.prog} --help`"))

    def commands(self) -> "list[Parser]":
        return [p for action in self._actions if isinstance(action.choices, dict) for p in action.choices.values()]


def parser() -> Parser:
    top = Parser("python -m maws", description="Look at models and prepare training; training is maws/train.py.")
    commands = top.add_subparsers(required=True, dest="command", metavar="|".join(COMMANDS))
    for name, command in COMMANDS.items():
        example = f"Example: python -m maws {name} {command.example}" if command.example else None
        one = commands.add_parser(name, allow_abbrev=False, help=command.help, description=command.help, epilog=example)
        command.arguments(one)
    return top


def models(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="only these models (default: all)")
    add("--ranks", type=int, default=1, metavar="N", help="GPUs that share the model states (default: 1)")
    add("--image-size", type=int, default=0, metavar="PIXELS", help="side of the images (default: the model's own)")
    add("--json", action="store_true", help="print JSON: exact numbers of parameters, multiply-adds and bytes")


def fit_pca(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--shards", required=True, metavar="FOLDER", help="the shard set whose images give the patches")
    add("--output", required=True, metavar="FILE", help="safetensors file, for target.file of stage mae")
    add("--patch", type=int, default=16, metavar="PIXELS", help="side of a predicted patch (default: 16)")
    add("--components", type=int, default=96, metavar="K", help="directions that are kept (default: 96)")
    add("--patches", type=int, default=1_000_000, metavar="N", help="how many are looked at (default: 1000000)")
    add("--per-image", type=int, default=16, metavar="N", help="patches of one image (default: 16)")
    add("--image-size", type=int, default=224, metavar="PIXELS", help="side of the images a run sees (default: 224)")
    add("--seed", type=int, default=0, help="of images, crops and patches")
    add("--workers", type=int, metavar="N", help="processes that read images (default: one a core, at most 8)")
    add("settings", nargs="*", metavar="data.name=value", help="data settings of the run, where it changes them")


COMMANDS: Final = {
    "models": Command(
        "parameters of each model size, multiply-adds per image of MAE, WSP and LiT, and GPU memory of training",
        models,
        "maws.model_table",
        example="vit_l16 vit_2b14 --ranks 8",
    ),
    "fit-pca": Command("principal components of image patches, a target of stage mae", fit_pca, "maws.pca"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    return told(lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    options = parser().parse_args(arguments)
    return importlib.import_module(COMMANDS[options.command].module).run(options)


if __name__ == "__main__":
    leave(main())
