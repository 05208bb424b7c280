"""An encoder whose parameters are split over the ranks (ZeRO-3), for towers that do not fit into one device.

    --partition auto        when the weights as float32 would take more than 80 % of the free memory of some rank
    --partition zero3       always       --partition none   never

Every forward then fetches each block from all ranks, so all ranks must do the same number of them. Parts of a tower
cannot be called by hand, and nothing can be trained inside it: their parameters are whole only in its own forward.
"""

import logging
import math
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

from data_pipeline.errors import UsageError
from eval.distributed import company
from eval.resolution import POSITIONS, positions
from maws import dist, launchers
from maws.checkpoint import CheckpointError
from maws.checks.machine import free_memory
from maws.models.text import TextShape, TextTower
from maws.models.two_tower import TwoTower
from maws.models.vit import VisionTransformer
from maws.release import Release
from maws.weight_files import WeightFiles

log = logging.getLogger(__name__)

CHOICES: Final = ("auto", "none", "zero3")
ROOM: Final = 0.8  # share of the free memory that weights may take; ours: the rest is for a batch on its way


def wanted(choice: str, release: Release, device: torch.device) -> bool:
    """Shall the towers be split? All ranks decide the same. Raises UsageError for zero3 with one rank."""
    if choice not in CHOICES:
        raise UsageError(f"--partition {choice} is not known; use {', '.join(CHOICES)}")
    if dist.world_size() == 1:
        if choice == "zero3":
            raise UsageError(
                "--partition zero3 splits a tower over several ranks, and this is one process; start it with "
                "torchrun --nproc_per_node N -m -- eval …"
            )
        return False
    if choice != "auto":
        return choice == "zero3"
    needed, free = bytes_needed(release), _free(device)
    if not (split := any(dist.gather_objects(needed > ROOM * free))):
        return False
    log.info("the weights (%.1f GB as float32) do not fit into each rank: they are split (ZeRO-3)", needed / 1e9)
    return split


def bytes_needed(release: Release) -> int:
    """Of all weights of a release, as float32."""
    with WeightFiles(release.weights) as files:
        return 4 * sum(math.prod(files.shape(name)) for name in files.names)


def _free(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_memory() / launchers.detect().local_size


class Partition:
    """The image tower of a release, or both towers of a LiT release, split over the ranks."""

    def __init__(self, release: Release, image_size: int, device: torch.device) -> None:
        """Raises CheckpointError for weights that do not fit the release's config.json."""
        from maws.engine import Frozen  # DeepSpeed takes seconds to import

        self.both = release.stage == "lit"

        def make() -> nn.Module:
            image = VisionTransformer(release.shape, image_size)
            if not self.both:
                return image
            text, bias = TextTower(TextShape(**release.config["text"])), release.config.get("loss") == "siglip"
            return TwoTower(image, text, release.config["joint_width"], bias=bias)

        with WeightFiles(release.weights) as files:
            _check(make, files, release)

            def read(name: str) -> Tensor:
                value = files.read(name)
                if name.endswith(POSITIONS):
                    value = positions(value, release.shape, release.config["image_size"], image_size)
                return value

            self._frozen = Frozen(make, read, device)
        self.module: Any = self._frozen.module
        self.tower: Any = self.module.image if self.both else self.module
        _whole_inside_forward_only(self.tower)
        if (here := company()) is not None:
            here.at_end.append(self._frozen.close)

    def inside(self, function: Callable[[], Any]) -> Any:
        """What the function gives, called where parameters are whole; all ranks take part."""
        return self._frozen.inside(function)

    def forward(self, images: Tensor) -> Tensor:
        """Inside: the image tower's tokens. Alone it is what is being called already, with its parameters whole."""
        return self.tower(images) if self.both else VisionTransformer.forward(self.tower, images)

    @property
    def two_tower(self) -> "Towers":
        assert self.both
        return Towers(self)


def _check(make: Callable[[], nn.Module], files: WeightFiles, release: Release) -> None:
    """Before rank 0 reads and the others wait for it. Raises CheckpointError."""
    with torch.device("meta"):
        wanted = {name: tuple(param.shape) for name, param in make().named_parameters()}
    for name, shape in wanted.items():
        if name not in files.names:
            raise CheckpointError(f"{release.weights} does not fit its config.json: it has no {name}")
        if not name.endswith(POSITIONS) and files.shape(name) != shape:
            raise CheckpointError(
                f"{release.weights} does not fit its config.json: {name} is {files.shape(name)} there and {shape} here"
            )


class Towers:
    """The methods of a TwoTower that evaluation calls, each of them a forward."""

    def __init__(self, partition: Partition) -> None:
        self._inside, self._module = partition.inside, partition.module

    def encode_image(self, images: Tensor) -> Tensor:
        return self._inside(lambda: TwoTower.encode_image(self._module, images))

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self._inside(lambda: TwoTower.encode_text(self._module, ids, mask))

    def scale(self) -> Tensor:
        return self._inside(lambda: TwoTower.scale(self._module).clone())


def _whole_inside_forward_only(tower: Any) -> None:
    """Say it, in place of torch's words for a parameter without elements; and that nothing is trained in there."""
    embed = tower.embed

    def checked(*arguments: Any) -> Tensor:
        in_parts = any(p is not None and not p.numel() for p in tower._parameters.values())
        if in_parts or torch.is_grad_enabled():
            raise UsageError(
                "this evaluator computes with parts of the image tower, or trains in it, and the tower is split over "
                "the ranks; give --partition none, on a device with room for all of it"
            )
        return embed(*arguments)

    tower.__dict__["embed"] = checked
