"""Multiply-adds of one image through each model: the compute axis of MAWS Fig. 5, as recipes §9.12 defines it.

    masked_autoencoder(VARIANTS["vit_b16"], 224, DecoderShape()).forward      # 9.8e9
    weakly_supervised(VARIANTS["vit_b16"], 224).training()                    # 3 x 17.6e9

Counted are the products of matrices. Biases, norms, softmax, GELU and residuals are left out: SWAG's own counter, which
has them, agrees to 0.3 %. A FLOP counter that takes a multiply-add for two operations shows twice these numbers.

Letters: N patches, K visible patches, T tokens, D width, E decoder width, p patch side, P = 3pp values of a patch.
"""

from dataclasses import dataclass
from itertools import pairwise

from maws.models.mae import DecoderShape
from maws.models.text import TextShape
from maws.models.vit import Shape

SYNSETS = 28_000  # of IG-3B (MAWS §4.1)
CLASSES = 1000  # of ImageNet-1k
HEAD_WIDTH = 4096  # hidden layer of LC-MAE's projector and predictor (recipes §4.3)


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of one sample, of what is trained and of what only runs forward (a locked tower, a target)."""

    trained: int
    frozen: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.trained + other.trained, self.frozen + other.frozen)

    @property
    def forward(self) -> int:
        return self.trained + self.frozen

    def training(self, checkpointed: bool = False) -> int:
        """Forward, and twice as much backward; blocks that are checkpointed run forward once more.

        Model FLOPs utilisation counts the former, whatever is recomputed.
        """
        return (4 if checkpointed else 3) * self.trained + self.frozen

    @property
    def training_flops(self) -> int:
        """FLOP of one sample in training, a multiply-add counted as two, as in devices' peak FLOP/s."""
        return 2 * self.training()


