"""How good the features are while training goes on: nearest neighbours over synsets, and zero-shot by lemmas.

    deepspeed maws/train.py --stage mae … probe.every="1 epochs" probe.shards=shards/held_out

A stage file offers one in `probe(objective, cfg, shards, run, part)`. Which pictures it looks at is a function of the
shard set alone, so that runs, seeds and numbers of ranks compare. Every rank runs the same number of forwards of the
same size on an equal share of them; nothing is learned and nothing of the training is changed.

Letters: N pictures, n of this rank, D width, K neighbours, S synsets.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.errors import DataError
from data_pipeline.images import BadImage, decode
from data_pipeline.shardset import ShardSet
from maws import dist
from maws.config import ConfigError, ProbeConfig, TrainConfig
from maws.data.order import Part
from maws.data.tokenizer import Tokenizer
from maws.data.transforms import Preprocess
from maws.models.two_tower import TwoTower
from maws.models.vit import VisionTransformer, normalise
from maws.seeding import derive, hash_keys, stream, uniform

if TYPE_CHECKING:  # only named here: a stage can be read without DeepSpeed
    from maws.engine import Engine

log = logging.getLogger(__name__)

TEMPERATURE = 0.07  # Wu et al., 2018
BATCH = 32  # pictures or prompts in memory at once; without gradients they take less than a training step's
SHARDS = 64  # that pictures are chosen from: reading the index of every shard of a large set takes too long
SYNSETS = 1000  # most that zero-shot chooses between, the commonest: every prompt is encoded every time
LEMMAS = 2  # of a synset, each with a prompt of its own
TEMPLATE = "a photo of {}"


class Choice(NamedTuple):
    """A picture: its place in the shard set, and its synsets."""

    shard: int
    row: int
    synsets: list[int]


def knn(tower: VisionTransformer, cfg: TrainConfig, shards: ShardSet, part: Part) -> "Knn | None":
    """The probe of a trunk; None when `probe.every` is 0. Raises ConfigError when the set has no pictures for it."""
    if not cfg.probe.every.value:
        return None
    shards = _shards(cfg.probe, shards)
    wanted = cfg.probe.queries + cfg.probe.bank
    choices = choose(shards, wanted, {entry.index: entry.index for entry in shards.vocabulary})
    if len(choices) < 2:
        raise ConfigError(
            f"probe.every={cfg.probe.every}: {shards.path} has {len(choices)} pictures with synsets, and nearest "
            f"neighbours need 2 or more; name another set with probe.shards, or set probe.every='0 steps'"
        )
    queries = cfg.probe.queries
    if len(choices) < wanted:
        queries = min(len(choices) - 1, max(1, len(choices) * queries // wanted))
    own = sorted({synset for choice in choices for synset in choice.synsets})
    numbers = {synset: number for number, synset in enumerate(own)}  # the others get no vote
    choices = [choice._replace(synsets=[numbers[s] for s in choice.synsets]) for choice in choices]
    return Knn(tower, cfg, Pictures(shards, choices, part, tower.image_size), queries, len(own))


def zero_shot(
    towers: TwoTower, tokenizer: Tokenizer, cfg: TrainConfig, shards: ShardSet, part: Part
) -> "ZeroShot | None":
    """The probe of two towers; None when `probe.every` is 0. Raises ConfigError when the set has no pictures for it."""
    if not cfg.probe.every.value:
        return None
    shards = _shards(cfg.probe, shards)
    entries = sorted(shards.vocabulary, key=lambda e: (-e.count, e.index))[:SYNSETS]
    choices = choose(shards, cfg.probe.queries, {entry.index: number for number, entry in enumerate(entries)})
    if not choices:
        raise ConfigError(
            f"probe.every={cfg.probe.every}: {shards.path} has no picture with a synset, and zero-shot needs some; "
            f"name another set with probe.shards, or set probe.every='0 steps'"
        )
    named = [(n, lemma) for n, entry in enumerate(entries) for lemma in entry.lemmas[:LEMMAS]]
    places, valid = share(len(named), part)
    ids, mask = tokenizer([TEMPLATE.format(named[p][1].replace("_", " ")) for p in places])
    owner = torch.tensor([number for number, _ in named])
    return ZeroShot(towers, cfg, Pictures(shards, choices, part, towers.image.image_size), (ids, mask), valid, owner)


def _shards(cfg: ProbeConfig, shards: ShardSet) -> ShardSet:
    for name, value in (("bank", cfg.bank), ("queries", cfg.queries), ("k", cfg.k)):
        if value < 1:
            raise ConfigError(f"probe.{name}={value} must be 1 or more")
    return ShardSet.open(cfg.shards) if cfg.shards else shards


def choose(shards: ShardSet, number: int, synsets: Mapping[int, int]) -> list[Choice]:
    """At most `number` pictures that carry some of `synsets` (label index -> number here), no picture twice, in an
    order drawn from their keys. Where the set has more than SHARDS shards, from that many of them.
    """
    places = stream(0, "probe shards").permutation(shards.num_shards)[:SHARDS]
    found: list[tuple[float, bytes, Choice]] = []
    for shard in map(int, places):
        index = shards.index(shard)
        draws = uniform(hash_keys(index.column("key").to_pylist()), derive(0, "probe"))
        labels, contents = index.column("labels").to_pylist(), index.column("content_sha256").to_pylist()
        for row, (draw, content, own) in enumerate(zip(draws, contents, labels, strict=True)):
            if kept := [synsets[s] for s in own if s in synsets]:
                found.append((float(draw), content or b"", Choice(shard, row, kept)))
    found.sort(key=lambda f: (f[0], f[2].shard, f[2].row))
    seen: set[bytes] = set()
    chosen = []
    for _, content, choice in found:
        if content not in seen:
            chosen.append(choice)
        if content:
            seen.add(content)
    return chosen[:number]


def share(number: int, part: Part) -> tuple[np.ndarray, np.ndarray]:
    """Which of `number` things this rank takes, and which of those count.

    All ranks take equally many; what is there for that alone (the first thing) does not count.
    """
    each = -(-number // part.world)
    places = np.arange(part.rank, each * part.world, part.world)
    return np.where(places < number, places, 0), places < number


def gather(mine: Tensor, valid: np.ndarray, number: int) -> tuple[Tensor, Tensor]:
    """Rows of all ranks (n D each, as `share` gave them out) in their order, number D, and whether each one counts."""
    with_flag = torch.cat([mine, torch.from_numpy(valid).to(mine)[:, None]], dim=1)  # n D+1
    rows = dist.all_gather(with_flag)  # rank by rank
    rows = rows.unflatten(0, (dist.world_size(), -1)).transpose(0, 1).flatten(0, 1)[:number]
    return rows[:, :-1], rows[:, -1] > 0


class Pictures:
    """This rank's share of some pictures as uint8 3 side side, read when first asked for and then kept in memory."""

    def __init__(
        self, shards: ShardSet, choices: Sequence[Choice], part: Part, side: int, preprocess: Preprocess | None = None
    ) -> None:
        """Seen as `preprocess` says; without one, the short side is resized to `side` and the centre cut."""
        self.shards, self.choices, self.preprocess = shards, choices, preprocess or Preprocess(side)
        self.places, self.valid = share(len(choices), part)
        self._images: Tensor | None = None
        size = len(self.places) * 3 * side**2 / (1 << 20)
        log.info("probe: %d pictures of %s, %.0f MiB in memory on each rank", len(choices), shards.path, size)

    def images(self) -> Tensor:
        """n 3 side side. A picture that cannot be read is grey and does not count."""
        if self._images is None:
            side = self.preprocess.image_size
            self._images = torch.full((len(self.places), 3, side, side), 128, dtype=torch.uint8)
            for i in map(int, np.flatnonzero(self.valid)):
                choice = self.choices[int(self.places[i])]
                try:
                    self._images[i] = self.preprocess(decode(self.shards.image_bytes(choice.shard, choice.row)))
                except (BadImage, DataError) as e:
                    self.valid[i] = False
                    log.warning("probe: row %d of %s left out: %s", choice.row, self.shards.tar_path(choice.shard), e)
        return self._images

    def features(self, encode: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """l2-normalised features of all N pictures in their order, float32 N D, and which of them were read, N."""
        mine = torch.cat([encode(images) for images in self.images().split(BATCH)])
        return gather(F.normalize(mine.float(), dim=1), self.valid, len(self.choices))

    def labels(self, synsets: int, device: torch.device) -> Tensor:
        """Which synsets each picture has: N S."""
        out = torch.zeros(len(self.choices), synsets, dtype=torch.bool, device=device)
        for row, choice in zip(out, self.choices, strict=True):
            row[choice.synsets] = True
        return out


@dataclass
class Knn:
    """Nearest neighbours over synsets, of the pooled features of a trunk.

    `probe/knn_chance` is what always answering the bank's commonest synset would score.
    """

    tower: VisionTransformer
    cfg: TrainConfig
    pictures: Pictures
    queries: int  # the first of the pictures; the others are the bank
    synsets: int

    def __call__(self, engine: "Engine") -> dict[str, float]:
        def encode(images: Tensor) -> Tensor:
            x = normalise(images.to(engine.device), self.cfg.data.mean, self.cfg.data.std).to(self.tower.dtype)
            return engine.inside(self.tower, lambda: self.tower.pooled(VisionTransformer.forward(self.tower, x)))

        with untouched(engine.device):
            features, read = self.pictures.features(encode)
            labels = self.pictures.labels(self.synsets, features.device)
            is_query = torch.arange(len(read), device=read.device) < self.queries
            q, b = read & is_query, read & ~is_query
            guesses = nearest(features[b], labels[b], features[q], self.cfg.probe.k)
            common = labels[b].sum(dim=0).argmax().expand_as(guesses)
            found = {"probe/knn_top1": right(guesses, labels[q]), "probe/knn_chance": right(common, labels[q])}
        return told(found, "nearest neighbours", int(q.sum()))


def nearest(bank: Tensor, labels: Tensor, queries: Tensor, k: int) -> Tensor:
    """The synset that the `k` nearest of the bank (N D, labels N S) vote for, for each query.

    A neighbour votes with exp(cosine / temperature), shared between its synsets as WSP's target is.
    """
    similarity = queries @ bank.T  # Q N
    best, found = similarity.topk(min(k, len(bank)), dim=1)  # Q K
    weight = torch.zeros_like(similarity).scatter(1, found, ((best - 1) / TEMPERATURE).exp())
    return (weight @ (labels / labels.sum(dim=1, keepdim=True))).argmax(dim=1)


def right(guesses: Tensor, labels: Tensor) -> float:
    """Share of guesses that are one of the query's own synsets (Q S)."""
    return float(labels.gather(1, guesses[:, None]).float().mean())


@dataclass
class ZeroShot:
    """Pictures against the synsets' lemmas, through both towers as they are now.

    `probe/zeroshot_chance` is what always answering the queries' commonest synset would score.
    """

    towers: TwoTower
    cfg: TrainConfig
    pictures: Pictures
    prompts: tuple[Tensor, Tensor]  # token ids and masks of this rank's share, n T
    valid: np.ndarray  # which of those count, n
    owner: Tensor  # the synset that each of all prompts is of

    def __call__(self, engine: "Engine") -> dict[str, float]:
        def see(images: Tensor) -> Tensor:
            x = normalise(images.to(engine.device), self.cfg.data.mean, self.cfg.data.std).to(self.towers.image.dtype)
            return engine.inside(self.towers, lambda: self.towers.encode_image(x))

        def read(ids: Tensor, mask: Tensor) -> Tensor:
            ids, mask = ids.to(engine.device), mask.to(engine.device)
            return engine.inside(self.towers, lambda: self.towers.encode_text(ids, mask))

        with untouched(engine.device):
            features, seen = self.pictures.features(see)
            mine = [read(*part) for part in zip(*(t.split(BATCH) for t in self.prompts), strict=True)]
            texts, _ = gather(torch.cat(mine).float(), self.valid, len(self.owner))
            synsets = int(self.owner.max()) + 1
            means = texts.new_zeros(synsets, texts.shape[1]).index_add_(0, self.owner.to(texts.device), texts)
            guesses = (features[seen] @ F.normalize(means, dim=1).T).argmax(dim=1)
            labels = self.pictures.labels(synsets, features.device)[seen]
            common = labels.sum(dim=0).argmax().expand_as(guesses)
            found = {"probe/zeroshot_top1": right(guesses, labels), "probe/zeroshot_chance": right(common, labels)}
        return told(found, f"zero-shot among {synsets} synsets", len(guesses))


@contextmanager
def untouched(device: torch.device) -> Iterator[None]:
    """Whatever is drawn inside, torch's generators are afterwards as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def told(found: dict[str, float], what: str, queries: int) -> dict[str, float]:
    """Rank 0's values on all ranks, and in words."""
    found = dist.broadcast({name: round(value, 4) for name, value in found.items()})
    score, chance = found.values()
    log.info(
        "probe: %s: right for %.1f%% of %d pictures; the commonest answer alone would be for %.1f%%",
        what, 100 * score, queries, 100 * chance,
    )  # fmt: skip
    return found
