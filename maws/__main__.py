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
from pathlib import Path
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


def plan(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--stage", required=True, metavar="NAME", help="mae, lc_mae, simmim, wsp or lit")
    add("--preset", required=True, metavar="NAME", help="a preset of the stage, such as vit_6.5b14")
    add("--gpus", type=int, required=True, metavar="N", help="ranks, one a GPU")
    add("--gpu", default="", metavar="NAME", help="h200, h100, a100, l40s … (default: the one that is here, or h200)")
    add("--memory", default="", metavar="SIZE", help="of one GPU, such as 141GB, in place of the data sheet's")
    add("--tflops", type=float, default=0.0, metavar="N", help="peak of one GPU, in place of the data sheet's")
    add("--mfu", type=float, default=0.0, metavar="X", help="share of the peak that is reached (default: 0.4)")
    add("--from-run", default="", metavar="RUN", help="take the speed from this run's metrics.jsonl")
    add("--samples", type=float, default=0.0, metavar="N", help="samples of an epoch, such as 5e9")
    add("--sample-bytes", type=float, default=0.0, metavar="N", help="mean size of a sample on disk")
    add("--shards", default="", metavar="FOLDER", help="take samples, sizes and synsets from this shard set")
    add("--micro-batch", type=int, metavar="N", help="samples in one rank at a time; short for optim.micro_batch=N")
    add("--host-memory", default="", metavar="SIZE", help="of one node, to check what is offloaded")
    add("--gpus-per-node", type=int, default=8, metavar="N", help="(default: 8)")
    add("--json", action="store_true", help="print JSON: bytes, seconds, FLOP/s")
    add("settings", nargs="*", metavar="group.name=value", help="settings of the training, as for maws/train.py")


def doctor(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--shards",
        default="",
        metavar="FOLDER",
        help="this shard set too: hashes of some files, some pictures",
    )
    add("--full", action="store_true", help="hashes of all shards, which takes as long as reading them")
    add("--run", default="", metavar="FOLDER", help="where a run is kept, or will be: its disk, its checkpoints")
    add("--tokenizer", default="", metavar="FOLDER", help="load this tokenizer")
    add("--json", action="store_true", help="print JSON")


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


def cache_features(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--run", required=True, metavar="RUN", help="run or release whose image tower stage lit will lock")
    add("--shards", required=True, metavar="FOLDER", help="the shard set; the features are kept beside its shards")
    add("--crops", type=int, default=1, metavar="K", help="of each picture: epoch e takes crop e mod K (default: 1)")
    add("--dtype", default="float32", metavar="float32|float16|bfloat16", help="as kept (default: float32)")
    add("--batch", type=int, default=32, metavar="N", help="pictures encoded at once, each K times (default: 32)")
    add("--seed", type=int, default=0, help="of the crops: those of a training with this seed (default: 0)")
    add("--workers", type=int, metavar="N", help="processes that read pictures (default: the cores but one, at most 8)")
    add("--overwrite", action="store_true", help="replace features of this tower and these crops that are there")
    add("settings", nargs="*", metavar="data.name=value", help="data settings of the training that is to come")


def watch(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="run folders; one that is not there yet is waited for")
    add("--once", action="store_true", help="print one frame and end")
    add("--interval", type=float, default=2.0, metavar="SECONDS", help="between two looks (default: 2)")


def export(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", type=Path, metavar="RUN_OR_RELEASE", help="a run folder, finished or not, or a release folder")
    add("--to", default="safetensors", metavar="safetensors|timm|open_clip|hf", help="form (default: our release form)")
    add("--checkpoint", default="latest", metavar="latest|PATH", help="which one (default: the newest that is whole)")
    add("--output", required=True, type=Path, metavar="FOLDER", help="the folder that is written")
    add("--overwrite", action="store_true", help="replace a release or an export that is there already")
    add("--dtype", default="float32", metavar="float32|bfloat16", help="of the values in the files (default: float32)")
    add("--ema", action="store_true", help="the mean of the weights (optim.ema) in their place")
    add("--max-shard", default="", metavar="SIZE", help="of one file; above it there are several (default: 5GB)")
    add("--no-check", dest="check", action="store_false", help="do not load the folder back with the other library")
    add("--shards", default="", metavar="FOLDER", help="where the shard set of a wsp run is now, if it was moved")
    add("--init-from", default="", metavar="RUN", help="where the release the run started from is now, if it was moved")


def import_(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="weights of another project: .pth, .pt, .bin, .safetensors; or folder")
    layouts = "mae, long_seq_mae, lut, maws, maws_clip, swag, timm, open_clip"
    add("--from", dest="layout", default="auto", metavar="LAYOUT", help=f"{layouts} (default: by the names in it)")
    add("--output", required=True, type=Path, metavar="FOLDER", help="the release that is written")
    add("--overwrite", action="store_true", help="replace a release that is there already")
    add("--tokenizer", type=Path, metavar="PATH", help="sentencepiece.bpe.model or tokenizer.json, or a folder of it")
    add("--entry", default="", metavar="NAME", help="of a file with several sets of weights, such as model_ema")
    add("--heads", type=int, default=0, metavar="N", help="attention heads of the image tower, for an unknown width")
    add("--dtype", default="float32", metavar="NAME", help="float32, bfloat16 or float16 (default: float32)")
    add("--lineage", default="", metavar="STAGE,…", help="how it was trained, such as mae,wsp, where you know it")
    add("--target", default="norm_pixels", metavar="KIND", help="what a decoder predicts: norm_pixels or pixels")
    add("--max-shard", default="5GB", metavar="SIZE", help="of one file; above it there are several (default: 5GB)")


def ledger(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="a run folder, finished or not")
    add("--step", default="", metavar="N|A:B", help="the sample keys of step N, or of the steps A to B - 1 (from 0)")
    add("--key", default="", metavar="KEY", help="the steps so far that this sample was given to")
    add("--check", action="store_true", help="compare with RUN/keys, which log.keys=yes writes")
    add("--shards", default="", metavar="FOLDER", help="where the run's shard set is now, if it was moved")
    add("--ranks", type=int, default=0, metavar="W", help="only the share of one of W ranks")
    add("--rank", type=int, metavar="R", help="which one, from 0")
    add("--json", action="store_true", help="one JSON object a line")


def verify_resume(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--stage", required=True, help="a training stage: mae, lc_mae, wsp, lit, …")
    add("--preset", required=True, help="a whole configuration of it: debug, or the one you are about to train")
    add("--init-from", default="", metavar="RUN", help="what the stage starts from")
    add("--ranks", default="2,2,1,2", metavar="N,N,…", help="ranks of each start, the straight run's first")
    add("--kills", type=int, default=-1, metavar="N", help="how often it is killed (default: once a further start)")
    add("--seed", type=int, default=0, help="of the moments at which it is killed")
    add("--output", type=Path, required=True, metavar="FOLDER", help="both runs, their output, certificate.json")
    add("--tolerance", type=float, default=0.0, help="of losses on other numbers of ranks (default: the stage's own)")
    add("settings", nargs="*", metavar="group.name=value", help="change single settings of the preset")


COMMANDS: Final = {
    "models": Command(
        "parameters of each model size, multiply-adds per image of MAE, WSP and LiT, and GPU memory of training",
        models,
        "maws.model_table",
        example="vit_l16 vit_2b14 --ranks 8",
    ),
    "export": Command(
        "a run or a release as a release, or for timm, open_clip or transformers; on the CPU, a tensor at a time",
        export,
        "maws.exporting",
        example="runs/lit --to open_clip --output lit_open_clip",
    ),
    "import": Command(
        "a release from weights of other projects: MAE, LC-MAE, MAWS, SWAG, timm, open_clip",
        import_,
        "maws.importing",
        example="vit_l16_maws.pt --from maws --output release/maws_l16",
    ),
    "ledger": Command(
        "the sample keys of every step of a run, written down again from its settings",
        ledger,
        "maws.ledger",
        example="runs/mae --step 120:123",
    ),
    "doctor": Command(
        "Python, torch, GPUs, DeepSpeed, disks, limits and data: is this machine ready, and if not, what to do",
        doctor,
        "maws.doctor",
        example="--shards shards/ --run runs/mae",
    ),
    "plan": Command(
        "memory of every rank, time, data and checkpoints of a training; refuses what does not fit",
        plan,
        "maws.planning",
        example="--stage mae --preset vit_6.5b14 --gpus 64 --gpu h200 --samples 5e9",
    ),
    "cache-features": Command(
        "features of a locked image tower for every picture of a shard set, so that stage lit need not run the tower",
        cache_features,
        "maws.cache_features",
        example="--run runs/mae_wsp --shards shards/ --crops 2 data.crop_scale=0.9,1.0 data.flip=no",
    ),
    "fit-pca": Command("principal components of image patches, a target of stage mae", fit_pca, "maws.pca"),
    "watch": Command(
        "runs in the terminal while they train: progress, curves, speed, and what went wrong",
        watch,
        "maws.watch",
        example="runs/mae runs/wsp",
    ),
    "verify-resume": Command(
        "kill a training at random moments, resume it on other numbers of ranks, and prove that nothing has changed",
        verify_resume,
        "maws.verify_resume",
        example="--stage mae --preset debug --ranks 4,2,1,2 --output runs/proof data.shards=shards/",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    return told(lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    top = parser()
    options, rest = top.parse_known_args(arguments)
    if hasattr(options, "settings"):  # they may stand before, between and after flags, as for maws/train.py
        options.settings += [word for word in rest if "=" in word and not word.startswith("-")]
        rest = [word for word in rest if word not in options.settings]
    if rest:
        command = next(p for p in top.commands() if p.prog.endswith(f" {options.command}"))
        command.error(f"unrecognized arguments: {' '.join(rest)}")
    return importlib.import_module(COMMANDS[options.command].module).run(options)


if __name__ == "__main__":
    leave(main())
