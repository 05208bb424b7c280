"""A release from the files of a checkpoint, whatever number of ranks wrote it, one tensor at a time and without them.

    python -m maws export runs/mae --output mae_step_40000
    python -m maws export runs/mae --checkpoint runs/mae/checkpoints/step_0030000 --output mean --ema --dtype bfloat16

It holds what a finished run's release/ holds: same files, names and values. The parameters of the objective are laid
out without memory; each value then comes from where it is: trained ones from the ranks' files (the mean's from `ema/`,
a momentum target's from `average/`), frozen ones from the release the run started from, whose hash must be the one in
config.json, or, like fixed position tables, from the formula they started with.
"""

import logging
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.errors import DataError, UserError
from maws import checkpoint, config, dist, manifest, stages
from maws.checkpoint import CheckpointError, RankFiles
from maws.config import ConfigError, TrainConfig, nearest
from maws.data.loader import open_shards
from maws.data.transforms import Preprocess
from maws.models.init import formula
from maws.models.text import TextTower
from maws.models.vit import VisionTransformer
from maws.pretrained_text import TextWeights, pretrained_sha256
from maws.release import describe, open_release, write_release
from maws.seeding import generator
from maws.tensor_file import Spec
from maws.tower_file import Fit, TowerFile
from maws.weight_files import Weights

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def export(
    run: Path, output: Path, which: str = "latest", dtype: str = "float32", ema: bool = False,
    max_shard: int = 5 * 10**9, overwrite: bool = False, shards: str = "", init_from: str = "",
) -> Path:  # fmt: skip
    """Write `output` from a checkpoint of `run`; `shards` and `init_from` say where those of its config are now.

    Raises ConfigError for what cannot be done as asked, CheckpointError for what is missing or damaged.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype} is not known; {nearest(dtype, list(DTYPES))}")
    if output.exists() and not overwrite:
        raise ConfigError(f"--output {output} is there already; add --overwrite to replace it, or name another")
    if output.exists() and not (output / "config.json").is_file():
        raise ConfigError(f"--output {output} is no release, so --overwrite does not delete it; name another")
    record, cfg, stage = read_run(run)
    found = checkpoint.find(run, which, "--checkpoint")
    assert found is not None  # only --resume auto may find none
    with manifest.reading(found):
        state = checkpoint.read_state(found)
        data = _Shards(cfg, record, shards)
        with torch.device("meta"):
            objective = stage.objective(cfg, data)  # type: ignore[arg-type]
        source = Source(objective, cfg, RankFiles(found, state["ranks"]), state["elements"], init_from)
        if ema and not source.has_ema:
            raise ConfigError(f"--ema: {found} holds no mean of the weights; the run had optim.ema=0")
        parts = stage.release(objective, cfg, data, run)  # type: ignore[arg-type]
        facts = (
            facts_of(record, cfg, parts.config, state["step"]) | {"dtype": dtype} | ({"weights": "ema"} if ema else {})
        )
        beside = source.weights(parts.rename, DTYPES[dtype], ema=True) if source.has_ema and not ema else None
        weights = source.weights(parts.rename, DTYPES[dtype], ema)
        try:
            write_release(output, weights, facts, preprocess_of(cfg, stage), parts.files, beside, max_shard)
        except OSError as e:
            raise CheckpointError(f"{output} could not be written: {e}; nothing of it is left") from None
    log.info(
        "%s: %s parameters of step %d, which %d rank(s) wrote", output, f"{weights.parameters:,}", state["step"],
        state["ranks"],
    )  # fmt: skip
    return output


def read_run(run: Path) -> tuple[dict[str, Any], TrainConfig, stages.Stage]:
    """What a run folder says of itself: config.json as it is, and as the config of its stage."""
    if not (run / "config.json").is_file() or not (run / "checkpoints").is_dir():
        raise CheckpointError(
            f"{run} is no run with checkpoints: looked for config.json and checkpoints/ in it; give the folder that "
            f"was --run of maws/train.py"
        )
    record = config.load_json(run / "config.json")
    stage = stages.load(str(record.get("stage")))
    names = {f.name for f in fields(stage.Config)}
    return record, config.from_json(stage.Config, {k: v for k, v in record.items() if k in names}), stage


def facts_of(record: dict[str, Any], cfg: TrainConfig, of_stage: dict[str, Any], steps: int) -> dict[str, Any]:
    """A release's config.json, for weights after `steps` steps of the run whose config.json is `record`."""
    trained = {
        "preset": record["preset"], "steps": steps, "batch_size": cfg.optim.batch_size, "seed": cfg.seed,
        "init_from": cfg.init_from, "revision": record["revision"],
    }  # fmt: skip
    return {
        "stage": record["stage"], "lineage": record["lineage"], "variant": cfg.model.variant,
        "model": describe(stages.shape_of(cfg.model)), "image_size": stages.image_side(cfg.model), **of_stage,
        "train": trained, "shards_sha256": record["shards_sha256"], "init_sha256": cfg.init_sha256, "dtype": "float32",
    }  # fmt: skip


