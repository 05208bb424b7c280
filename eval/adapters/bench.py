"""Low-shot methods on one encoder and one data set: choosing their values, and scoring them on every split."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from data_pipeline.errors import DataError
from eval import chosen, logistic, msn, ridge
from eval.adapters.adapted import Adapted, features, fresh, solved
from eval.adapters.adaptformer import AdaptFormer
from eval.adapters.lora import Lora
from eval.adapters.settings import FITTED, Config
from eval.adapters.training import Diverged, Pictures, right, train_fast, train_paper
from eval.adapters.vpt import Deep, Shallow, initial_prompts
from eval.chosen import Choice, Values
from eval.datasets import Data
from eval.features import Encoder, Features
from eval.held_out import hold_out
from eval.metrics import ranks
from eval.progress import Progress
from eval.splits import Which
from maws.seeding import generator


class Bench:
    """All that the methods are tried on: an encoder, its features, and the pictures."""

    def __init__(
        self, cfg: Config, data: Data, encode: Encoder, train: Features, test: Features,
        drawn: Mapping[Which, Sequence[int]], first_seed: int,
    ) -> None:  # fmt: skip
        """`train.rows` and the splits `drawn` are positions in the training data."""
        assert data.train is not None
        place = {position: row for row, position in enumerate(train.rows.tolist())}
        device = train.labels.device
        self.rows = {which: torch.tensor([place[p] for p in split], device=device) for which, split in drawn.items()}
        self.cfg, self.encode, self.train, self.test, self.first_seed = cfg, encode, train, test, first_seed
        self.classes = len(data.classes)
        self.shots = Pictures(data.train, encode, train.rows.tolist(), train.labels)
        self.queries = Pictures(data.test, encode, test.rows.tolist(), test.labels)
        self.starts: dict[tuple[str, int], Tensor] = {}  # by method and row: the feature under the untrained adapter

    def choose(self) -> dict[str, Choice]:
        """The values of every method. Only training images are looked at."""
        k, seed = self.cfg.choice_k, self.first_seed
        rows = self.rows[k, seed]
        held = hold_out(self.train.labels[rows], 1 / k, seed)  # one image of every class that has two
        on = f"seed {seed}, {k}-shot, {int(held.sum())} of its images held out"
        choices: dict[str, Choice] = {}
        for method in self.cfg.tuned:
            candidates = self.cfg.candidates(method)
            if not held.any() and len(candidates) > 1:
                choices[method] = Choice(candidates[len(candidates) // 2], "the middle: no class has two images")
                continue
            with Progress(f"choosing for low-shot {method}", len(candidates)) as progress:
                trial = Trial(self, method, rows[~held], rows[held], choices, progress)
                choices[method] = chosen.choose(candidates, trial, on)
        return choices

    def scores(
        self, method: str, splits: Sequence[Which], choices: Mapping[str, Choice]
    ) -> Iterator[tuple[Which, Tensor]]:
        """Which evaluation pictures a method gets right, for every split: bool N."""
        values, rows = choices[method].values, {which: self.rows[which] for which in splits}
        with Progress(f"low-shot {method}", len(rows)) as progress:
            if method in FITTED:
                for which, positions in rows.items():
                    x, labels = self.train.features[positions], self.train.labels[positions]
                    head = self.fit(method, x, labels, values["l2"])
                    yield which, ranks(head(self.test.features), self.test.labels) == 0
                    progress.add(1)
                return
            for k in dict.fromkeys(k for k, _ in rows):  # the models of one K share a pass over the pictures
                mine = {which: positions for which, positions in rows.items() if which[0] == k}
                models = []
                for which, positions in mine.items():
                    models.append(self._trained(method, positions, values, choices, which))
                    progress.add(1)
                yield from zip(mine, right(models, self.queries), strict=True)

    def fit(
        self, method: str, x: Tensor, labels: Tensor, l2: float,
        start: logistic.LinearHead | None = None, iterations: int | None = None,
    ) -> Any:  # fmt: skip
        """A head on features x N D: features -> scores N S. `start` and `iterations` are of linear."""
        if method == "linear":
            iterations = iterations or self.cfg.linear.iterations
            return logistic.fit(x, labels, self.classes, l2, start=start, iterations=iterations)
        return (ridge if method == "ridge" else msn).fit(x, labels, self.classes, l2)

    def _trained(
        self, method: str, rows: Tensor, values: Values, choices: Mapping[str, Choice], which: Which
    ) -> Adapted:
        try:
            return self.adapt(method, rows, values, choices, which[1])
        except Diverged:
            group = "vpt" if method == "vpt-shallow" else method
            lr = "paper.lr" if self.cfg.budget == "paper" else "lr"
            raise DataError(
                f"low-shot {method} diverged on the {which[0]}-shot split of seed {which[1]} with {dict(values)}; "
                f"give lower rates: --set lowshot.{group}.{lr}=…"
            ) from None

    def adapt(self, method: str, rows: Tensor, values: Values, choices: Mapping[str, Choice], seed: int) -> Adapted:
        """An adapter and its head, trained on the pictures at `rows` of the training features."""
        cfg, tower, device = self.cfg.adapter(method), self.encode.tower, self.encode.device
        shots, fast = self.shots.part(rows), self.cfg.budget == "fast"
        # Fast: the same for all splits, so that features under it are made once.
        adapter = self._adapter(method, self.first_seed if fast else seed).to(device)
        if fast:
            start, linear = self._start(method, adapter, rows), choices["linear"].values
            head = solved(self.fit("linear", start, self.train.labels[rows], linear["l2"]))
            return train_fast(Adapted(tower, adapter, head), shots, cfg, **values, seed=seed)
        style = "vpt" if method.startswith("vpt") else "adaptformer"
        head = fresh(tower.embed_dim, self.classes, style, generator(seed, "head")).to(device)
        return train_paper(Adapted(tower, adapter, head), shots, cfg.paper, **values, seed=seed)

    def _adapter(self, method: str, seed: int) -> torch.nn.Module:
        """As it is before training."""
        tower, draw, cfg = self.encode.tower, generator(seed, "prompts"), self.cfg
        if method == "adaptformer":
            af = cfg.adaptformer
            return AdaptFormer(tower, draw, af.bottleneck, af.dropout, af.scale)
        if method == "lora":
            return Lora(tower, draw, cfg.lora.rank, cfg.lora.alpha)
        prompts = initial_prompts(tower, cfg.vpt.prompts, draw, deep=method == "vpt")
        return Deep(prompts) if method == "vpt" else Shallow(prompts)

    @torch.no_grad()
    def _start(self, method: str, adapter: torch.nn.Module, rows: Tensor) -> Tensor:
        """Features at `rows` under the untrained adapter, each made once: splits share images. n D."""
        if not method.startswith("vpt"):
            return self.train.features[rows]  # AdaptFormer and LoRA start as the plain trunk
        new = torch.tensor([row for row in rows.tolist() if (method, row) not in self.starts], dtype=torch.long)
        with Progress("features under the first prompts", len(new)) as progress:
            shots = self.shots.part(new)
            for part, (images, _) in zip(new.split(shots.size), shots.batches(), strict=False):  # maybe none
                made = features(adapter, self.encode, images)
                self.starts.update({(method, row): one for row, one in zip(part.tolist(), made, strict=True)})
                progress.add(len(part))
        return torch.stack([self.starts[method, row] for row in rows.tolist()])


class Trial:
    """Top-1 on held-out training images of values for a method; one that diverges gets none right."""

    def __init__(
        self, bench: Bench, method: str, rows: Tensor, held: Tensor, choices: Mapping[str, Choice], progress: Progress
    ) -> None:
        self.bench, self.method, self.rows, self.held = bench, method, rows, held
        self.choices, self.progress = choices, progress
        self.last: Any = None  # head: the linear search starts where that of the stronger l2 ended

    def __call__(self, values: Values) -> float:
        value = self._fitted(values["l2"]) if self.method in FITTED else self._adapted(values)
        self.progress.add(1)
        return value

    def _fitted(self, l2: float) -> float:
        train, iterations = self.bench.train, self.bench.cfg.linear.search_iterations
        x, labels = train.features[self.rows], train.labels[self.rows]
        self.last = self.bench.fit(self.method, x, labels, l2, self.last, iterations)
        return _share(ranks(self.last(train.features[self.held]), train.labels[self.held]) == 0)

    def _adapted(self, values: Values) -> float:
        bench = self.bench
        try:
            model = bench.adapt(self.method, self.rows, values, self.choices, bench.first_seed)
            return _share(right([model], bench.shots.part(self.held))[0])
        except Diverged:
            return 0.0


def _share(right: Tensor) -> float:
    return right.double().mean().item()
