"""The table of `python -m maws models`: what each model size has, computes and keeps in memory.

Parameters are counted in the real modules, built without memory (torch's meta device); compute is models/flops.py's,
memory models/memory.py's.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from maws.config import ConfigError, nearest
from maws.models import flops, memory
from maws.models.heads import Head
from maws.models.mae import DecoderShape, MaskedAutoencoder
from maws.models.text import TEXT_VARIANTS
from maws.models.vit import VARIANTS, Shape, VisionTransformer

RATIO = 0.75
DECODERS = {  # of the presets; all others have MAE's
    "nano": DecoderShape(width=96, depth=2, heads=3),
    "atto": DecoderShape(width=32, depth=1, heads=2),
}
TEXTS = {  # text tower and joint width (recipes §8.1); for vit_6.5b14, of which no LiT was released, those of the 2B
    "vit_l16": ("xlmr_large", 1024),
    "vit_h14": ("xlmr_large", 1024),
    "vit_2b14": ("xlmr_large", 2048),
    "vit_6.5b14": ("xlmr_large", 2048),
    "nano": ("nano", 128),
    "atto": ("atto", 32),
}
WIDTH = 120  # columns, where there is no terminal to ask
TABLE_WIDTH = 200  # more than a table needs: a narrow terminal wraps its lines, but no digit is lost


@dataclass(frozen=True)
class Row:
    """One size. `*_macs`: multiply-adds per image (LiT: per pair), forward; `*_bytes` of one rank, or of one image."""

    name: str
    image_size: int
    patch: int
    tokens: int  # patches and class tokens
    depth: int
    width: int
    heads: int
    parameters: int  # of the trunk, without a head
    decoder_parameters: int
    mae_macs: int
    mae_macs_skipping: int  # without embedding masked and predicting visible patches: what this code computes
    wsp_macs: int
    lit_macs: int
    mae_states_bytes: float
    lc_mae_states_bytes: float
    wsp_states_bytes: float
    mae_activations_bytes: int
    mae_activations_checkpointed_bytes: int
    wsp_activations_bytes: int
    wsp_activations_checkpointed_bytes: int


def run(options: argparse.Namespace) -> int:
    """The command `models`. Raises ConfigError for an unknown name, and a size that a named model cannot have."""
    if options.ranks < 1:
        raise ConfigError(f"--ranks {options.ranks}: model states are spread over at least one rank; give 1 or more")
    rows, left_out = select(options.names, options.image_size, options.ranks)
    if options.json:
        sys.stdout.write(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    else:
        show(rows, options.ranks, left_out)
    return 0


def select(names: Sequence[str], image_size: int, ranks: int) -> tuple[list[Row], list[str]]:
    """Rows of the named models, or of all; and those of all that have no such image size (0: each its own)."""
    if unknown := [name for name in names if name not in VARIANTS]:
        raise ConfigError(f"there is no model {unknown[0]!r}; {nearest(unknown[0], list(VARIANTS))}")
    sizes = {name: image_size or VARIANTS[name].image for name in names or VARIANTS}
    unfit = [name for name, side in sizes.items() if side < 1 or side % VARIANTS[name].patch]
    if unfit and (names or len(unfit) == len(sizes)):
        patch = VARIANTS[unfit[0]].patch
        raise ConfigError(
            f"--image-size {image_size}: {unfit[0]} cuts an image into patches of {patch} pixels, so its side is a "
            f"multiple of {patch}; try {max(1, round(image_size / patch)) * patch}"
        )
    return [row(name, side, ranks) for name, side in sizes.items() if name not in unfit], unfit


def row(name: str, side: int, ranks: int) -> Row:
    """All figures of one size for square images of `side` pixels."""
    shape = replace(VARIANTS[name], image=side)
    decoder = DECODERS.get(name, DecoderShape())
    text, joint = TEXTS.get(name, ("xlmr_base", shape.width))
    with torch.device("meta"):
        vit, mae, mlp = VisionTransformer(shape, side), MaskedAutoencoder(shape, side, decoder), Head(shape.width)
    trunk, both = count(vit), count(mae)
    wsp = trunk + wsp_head_parameters(shape.width)
    head = count(mlp)  # as projector and as predictor; the target has no predictor
    tokens = flops.patches(shape, side) + shape.class_tokens
    return Row(
        name, side, shape.patch, tokens, shape.depth, shape.width, shape.heads, trunk, both - trunk,
        mae_macs=flops.masked_autoencoder(shape, side, decoder, RATIO).forward,
        mae_macs_skipping=flops.masked_autoencoder(shape, side, decoder, RATIO, skip=True).forward,
        wsp_macs=flops.weakly_supervised(shape, side).forward,
        lit_macs=flops.locked_image_text(shape, side, TEXT_VARIANTS[text], joint).forward,
        mae_states_bytes=memory.states(both, ranks=ranks),
        lc_mae_states_bytes=memory.states(both + 2 * head, trunk + head, ranks),
        wsp_states_bytes=memory.states(wsp, ranks=ranks),
        **activations(shape, decoder, side),
    )  # fmt: skip


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def wsp_head_parameters(width: int) -> int:
    """Linear, Tanh, Linear to IG-3B's synsets, with biases."""
    return width * (width + 1) + (width + 1) * flops.SYNSETS


