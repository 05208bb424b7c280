"""CLIP's and SigLIP's losses in chunks, against their plain formulas, open_clip's own classes, and one rank by two."""

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as td
import torch.nn.functional as F
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from maws.config import IMAGENET_MEAN, IMAGENET_STD
from maws.models import init
from maws.models.text import TEXT_VARIANTS, TextTower
from maws.models.two_tower import TwoTower
from maws.models.vit import build_vit, normalise
from maws.objectives.chunked_pairs import sigmoid_of_pairs, softmax_of_pairs
from maws.objectives.contrastive import LOSSES, Contrastive, pair_loss

B, E = 11, 5  # rows and columns of the small problems; width
CHUNKS = [1, 4, 11, 50]


def drawn(rows: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, E, generator=generator, dtype=torch.float64), dim=1).to(dtype)


def problem(loss: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Image and text features of all pairs, the scale and, for siglip, the bias; all want gradients."""
    numbers = [torch.tensor([7.0], dtype=torch.float64)]
    numbers += [torch.tensor([-2.0], dtype=torch.float64)] if loss == "siglip" else []
    return [t.requires_grad_() for t in (drawn(B, 1, dtype), drawn(B, 2, dtype), *numbers)]


def plain(loss: str, image: Tensor, text: Tensor, scale: Tensor, bias: Any = None) -> Tensor:
    """The formulas of the papers, with every score at once."""
    scores = scale * image @ text.T
    if loss == "clip":
        find_text, find_image = scores.log_softmax(dim=1), scores.log_softmax(dim=0)
        return -(find_text.trace() + find_image.trace()) / (2 * len(image))
    sign = 2 * torch.eye(len(image), dtype=scores.dtype) - 1
    return -(sign * (scores + bias)).sigmoid().log().sum() / len(image)


def gradients(loss: Tensor, of: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, of)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_and_all_gradients_are_those_of_the_plain_formula_whatever_the_chunk(loss, chunk):
    given = problem(loss)
    got, want = pair_loss(*given, chunk=chunk)[0], plain(loss, *given)
    assert_close(got, want, rtol=1e-9, atol=1e-9)
    for ours, theirs in zip(gradients(got, given), gradients(want, given), strict=True):
        assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("first", [0, 3, 8])
def test_rows_of_one_rank_have_their_own_columns_where_the_rank_stands(first, chunk):
    rows, columns, scale, bias = drawn(3, 1), drawn(B, 2), torch.tensor([7.0]), torch.tensor([-2.0])
    scores, own = scale * rows @ columns.T, torch.arange(first, first + 3)
    losses, behind = softmax_of_pairs(rows, columns, scale, first, chunk)
    assert_close(losses, F.cross_entropy(scores, own, reduction="none"))
    assert_close(behind, scores.amax(dim=1) - scores.gather(1, own[:, None])[:, 0])
    target = F.one_hot(own, B).double()
    want = F.binary_cross_entropy_with_logits(scores + bias, target, reduction="none").sum(dim=1)
    assert_close(sigmoid_of_pairs(rows, columns, scale, bias, first, chunk)[0], want)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_finite_differences_of_the_loss(loss):
    given = problem(loss)
    assert torch.autograd.gradcheck(lambda *tensors: pair_loss(*tensors, chunk=4)[0], given)


def open_clip_loss(name: str) -> Any:
    """A loss class of the installed open_clip, from its file alone: importing the package takes many seconds."""
    package = importlib.util.find_spec("open_clip")
    assert package is not None and package.origin is not None
    spec = importlib.util.spec_from_file_location("open_clip_loss", Path(package.origin).with_name("loss.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)()


@pytest.mark.parametrize(("loss", "name"), [("clip", "ClipLoss"), ("siglip", "SigLipLoss")])
def test_loss_and_gradients_are_open_clips(loss, name):
    given = problem(loss)
    got, want = pair_loss(*given, chunk=4)[0], open_clip_loss(name)(*given)
    assert_close(got, want, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(gradients(got, given), gradients(want, given), strict=True):
        assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_features_in_bf16_are_scored_in_float32(loss):
    given = problem(loss, torch.bfloat16)
    rounded = [t.detach().double().requires_grad_() for t in given]
    image, text, *numbers = given
    call = softmax_of_pairs if loss == "clip" else sigmoid_of_pairs
    losses, _ = call(image, text, *[n.float() for n in numbers], 0, 4)  # type: ignore[arg-type]
    assert losses.dtype == torch.float32
    scores = rounded[2] * rounded[0] @ rounded[1].T
    own = torch.arange(B)
    want = (
        F.cross_entropy(scores, own, reduction="none") if loss == "clip" else
        F.binary_cross_entropy_with_logits(scores + rounded[3], torch.eye(B).double(), reduction="none").sum(dim=1)
    )  # fmt: skip
    assert_close(losses.double(), want, rtol=1e-5, atol=1e-5)
    got, expected = gradients(losses.sum(), given), gradients(want.sum(), rounded)
    for ours, theirs, at in zip(got, expected, (2e-2, 2e-2, 1e-5, 1e-5), strict=False):  # 8 bits of bf16
        assert_close(ours.double(), theirs, rtol=at, atol=at)


def test_scores_too_large_for_exp_are_no_trouble():
    image, text = 1000 * drawn(B, 1), drawn(B, 2)
    for loss, numbers in (("clip", [torch.tensor([50.0])]), ("siglip", [torch.tensor([50.0]), torch.tensor([0.0])])):
        got = pair_loss(image, text, *numbers, chunk=4)[0]
        scores = 50 * image @ text.T
        if loss == "clip":
            want = (F.cross_entropy(scores, torch.arange(B)) + F.cross_entropy(scores.T, torch.arange(B))) / 2
        else:
            want = F.binary_cross_entropy_with_logits(scores, torch.eye(B).double(), reduction="sum") / B
        assert_close(got, want)


class Largest(TorchDispatchMode):
    """Notes the most elements of any tensor made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))])
        return out


