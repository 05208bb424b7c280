"""naver-ai/lut, the official code of LC-MAE: MAE's encoder and decoder, and two heads.

| tensor | shape | ours |
|---|---|---|
| MAE's own, 512 x 8 decoder | interop/mae.py | the same |
| head.0.weight, head.3.weight | (4096, D), (D, 4096), no bias | projector.* |
| head.1.weight, .bias, .running_mean, .running_var, .num_batches_tracked | (4096), () | projector.* |
| predictor.0, .1, .3 | as head | predictor.* |

A checkpoint has the entries `model` (online) and `model_ema` (target, every name behind `ema.`); the target's predictor
is averaged along but never used. `read_foreign(path, entry="model_ema")` reads the target.
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from maws.checkpoint import CheckpointError
from maws.interop import mae
from maws.interop.converted import Converted, check, differences, names_and_shapes
from maws.interop.sizes import decoder_size, trunk_size
from maws.models.heads import Head

WRAPPER = "model"
NAMES = {"head.": "projector.", "predictor.": "predictor."}
MEDIUM = {512: 8}  # heads of its ViT-M, which has no name here


def detect(keys: Collection[str]) -> bool:
    return all(name in keys for name in (*mae.TRUNK, "head.0.weight", "predictor.0.weight"))


def to_ours(tensors: Mapping[str, Tensor], heads: int = 0) -> Converted:
    weights = {name: value for name, value in tensors.items() if not name.startswith(tuple(NAMES))}
    mlps = {_renamed(name, NAMES): value for name, value in tensors.items() if name not in weights}
    width = tensors["patch_embed.proj.weight"].shape[0] if "patch_embed.proj.weight" in tensors else 0
    shape, side = trunk_size(weights, heads or MEDIUM.get(width, 0))
    decoder = decoder_size(weights, shape, (side // shape.patch) ** 2)
    check(weights, shape, side, decoder)
    for mlp in NAMES.values():
        check_mlp({n.removeprefix(mlp): v for n, v in mlps.items() if n.startswith(mlp)}, mlp, shape.width)
    return Converted("lut", shape, side, weights, decoder, mlps)


def check_mlp(tensors: Mapping[str, Tensor], prefix: str, width: int) -> None:
    """The projector or predictor of recipes §4.3, of any hidden width and depth."""
    matrices = [value for name, value in tensors.items() if name.endswith(".weight") and value.ndim == 2]
    hidden = tensors["0.weight"].shape[0] if "0.weight" in tensors else 0
    with torch.device("meta"):
        mlp = Head(width, hidden, len(matrices))
    wanted = {prefix + name: value.shape for name, value in mlp.state_dict().items()}
    if problems := differences({prefix + name: value for name, value in tensors.items()}, wanted):
        raise CheckpointError(f"{prefix}* is no head of linear layers and batch norms: {'; '.join(problems)}")


def from_ours(converted: Converted) -> dict[str, Tensor]:
    back = {ours: theirs for theirs, ours in NAMES.items()}
    heads = {_renamed(name, back): value for name, value in converted.heads.items()}
    if not heads or "" in heads or converted.decoder is None:
        raise CheckpointError("LUT's files have a decoder, a projector and a predictor, and no other heads")
    if converted.decoder.reduction != "none":
        raise CheckpointError("LUT's decoder is not reduced; there is no layout for both")
    return {**converted.weights, **heads}


def objective_state(online: Converted, target: Converted) -> dict[str, Tensor]:
    """Both entries of a checkpoint as the state of objectives/momentum_guidance.py, with global guidance only.

    The target keeps no decoder and no predictor: nothing reads them.
    """
    online_heads = {"projector.": "online.projector.global.", "predictor.": "predictor.global."}
    target_heads = {"projector.": "target.projector.global."}
    trunk = names_and_shapes(target.shape, target.image_size, None)
    followed = {name: value for name, value in target.heads.items() if name.startswith(tuple(target_heads))}
    return {
        **{f"online.encoder.{name}": value for name, value in online.weights.items()},
        **{_renamed(name, online_heads): value for name, value in online.heads.items()},
        **{f"target.encoder.{name}": target.weights[name] for name in trunk},
        **{_renamed(name, target_heads): value for name, value in followed.items()},
    }


def _renamed(name: str, names: Mapping[str, str]) -> str:
    """With its prefix replaced; "" for a name without any of them."""
    return next((new + name.removeprefix(old) for old, new in names.items() if name.startswith(old)), "")
