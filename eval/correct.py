"""Which images a score has right, kept beside the results: what paired tests between two runs need.

    RUN/correct/<evaluator>-<hash>.json   {"evaluator", "metric", "seed", "n", "hashes", "right": bits in base64}

A bit per image, in the order of the data set: 8 kB for 50,000 images. The line in results.jsonl names the file.
"""

import base64
import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from data_pipeline.errors import DataError
from data_pipeline.files import write_bytes
from eval.results import Result

FOLDER = "correct"


def packed(right: Tensor) -> bytes:
    """bool N -> a bit each, for Score.right."""
    return np.packbits(right.cpu().numpy().astype(bool)).tobytes()


def keep(folder: Path, result: Result, right: bytes) -> Result:
    """Write the file of a score into the folder of its results, and name it in the result."""
    what = {"evaluator": result.evaluator, "metric": result.metric, "seed": result.seed, "n": result.n}
    settings = json.dumps(asdict(replace(result, time="", value=0.0)), sort_keys=True, default=str)
    name = f"{FOLDER}/{result.evaluator}-{hashlib.sha256(settings.encode()).hexdigest()[:16]}.json"
    content = what | {"hashes": result.hashes, "right": base64.b64encode(right).decode()}
    try:
        write_bytes(folder / name, json.dumps(content).encode())
    except OSError as error:
        raise DataError(f"{error}: give --results in a folder that can be written to") from None
    return replace(result, config=result.config | {"correct": name})


def read(folder: Path, result: Result) -> np.ndarray | None:
    """bool N of a result, or None where its evaluator keeps none, the file is gone, or it is of another score."""
    name = result.config.get("correct")
    if not isinstance(name, str) or Path(name).parent != Path(FOLDER):
        return None
    try:
        content = json.loads((folder / name).read_text())
        bits = np.frombuffer(base64.b64decode(content["right"], validate=True), dtype=np.uint8)
        right = np.unpackbits(bits, count=result.n).astype(bool)
        fits = content["hashes"] == result.hashes and content["n"] == result.n and len(bits) == -(-result.n // 8)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return right if fits and abs(right.mean() - result.value) < 0.5 / result.n else None