def preprocess_of(cfg: TrainConfig, stage: stages.Stage) -> Preprocess:
    """How evaluation makes pictures: the stage says, or the short side becomes the image size."""
    make = getattr(stage, "preprocess", None)
    return make(cfg) if make else Preprocess(stages.image_side(cfg.model), mean=cfg.data.mean, std=cfg.data.std)


def publish(
    objective: Any, stage: stages.Stage, cfg: TrainConfig, shards: Any, run: Path, record: dict[str, Any], steps: int
) -> None:
    """RUN/release from the run's last checkpoint; rank 0 writes it, all ranks wait and learn how it went.

    Raises CheckpointError on all ranks when it could not be written.
    """
    failure = ""
    if dist.rank() == 0:
        try:
            found = run / "checkpoints" / checkpoint.name_of(steps)
            state = checkpoint.read_state(found)
            source = Source(objective, cfg, RankFiles(found, state["ranks"]), state["elements"])
            parts = stage.release(objective, cfg, shards, run)
            mean = source.weights(parts.rename, torch.float32, ema=True) if source.has_ema else None
            facts = facts_of(record, cfg, parts.config, steps)
            weights = source.weights(parts.rename, torch.float32, ema=False)
            write_release(run / "release", weights, facts, preprocess_of(cfg, stage), parts.files, mean)
        except (OSError, UserError) as e:
            failure = f"the release could not be written: {e}. The checkpoints are whole: go on with --resume auto"
    if failure := dist.broadcast(failure):
        raise CheckpointError(failure)


