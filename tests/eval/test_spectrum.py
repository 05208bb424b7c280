"""Spectra: against the SVD of the whole matrix, layer by layer against a forward by hand, and what is refused."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from data_pipeline.errors import DataError, UsageError
from data_pipeline.images import decode
from eval import pictures as module
from eval.base import File, Score
from eval.encoder import Encoder, open_encoder
from eval.evaluators.spectrum import Config, Spectrum, by_layer
from eval.moments import Moments
from eval.pictures import open_pictures
from eval.spectra import effective_rank, log_difference, variance_share
from maws.data.transforms import Preprocess
from maws.models.vit import build_vit
from tests.eval.conftest import SIDE

WIDTH = 32  # of atto
LAYERS = ["block=1", "block=2", "norm"]


def features(n: int, width: int, seed: int = 0) -> torch.Tensor:
    """Directions of very different width around a mean far from zero, float32."""
    rng = torch.Generator().manual_seed(seed)
    wide = torch.logspace(0, -3, width, dtype=torch.float64)
    return (torch.randn(n, width, generator=rng, dtype=torch.float64) * wide + 300).float()


def in_batches(x: torch.Tensor, sizes: list[int]) -> Moments:
    moments = Moments(x.shape[1])
    for part in x.split(sizes):
        moments.add(part)
    return moments


def encoder(**shape) -> Encoder:
    tower = build_vit("atto", SIDE, seed=1, **shape)
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            if "norm" in name or "bias" in name:  # untrained ones are 1 and 0
                parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    return Encoder(tower, Preprocess(SIDE))


@pytest.fixture
def data(files):
    return open_pictures([files.test])  # 28 pictures


def scores(items) -> dict[str, float]:
    return {item.metric: item.value for item in items if isinstance(item, Score)}


# --------------------------------------------------------------------------------------------------------------- maths


@pytest.mark.parametrize(("n", "width"), [(50, 12), (12, 12), (7, 12)])
def test_singular_values_are_those_of_the_whole_centred_matrix(n, width):
    x = features(n, width)
    expected = torch.linalg.svdvals(x.double() - x.double().mean(0)) / math.sqrt(n)
    found = in_batches(x, [3, n - 3]).singular_values()
    rank = min(n - 1, width)
    assert_close(found[:rank], expected[:rank], rtol=1e-6, atol=0.0)
    assert (found[rank:] == 0).all(), "centring takes one dimension"


def test_batches_give_what_one_pass_over_the_whole_gives():
    x = features(40, 9)
    whole = in_batches(x, [40])
    for sizes in ([1] * 40, [39, 1], [13, 0, 27]):
        found = in_batches(x, sizes)
        assert (found.count, found.mean.dtype) == (40, torch.float64)
        assert_close(found.mean, whole.mean, rtol=1e-14, atol=0.0)
        assert_close(found.scatter, whole.scatter, rtol=1e-10, atol=1e-12)


def test_ranks_together_have_what_one_has_alone(monkeypatch):
    x = features(20, 5)
    whole, parts = in_batches(x, [20]), [in_batches(x[:14], [14]), in_batches(x[14:], [6]), Moments(5)]
    turn: list[int] = [0, 0, 0]

    def sum_over(tensor, own):  # what all_reduce gives, by what every rank would have sent at this call
        call = turn[own]
        turn[own] += 1
        if call == 0:
            return torch.tensor(float(sum(part.count for part in parts)), dtype=torch.float64)
        if call == 1:
            return sum(part.mean * part.count for part in parts)
        apart = [part.mean - whole.mean for part in parts]
        return sum(p.scatter + p.count * a.outer(a) for p, a in zip(parts, apart, strict=True))

    for number, part in enumerate(parts):
        monkeypatch.setattr("maws.dist.sum_with_grad", lambda x, own=number: sum_over(x, own))
        found = part.of_all_ranks()
        assert found.count == 20
        assert_close(found.mean, whole.mean)
        assert_close(found.scatter, whole.scatter)


def test_features_that_do_not_vary_have_no_directions():
    values = in_batches(torch.full((9, 4), 7.0), [4, 5]).singular_values().tolist()
    assert values == [0, 0, 0, 0]
    assert (effective_rank(values), variance_share(values, 1)) == (0.0, 1.0)


def test_a_spectrum_needs_two_pictures_and_finite_features():
    with pytest.raises(ValueError, match="two pictures"):
        in_batches(torch.ones(1, 3), [1]).singular_values()
    with pytest.raises(ValueError, match="nan or infinity"):
        in_batches(torch.tensor([[1.0], [math.nan]]), [2]).singular_values()


def test_the_effective_rank_is_the_exponential_of_an_entropy():
    assert effective_rank([5.0] * 6 + [0.0] * 3) == pytest.approx(6)
    assert effective_rank([3.0, 0.0]) == pytest.approx(1)
    shares = [0.5, 0.25, 0.25]  # entropy 1.5 bits
    assert effective_rank([8 * share for share in shares]) == pytest.approx(2**1.5)


def test_the_share_of_variance_is_of_squares():
    assert variance_share([4.0, 3.0], 1) == pytest.approx(16 / 25)
    assert variance_share([4.0, 3.0], 9) == 1


def test_a_difference_ends_where_one_of_the_spectra_does():
    assert log_difference([math.e, 1, 0], [1, math.e, 5, 5]) == pytest.approx([1, -1])


# -------------------------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize("token", ["mean", "cls"])
@pytest.mark.parametrize(
    "shape", [{}, {"class_tokens": 2}, {"positions": "relative"}, {"pool": "mean_norm"}], ids=lambda s: "-".join(s)
)
def test_layers_are_those_of_a_forward_by_hand(shape, token):
    encode = encoder(**shape)
    tower, images = encode.tower, torch.randint(0, 256, (3, 3, SIDE, SIDE), dtype=torch.uint8)
    found = by_layer(encode, images, token)
    x = tower.prepend(tower.embed(encode.prepare(images)))
    bias = tower.rel_pos_bias() if tower.rel_pos_bias is not None else None
    own = slice(tower.class_tokens) if token == "cls" else slice(tower.class_tokens, None)
    for number, block in enumerate(tower.blocks, start=1):
        x = block(x, bias)
        assert_close(found[f"block={number}"], x[:, own].mean(1))
    assert_close(found["norm"], tower.norm(x)[:, own].mean(1))
    assert list(found) == LAYERS
    assert not any(block._forward_hooks for block in tower.blocks), "nothing stays on the model"


def test_scores_and_file_are_of_every_layer_and_the_same_twice(run, data):
    encode = open_encoder(run, torch.device("cpu"))
    found = list(Spectrum(Config(k=(3,)), data, seed=0).run(encode))
    (file,) = [item for item in found if isinstance(item, File)]
    content = json.loads(file.text)
    assert list(content["layers"]) == LAYERS
    assert (content["images"], content["token"], content["weights"]) == (28, "mean", encode.sha256)
    images = torch.stack([encode.preprocess(decode(data.test.read(row))) for row in range(28)])
    for layer, x in by_layer(encode, images, "mean").items():
        expected = torch.linalg.svdvals(x.double() - x.double().mean(0)) / math.sqrt(28)
        assert_close(torch.tensor(content["layers"][layer])[:20].double(), expected[:20], rtol=1e-5, atol=0.0)
        assert scores(found)[f"effective_rank/{layer}"] == pytest.approx(effective_rank(expected.tolist()), rel=1e-4)
        share = (expected[:3] ** 2).sum() / (expected**2).sum()
        assert scores(found)[f"variance@k=3/{layer}"] == pytest.approx(100 * share.item())
    assert list(Spectrum(Config(k=(3,)), data, seed=0).run(encode)) == found


def test_the_number_of_pictures_of_a_forward_changes_nothing(run, data):
    whole, parts = (
        scores(Spectrum(Config(), data, 0).run(replace(open_encoder(run, torch.device("cpu")), batch=batch)))
        for batch in (None, 5)
    )
    assert whole == pytest.approx(parts, rel=1e-5)


def test_a_broken_picture_is_left_out_and_more_are_an_error(run, data, monkeypatch, caplog):
    encode, read = open_encoder(run, torch.device("cpu")), data.test.read
    broken = replace(data, test=replace(data.test, read=lambda row: b"no picture" if row == 4 else read(row)))
    with pytest.raises(DataError, match="more than 1% of the 28 pictures"):
        list(Spectrum(Config(), broken, 0).run(encode))
    monkeypatch.setattr(module, "MAX_BAD", 0.1)
    found = list(Spectrum(Config(), broken, 0).run(encode))
    assert {item.n for item in found if isinstance(item, Score)} == {27}
    assert "1 of 28 pictures cannot be read" in caplog.text


def test_an_encoder_without_class_token_has_no_spectrum_of_it(data):
    with pytest.raises(UsageError, match="no class token; use mean"):
        list(Spectrum(Config(token="cls"), data, 0).run(encoder(class_tokens=0, pool="mean")))


def test_damaged_weights_are_told(data):
    encode = encoder()
    encode.tower.blocks[1].mlp.fc2.bias[0] = np.nan
    with pytest.raises(DataError, match=r"block=2 of the encoder has no spectrum: .*nan"):
        list(Spectrum(Config(), data, 0).run(encode))


@pytest.mark.parametrize("wrong", [{"token": "all"}, {"k": (0,)}, {"images": 1}, {"images": -3}])
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError):
        Config(**wrong)


def test_from_the_command_line_values_have_their_units(run, files, evaluate):
    done = evaluate("spectrum", "--run", run, "--data", files.test, "--set", "spectrum.k=2")
    assert done.code == 0
    assert "28  dimensions" in done.out and "28  % of variance" in done.out
    lines = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    assert [line["metric"] for line in lines[:2]] == ["effective_rank/block=1", "variance@k=2/block=1"]
    assert {line["config"]["protocol"] for line in lines} == {"spectrum/mean"}
    assert len(list((run / "spectrum").glob("*.json"))) == 1
