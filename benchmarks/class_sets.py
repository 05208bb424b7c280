"""Make the class sets of eval/prompts/ again from the public lists they were taken from.

    git clone https://github.com/openai/CLIP clip && git clone https://github.com/LAION-AI/CLIP_benchmark bench
    python benchmarks/class_sets.py --clip clip --clip-benchmark bench

Needs open_clip_torch (ImageNet's names and templates), timm (ImageNet's ids in order) and torchvision (order of
Flowers-102). Without a change at the sources nothing changes in eval/prompts/: `git diff` shows what did. Class names
and templates are data; no code of these projects is copied. Writes the *.json files and the tables of README.md.
"""

import argparse
import ast
import hashlib
import importlib.metadata
import json
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.wordnet import open_wordnet

PROMPTS = Path(__file__).parents[1] / "eval" / "prompts"
SORTED = "sorted folders"  # the order in which torchvision's ImageFolder numbers classes

ISO3166 = """
AD AE AF AG AI AL AM AO AQ AR AT AU AW AX AZ BA BB BD BE BF BG BH BJ BM BN BO BQ BR BS BT BW BY BZ CA CD CF CH CI CK CL
CM CN CO CR CU CV CW CY CZ DE DK DM DO DZ EC EE EG ES ET FI FJ FK FO FR GA GB GD GE GF GG GH GI GL GM GP GR GS GT GU GY
HK HN HR HT HU ID IE IL IM IN IQ IR IS IT JE JM JO JP KE KG KH KN KP KR KW KY KZ LA LB LC LI LK LR LT LU LV LY MA MC MD
ME MF MG MK ML MM MN MO MQ MR MT MU MV MW MX MY MZ NA NC NG NI NL NO NP NZ OM PA PE PF PG PH PK PL PR PS PT PW PY QA RE
RO RS RU RW SA SB SC SD SE SG SH SI SJ SK SL SM SN SO SS SV SX SY SZ TG TH TJ TL TM TN TO TR TT TW TZ UA UG US UY UZ VA
VE VG VI VN VU WS XK YE ZA ZM ZW
"""
CALTECH = {  # folders whose names are not the class names
    "background": "BACKGROUND_Google", "off-center face": "Faces", "centered face": "Faces_easy", "leopard": "Leopards",
    "motorbike": "Motorbikes", "airplane": "airplanes", "side of a car": "car_side",
    "body of a cougar cat": "cougar_body", "face of a cougar cat": "cougar_face",
    "head of a  crocodile": "crocodile_head", "head of a flamingo": "flamingo_head",
    "snoopy (cartoon beagle)": "snoopy", "yin and yang symbol": "yin_yang",
}  # fmt: skip
EUROSAT = {
    "annual crop land": "AnnualCrop", "forest": "Forest", "brushland or shrubland": "HerbaceousVegetation",
    "highway or road": "Highway", "industrial buildings or commercial buildings": "Industrial",
    "pasture land": "Pasture", "permanent crop land": "PermanentCrop",
    "residential buildings or homes or apartments": "Residential", "river": "River", "lake or sea": "SeaLake",
}  # fmt: skip
FACES = ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")

# What the classes of the small sets mean in WordNet 3.0, in their order: chosen by hand, ours.
CIFAR10 = """airplane.n.01 car.n.01 bird.n.01 cat.n.01 deer.n.01 dog.n.01 frog.n.01 horse.n.01 ship.n.01 truck.n.01"""
STL10 = """airplane.n.01 bird.n.01 car.n.01 cat.n.01 deer.n.01 dog.n.01 horse.n.01 monkey.n.01 ship.n.01 truck.n.01"""
VOC2007 = """
airplane.n.01 bicycle.n.01 bird.n.01 boat.n.01 bottle.n.01 bus.n.01 car.n.01 cat.n.01 chair.n.01 cow.n.01
dining_table.n.01 dog.n.01 horse.n.01 motorcycle.n.01 person.n.01 pot_plant.n.01 sheep.n.01 sofa.n.01 train.n.01
television_receiver.n.01
"""
CIFAR100 = """
apple.n.01 fish.n.01 baby.n.01 bear.n.01 beaver.n.07 bed.n.01 bee.n.01 beetle.n.01 bicycle.n.01 bottle.n.01 bowl.n.03
male_child.n.01 bridge.n.01 bus.n.01 butterfly.n.01 camel.n.01 can.n.01 castle.n.02 caterpillar.n.01 cattle.n.01
chair.n.01 chimpanzee.n.01 clock.n.01 cloud.n.02 cockroach.n.01 sofa.n.01 crab.n.01 crocodile.n.01 cup.n.01
dinosaur.n.01 dolphin.n.02 elephant.n.01 flatfish.n.02 forest.n.02 fox.n.01 girl.n.01 hamster.n.01 house.n.01
kangaroo.n.01 computer_keyboard.n.01 lamp.n.02 lawn_mower.n.01 leopard.n.02 lion.n.01 lizard.n.01 lobster.n.02 man.n.01
maple.n.02 motorcycle.n.01 mountain.n.01 mouse.n.01 mushroom.n.05 oak.n.02 orange.n.01 orchid.n.01 otter.n.02 palm.n.03
pear.n.01 pickup.n.01 pine.n.01 plain.n.01 plate.n.04 poppy.n.01 porcupine.n.01 opossum.n.02 rabbit.n.01 raccoon.n.02
ray.n.07 road.n.01 rocket.n.01 rose.n.01 sea.n.01 seal.n.09 shark.n.01 shrew.n.02 skunk.n.04 skyscraper.n.01 snail.n.01
snake.n.01 spider.n.01 squirrel.n.01 streetcar.n.01 sunflower.n.01 sweet_pepper.n.02 table.n.02 tank.n.01 telephone.n.01
television_receiver.n.01 tiger.n.02 tractor.n.01 train.n.01 trout.n.02 tulip.n.01 turtle.n.02 wardrobe.n.01 whale.n.02
willow.n.01 wolf.n.01 woman.n.01 worm.n.01
"""


