import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from maws.objectives.chunked_softmax import (
    CHUNKS,
    MOST_SCORES,
    ClassScores,
    Targets,
    chosen_chunk,
    each_class,
    mix,
    one_over_k,
)

IDS = torch.tensor([[4, -1, -1], [0, 2, 6], [10, 3, -1], [-1, -1, -1], [5, -1, 9]])  # 5 images, 11 classes


def layer(loss: str = "softmax", chunk: int = 4, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> ClassScores:
    made, rng = ClassScores(3, 11, loss, chunk).to(dtype), torch.Generator().manual_seed(1)
    for p in made.parameters():
        p.data = (scale * torch.randn(p.shape, generator=rng, dtype=torch.float64)).to(dtype)
    return made


def features(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)


def dense(targets: Targets) -> Tensor:
    """The rows that the indices stand for."""
    rows = torch.zeros(len(targets.ids), 11, dtype=torch.float64)
    for row, ids, weights in zip(rows, targets.ids, targets.weights, strict=True):
        for index, weight in zip(ids.tolist(), weights.tolist(), strict=True):
            if index >= 0:
                row[index] += weight
    return rows


def reference(loss: str, scores: Tensor, targets: Targets) -> Tensor:
    """Each image's loss with the whole matrix of scores, by the losses of torch."""
    rows = dense(targets)
    if loss == "softmax":
        return F.cross_entropy(scores, rows, reduction="none")
    each = F.binary_cross_entropy_with_logits(scores, rows, reduction="none").sum(dim=1)
    return torch.where(rows.sum(dim=1) > 0, each, 0.0)


def targets_of(loss: str) -> Targets:
    return one_over_k(IDS) if loss == "softmax" else each_class(IDS)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("chunk", [1, 4, 11, 50])
def test_loss_and_gradients_are_those_of_the_dense_loss_whatever_the_chunk(loss, chunk):
    one, two, x, y = layer(loss, chunk), layer(loss), features().requires_grad_(), features().requires_grad_()
    weight = torch.arange(1.0, 6.0, dtype=torch.float64)
    got, best = one(x, *targets_of(loss))
    want = reference(loss, two(y), targets_of(loss))
    assert_close(got, want, rtol=0, atol=1e-6)  # sigmoid: torch's softplus is linear from 20 on
    assert best.tolist() == two(y).argmax(dim=1).tolist()
    (got * weight).sum().backward()
    (want * weight).sum().backward()
    for a, b in [(x.grad, y.grad), (one.weight.grad, two.weight.grad), (one.bias.grad, two.bias.grad)]:
        assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_gradients_are_the_finite_differences_of_the_loss(loss):
    one = layer(loss)
    theirs = Targets(*(part[[1, 2, 0, 4, 3]] for part in targets_of(loss)))
    targets = mix(targets_of(loss), theirs, torch.linspace(0.2, 0.9, 5, dtype=torch.float64))

    def losses(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(one, {"weight": weight, "bias": bias}, (x, *targets))[0]

    arguments = (features().requires_grad_(), one.weight.detach().requires_grad_(), one.bias.detach().requires_grad_())
    assert torch.autograd.gradcheck(losses, arguments)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_mixed_targets_give_the_weighted_sum_of_two_losses(loss):
    one, other, weight = layer(loss), torch.tensor([1, 2, 0, 4, 3]), torch.linspace(0.2, 0.9, 5)
    targets = targets_of(loss)
    theirs = Targets(*(part[other] for part in targets))
    scores = one(features())
    want = weight * reference(loss, scores, targets) + (1 - weight) * reference(loss, scores, theirs)
    assert_close(one(features(), *mix(targets, theirs, weight))[0], want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_an_image_without_classes_has_no_loss_and_no_gradient(loss):
    x = features().requires_grad_()
    got, _ = layer(loss)(x, *targets_of(loss))
    got.sum().backward()
    assert got[3] == 0
    assert not x.grad[3].any()
    assert x.grad[[0, 1, 2, 4]].any(dim=1).all()


def test_scores_too_large_for_exp_are_no_trouble():
    got, _ = layer(scale=1e4)(features(), *one_over_k(IDS))
    assert_close(got, reference("softmax", layer(scale=1e4)(features()), one_over_k(IDS)))


def test_the_first_of_equal_scores_is_the_best_class():
    one = layer(chunk=4)
    torch.nn.init.zeros_(one.weight)
    one.bias.data = torch.tensor([0, 1, 2, 1, 2, 2, 0, 2, 1, 1, 2], dtype=torch.float64)
    assert one(features(), *one_over_k(IDS))[1].tolist() == [2] * 5


def test_under_bf16_only_the_scores_are_rounded_and_gradients_are_summed_in_float32():
    one, x = layer(dtype=torch.bfloat16), features(torch.bfloat16).requires_grad_()
    got, _ = one(x, *one_over_k(IDS))
    scores = one(x).detach().double().requires_grad_()  # a bf16 product
    want = reference("softmax", scores, one_over_k(IDS))
    assert got.dtype == torch.float32
    assert_close(got.double(), want, rtol=0, atol=1e-6)
    got.sum().backward()
    want.sum().backward()
    assert_close(one.weight.grad, (scores.grad.T @ x.double()).bfloat16())  # exact sums, rounded once
    assert_close(x.grad, (scores.grad @ one.weight.double()).bfloat16())


def test_what_needs_no_gradient_gets_none():
    one = layer().requires_grad_(False)
    x = features().requires_grad_()
    one(x, *one_over_k(IDS))[0].sum().backward()
    assert x.grad.any()
    assert one.weight.grad is None


class Largest(TorchDispatchMode):
    """Notes the most elements that any tensor made inside has, of those with a row per image and of all others."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch, self.per_image, self.other = batch, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and self.batch in t.shape:
                self.per_image = max(self.per_image, t.numel())
            elif isinstance(t, Tensor):
                self.other = max(self.other, t.numel())
        return out


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_no_tensor_of_batch_times_classes_is_ever_made(loss):
    batch, width, chunk, seen = 37, 5, 16, {}
    for classes in (100, 1000):
        one = ClassScores(width, classes, loss, chunk)
        x = torch.randn(batch, width, requires_grad=True)
        ids = torch.randint(classes, (batch, 2))
        with Largest(batch) as largest:
            one(x, *one_over_k(ids))[0].sum().backward()
        seen[classes] = largest.per_image
        assert largest.other <= classes * width  # the weight's gradient
    assert seen == {100: batch * chunk, 1000: batch * chunk}
    with Largest(batch) as largest:
        F.cross_entropy(one(x), torch.zeros(batch, dtype=torch.int64)).backward()
    assert largest.per_image == batch * 1000  # the dense loss is noticed


def test_the_chosen_chunk_fits_in_its_bound_and_is_never_more_than_there_are_classes():
    assert chosen_chunk(2048, 28_000) * 2048 == MOST_SCORES
    assert chosen_chunk(32, 28_000) == CHUNKS[1]
    assert chosen_chunk(10**6, 28_000) == CHUNKS[0]
    assert chosen_chunk(32, 7) == 7


def test_an_unknown_loss_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="softmax or sigmoid"):
        ClassScores(3, 11, "hinge")
