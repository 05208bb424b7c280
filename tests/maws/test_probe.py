"""Probes: right votes, the same pictures whoever asks, equal work on all ranks, a training that is not disturbed."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from training import arguments, metrics, train_in_turn

from data_pipeline.shardset import ShardSet
from maws import probe, stages
from maws.config import ConfigError, override
from maws.data.order import Part
from maws.data.transforms import Preprocess
from maws.models.vit import build_vit
from maws.seeding import hash_keys

EVERY = ("probe.every=2 steps", "probe.bank=60", "probe.queries=20", "probe.k=5")


class Bare:
    """Stands for the engine: parameters are whole anyway."""

    def __init__(self):
        self.device = torch.device("cpu")

    @torch.no_grad()
    def inside(self, module, function):
        module.eval()
        return function()


def settings(*more):
    return override(stages.preset("mae", "debug"), [*EVERY, *more])


# --------------------------------------------------------------------------------------------------------------- votes


def test_the_nearest_vote_with_their_cosine_as_a_loop_over_them_would():
    rng = torch.Generator().manual_seed(3)
    bank, queries = (F.normalize(torch.randn(n, 6, generator=rng), dim=1) for n in (17, 5))
    labels = torch.rand(17, 4, generator=rng) < 0.4
    labels[:, 0] |= ~labels.any(dim=1)
    for query, guess in zip(queries, probe.nearest(bank, labels, queries, k=3), strict=True):
        votes = [0.0] * 4
        for i in sorted(range(17), key=lambda i: -float(query @ bank[i]))[:3]:
            own = labels[i].nonzero().flatten().tolist()
            for synset in own:
                votes[synset] += float(torch.exp(query @ bank[i] / 0.07)) / len(own)
        assert votes[int(guess)] == max(votes)


def test_a_guess_is_right_when_it_is_one_of_the_querys_own_synsets():
    labels = torch.tensor([[True, True, False], [False, False, True], [True, False, False]])
    assert probe.right(torch.tensor([1, 2, 1]), labels) == pytest.approx(2 / 3)


def test_features_that_tell_synsets_apart_score_all_and_noise_scores_about_chance():
    centres = F.normalize(torch.randn(5, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    own = torch.arange(200) % 5
    labels = F.one_hot(own).bool()
    clear = F.normalize(centres[own] + 0.05 * torch.randn(200, 32, generator=torch.Generator().manual_seed(1)), dim=1)
    noise = F.normalize(torch.randn(200, 32, generator=torch.Generator().manual_seed(2)), dim=1)
    scores = [probe.right(probe.nearest(x[:150], labels[:150], x[150:], 20), labels[150:]) for x in (clear, noise)]
    assert scores[0] == 1.0 and scores[1] < 0.45


# ------------------------------------------------------------------------------------------------------------ pictures


def test_pictures_are_labelled_and_differ_and_do_not_depend_on_who_asks(shards: ShardSet):
    names = {entry.index: entry.index for entry in shards.vocabulary}
    chosen = probe.choose(shards, 50, names)
    assert chosen == probe.choose(ShardSet.open(shards.path), 50, names)
    assert probe.choose(shards, 20, names) == chosen[:20]
    assert len({c[:2] for c in chosen}) == 50
    for shard, row, synsets in chosen:
        assert synsets and synsets == shards.index(shard).column("labels")[row].as_py()


def test_a_picture_with_the_same_content_as_another_is_left_out(shards: ShardSet, monkeypatch):
    names = {entry.index: entry.index for entry in shards.vocabulary}
    alone = probe.choose(shards, 1000, names)
    index = shards.index
    first = alone[0]
    same = shards.index(first.shard).column("content_sha256")[first.row].as_py()

    def copies(shard):
        table = index(shard)
        column = table.column_names.index("content_sha256")
        values = table.column("content_sha256").to_pylist()
        return table.set_column(column, "content_sha256", [[same if shard == first.shard else v for v in values]])

    monkeypatch.setattr(shards, "index", copies)
    assert [c for c in probe.choose(shards, 1000, names) if c.shard == first.shard] == [first]


@pytest.mark.parametrize(("number", "world"), [(10, 1), (10, 4), (3, 4), (8, 4)])
def test_ranks_take_equal_shares_that_are_everything_once(number, world):
    shares = [probe.share(number, Part(rank, world)) for rank in range(world)]
    assert len({len(places) for places, _ in shares}) == 1
    taken = np.concatenate([places[valid] for places, valid in shares])
    assert sorted(taken) == list(range(number))


@pytest.mark.parametrize("number", [10, 9, 2])
def test_what_the_ranks_found_is_put_together_in_the_order_of_the_pictures(monkeypatch, number):
    """Three ranks, as `share` gave the pictures out; what is there for equal work alone is not among them."""
    x = torch.arange(2.0 * number).view(number, 2)
    shares = [probe.share(number, Part(rank, 3)) for rank in range(3)]
    sent = [
        torch.cat([x[places], torch.from_numpy(valid & (places != 1)).float()[:, None]], 1) for places, valid in shares
    ]
    monkeypatch.setattr(probe.dist, "world_size", lambda: 3)
    monkeypatch.setattr(probe.dist, "all_gather", lambda mine: torch.cat(sent))
    rows, counts = probe.gather(x[shares[0][0]], shares[0][1], number)
    assert torch.equal(rows, x)
    assert counts.tolist() == [i != 1 for i in range(number)]  # picture 1 could not be read


def test_an_unreadable_picture_does_not_count_and_the_others_keep_their_places(shards: ShardSet, monkeypatch):
    names = {entry.index: entry.index for entry in shards.vocabulary}
    chosen = probe.choose(shards, 6, names)
    bad = chosen[2]
    read = shards.image_bytes
    monkeypatch.setattr(shards, "image_bytes", lambda s, r: b"no picture" if (s, r) == bad[:2] else read(s, r))
    pictures = probe.Pictures(shards, chosen, Part(), side=32)
    features, seen = pictures.features(lambda images: images.float().flatten(1))
    assert seen.tolist() == [True, True, False, True, True, True]
    want = Preprocess(32)(probe.decode(read(*chosen[3][:2]))).float().flatten()
    assert_close(features[3], F.normalize(want, dim=0))


# ------------------------------------------------------------------------------------------------------------- a probe


def test_the_knn_probe_scores_the_pooled_features_of_the_trunk(shards: ShardSet):
    cfg, tower = settings(), build_vit("atto").eval()
    made = probe.knn(tower, cfg, shards, Part())
    assert made is not None
    found = made(Bare())  # type: ignore[arg-type]
    names = {entry.index: entry.index for entry in shards.vocabulary}
    chosen = probe.choose(shards, 80, names)
    images = torch.stack([Preprocess(32)(probe.decode(shards.image_bytes(c.shard, c.row))) for c in chosen])
    with torch.no_grad():
        features = F.normalize(tower.pooled(tower(probe.normalise(images, cfg.data.mean, cfg.data.std))), dim=1)
    right = 0
    for query in range(20):
        votes: dict[int, float] = {}
        cosine = features[20:] @ features[query]
        for i in cosine.topk(5).indices.tolist():
            for synset in chosen[20 + i].synsets:
                votes[synset] = votes.get(synset, 0) + float((cosine[i] / 0.07).exp()) / len(chosen[20 + i].synsets)
        right += max(votes, key=votes.__getitem__) in chosen[query].synsets
    assert found["probe/knn_top1"] == pytest.approx(right / 20)
    assert 0 < found["probe/knn_chance"] < 1
    assert found == made(Bare())  # type: ignore[arg-type]


class Words:
    """Two towers that know pictures and prompts by heart: a vector of its own for each word."""

    image = SimpleNamespace(image_size=16, dtype=torch.float32)

    def __init__(self):
        self.seen: list[str] = []

    def __call__(self, prompts):  # the tokenizer: the prompt's number
        self.seen += [p for p in prompts if p not in self.seen]
        ids = torch.tensor([[self.seen.index(p)] for p in prompts])
        return ids, torch.ones_like(ids)

    def eval(self): ...

    def vector(self, lemma: str) -> torch.Tensor:
        rng = torch.Generator().manual_seed(hash_keys([lemma])[0].item() % 1000)
        return F.normalize(torch.randn(16, generator=rng), dim=0)

    def encode_text(self, ids, mask):
        return torch.stack([self.vector(self.seen[i].removeprefix("a photo of ")) for i in ids.flatten().tolist()])


def test_the_zero_shot_probe_finds_a_synset_by_the_mean_of_its_lemmas(shards: ShardSet, monkeypatch):
    towers = Words()
    made = probe.zero_shot(towers, towers, settings(), shards, Part())  # type: ignore[arg-type]
    assert made is not None
    entries = sorted(shards.vocabulary, key=lambda e: (-e.count, e.index))
    assert towers.seen == [f"a photo of {w.replace('_', ' ')}" for e in entries for w in e.lemmas[:2]]
    means = [sum(towers.vector(w.replace("_", " ")) for w in e.lemmas[:2]) for e in entries]
    wrong = {3, 4}  # these look like nothing that they are
    looks = [(c.synsets[0] if i not in wrong else 0) for i, c in enumerate(made.pictures.choices)]
    wrong = {i for i, (look, c) in enumerate(zip(looks, made.pictures.choices, strict=True)) if look not in c.synsets}
    features = F.normalize(torch.stack([means[look] for look in looks]), dim=1)  # type: ignore[list-item]
    monkeypatch.setattr(made.pictures, "features", lambda encode: (features, torch.ones(len(looks), dtype=torch.bool)))
    found = made(Bare())  # type: ignore[arg-type]
    assert found["probe/zeroshot_top1"] == pytest.approx(1 - len(wrong) / 20)
    commonest = max(range(len(entries)), key=lambda n: sum(n in c.synsets for c in made.pictures.choices))
    assert found["probe/zeroshot_chance"] == sum(commonest in c.synsets for c in made.pictures.choices) / 20


def test_nothing_is_probed_unless_asked_for(shards: ShardSet):
    assert probe.knn(build_vit("atto"), stages.preset("mae", "debug"), shards, Part()) is None


def test_a_small_set_is_shared_out_in_the_proportion_that_was_asked_for(shards: ShardSet):
    made = probe.knn(build_vit("atto"), settings("probe.bank=3000", "probe.queries=1000"), shards, Part())
    assert made is not None
    assert len(made.pictures.choices) == 105 and made.queries == 26


@pytest.mark.parametrize("setting", ["probe.bank=0", "probe.queries=0", "probe.k=-1"])
def test_impossible_sizes_are_refused(shards: ShardSet, setting):
    with pytest.raises(ConfigError, match=setting.replace(".", r"\.") + " must be 1 or more"):
        probe.knn(build_vit("atto"), settings(setting), shards, Part())


def test_a_set_without_labels_is_refused_with_the_way_out(shards: ShardSet, monkeypatch):
    monkeypatch.setattr(probe, "choose", lambda *_: [])
    with pytest.raises(ConfigError, match=r"0 pictures with synsets.*probe\.shards"):
        probe.knn(build_vit("atto"), settings(), shards, Part())


def test_random_numbers_of_a_training_go_on_as_if_there_had_been_no_probe():
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    with probe.untouched(torch.device("cpu")):
        torch.rand(7)
    assert torch.equal(torch.rand(3), want)


SHORT = ("optim.length=5 steps", "checkpoint.every=100 steps")


def test_on_two_ranks_a_training_with_probes_has_the_same_losses_to_the_bit(tmp_path, shards_path):
    runs = {name: tmp_path / name for name in ("plain", "probed")}
    train_in_turn(
        [
            arguments("mae", runs["plain"], shards_path, *SHORT),
            arguments("mae", runs["probed"], shards_path, *SHORT, *EVERY),
        ],
        ranks=2,
    )
    same_losses_and_scores(runs["plain"], runs["probed"], "knn")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["simmim", "lc_mae", "wsp", "lit"])
def test_on_two_ranks_every_stage_is_probed_and_none_is_disturbed(tmp_path, shards_path, stage):
    """lc_mae has running statistics and a momentum target, wsp draws masks, lit has two towers and a locked one."""
    runs = [arguments("mae", tmp_path / "mae", shards_path, *SHORT)] if stage == "lit" else []
    begin = ("--init-from", str(tmp_path / "mae")) if stage == "lit" else ()
    for name, more in (("plain", ()), ("probed", EVERY)):
        runs.append(arguments(stage, tmp_path / name, shards_path, *SHORT, *begin, *more))
    train_in_turn(runs, ranks=2)
    same_losses_and_scores(tmp_path / "plain", tmp_path / "probed", "zeroshot" if stage == "lit" else "knn")


def same_losses_and_scores(plain, probed, name):
    assert losses_of_training(probed) == losses_of_training(plain)
    found = {line["step"]: line for line in metrics(probed) if f"probe/{name}_top1" in line}
    assert sorted(found) == [2, 4, 5]
    for line in found.values():
        assert 0 <= line[f"probe/{name}_top1"] <= 1 and 0 < line[f"probe/{name}_chance"] < 1


def losses_of_training(run):
    found = {line["step"]: line["train/loss"] for line in metrics(run) if "train/loss" in line}
    assert sorted(found) == [1, 2, 3, 4, 5]
    return found