def activations(shape: Shape, decoder: DecoderShape, side: int) -> dict[str, int]:
    """Per image: MAE keeps both stacks, WSP one; of checkpointed stacks only one block is whole at a time."""
    seen = (flops.visible(shape, side, RATIO) + shape.class_tokens, shape.width, shape.depth)
    every = flops.patches(shape, side) + shape.class_tokens
    full, filled = (every, shape.width, shape.depth), (every, decoder.width, decoder.depth)
    return {
        "mae_activations_bytes": memory.activations(*seen) + memory.activations(*filled),
        "mae_activations_checkpointed_bytes": memory.checkpointed([seen, filled]),
        "wsp_activations_bytes": memory.activations(*full),
        "wsp_activations_checkpointed_bytes": memory.checkpointed([full]),
    }


def show(rows: Sequence[Row], ranks: int, left_out: Sequence[str]) -> None:
    terminal = sys.stdout.isatty()
    plain: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
    console = Console(width=None if terminal else WIDTH, **plain)
    wide = Console(width=TABLE_WIDTH, height=25, **plain)  # without a height rich asks a dumb terminal all the same
    wide.print(compute_table(rows, terminal))
    console.print(
        f"Parameters: of the trunk, without a head. GMAC: 10^9 multiply-adds of one image, forward; training takes 3 "
        f"times that, or 4 with checkpointed blocks (the locked image tower of LiT: once). MAE masks {RATIO:.0%}; "
        f"'skipping' leaves out what this code never computes: embedding masked patches, predicting visible ones. "
        f"WSP: a head for {flops.SYNSETS:,} synsets. LiT: image tower and XLM-R.\n"
    )
    wide.print(memory_table(rows, terminal))
    where = f"on each of {ranks} ranks (ZeRO-3)" if ranks > 1 else "on one rank (--ranks N: shared by N)"
    console.print(
        f"States: weights, gradients and Adam's moments, 16 bytes per parameter in bf16 and in fp32; LC-MAE 6 more for "
        f"each that its target follows; {where}. Activations: one image in bf16."
    )
    if left_out:
        console.print(f"Left out, because their patch does not divide the image: {', '.join(left_out)}.")


def compute_table(rows: Sequence[Row], terminal: bool) -> Table:
    columns = ("model", "image", "patch", "tokens", "blocks", "width", "heads", "parameters", "MAE decoder",
               "GMAC\nMAE", "\nskipping", "\nWSP", "\nLiT")  # fmt: skip
    table = _table(terminal, *columns)
    for r in rows:
        macs = (r.mae_macs, r.mae_macs_skipping, r.wsp_macs, r.lit_macs)
        sizes = [r.image_size, r.patch, r.tokens, r.depth, r.width, r.heads]
        counts = [f"{r.parameters:,}", f"{r.decoder_parameters:,}"]
        table.add_row(r.name, *map(str, sizes), *counts, *(_number(m / 1e9) for m in macs))
    return table


def memory_table(rows: Sequence[Row], terminal: bool) -> Table:
    columns = ("model", "states, GiB\nMAE", "\nLC-MAE", "\nWSP", "activations, MB\nMAE", "\nMAE checkpointed",
               "\nWSP", "\nWSP checkpointed")  # fmt: skip
    table = _table(terminal, *columns)
    for r in rows:
        states = [b / memory.GIB for b in (r.mae_states_bytes, r.lc_mae_states_bytes, r.wsp_states_bytes)]
        kept = [r.mae_activations_bytes, r.mae_activations_checkpointed_bytes,
                r.wsp_activations_bytes, r.wsp_activations_checkpointed_bytes]  # fmt: skip
        table.add_row(r.name, *map(_number, [*states, *(b / 1e6 for b in kept)]))
    return table


def _number(value: float) -> str:
    return f"{value:,.1f}" if value >= 1 else f"{value:.2g}"


def _table(terminal: bool, *columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD if terminal else None, pad_edge=False, collapse_padding=terminal)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True, vertical="bottom")
    return table
