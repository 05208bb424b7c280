"""An engine's parameters, put together from the parts of all ranks."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor


def whole_weights(engine: Any, ema: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Every parameter on the CPU: fp32 master values where there are some. All ranks take part.

    With `ema` their means instead; what is not trained has none and is as it is.
    """
    from deepspeed import zero
    from deepspeed.utils import safe_get_full_fp32_param

    from maws import dist

    for name, p in engine.objective.named_parameters():
        if ema and p.requires_grad:
            flat = dist.all_gather(engine.ema.means[name].to(engine.device))
            yield name, flat[: p.ds_numel].reshape(p.ds_shape).cpu()  # without the padding behind its end
        elif p.requires_grad:
            yield name, safe_get_full_fp32_param(p).detach().float().cpu().reshape(p.ds_shape)  # type: ignore[union-attr]
        else:
            with zero.GatheredParameters([p]):
                value = p.detach().float().cpu().clone()
            yield name, value
