"""Logistic regression against scikit-learn and autograd."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch.testing import assert_close

from eval import logistic

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
    monkeypatch.setattr(logistic, "ROWS", 32)
    parameters = torch.randn(S, D + 1, dtype=torch.float64, requires_grad=True)
    expected = F.cross_entropy(x @ parameters[:, :-1].T + parameters[:, -1], y)
    expected = expected + 0.05 * parameters[:, :-1].square().sum()
    expected.backward()
    with torch.no_grad():
        loss, gradient = logistic.loss_and_gradient(parameters, x, y, 0.1)
    assert_close(loss, expected)
    assert_close(gradient, parameters.grad)


def test_starting_elsewhere_ends_in_the_same_place(x, y):
    cold = logistic.fit(x, y, S, 0.01, iterations=2000, tolerance=1e-9)
    warm = logistic.fit(x, y, S, 0.01, iterations=2000, tolerance=1e-9, start=logistic.fit(x, y, S, 1.0))
    assert_close(cold.weight, warm.weight, atol=1e-6, rtol=1e-5)


def test_a_constant_feature_does_no_harm(x, y):
    x[:, 2] = 1e6
    assert torch.isfinite(logistic.fit(x.float(), y, S, 0.01)(x.float())).all()