@dataclass(frozen=True)
class Source:
    """Where a list was taken from."""

    file: str
    version: str
    sha256: str
    licence: str


@dataclass
class ClassSet:
    """One file of eval/prompts/."""

    name: str
    title: str
    task: str
    classes: list[dict[str, Any]]
    templates: Sequence[str]
    sources: list[Source]
    order: str = SORTED
    note: str = ""
    language: str = "en"
    shared: list[str] = field(default_factory=list)

    def text(self) -> str:
        """JSON, a class a line."""
        spellings = [name for entry in self.classes for name in entry["names"]]
        self.shared = sorted({name for name in spellings if spellings.count(name) > 1})
        head = {
            "name": self.name.partition(".")[0],
            "title": self.title, "task": self.task, "language": self.language, "order": self.order,
            "note": self.note, "sources": [vars(source) for source in self.sources], "shared_names": self.shared,
        }  # fmt: skip
        lines = [f"{json.dumps(key)}: {dump(value)}" for key, value in head.items() if value]
        lines.append('"templates": [\n' + ",\n".join(map(dump, self.templates)) + "\n]")
        entries = [{"label": label, **entry} for label, entry in enumerate(self.classes)]
        lines.append('"classes": [\n' + ",\n".join(map(dump, entries)) + "\n]")
        return "{\n" + ",\n".join(lines) + "\n}\n"


def dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


# ------------------------------------------------------------------------------------------------------------- sources


class Clone:
    """A git repository, work tree or bare."""

    def __init__(self, folder: Path, name: str, licence: str) -> None:
        self.folder, self.name, self.licence = folder, name, licence

    def read(self, path: str) -> tuple[str, Source]:
        data = self._git("show", f"HEAD:{path}")
        commit = self._git("rev-parse", "HEAD").decode().strip()
        digest = hashlib.sha256(data).hexdigest()
        return data.decode(), Source(f"https://github.com/{self.name} {path}", commit, digest, self.licence)

    def _git(self, *arguments: str) -> bytes:
        return subprocess.run(["git", "-C", str(self.folder), *arguments], check=True, capture_output=True).stdout


def package(name: str, file: Path, licence: str) -> Source:
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return Source(f"{name} {file.name}", importlib.metadata.version(name), digest, licence)


class ClipPrompts:
    """openai/CLIP data/prompts.md: a section a data set, with the Python lists `classes` and `templates`."""

    def __init__(self, clone: Clone) -> None:
        text, self.source = clone.read("data/prompts.md")
        self.sections = {part.split("\n", 1)[0]: part for part in re.split(r"^## ", text, flags=re.M)[1:]}

    def names(self, section: str) -> list[list[str]]:
        return [[item] if isinstance(item, str) else item for item in self._list(section, "classes")]

    def templates(self, section: str) -> list[str]:
        return self._list(section, "templates")

    def _list(self, section: str, name: str) -> list[Any]:
        found = re.search(rf"^{name} = (\[.*?^\])", self.sections[section], re.S | re.M)
        assert found, f"{section} has no {name}"
        return ast.literal_eval(found[1])


# ---------------------------------------------------------------------------------------------------------------- sets


