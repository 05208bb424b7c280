"""Logistic regression against scikit-learn and autograd."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch.testing import assert_close

from eval import logistic
from eval.evaluators.linear import Config, Linear

N, D, S = 90, 7, 4


@pytest.fixture
def x() -> torch.Tensor:
    scales = torch.tensor([1, 10, 0.1, 1, 5, 2, 1], dtype=torch.float64)
    return torch.randn(N, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * scales + 3


@pytest.fixture
def y(x) -> torch.Tensor:
    return torch.arange(N) % S


@pytest.mark.parametrize("l2", [1e-3, 1e-1, 10.0])
def test_the_solution_is_that_of_scikit_learn(x, y, l2):
    scaler = StandardScaler().fit(x.numpy())
    expected = LogisticRegression(C=1 / (l2 * N), tol=1e-10, max_iter=10_000).fit(
        scaler.transform(x.numpy()), y.numpy()
    )
    head = logistic.fit(x, y, S, l2, iterations=2000, tolerance=1e-10)
    probability = head(x).softmax(dim=1).numpy()
    np.testing.assert_allclose(probability, expected.predict_proba(scaler.transform(x.numpy())), atol=1e-6)
    np.testing.assert_allclose(head.weight.numpy(), expected.coef_, atol=1e-5)


def test_gradient_is_that_of_autograd_also_in_pieces(x, y, monkeypatch):
    monkeypatch.setitem(logistic.PIECE, "cpu", 32 * S)
    parameters = torch.randn(S, D + 1, dtype=torch.float64, requires_grad=True)
    expected = F.cross_entropy(x @ parameters[:, :-1].T + parameters[:, -1], y)
    expected = expected + 0.05 * parameters[:, :-1].square().sum()
    expected.backward()
    with torch.no_grad():
        loss, gradient = logistic.loss_and_gradient(parameters, x, y, 0.1)
    assert_close(torch.tensor(loss, dtype=torch.float64), expected.detach())
    assert_close(gradient, parameters.grad)


def test_starting_elsewhere_ends_in_the_same_place(x, y):
    cold = logistic.fit(x, y, S, 0.01, iterations=2000, tolerance=1e-9)
    warm = logistic.fit(x, y, S, 0.01, iterations=2000, tolerance=1e-9, start=logistic.fit(x, y, S, 1.0))
    assert_close(cold.weight, warm.weight, atol=1e-6, rtol=1e-5)


def test_a_constant_feature_does_no_harm(x, y):
    x[:, 2] = 1e6
    assert torch.isfinite(logistic.fit(x.float(), y, S, 0.01)(x.float())).all()


def test_features_that_nearly_repeat_each_other_do_not_slow_the_search_down(y, monkeypatch):
    """Ten directions whose variances differ a million times, mixed: the solution is scikit-learn's after 30 looks."""
    draw = torch.Generator().manual_seed(1)
    spread = torch.logspace(0, -3, 10, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(10, 10, generator=draw, dtype=torch.float64))[0]
    x = (torch.randn(N, 10, generator=draw, dtype=torch.float64) + y[:, None] * 0.5) * spread @ rotation
    looks, evaluate = [], logistic.loss_and_gradient
    monkeypatch.setattr(logistic, "loss_and_gradient", lambda *a: looks.append(a) or evaluate(*a))
    head = logistic.fit(x, y, S, 1e-3, iterations=200, tolerance=1e-5)
    z = StandardScaler().fit_transform(x.numpy())
    expected = LogisticRegression(C=1 / (1e-3 * N), tol=1e-10, max_iter=100_000).fit(z, y.numpy())
    np.testing.assert_allclose(head(x).softmax(dim=1).numpy(), expected.predict_proba(z), atol=2e-3)
    assert len(looks) < 30


def test_the_probe_as_it_is_run_is_scikit_learns_with_the_l2_it_chose(x, y):
    """The default settings, search and early end included, from where the search ended."""
    probe = Linear(Config(), cast(Any, SimpleNamespace(classes=range(S))), seed=0)
    head, chosen = probe.fitted(x, y)
    z = StandardScaler().fit_transform(x.numpy())
    expected = LogisticRegression(C=1 / (chosen["l2"] * N), tol=1e-10, max_iter=10_000).fit(z, y.numpy())
    np.testing.assert_allclose(head(x).softmax(dim=1).numpy(), expected.predict_proba(z), atol=5e-3)
