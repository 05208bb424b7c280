"""MAE pre-pretraining, weakly supervised pretraining and LiT (MAWS, Singh et al., 2023, arXiv 2303.13496).

model = maws.create_model("vit_l16", pretrained="runs/wsp")
model, preprocess, tokenizer = maws.create_clip("vit_b16_xlmr_b", pretrained="runs/lit")
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maws.api import create_clip, create_model

__version__ = "0.1.0"
__all__ = ["create_clip", "create_model"]


def __getattr__(name: str) -> Any:
    """The functions of maws/api.py, imported when they are used: that takes seconds, which not every command needs."""
    if name in __all__:
        from maws import api

        return getattr(api, name)
    raise AttributeError(f"module 'maws' has no attribute {name!r}")