def imagenet(bench: Clone) -> list[ClassSet]:
    """English from open_clip, which has OpenAI's; other languages from CLIP_benchmark."""
    import timm.data
    from open_clip import zero_shot_metadata

    table = open_wordnet().synsets
    of_wnid = dict(zip(table["wnid"].to_pylist(), table["synset"].to_pylist(), strict=True))
    ids_file = Path(timm.data.__file__).parent / "_info" / "imagenet_synsets.txt"
    wnids = ids_file.read_text().split()
    ids = package("timm", ids_file, "Apache-2.0")
    names = package("open_clip_torch", Path(zero_shot_metadata.__file__), "MIT")

    def made(words: Sequence[str], templates: Sequence[str], language: str, source: Source, note: str) -> ClassSet:
        classes = [
            {"names": [word.strip()], "wnid": wnid, "synset": of_wnid[wnid]}
            for word, wnid in zip(words, wnids, strict=True)
        ]
        name = "imagenet1k" if language == "en" else f"imagenet1k.{language}"
        return ClassSet(name, "ImageNet-1k", "objects", classes, templates, [source, ids], SORTED, note, language)

    english = [template("{}") for template in zero_shot_metadata.OPENAI_IMAGENET_TEMPLATES]
    found = [made(zero_shot_metadata.IMAGENET_CLASSNAMES, english, "en", names, "Names and templates are OpenAI's.")]
    for code, language, maker in (
        ("ar", "ar", " by KhalidAlt,"),
        ("cn", "zh", " by Chinese-CLIP (OFA-Sys),"),
        ("it", "it", ""),
        ("jp", "ja", " by rinna's japanese-clip and mkshing,"),
    ):
        folder = "clip_benchmark/datasets"
        text, source = bench.read(f"{folder}/{code}_classnames.json")
        templates, second = bench.read(f"{folder}/{code}_zeroshot_classification_templates.json")
        each = [t.replace("{c}", "{}") for t in json.loads(templates)["imagenet1k"]]
        note = f"Names and templates{maker} as CLIP_benchmark holds them."
        if len(set(each)) < len(each):
            note += " Some templates are there twice, and count twice."
        found.append(made(json.loads(text)["imagenet1k"], each, language, source, note))
        found[-1].sources.insert(1, second)
    return found


def svhn(bench: Clone) -> ClassSet:
    """Not among OpenAI's."""
    folder = "clip_benchmark/datasets"
    names, source = bench.read(f"{folder}/en_classnames.json")
    templates, second = bench.read(f"{folder}/en_zeroshot_classification_templates.json")
    classes = [{"names": [name]} for name in json.loads(names)["svhn"]]
    each = [template.replace("{c}", "{}") for template in json.loads(templates)["svhn"]]
    return ClassSet("svhn", "SVHN", "digits", classes, each, [source, second], "the digits")