class Source:
    """Values of an objective's parameters, one at a time."""

    def __init__(
        self, objective: Any, cfg: TrainConfig, files: RankFiles, elements: dict[str, int], init_from: str = ""
    ) -> None:
        self.objective, self.cfg, self.files, self.elements = objective, cfg, files, elements
        self.keys = files.keys()
        self.has_ema = any(key.startswith("ema/") for key in self.keys)
        self._tower, self._names, self._fit = self._handed_over(init_from)
        self._text: TextWeights | None = None

    def weights(self, rename: Callable[[str], str], dtype: torch.dtype, ema: bool) -> Weights:
        """Those that get a name; each value is made when it is asked for."""
        params = ((n, p) for n, p in self.objective.named_parameters() if rename(n))
        wanted = {n: torch.Size(getattr(p, "ds_shape", p.shape)) for n, p in params}  # partitioned ones are empty

        def values() -> Iterator[tuple[str, Tensor]]:
            for name, shape in wanted.items():
                yield rename(name), self.value(name, shape, ema)

        return Weights({rename(n): Spec(dtype, tuple(shape)) for n, shape in wanted.items()}, values())

    def value(self, name: str, shape: torch.Size, ema: bool) -> Tensor:
        """One parameter, whole, float32. Raises CheckpointError when the files do not have it so."""
        for kind in ("ema", "weight", "average") if ema else ("weight", "average"):
            if f"{kind}/{name}" in self.keys:
                if self.elements.get(name) != (count := math.prod(shape)):
                    raise CheckpointError(
                        f"{self.files.checkpoint} has {self.elements.get(name)} elements of {name}, the run's "
                        f"config.json makes it {tuple(shape)}: they are not of one run"
                    )
                return self.files.cut(f"{kind}/{name}", 0, count, count).view(shape)
        return self._frozen(name, shape)

    def _frozen(self, name: str, shape: torch.Size) -> Tensor:
        """As it was when the run started, for it was not trained since."""
        if self._tower is not None and name in self._names:
            return self._tower.read(self._names[name], self._fit).float()
        if (text := self._pretrained_text(name, shape)) is not None:
            return text
        init = formula(name, self.objective.init_rules())
        return init.draw(shape, generator(self.cfg.seed, "init", name))

    def _handed_over(self, init_from: str) -> tuple[TowerFile | None, dict[str, str], Fit | None]:
        """The release that the run started from, and name here -> name there of what was taken (handover.py)."""
        if not self.cfg.init_from:
            return None, {}, None
        release = open_release(init_from or self.cfg.init_from)
        if release.sha256 != self.cfg.init_sha256:
            raise CheckpointError(
                f"{release.weights} is not what the run started from: its hash is {release.sha256[:12]}…, config.json "
                f"says {self.cfg.init_sha256[:12]}…; give the right one with --init-from"
            )
        prefix, tower = next((n, m) for n, m in self.objective.named_modules() if isinstance(m, VisionTransformer))
        file, options = TowerFile(release), self.cfg.handover
        fit = Fit(tower.shape, tower.grid, options.align_corners, options.patch)
        names = {f"{prefix}.{n}" if prefix else n: n for n in file.names if fit.takes(n, release.shape)}
        return file, names, fit

    def _pretrained_text(self, name: str, shape: torch.Size) -> Tensor | None:
        """A locked text tower comes whole from where it was published."""
        pretrained = getattr(getattr(self.cfg, "text", None), "pretrained", "")
        prefix = next((n + ".encoder." for n, m in self.objective.named_modules() if isinstance(m, TextTower)), "")
        if not pretrained or not name.startswith(prefix):
            return None
        if self._text is None:
            self._text = TextWeights(pretrained)
            wanted = getattr(self.cfg, "text_sha256", "")  # older runs have not noted it
            if wanted and (there := pretrained_sha256(pretrained)) != wanted:
                raise CheckpointError(
                    f"text.pretrained={pretrained} is not what the run locked: its hash is {there[:12]}…, config.json "
                    f"says {wanted[:12]}…; put the weights back that it was started with"
                )
        own = name.removeprefix(prefix)
        return self._text.read(own).float() if own in self._text.names else torch.zeros(shape)  # as load_pretrained


class _Shards:
    """The shard set of a run, opened when something of it is needed: only WSP's vocabulary is."""

    def __init__(self, cfg: TrainConfig, record: dict[str, Any], elsewhere: str) -> None:
        self._data = config.override(cfg.data, [f"shards={elsewhere}"]) if elsewhere else cfg.data
        self._sha256, self._found = record["shards_sha256"], None

    def __getattr__(self, name: str) -> Any:
        if re.fullmatch("__.*__", name):
            raise AttributeError(name)
        if self._found is None:
            try:
                found: Any = open_shards(self._data)
            except (UserError, OSError) as e:
                raise DataError(
                    f"{e}. The release holds the vocabulary: say where the shards are with --shards"
                ) from None
            if found.sha256 != self._sha256:
                raise DataError(f"{self._data.shards} is another shard set than the run was trained on; use --shards")
            self._found = found
        return getattr(self._found, name)