@pytest.mark.parametrize("loss", LOSSES)
def test_no_tensor_is_larger_than_rows_by_chunk_or_the_features_of_all(loss):
    rows, chunk, scale, bias = 37, 16, torch.tensor([5.0]), torch.tensor([-1.0])
    own, all_of_them = drawn(rows, 1).requires_grad_(), drawn(4000, 2).requires_grad_()
    assert rows * chunk < all_of_them.numel() < rows * len(all_of_them)
    with Largest() as largest:
        if loss == "clip":
            losses, _ = softmax_of_pairs(own, all_of_them, scale, 74, chunk)
        else:
            losses, _ = sigmoid_of_pairs(own, all_of_them, scale, bias, 74, chunk)
        forward, largest.elements = largest.elements, 0
        losses.sum().backward()
    assert forward == rows * chunk
    assert largest.elements == all_of_them.numel()  # their gradient
    with Largest() as largest:
        F.cross_entropy(own @ all_of_them.T, torch.arange(rows)).backward()
    assert largest.elements == rows * len(all_of_them)  # the plain loss is noticed


def objective(loss: str, lock: str = "none") -> Contrastive:
    towers = TwoTower(build_vit("atto", seed=None), TextTower(TEXT_VARIANTS["atto"]), 24, lock, bias=loss == "siglip")
    made = Contrastive(towers, IMAGENET_MEAN, IMAGENET_STD, chunk=3)
    init.fill(made, made.init_rules(), seed=0)
    return made.eval()


