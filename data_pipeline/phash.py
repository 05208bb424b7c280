"""A picture's shape in 32 bytes: pictures that look the same differ in few bits, whatever their size or compression.

perceptual_hash(image) -> 32 bytes or None          distance(a, b) -> 0 … 256, under 16: the same picture

The picture is averaged down to 64 x 64 grey pixels, and its 128 lowest frequencies (DCT-II, without the constant) are
written with two bits each: strongly positive, strongly negative, or neither. A threshold at the median magnitude makes
half of them "neither". (One sign bit for each of 256 frequencies flips at random wherever a frequency is absent, as
every second one is in a symmetric drawing: measured in benchmarks/README.md.)
"""

import math
from typing import Final

import numpy as np
from PIL import Image

SIDE: Final = 64  # pixels of the reduced picture; ours, as are all numbers here
FREQUENCIES: Final = 128
BANDS: Final = 16  # each 16 bits of the hash hold frequencies of all heights, so that they tell as much as the others
UNIT: Final = 1024
MIN_CONTRAST: Final = 2.0  # grey levels: weaker than this, rounding and JPEG write the hash and not the picture


def perceptual_hash(image: Image.Image) -> bytes | None:
    """Hash of an upright RGB or grey picture; None if it says too little: one colour, one edge, one smooth gradient.

    That is when half of the frequencies are weaker than MIN_CONTRAST; all such pictures would look alike.
    """
    filter_ = Image.Resampling.BOX if min(image.size) >= SIDE else Image.Resampling.BILINEAR
    grey = np.asarray(image.convert("L").resize((SIDE, SIDE), filter_), np.float64)
    spectrum = (_COSINES @ grey @ _COSINES.T)[_ROWS, _COLUMNS]
    threshold = np.partition(np.abs(spectrum), FREQUENCIES // 2 - 1)[FREQUENCIES // 2 - 1]
    if threshold < MIN_CONTRAST * _SCALE:
        return None
    bits = np.stack([spectrum > threshold, spectrum < -threshold], axis=1)
    return np.packbits(bits.reshape(-1, BANDS, 2).transpose(1, 0, 2)).tobytes()


def distance(a: bytes, b: bytes) -> int:
    """Bits in which two hashes differ."""
    return (int.from_bytes(a) ^ int.from_bytes(b)).bit_count()


def _cosines(frequencies: int) -> np.ndarray:
    """Rows of the DCT-II matrix as whole numbers: sums of them are exact in float64 in whatever order they are added,
    so that every machine computes the same bits."""
    rows = [
        [
            round(UNIT * math.cos(math.pi * (2 * x + 1) * f / (2 * SIDE)) * (1 if f else math.sqrt(0.5)))
            for x in range(SIDE)
        ]
        for f in range(frequencies)
    ]
    return np.array(rows, np.float64)


def _lowest(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the lowest frequencies, without the constant."""
    places = sorted((u * u + v * v, u, v) for u in range(SIDE) for v in range(SIDE))[1 : number + 1]
    return np.array([u for _, u, _ in places]), np.array([v for _, _, v in places])


_ROWS, _COLUMNS = _lowest(FREQUENCIES)
_COSINES = _cosines(int(max(_ROWS.max(), _COLUMNS.max())) + 1)
_SCALE: Final = UNIT**2 * SIDE / 2  # of a coefficient in whole numbers to one of the orthonormal transform
