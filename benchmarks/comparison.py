"""How often a comparison errs: two ways of training that are equally good, many times, through the same statistics.

    python benchmarks/comparison.py --seeds 3 --images 400 --spread 0.015 --repeats 400

Counts how often each rule takes them for different; 5 % is what each promises on its own. `--gap` makes one better, and
the counts are then how often that is seen.
"""

import argparse

import numpy as np

from eval.comparison import paired_statistics as paired
from eval.report_intervals import t_interval


def answers(rng: np.random.Generator, hard: np.ndarray, means: np.ndarray) -> np.ndarray:
    """S N: a seed of mean m has an image right when it is easier than m, with some luck."""
    luck = 0.15 * rng.standard_normal((len(means), len(hard)))
    return (hard[None] + luck < means[:, None]).astype(float)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--images", type=int, default=400)
    p.add_argument("--spread", type=float, default=0.015, help="standard deviation of top-1 between training seeds")
    p.add_argument("--gap", type=float, default=0.0)
    p.add_argument("--repeats", type=int, default=400)
    p.add_argument("--draws", type=int, default=1000)
    args = p.parse_args()
    found = {"bootstrap over seeds and images": 0, "t over seeds": 0, "both (called above)": 0, "images alone": 0}
    for repeat in range(args.repeats):
        rng = np.random.default_rng(repeat)
        hard = rng.random(args.images)
        means = [0.3 + gap + args.spread * rng.standard_normal(args.seeds) for gap in (args.gap, 0.0)]
        difference = answers(rng, hard, means[0]) - answers(rng, hard, means[1])
        draws = paired.bootstrap_means({"d": difference}, args.draws, repeat)["d"]
        low, high = paired.percentiles(draws)
        of_seeds = t_interval(difference.mean(axis=1).tolist(), "seeds")
        without_images, without_seeds = not low <= 0 <= high, not of_seeds.low <= 0 <= of_seeds.high
        found["bootstrap over seeds and images"] += without_images
        found["t over seeds"] += without_seeds
        found["both (called above)"] += without_images and without_seeds
        found["images alone"] += paired.over_images(difference, args.draws, repeat).permutation < 0.05
    print(f"{args.seeds} seeds, {args.images} images, spread {args.spread:g}, gap {args.gap:g}, {args.repeats} repeats")
    for name, count in found.items():
        print(f"  {name:<34} {100 * count / args.repeats:5.1f} % taken for different")


if __name__ == "__main__":
    main()
