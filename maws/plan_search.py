"""What fits instead: the settings nearest to those that do not, found by trying them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from maws.config import ConfigError, TrainConfig
from maws.ds_config import DS_CONFIGS
from maws.plan_memory import Memory, Subject, Zero
from maws.rehearsal import Footprint

Indivisible = Callable[[TrainConfig, int], list[str]]  # why so many ranks cannot share the batch
MOST_RANKS = 4096


@dataclass(frozen=True)
class Alternative:
    """Settings that fit, and what they need on a rank."""

    change: str  # for people
    settings: tuple[str, ...]
    ranks: int
    memory: Memory

    def as_json(self) -> dict[str, object]:
        return {"change": self.change, "settings": list(self.settings), "ranks": self.ranks,
                "total_bytes": self.memory.total, "host_bytes": self.memory.host}  # fmt: skip


def alternatives(subject: Subject, ranks: int, usable: int, indivisible: Indivisible) -> list[Alternative]:
    """One of each kind that fits, the smallest change first: a smaller micro-batch, recomputed blocks, offloading, a
    batch that divides, more GPUs."""
    found = list(_with_these_ranks(subject, ranks, usable, indivisible))
    found += _with_more(subject, ranks, usable, indivisible)
    return found


def _with_these_ranks(subject: Subject, ranks: int, usable: int, indivisible: Indivisible) -> Iterator[Alternative]:
    base = list[str]()
    for reason in indivisible(subject.cfg, ranks):  # first make the batch one that so many ranks can share
        base += _divisible(subject.cfg, ranks, reason)
    try:
        subject = subject.with_settings(*base)
    except ConfigError:
        return
    if indivisible(subject.cfg, ranks):
        return
    if one := _largest_micro(subject, ranks, usable):
        yield _alternative(
            "the batch and its parts" if base else "a smaller micro-batch", base, [], subject, ranks, one
        )
    again = subject
    if subject.cfg.model.checkpoint_blocks != "all":
        again = subject.with_settings("model.checkpoint_blocks=all")
        if one := _largest_micro(again, ranks, usable):
            yield _alternative("blocks recomputed", base, ["model.checkpoint_blocks=all"], again, ranks, one)
    for kept, policy in ((subject, []), (again, ["model.checkpoint_blocks=all"])):
        for name in offloading():
            settings = [*policy, f"engine.ds_config={name}"]
            moved = kept.with_settings(settings[-1])
            if one := _largest_micro(moved, ranks, usable):
                yield _alternative("states on the host", base, settings, moved, ranks, one)
                return


def _with_more(subject: Subject, ranks: int, usable: int, indivisible: Indivisible) -> Iterator[Alternative]:
    """More ranks: parts of states get smaller, until one sample at a time and one copy of them fits."""
    more = ranks * 2
    while more <= min(MOST_RANKS, subject.cfg.optim.batch_size):
        cfg, base = subject.cfg, list[str]()
        for reason in indivisible(cfg, more):
            base += _divisible(cfg, more, reason)
        changed = subject.with_settings(*base)
        if not indivisible(changed.cfg, more) and (one := _largest_micro(changed, more, usable)):
            yield _alternative(f"{more} GPUs", base, [], changed, more, one)
            return
        more *= 2


def _divisible(cfg: TrainConfig, ranks: int, reason: str) -> list[str]:
    """The nearest batch that so many ranks can share, in streams that they can share."""
    batch = max(1, round(cfg.optim.batch_size / ranks)) * ranks
    settings = [f"optim.batch_size={batch}"] if batch != cfg.optim.batch_size else []
    return settings + ([f"data.streams={ranks}"] if "streams" in reason or settings else []) + ["optim.micro_batch=0"]


def _largest_micro(subject: Subject, ranks: int, usable: int) -> int:
    """The largest micro-batch, no larger than asked for, that fits; 0: not even one sample does."""
    share = subject.cfg.optim.batch_size // ranks
    most = min(share, subject.cfg.optim.micro_batch or share)
    sizes = [m for m in range(most, 0, -1) if share % m == 0]
    fits = [m for m in sizes if _guessed(subject, ranks, m).total <= usable]
    for micro in fits[:3]:  # the guess is close, but what counts is the rehearsal
        if subject.memory(ranks, micro).total <= usable:
            return micro
    return 0


def _guessed(subject: Subject, ranks: int, micro: int) -> Memory:
    """Memory with activations drawn through those of two and four samples."""
    two, four = subject.footprint(2), subject.footprint(4)
    line = Footprint(
        two.saved + (four.saved - two.saved) * (micro - 2) // 2, two.peak + (four.peak - two.peak) * (micro - 2) // 2
    )
    return subject.memory(ranks, micro, footprint=line)


def _alternative(
    change: str, base: list[str], settings: list[str], subject: Subject, ranks: int, micro: int
) -> Alternative:
    said = [s for s in (*base, *settings) if not s.startswith("optim.micro_batch")]
    share = subject.cfg.optim.batch_size // ranks
    if micro != share or subject.cfg.optim.micro_batch:
        said.append(f"optim.micro_batch={micro}")
    return Alternative(change, tuple(said), ranks, subject.memory(ranks, micro))


def offloading() -> list[str]:
    """ds_configs that keep states elsewhere, those that move least first."""
    names = sorted(path.stem for path in DS_CONFIGS.glob("*.json"))
    zeros = {name: Zero.named(name) for name in names}
    moved = [n for n in names if zeros[n].optimizer != "none" or zeros[n].params != "none"]
    return sorted(moved, key=lambda n: (zeros[n].params != "none", "nvme" in (zeros[n].optimizer, zeros[n].params)))
