"""Starting a stage from another one's release: what is taken, dropped and new, and proof that it arrived.

    handover = load_backbone(objective.backbone, open_release("runs/mae"), gather)   # before the engine is built
    handover.verify(engine, run)                                                     # before the first step

The report goes to the log by patterns of names, and name by name to RUN/handover.json (and the log, at debug level).
The proof: the trunk in the engine and a float32 computation that streams the release block by block
(tower_file.reference_tokens) give the same tokens for two fixed images, or the run is refused. Axes: B T D as there.
"""

import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from maws import dist
from maws.checkpoint import CheckpointError
from maws.config import ConfigError, HandoverConfig
from maws.files import write_json
from maws.models.init import Gather
from maws.models.patch_embed import RESAMPLING
from maws.models.vit import VisionTransformer
from maws.release import ENCODER, Release
from maws.seeding import generator
from maws.tower_file import KERNEL, POSITIONS, Fit, TowerFile, reference_tokens

if TYPE_CHECKING:  # only named here: a stage can be read without DeepSpeed
    from maws.engine import Engine

log = logging.getLogger(__name__)

IMAGES = 2
# Largest difference of two tokens' values, as a share of the largest value. float32 adds in another order; bf16 rounds
# every weight and every intermediate to 8 bits, measured 0.02 on random trunks of 12 and 32 blocks.
TOLERANCE = {"fp32": 1e-4, "bf16": 0.05}


@dataclass(frozen=True)
class Handover:
    """An image tower that was given the weights of a release."""

    tower: VisionTransformer
    release: Release
    fit: Fit
    taken: list[str]  # names in the tower
    dropped: list[str]  # names in the release
    adapted: dict[str, str]  # taken, but not as they were: name -> what was done

    def report(self, objective: nn.Module) -> dict[str, Any]:
        """What was taken, dropped and new, by names of the release and, where new, of the objective."""
        prefix = next(f"{n}." if n else "" for n, m in objective.named_modules() if m is self.tower)
        taken = {prefix + n for n in self.taken}
        new = [n for n, _ in objective.named_parameters() if n not in taken]
        return {
            "from": str(self.release.folder),
            "lineage": list(self.release.lineage),
            "adapted": self.adapted,
            "taken": _listed(self.taken),
            "dropped": _listed(self.dropped),
            "new": _listed(new),
        }

    def verify(self, engine: "Engine", run: Path) -> None:
        """Compare the engine's trunk with the release, and write RUN/handover.json; all ranks take part.

        Raises CheckpointError when they differ by more than the tolerance of the engine's precision.
        """
        report, tolerance = self.report(engine.objective), TOLERANCE[engine.runtime.precision]
        differences = dist.gather_objects(self._difference(engine))
        worst = max(differences, key=lambda d: d if d == d else torch.inf)  # not a number is worse than any
        parity = {
            "images": IMAGES, "image_size": self.tower.image_size, "precision": engine.runtime.precision,
            "difference": worst, "tolerance": tolerance,
        }  # fmt: skip
        if dist.rank() == 0:
            self._say(report, parity)
            write_json(run / "handover.json", report | {"parity": parity})
        if not worst <= tolerance:
            raise CheckpointError(
                f"the trunk that would be trained is not the one in {self.release.folder}: the tokens of {IMAGES} "
                f"fixed images differ by {worst:.3g} of their largest value on rank {differences.index(worst)}, "
                f"{tolerance:g} is allowed ({engine.runtime.precision}). The weights were damaged on their way in: "
                f"start again, and if it repeats, with one rank and engine.precision=fp32 to see which it takes"
            )

    def _difference(self, engine: "Engine") -> float:
        """The largest difference between this rank's tokens and the reference's, over the largest of the latter."""
        images = fixed_images(self.tower.image_size).to(engine.device)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # else convolutions keep 10 bits on newer GPUs
            want = None
            if dist.rank() == 0:
                with TowerFile(self.release) as tower:
                    want = reference_tokens(tower, images, self.fit).cpu()
            want = dist.broadcast(want)
            got = engine.inside(self.tower, lambda: VisionTransformer.forward(self.tower, images.to(self.tower.dtype)))
        return float((got.float().cpu() - want).abs().max() / want.abs().max())

    def _say(self, report: dict[str, Any], parity: dict[str, Any]) -> None:
        log.info("started from %s (%s)", self.release.folder, " → ".join(self.release.lineage))
        for kind in ("taken", "dropped", "new"):
            counts = Counter()
            for pattern, n in report[kind]["patterns"].items():
                counts[re.sub(r"\*.*", "*", pattern)] += n  # all of a block's as one
            listed = ", ".join(f"{pattern} x{n}" if n > 1 else pattern for pattern, n in counts.items())
            log.info("  %-8s %4d tensors: %s", kind, report[kind]["tensors"], listed or "none")
            for name in report[kind]["names"]:
                log.debug("  %-8s %s", kind, name)
        for name, what in self.adapted.items():
            log.info("  %-8s %s: %s", "adapted", name, what)
        log.info(
            "  the trunk in the engine gives the release's tokens: largest difference %.2g, %g is allowed (%s)"
            if parity["difference"] <= parity["tolerance"] else
            "  the trunk in the engine does NOT give the release's tokens: largest difference %.2g, %g is allowed (%s)",
            parity["difference"], parity["tolerance"], parity["precision"],
        )  # fmt: skip