def patches(shape: Shape, side: int) -> int:
    """N of a square image of `side` pixels."""
    return (side // shape.patch) ** 2


def visible(shape: Shape, side: int, ratio: float) -> int:
    """K at a mask ratio (recipes §2.1)."""
    return int(patches(shape, side) * (1 - ratio))


def blocks(tokens: int, width: int, depth: int) -> int:
    """Transformer blocks of MLP ratio 4: 12 T D^2 in linear layers, 2 T^2 D in the two products of attention."""
    return depth * (12 * tokens * width**2 + 2 * tokens**2 * width)


def trunk(shape: Shape, side: int) -> int:
    """Every patch through the patch embedding and the blocks."""
    return encoder(shape, side, ratio=0.0)


def encoder(
    shape: Shape, side: int, ratio: float, skip: bool = False, keep: int | None = None, mask_tokens: bool = False
) -> int:
    """MAE's encoder. The papers' code embeds all patches and drops the masked ones; `skip`: they are never embedded.

    `keep` visible patches where it is given, instead of what a plain ratio leaves; with `mask_tokens` the blocks see
    all patches.
    """
    n = patches(shape, side)
    keep = visible(shape, side, ratio) if keep is None else keep
    embedded, seen = keep if skip else n, n if mask_tokens else keep
    return embedded * 3 * shape.patch**2 * shape.width + blocks(seen + shape.class_tokens, shape.width, shape.depth)


def decoder(
    shape: Shape, decoder: DecoderShape, side: int, ratio: float, skip: bool = False, keep: int | None = None,
    mask_tokens: bool = False, outputs: int = 0,
) -> int:  # fmt: skip
    """MAE's decoder, of any size. The papers' code predicts all patches; `skip`: only masked ones.

    A reduced decoder (long-sequence MAE, recipes §3.3) has a quarter of the patches, each of which predicts 2p x 2p
    pixels, masked or not, or is turned back into four patches when it restores the grid. `outputs` values are predicted
    of a patch; 0: its pixels.
    """
    n, e, c = patches(shape, side), decoder.width, shape.class_tokens
    keep = visible(shape, side, ratio) if keep is None else keep
    reduced, coarse = decoder.reduction != "none", decoder.reduction != "none" and not decoder.restore
    resized = n * e**2 * ((decoder.reduction == "conv") + decoder.restore)  # 2 x 2 kernels, N/4 times each
    predicted = n // 4 if coarse else n - keep if skip else n + c
    embed = ((n if mask_tokens else keep) + c) * shape.width * e
    inside = blocks((n // 4 if reduced else n) + c, e, decoder.depth)
    return embed + resized + inside + predicted * e * (outputs or 3 * shape.patch**2 * (4 if coarse else 1))


def masked_autoencoder(
    shape: Shape, side: int, decoder_shape: DecoderShape, ratio: float = 0.75, skip: bool = False,
    keep: int | None = None, mask_tokens: bool = False, outputs: int = 0,
) -> Cost:  # fmt: skip
    """One MAE sample: encoder on the visible patches, decoder on all."""
    seen = encoder(shape, side, ratio, skip, keep, mask_tokens)
    return Cost(seen + decoder(shape, decoder_shape, side, ratio, skip, keep, mask_tokens, outputs))


def weakly_supervised(shape: Shape, side: int, synsets: int = SYNSETS, head: str = "mlp") -> Cost:
    """One WSP sample: the whole trunk, then a head on the class token: linear, or a hidden layer of width D (mlp)."""
    return Cost(trunk(shape, side) + wsp_head(shape.width, synsets, head))


def wsp_head(width: int, synsets: int = SYNSETS, head: str = "mlp") -> int:
    return width * synsets + (width**2 if head == "mlp" else 0)


def classifier(shape: Shape, side: int, classes: int = CLASSES, trained: float | None = None) -> Cost:
    """One sample of finetuning: the whole trunk and a linear head.

    Of partial finetuning (recipes §9.5) `trained` blocks at the end are trained, 0.5 for the MLP of the last one alone,
    and what is below only runs forward; None: everything is trained.
    """
    whole, tokens = trunk(shape, side), patches(shape, side) + shape.class_tokens
    if trained is None:
        own = whole
    else:
        own = 8 * tokens * shape.width**2 if trained == 0.5 else blocks(tokens, shape.width, int(trained))
    return Cost(own + shape.width * classes, whole - own)


def locked_image_text(
    shape: Shape, side: int, text: TextShape, joint_width: int, batch: int = 0, lock: str = "image", loss: str = "clip"
) -> Cost:
    """One LiT pair: the locked tower runs forward only, the other one and both projections are trained.

    Each image meets each caption of the global `batch` and, with CLIP's loss, each caption each image; cached image
    features leave out the frozen part.
    """
    tokens = text.context + 2  # <s> and </s>; captions are padded to this length
    towers = {"image": trunk(shape, side), "text": blocks(tokens, text.width, text.depth)}
    frozen = towers.pop(lock, 0)
    projections = (shape.width + text.width) * joint_width
    scores = (2 if loss == "clip" else 1) * batch * joint_width
    return Cost(sum(towers.values()) + projections + scores, frozen)


def head(width: int, hidden: int = HEAD_WIDTH, depth: int = 2) -> int:
    """One row through a projector or predictor of LC-MAE: width -> hidden -> … -> width."""
    sizes = [width, *[hidden] * (depth - 1), width] if depth else [width]
    return sum(a * b for a, b in pairwise(sizes))


def guided_autoencoder(
    shape: Shape, side: int, decoder_shape: DecoderShape, ratio: float = 0.75, symmetric: bool = True,
    skip: bool = False,
) -> Cost:  # fmt: skip
    """One LC-MAE sample (recipes §4.1): MAE on view 1; online heads on the visible patches, target on whole views.

    `symmetric`, as the official code: both views pass both branches. Otherwise the paper's text: view 1 online against
    view 2 in the target.
    """
    views = 2 if symmetric else 1
    mlp = 2 * shape.width * HEAD_WIDTH  # the projector, and again the predictor
    online = Cost(encoder(shape, side, ratio, skip) + 2 * mlp)
    target = Cost(0, frozen=trunk(shape, side) + mlp)
    reconstruction = Cost(decoder(shape, decoder_shape, side, ratio, skip))
    return sum([online + target] * views, start=reconstruction)


def simmim(shape: Shape, side: int, keep: int = 0) -> Cost:
    """One SimMIM sample: mask tokens take the place of patches, all of which pass the trunk; one 1x1 convolution
    predicts all but `keep`."""
    return Cost(trunk(shape, side) + (patches(shape, side) - keep) * shape.width * 3 * shape.patch**2)
