"""Evaluator lowshot: K training images per class, several random splits; classifiers and adapters on a frozen trunk.

    python -m eval lowshot --run runs/demo/mae_wsp --train demo/emoji --data demo/emoji/eval-emojione.parquet
    python -m eval lowshot … --set lowshot.methods=linear,ridge,msn,vpt,vpt-shallow,adaptformer,lora
    python -m eval lowshot … --set lowshot.budget=paper lowshot.splits=runs/other/splits lowshot.chosen=FILE

K is 1, 5 and 10 from 5 seeds (recipes 9.2); a class with fewer than K images gives all it has. Every (K, seed) is
written down as a split file beside the results, which another run can be given. One score per seed:
`1-shot/linear/top1`, `5-shot/vpt/top1`.

Hyper-parameters with more than one candidate are chosen on training images alone: the first seed's split of one K
(`choose_on`), one image of every class held out. They then hold for every K and seed, stand in every score's `chosen`
and in lowshot/chosen-….json.

Adapters train by one of two budgets. `fast`: the head starts from the linear solution of the same split on the features
that the untrained adapter gives, and a few steps follow on pictures that are decoded once: many encoders can be
compared on a CPU. `paper`: the published schedules, 100 epochs of random crops.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Final

import torch

from data_pipeline.errors import DataError
from eval import chosen, splits
from eval.adapters.adapted import check_whole
from eval.adapters.bench import Bench
from eval.adapters.settings import ADAPTERS, FITTED, METHODS, Config
from eval.base import File, Score
from eval.chosen import Choice
from eval.correct import packed
from eval.datasets import Data, check_classes
from eval.features import Encoder, Features, allowed_broken, extract, too_many_broken
from eval.sources.source import some
from eval.splits import Which

__all__ = ["Config", "Lowshot"]

ALL: Final = 0.5  # of the training images: if more are drawn all are made into features, which other probes share
PROTOCOLS: Final = {"vpt": "vpt-deep", "linear": "logistic"}  # where the method's name says less


class Lowshot:
    needs_train: ClassVar[bool] = True
    needs_text: ClassVar[bool] = False

    def __init__(self, cfg: Config, data: Data, seed: int) -> None:
        assert data.train is not None
        self.cfg, self.data, self.pool = cfg, data, splits.Pool(data.train)
        self.seeds = range(seed, seed + cfg.seeds)
        self.which = [(k, one) for k in cfg.k for one in self.seeds]
        self.given = splits.read(Path(cfg.splits), self.which, data.train, data.classes) if cfg.splits else {}
        wanted = {method: cfg.candidates(method)[0] for method in cfg.tuned}
        self.choices = chosen.read(Path(cfg.chosen), cfg.budget, wanted) if cfg.chosen else None

    def run(self, encode: Encoder) -> Iterator[Score | File]:
        if any(method in ADAPTERS for method in self.cfg.methods):
            check_whole(encode)
        dataset, test = self.pool.dataset, extract(encode, self.data.test)
        drawn, train = self._drawn(encode)
        check_classes(self.data, test.labels.cpu().numpy(), train.labels.cpu().numpy())
        files = {which: splits.file_of(dataset, drawn[which], *which) for which in self.which}
        yield from files.values()
        bench = Bench(self.cfg, self.data, encode, train, test, drawn, self.seeds[0])
        choices = self.choices.choices if self.choices else bench.choose()
        name = f"chosen-{self.cfg.budget}-{splits.name_of(dataset.keys)}-seed{self.seeds[0]}"
        yield File(f"lowshot/{name}.json", chosen.as_text(choices, self.cfg.budget, dataset.sha256, encode.sha256))
        from_file = {"chosen": self.choices.sha256} if self.choices else {}
        origin = {k: self._origin(k) for k in self.cfg.k}
        for method in (m for m in METHODS if m in self.cfg.methods):
            facts, values = self._facts(method, encode), self._told(method, choices)
            for which, right in bench.scores(method, self.which, choices):
                hashes = {"split": hashlib.sha256(files[which].text.encode()).hexdigest()} | from_file
                value, metric = right.double().mean().item(), f"{which[0]}-shot/{method}/top1"
                more = facts | {"splits": origin[which[0]]}
                yield Score(metric, value, len(test), which[1], values, hashes, facts=more, right=packed(right))

    def _drawn(self, encode: Encoder) -> tuple[dict[Which, list[int]], Features]:
        """The splits, and features of their images alone if that saves work; `rows` are positions in the data set."""
        dataset, chosen_on = self.pool.dataset, (self.cfg.choice_k, self.seeds[0])
        wanted = [*self.which, *([] if self.choices or chosen_on in self.which else [chosen_on])]
        broken: set[int] = set()
        while True:
            drawn = {which: self.given.get(which) or self.pool.draw(*which, broken) for which in wanted}
            used = sorted(set().union(*drawn.values()))
            if everything := len(used) > ALL * len(dataset):
                used = list(range(len(dataset)))
            train = extract(encode, dataset if everything else dataset.part(used, part_of=len(dataset)))
            rows = torch.tensor(used)[train.rows]
            lost = set(used) - set(rows.tolist()) - broken
            if lost and (asked := [p for which in self.given for p in self.given[which] if p in lost]):
                raise DataError(
                    f"lowshot.splits={self.cfg.splits} asks for pictures that cannot be read: "
                    f"{some(dataset.keys[p] for p in set(asked))}; repair them"
                )
            if not any(p in lost for positions in drawn.values() for p in positions):
                return drawn, replace(train, rows=rows)
            broken |= lost
            if len(broken) > allowed_broken(dataset):
                raise DataError(too_many_broken(dataset, f"'{dataset.keys[min(broken)]}'"))

    def _origin(self, k: int) -> str:
        """`drawn`, as for anybody with these images and seeds; of other splits that were given, a short hash."""
        given = {which: split for which, split in self.given.items() if which[0] == k}
        if all(split == self.pool.draw(*which) for which, split in given.items()):
            return "drawn"
        keys = [[self.pool.dataset.keys[position] for position in given[which]] for which in sorted(given)]
        return hashlib.sha256(repr(keys).encode()).hexdigest()[:8]

    def _told(self, method: str, choices: Mapping[str, Choice]) -> dict[str, Any]:
        """What was chosen for a method; an adapter of the fast budget depends on l2 of the linear classifier too."""
        linear = method in ADAPTERS and self.cfg.budget == "fast"
        return (choices["linear"].facts("linear") if linear else {}) | choices[method].facts(method)

    def _facts(self, method: str, encode: Encoder) -> dict[str, Any]:
        protocol = f"lowshot/{PROTOCOLS.get(method, method)}"
        if method in FITTED:
            return {"protocol": protocol}
        cfg, size = self.cfg.adapter(method), encode.preprocess.image_size
        if self.cfg.budget == "fast":
            return {"protocol": f"{protocol}/fast", "augmentation": "flip" if cfg.flip else "none"}
        flip = ", flip" if cfg.paper.flip else ""
        return {
            "protocol": protocol,
            "augmentation": f"resize {round(size / cfg.paper.crop)}, random crop {size}{flip}",
        }