@torch.no_grad()
def load_backbone(
    tower: VisionTransformer, release: Release, gather: Gather, options: HandoverConfig = HandoverConfig()
) -> Handover:
    """Give a (possibly partitioned) image tower the weights of a release; all ranks take part.

    A position table of another grid is resized, a patch kernel of another side is resampled if `options.patch` says
    how, and a final norm that is for something else (pool mean_norm) is left as it starts. Raises CheckpointError when
    the release is of another architecture, ConfigError for an unknown option.
    """
    if options.patch not in ("refuse", *RESAMPLING):
        raise ConfigError(f"handover.patch={options.patch} is not known; use refuse, {' or '.join(RESAMPLING)}")
    fit = Fit(tower.shape, tower.grid, options.align_corners, options.patch)
    own = [(n, p) for n, p in tower.named_parameters() if re.fullmatch(ENCODER, n) and fit.takes(n, release.shape)]
    with TowerFile(release) as file:
        _refuse(file, fit, own, release)
        for name, param in own:
            with gather([param]):
                if dist.rank() == 0:
                    param.copy_(file.read(name, fit))
        taken = [n for n, _ in own]
        kept = {file.stored(n) for n in taken}
        dropped = [n for n in file.all_names if n not in kept]
        return Handover(tower, release, fit, taken, dropped, _adapted(file, fit))


def _refuse(file: TowerFile, fit: Fit, own: Sequence[tuple[str, nn.Parameter]], release: Release) -> None:
    """Raises CheckpointError with every reason why the tower cannot take the weights; the same on all ranks."""
    reasons = []
    if dist.rank() == 0:
        try:
            reasons = different_shape(file, fit) or different_tensors(file, fit, own)
        except CheckpointError as e:
            reasons = [str(e)]
    if reasons := dist.broadcast(reasons):
        raise CheckpointError(
            f"{release.folder} ({release.config['variant']}, {release.config['image_size']} px) does not fit this "
            f"model: {'; '.join(reasons[:4])}"
        )


def different_shape(file: TowerFile, fit: Fit) -> list[str]:
    """Why weights of one shape cannot serve another, each reason with the way out; empty when they can."""
    there, here, reasons = file.shape, fit.shape, []
    sizes = [(n, getattr(there, n), getattr(here, n)) for n in ("depth", "width", "heads")]
    if wrong := [f"{name} {a} there and {b} here" for name, a, b in sizes if a != b]:
        reasons.append(f"{', '.join(wrong)}: choose the model.variant it was trained with")
    if there.class_tokens != here.class_tokens:
        reasons.append(
            f"it has {there.class_tokens} class token(s), this model {here.class_tokens}, and there is no telling "
            f"which stands for which: set model.class_tokens={there.class_tokens}"
        )
    if (there.positions == "relative") != (here.positions == "relative"):
        reasons.append(
            f"it has {there.positions} positions, this model {here.positions}: set model.positions={there.positions}"
        )
    elif there.positions == "relative" and file.grid != fit.grid:
        reasons.append(
            f"its relative positions are of {file.grid[0]} x {file.grid[1]} patches, this model has {fit.grid[0]} x "
            f"{fit.grid[1]}, and only position tables are resized: keep the image and patch size"
        )
    if there.patch != here.patch and fit.patch == "refuse":
        reasons.append(
            f"its patches are {there.patch} px, this model's {here.patch}: set handover.patch=bicubic or pinv to "
            f"resample the patch kernel, or model.patch={there.patch}"
        )
    return reasons


def different_tensors(file: TowerFile, fit: Fit, own: Sequence[tuple[str, nn.Parameter]]) -> list[str]:
    """Tensors that are missing, or else those of another size; empty for a release that is as its config.json says."""
    if missing := [f"{n} is missing there" for n, _ in own if n not in file.names]:
        return missing
    sizes = [(n, file.size(n, fit), _shape(p)) for n, p in own]
    return [f"{n} is {there} there and {here} here" for n, there, here in sizes if there != here]


def _adapted(file: TowerFile, fit: Fit) -> dict[str, str]:
    found = {}
    if POSITIONS in file.names and file.grid != fit.grid:
        (a, b), (c, d) = file.grid, fit.grid
        found[POSITIONS] = f"{a} x {b} to {c} x {d} patches, bicubic, align_corners={fit.align_corners}"
    if file.shape.patch != fit.shape.patch:
        found[KERNEL] = f"{file.shape.patch} to {fit.shape.patch} px, {fit.patch}"
    return found


def fixed_images(side: int) -> Tensor:
    """Two normalised images that are the same for ever: IMAGES 3 side side, normal noise."""
    return torch.randn(IMAGES, 3, side, side, generator=generator(0, "handover"))


def _listed(names: Sequence[str]) -> dict[str, Any]:
    """Names, and how many of each pattern: `blocks.*.attn.qkv` for weights and biases of all blocks."""
    patterns = Counter(re.sub(r"\.\d+(?=\.)", ".*", re.sub(r"\.(weight|bias)$", "", n)) for n in names)
    return {"tensors": len(names), "patterns": dict(patterns), "names": list(names)}


def _shape(param: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(param, "ds_shape", param.shape))