def batch(part: slice = slice(None)) -> Any:
    """Eight pairs of which `part` is wanted."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=generator)
    ids = torch.randint(4, 300, (8, 6), generator=generator)
    return {"image": images[part], "token_ids": ids[part], "token_mask": torch.ones_like(ids)[part]}


@pytest.mark.parametrize("loss", LOSSES)
def test_the_objective_scores_every_image_against_every_caption(loss):
    made, given = objective(loss), batch()
    images = normalise(given["image"], IMAGENET_MEAN, IMAGENET_STD)
    out = made(given)
    embedded = made.towers(images, given["token_ids"], given["token_mask"])
    assert_close(out["loss"], plain(loss, *embedded))
    right = (embedded[0] @ embedded[1].T).argmax(dim=1) == torch.arange(8)
    assert_close(out["image_to_text"], right.float().mean())
    assert_close(out["logit_scale"], torch.tensor(1 / 0.07 if loss == "clip" else 10.0))
    assert ("logit_bias" in out) == (loss == "siglip")


def step_on_ranks(out: str) -> list[float]:
    """In a rank: the losses of its half of the batch; rank 0 keeps the mean of all ranks' gradients."""
    td.init_process_group("gloo")
    rank, found = td.get_rank(), []
    for loss in LOSSES:
        made = objective(loss)
        value = made(batch(slice(4 * rank, 4 * rank + 4)))["loss"]
        value.backward()
        grads = {name: p.grad for name, p in made.named_parameters() if p.grad is not None}
        for grad in grads.values():
            td.all_reduce(grad)
        if rank == 0:
            save_file({name: grad / 2 for name, grad in grads.items()}, Path(out) / f"{loss}.safetensors")
        found.append(value.item())
    return found


def test_two_ranks_have_the_loss_and_the_gradients_of_one(tmp_path):
    by_rank = run_ranks("test_contrastive", "step_on_ranks", tmp_path, out=str(tmp_path))
    for loss, values in zip(LOSSES, zip(*by_rank, strict=True), strict=True):
        alone = objective(loss)
        want = alone(batch())["loss"]
        want.backward()
        assert sum(values) / 2 == pytest.approx(want.item(), rel=1e-5)
        assert values[0] != values[1]
        got = load_file(tmp_path / f"{loss}.safetensors")
        expected = {name: p.grad for name, p in alone.named_parameters() if p.grad is not None}
        assert got.keys() == expected.keys()
        for name, grad in expected.items():
            assert_close(got[name], grad, rtol=1e-3, atol=1e-5 * max(1.0, float(grad.abs().max())), msg=name)


def test_captions_that_are_equal_are_right_for_each_others_images():
    image, text = drawn(4, 1), drawn(4, 2)
    text[0] = text[1] = image[0]
    text[2] = text[3] = -image[2]
    _, right = pair_loss(image, text, torch.tensor([7.0]))
    assert right.tolist()[0]
    assert not right.tolist()[2]
    assert pair_loss(image, image + 1e-9 * drawn(4, 3), torch.tensor([7.0]))[1].all()


def test_features_in_place_of_images_skip_the_tower_and_give_the_same_loss(monkeypatch):
    made, given = objective("clip", lock="image"), batch()
    want = made(given)["loss"]
    features = made.towers.image_features(normalise(given.pop("image"), IMAGENET_MEAN, IMAGENET_STD))
    monkeypatch.setattr(made.towers.image, "forward", lambda *_: pytest.fail("the image tower ran"))
    assert_close(made(given | {"features": features.detach()})["loss"], want)


def test_the_temperature_is_bounded_and_comes_back_from_beyond():
    towers = objective("clip").towers
    for beyond, grad in ((math.log(100) + 0.1, 1.0), (math.log(100) - 0.1, 1.0)):
        for sign in (1.0, -1.0):
            towers.logit_scale.data.fill_(beyond)
            towers.logit_scale.grad = None
            scale = towers.scale()
            assert scale.item() <= 100.001
            (sign * scale).backward()
            moves = sign > 0 or beyond < math.log(100)  # what would raise it further is left out
            assert towers.logit_scale.grad is not None
            assert bool(towers.logit_scale.grad) == moves, (beyond, sign, grad)
