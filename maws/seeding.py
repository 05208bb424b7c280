"""Named random streams: every use draws from (seed, name, numbers), so no step's randomness depends on the past."""

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch  # where it is used: the order of samples is also told without it (maws/ledger.py)

MASK = (1 << 63) - 1


def derive(seed: int, name: str, *parts: int | str) -> int:
    """A 63-bit number that depends on all arguments and on nothing else (the same on every machine and version)."""
    text = "/".join([str(seed), name, *map(str, parts)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") & MASK


def stream(seed: int, name: str, *parts: int | str) -> np.random.Generator:
    """A numpy generator of its own for one use, e.g. `stream(seed, "mask", epoch, key)`."""
    return np.random.Generator(np.random.PCG64(derive(seed, name, *parts)))


def generator(seed: int, name: str, *parts: int | str) -> "torch.Generator":
    """The same for torch, on the CPU."""
    import torch

    return torch.Generator().manual_seed(derive(seed, name, *parts))


def uniform(keys: np.ndarray, salt: int) -> np.ndarray:
    """A number in [0, 1) for each 64-bit key under a salt, vectorised (splitmix64, Steele et al., 2014)."""
    with np.errstate(over="ignore"):
        z = keys.astype(np.uint64) ^ np.uint64(salt & 0xFFFFFFFFFFFFFFFF)
        z = z + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) / float(1 << 53)


def hash_keys(keys: list[str]) -> np.ndarray:
    """A 64-bit hash of each sample key."""
    digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def seed_everything(seed: int) -> None:
    """Seed torch's and numpy's global generators (dropout and drop path draw from torch's)."""
    import torch

    torch.manual_seed(seed)
    np.random.seed(seed % (1 << 32))
