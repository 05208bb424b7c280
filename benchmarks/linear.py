"""The linear probe on cached features: time of a whole probe, and the fit against scikit-learn's, taking turns.

    OMP_NUM_THREADS=2 python benchmarks/linear.py                       # 100,000 x 768, 1,000 classes
    OMP_NUM_THREADS=2 python benchmarks/linear.py --images 20000 --rounds 1

Features are random: Gaussian classes in correlated directions of very different variance, as those of an encoder are,
and far enough apart to be told from each other. The first figure is `linear.protocol=logistic` as it is run, with the
search for l2. The second is one fit at one l2 on 1/20 of the images and 1/10 of the classes, by both; accuracy and loss
of both are told, since a faster fit of something worse is not faster.
"""

import argparse
import statistics
import sys
import time
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from eval import logistic
from eval.evaluators.linear import Config, Linear
from eval.metrics import topk

L2 = 1e-3


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--images", type=int, default=100_000)
    p.add_argument("--width", type=int, default=768)
    p.add_argument("--classes", type=int, default=1000)
    p.add_argument("--rounds", type=int, default=3)
    args = p.parse_args()
    torch.set_grad_enabled(False)
    say(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    x, y = features(args.images + 5000, args.width, args.classes)
    whole(x[:-5000], y[:-5000], x[-5000:], y[-5000:], args.classes)
    smaller = max(2, args.classes // 10)
    x, y = features(args.images // 20 + 2000, args.width, smaller)
    against_scikit_learn(x[:-2000], y[:-2000], x[-2000:], y[-2000:], smaller, args.rounds)


def features(images: int, width: int, classes: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    means = 0.4 * torch.randn(classes, width, generator=draw)
    spread = torch.linspace(0, -4.6, width).exp()  # standard deviations from 1 to 1/100
    rotation = torch.linalg.qr(torch.randn(width, width, generator=draw))[0]
    y = torch.randint(classes, (images,), generator=draw)
    return (means[y] + torch.randn(images, width, generator=draw)) * spread @ rotation, y


def whole(x: Tensor, y: Tensor, query: Tensor, label: Tensor, classes: int) -> None:
    probe = Linear(Config(), cast(Any, SimpleNamespace(classes=range(classes))), seed=0)
    start = time.perf_counter()
    head, chosen = probe.fitted(x, y)
    seconds = time.perf_counter() - start
    say(f"{len(x):,} x {x.shape[1]}, {classes:,} classes: {seconds:.1f} s, top-1 {topk(head(query), label, 1):.4f}")
    say(f"  chosen: {chosen}")


def against_scikit_learn(x: Tensor, y: Tensor, query: Tensor, label: Tensor, classes: int, rounds: int) -> None:
    from sklearn.linear_model import LogisticRegression

    mean, scale = logistic.standardisation(x)
    z, held = (x - mean) / scale, (query - mean) / scale
    times: list[tuple[float, float]] = []
    for _ in range(rounds):
        start = time.perf_counter()
        head = logistic.fit(x, y, classes, L2, iterations=1000, tolerance=1e-4)
        between = time.perf_counter()
        theirs = LogisticRegression(C=1 / (L2 * len(x)), tol=1e-4, max_iter=1000).fit(z.numpy(), y.numpy())
        times.append((between - start, time.perf_counter() - between))
    weight, bias = torch.from_numpy(theirs.coef_).float(), torch.from_numpy(theirs.intercept_).float()
    ratios = [b / a for a, b in times]
    say(
        f"one fit of {len(x):,} x {x.shape[1]}, {classes:,} classes, l2 {L2:g}, gradient below 1e-4: "
        f"{statistics.median(a for a, _ in times):.2f} s, scikit-learn {statistics.median(b for _, b in times):.2f} s; "
        f"ratio {statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f} in {rounds} rounds)"
    )
    loss = [logistic.loss_and_gradient(torch.cat([w, b[:, None]], 1), z, y, L2)[0]
            for w, b in ((head.weight, head.bias), (weight, bias))]  # fmt: skip
    top1 = topk(head(query), label, 1), topk(held @ weight.T + bias, label, 1)
    say(f"  loss {loss[0]:.5f} and {loss[1]:.5f}, top-1 {top1[0]:.4f} and {top1[1]:.4f}")


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
