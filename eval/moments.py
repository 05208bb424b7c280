"""Singular values of features from one pass over any number of pictures.

    moments = Moments(width); for features in batches: moments.add(features)
    moments.singular_values()            # D, largest first

They are those of the centred N D feature matrix over sqrt(N), so that they do not grow with the number of pictures: the
roots of the eigenvalues of the D D covariance, which is all that is kept. The N N matrix of LC-MAE §5.3 has the same
non-zero spectrum (recipes §9.10). Papers that speak of the covariance's own singular values mean their squares (Jing et
al., 2022): on a logarithmic axis the same curves, twice as high. Axes: N pictures, B of a batch, D width.
"""

import torch
from torch import Tensor

from maws import dist


class Moments:
    """Mean and scatter of features that come in batches, in float64."""

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64, device=device)  # D
        self.scatter = torch.zeros(width, width, dtype=torch.float64, device=device)  # D D, around the mean

    def add(self, features: Tensor) -> None:
        """B D. Around the batch's own mean (Chan et al., 1979): a mean far from zero costs no digits."""
        if not len(features):
            return
        part = Moments(len(self.mean), self.mean.device)
        exact = features.double()
        part.count, part.mean = len(exact), exact.mean(dim=0)
        exact = exact - part.mean
        part.scatter = exact.T @ exact
        self.merge(part)

    def merge(self, other: "Moments") -> None:
        """As if the other's features had come here too."""
        if not other.count:
            return
        total = self.count + other.count
        apart = other.mean - self.mean
        self.scatter += other.scatter + apart.outer(apart) * (self.count * other.count / total)
        self.mean += apart * (other.count / total)
        self.count = total

    def of_all_ranks(self) -> "Moments":
        """As if the features of every rank had come here; the ranks take part together."""
        found = Moments(len(self.mean), self.mean.device)
        counted = dist.sum_with_grad(torch.tensor(self.count, dtype=torch.float64, device=self.mean.device))
        found.count = int(counted)
        found.mean = dist.sum_with_grad(self.mean * self.count) / max(1, found.count)
        apart = self.mean - found.mean
        found.scatter = dist.sum_with_grad(self.scatter + self.count * apart.outer(apart))
        return found

    def singular_values(self) -> Tensor:
        """D, largest first; exactly 0 where N pictures can have none (from N on) or float64 cannot tell them from 0.

        Raises ValueError for nan or infinity, and below two pictures.
        """
        if self.count < 2:
            raise ValueError(f"a spectrum needs two pictures or more, not {self.count}")
        if not torch.isfinite(self.scatter).all():
            raise ValueError("features hold nan or infinity; they have no spectrum")
        squares = torch.linalg.eigvalsh(self.scatter.cpu()).flip(0).clamp(min=0) / self.count
        smallest = len(squares) * torch.finfo(torch.float64).eps * squares[0]  # numpy.linalg.matrix_rank's rule
        squares[squares <= smallest] = 0
        squares[self.count - 1 :] = 0  # centring takes one dimension
        return squares.sqrt()
