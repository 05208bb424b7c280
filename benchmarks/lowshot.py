"""Low-shot methods on the demo's encoder: what each costs and what it scores.

    OMP_NUM_THREADS=2 python benchmarks/lowshot.py                      # a few minutes for each adapter
    OMP_NUM_THREADS=1 python benchmarks/lowshot.py --methods linear vpt --k 1 5 --seeds 2

Each method runs alone with its default settings (K 1, 5 and 10; 5 seeds; the fast budget) on the demo's emoji, features
extracted before. Seconds are those of a wall clock, which on a busy machine says little, and of the cores; with every
adapter they hold what choosing l2 of the linear classifier costs.
"""

import argparse
import logging
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from eval.adapters.settings import METHODS, Config
from eval.base import Score
from eval.datasets import Data, open_data
from eval.evaluators.lowshot import Lowshot
from eval.features import Encoder, extract, open_encoder

EMOJI = Path("demo/emoji")


def main() -> None:
    logging.getLogger("eval").setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo/mae_wsp"))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--k", type=int, nargs="+", default=list(Config().k))
    parser.add_argument("--seeds", type=int, default=Config().seeds)
    options = parser.parse_args()
    data = open_data([EMOJI / "eval-emojione.parquet"], [EMOJI], EMOJI / "classes.json")
    print(f"{len(data.classes)} classes, {len(data.test)} evaluation pictures, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as cache:  # nothing is written into the run
        encode = replace(open_encoder(options.run, torch.device("cpu")), cache=Path(cache))
        assert data.train is not None
        for dataset in (data.train, data.test):
            extract(encode, dataset)
        for method in options.methods:
            measure(Config(k=tuple(options.k), seeds=options.seeds, methods=(method,)), data, encode)


def measure(cfg: Config, data: Data, encode: Encoder) -> None:
    """One line: seconds, and top-1 by K."""
    wall, cores = time.perf_counter(), time.process_time()
    scores = [item for item in Lowshot(cfg, data, 0).run(encode) if isinstance(item, Score)]
    wall, cores = time.perf_counter() - wall, time.process_time() - cores
    told = [
        f"{k}-shot {100 * statistics.mean(s.value for s in scores if s.metric.startswith(f'{k}-shot/')):.1f} %"
        for k in cfg.k
    ]
    print(f"{cfg.methods[0]:<12} {wall:7.1f} s, {cores:7.1f} s of a core; top-1: {', '.join(told)}", flush=True)


if __name__ == "__main__":
    main()