def from_clip(prompts: ClipPrompts) -> list[ClassSet]:
    """The sets of OpenAI's prompts.md."""

    def made(section: str, name: str, title: str, task: str, order: str = SORTED, **more: Any) -> ClassSet:
        folders, synsets, by = more.get("folders", ()), more.get("synsets", "").split(), more.get("by")
        entries: list[dict[str, Any]] = [{"names": names} for names in prompts.names(section)]
        if isinstance(folders, dict):
            folders = [folders.get(entry["names"][0]) for entry in entries]
        for entry, folder in zip(entries, folders, strict=bool(folders)) if folders else ():
            entry |= {"folder": folder} if folder else {}
        if by:  # another order than OpenAI's
            entries.sort(key=by)
        for entry, synset in zip(entries, synsets, strict=True) if synsets else ():
            entry["synset"] = synset
        note = more.get("note", "")
        return ClassSet(name, title, task, entries, prompts.templates(section), [prompts.source], order, note)

    def folded(entry: dict[str, Any]) -> str:
        return entry["names"][0].lower()

    own = "the data set's own numbers"
    return [
        made("Birdsnap", "birdsnap", "Birdsnap", "birds"),
        made("CIFAR10", "cifar10", "CIFAR-10", "objects", own, synsets=CIFAR10),
        made("CIFAR100", "cifar100", "CIFAR-100", "objects", own, synsets=CIFAR100),
        made("CLEVRCounts", "clevr_counts", "CLEVR counts", "number of objects", "ascending",
             by=lambda entry: int(entry["names"][0]), note="Label 0 is three objects."),
        made("Caltech101", "caltech101", "Caltech-101", "objects", folders=CALTECH,
             note="102 classes with the background; torchvision leaves BACKGROUND_Google out, so its numbers are one "
                  "less."),
        made("Country211", "country211", "Country211", "countries", folders=ISO3166.split(),
             note="Folders are ISO 3166 codes."),
        made("DescribableTextures", "dtd", "Describable Textures", "textures"),
        made("EuroSAT", "eurosat", "EuroSAT", "satellite images", folders=EUROSAT,
             by=lambda entry: entry["folder"]),
        made("FGVCAircraft", "fgvc_aircraft", "FGVC Aircraft (variants)", "aircraft", own),
        made("FacialEmotionRecognition2013", "fer2013", "FER2013", "facial expressions", own, folders=FACES),
        made("Flowers102", "flowers102", "Oxford Flowers-102", "flowers", "the data set's own numbers, less one",
             note="Folders named 1 to 102 would be read as these labels, from 0: give numbers less one."),
        made("Food101", "food101", "Food-101", "food"),
        made("GTSRB", "gtsrb", "GTSRB", "traffic signs", own, folders=[f"{number:05d}" for number in range(43)]),
        made("HatefulMemes", "hateful_memes", "Hateful Memes", "memes", own),
        made("KITTI", "kitti", "KITTI distance", "distance to the closest car", own),
        made("Kinetics700", "kinetics700", "Kinetics-700", "actions"),
        made("MNIST", "mnist", "MNIST", "digits", own),
        made("OxfordPets", "oxford_pets", "Oxford-IIIT Pets", "cats and dogs", "the data set's own numbers, less one",
             by=folded, note="In alphabetical order whatever the capitals; OpenAI lists cats first."),
        made("PascalVOC2007", "voc2007", "PASCAL VOC 2007", "objects", "alphabetical", by=folded, synsets=VOC2007,
             note="As a classification of one object a picture."),
        made("PatchCamelyon", "pcam", "PatchCamelyon", "histopathology", own),
        made("RESISC45", "resisc45", "RESISC45", "aerial images"),
        made("SST2", "sst2", "Rendered SST2", "sentiment of a text", own),
        made("STL10", "stl10", "STL-10", "objects", own, synsets=STL10),
        made("SUN397", "sun397", "SUN397", "scenes", own,
             note="Folders such as j/jail_cell and t/theater/indoor_seats resolve without their first letter. "
                  "Lists differ in whether jail_cell comes before jail/indoor, as here, or after."),
        made("StanfordCars", "stanford_cars", "Stanford Cars", "cars", "the data set's own numbers, less one"),
        made("UCF101", "ucf101", "UCF101", "actions",
             note="Its own classInd.txt has Hammering before HammerThrow and JumpingJack before JumpRope."),
    ]  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- README


def table(sets: Sequence[ClassSet]) -> str:
    lines = ["| file | data set | classes | templates | language | sha256 |", "|---|---|---|---|---|---|"]
    for made in sorted(sets, key=lambda made: made.name):
        digest = hashlib.sha256((PROMPTS / f"{made.name}.json").read_bytes()).hexdigest()
        counts = f"{len(made.classes)} | {len(made.templates)} | {made.language}"
        lines.append(f"| {made.name}.json | {made.title} | {counts} | {digest} |")
    return "\n".join(lines)


def template_table() -> str:
    lines = ["| file | templates | sha256 |", "|---|---|---|"]
    for file in sorted(PROMPTS.glob("*.txt")):
        texts = [line for line in file.read_text().splitlines() if line.strip() and not line.startswith("# ")]
        lines.append(f"| {file.name} | {len(texts)} | {hashlib.sha256(file.read_bytes()).hexdigest()} |")
    return "\n".join(lines)


def fill(text: str, mark: str, content: str) -> str:
    """Put a table between its two marks."""
    begin, end = f"<!-- {mark} -->\n", f"\n<!-- end of {mark} -->"
    before, rest = text.split(begin, 1)
    return before + begin + content + end + rest.split(end, 1)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip", type=Path, required=True, help="clone of openai/CLIP")
    parser.add_argument("--clip-benchmark", type=Path, required=True, help="clone of LAION-AI/CLIP_benchmark")
    args = parser.parse_args()
    bench = Clone(args.clip_benchmark, "LAION-AI/CLIP_benchmark", "MIT")
    sets = [*imagenet(bench), svhn(bench)]
    sets += from_clip(ClipPrompts(Clone(args.clip, "openai/CLIP", "MIT")))
    for made in sets:
        (PROMPTS / f"{made.name}.json").write_text(made.text(), encoding="utf-8")
    readme = PROMPTS / "README.md"
    text = fill(readme.read_text(), "class sets", table(sets))
    readme.write_text(fill(text, "templates", template_table()))
    print(f"{len(sets)} class sets in {PROMPTS}")


if __name__ == "__main__":
    main()
