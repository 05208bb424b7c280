"""The masked autoencoder against recipes §2.1 and §3.3 written out: argsort, un-shuffle, decoder, loss by loops."""

from dataclasses import replace

import pytest
import reference
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from maws.models import init
from maws.models.mae import (
    DecoderShape,
    MaskedAutoencoder,
    long_sequence_decoder,
    normalise_patches,
    patchify,
    unpatchify,
)
from maws.models.vit import VARIANTS, Options, Shape

SHAPE = Shape(patch=2, depth=1, width=16, heads=2, image=12)  # 6 x 6 patches
N, KEEP = 36, 9


def autoencoder(decoder: DecoderShape = DecoderShape(8, 2, 2), class_tokens: int = 1, **options) -> MaskedAutoencoder:
    mae = MaskedAutoencoder(replace(SHAPE, class_tokens=class_tokens), 12, decoder, **options)
    init.fill(mae, mae.init_rules(), seed=0)
    with torch.no_grad():
        for p in mae.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return mae.double().eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(2, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    noise = torch.rand(2, N, generator=torch.Generator().manual_seed(7))
    return noise.argsort(dim=1)


def linear(state, name: str, x: torch.Tensor) -> torch.Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def by_hand(mae: MaskedAutoencoder, image: torch.Tensor, ids_shuffle: list[int], class_tokens: int = 1) -> torch.Tensor:
    """Every patch's prediction, un-shuffled before the decoder as the paper has it: N P."""
    state, c = reference.double(mae), class_tokens
    latent = linear(state, "decoder_embed", reference.encoder(state, image, 2, 2, ids_shuffle[:KEEP]))
    patches = [state["mask_token"][0, 0]] * N
    for token, place in zip(latent[c:], ids_shuffle[:KEEP], strict=True):
        patches[place] = token
    x = torch.cat([latent[:c], torch.stack(patches)])
    x = reference.decoder(state, x, 2, state["decoder_pos_embed"][0])
    x = reference.layer_norm(x, state["decoder_norm.weight"], state["decoder_norm.bias"])
    return linear(state, "decoder_pred", x)[c:]


@pytest.mark.parametrize("class_tokens", [1, 0, 3])
def test_predictions_equal_the_papers_written_out(images, ids, class_tokens):
    changes = {} if class_tokens else {"pool": "mean"}
    mae = MaskedAutoencoder(replace(SHAPE, class_tokens=class_tokens, **changes), 12, DecoderShape(8, 2, 2))
    init.fill(mae, mae.init_rules(), seed=0)
    mae.double().eval()
    got = mae(images, ids, KEEP)
    assert got.shape == (2, N - KEEP, 12)
    for i in range(2):
        every = by_hand(mae, images[i], ids[i].tolist(), class_tokens)
        assert_close(got[i], torch.stack([every[p] for p in ids[i, KEEP:]]), rtol=0, atol=1e-10)


def test_mask_tokens_in_the_encoder_stand_at_the_masked_places(images, ids):
    """MAE Table 1c: the encoder sees all N tokens, and the decoder adds none."""
    mae = autoencoder(encode_mask_tokens=True)
    state = reference.double(mae)
    assert state["mask_token"].shape == (1, 1, 16)
    got = mae(images, ids, KEEP)
    for i in range(2):
        patches = reference.embed_patches(state, images[i], 2)
        for place in ids[i, KEEP:]:
            patches[place] = state["mask_token"][0, 0]
        x = torch.cat([state["cls_token"][0], patches]) + state["pos_embed"][0]
        x = reference.block(state, "blocks.0", x, 2)
        x = linear(state, "decoder_embed", reference.layer_norm(x, state["norm.weight"], state["norm.bias"]))
        x = reference.decoder(state, x, 2, state["decoder_pos_embed"][0])
        x = reference.layer_norm(x, state["decoder_norm.weight"], state["decoder_norm.bias"])
        every = linear(state, "decoder_pred", x)[1:]
        assert_close(got[i], torch.stack([every[p] for p in ids[i, KEEP:]]), rtol=0, atol=1e-10)


@pytest.mark.parametrize("reduction", ["conv", "average"])
@pytest.mark.parametrize("restore", [False, True])
def test_a_shorter_decoder_makes_one_token_of_two_by_two(images, ids, reduction, restore):
    mae = autoencoder(DecoderShape(8, 2, 2, reduction, restore))
    state, got = reference.double(mae), mae(images, ids, KEEP)
    assert state["decoder_pos_embed"].shape == (1, 1 + 9, 8)
    for i in range(2):
        latent = linear(state, "decoder_embed", reference.encoder(state, images[i], 2, 2, ids[i, :KEEP].tolist()))
        grid = state["mask_token"][0, 0].repeat(6, 6, 1)
        for token, place in zip(latent[1:], ids[i, :KEEP].tolist(), strict=True):
            grid[place // 6, place % 6] = token
        cells = []
        for y in range(0, 6, 2):
            for x in range(0, 6, 2):
                cell = grid[y : y + 2, x : x + 2]  # 2 2 E
                if reduction == "conv":
                    weight = state["decoder_reduce.weight"]  # E E 2 2
                    cells.append(torch.einsum("yxe,feyx->f", cell, weight) + state["decoder_reduce.bias"])
                else:
                    cells.append(cell.sum(dim=(0, 1)) / 4)
        out = reference.decoder(state, torch.cat([latent[:1], torch.stack(cells)]), 2, state["decoder_pos_embed"][0])
        if restore:
            weight, finer = state["decoder_restore.weight"], torch.zeros(6, 6, 8, dtype=torch.float64)
            for n, cell in enumerate(out[1:]):
                for dy in range(2):
                    for dx in range(2):
                        value = torch.einsum("e,ef->f", cell, weight[:, :, dy, dx]) + state["decoder_restore.bias"]
                        finer[2 * (n // 3) + dy, 2 * (n % 3) + dx] = value
            out = torch.cat([out[:1], finer.reshape(N, 8)])
        out = reference.layer_norm(out, state["decoder_norm.weight"], state["decoder_norm.bias"])
        every = linear(state, "decoder_pred", out)[1:]
        want = torch.stack([every[p] for p in ids[i, KEEP:]]) if restore else every
        assert_close(got[i], want, rtol=0, atol=1e-10)
    assert (mae.prediction_patch, mae.prediction_grid) == ((2, (6, 6)) if restore else (4, (3, 3)))


def test_a_patch_of_two_by_two_counts_by_the_share_of_it_that_was_masked(ids):
    mae = autoencoder(DecoderShape(8, 1, 2, "conv"))
    places, weight = mae.predicted(ids, KEEP)
    assert weight is not None and weight.shape == (2, 9)
    for i in range(2):
        visible = set(ids[i, :KEEP].tolist())
        for n, place in enumerate(places[i].tolist()):
            y, x = divmod(place, 3)
            own = [(2 * y + dy) * 6 + 2 * x + dx for dy in range(2) for dx in range(2)]
            assert weight[i, n] == sum(patch not in visible for patch in own) / 4
    assert float(weight.sum()) == 2 * (N - KEEP) / 4
    fine, none = autoencoder().predicted(ids, KEEP)
    assert torch.equal(fine, ids[:, KEEP:]) and none is None


def test_gradients_of_the_shorter_decoder_are_those_of_finite_differences(images, ids):
    mae = autoencoder(DecoderShape(8, 1, 2, "conv", restore=True))
    names = ["decoder_reduce.weight", "decoder_restore.bias", "mask_token", "decoder_embed.bias"]
    params = {n: p.detach().clone().requires_grad_() for n, p in mae.named_parameters() if n in names}

    def loss(*values: torch.Tensor) -> torch.Tensor:
        chosen = dict(zip(params, values, strict=True))
        return torch.func.functional_call(mae, chosen, (images, ids, KEEP)).square().mean()

    assert torch.autograd.gradcheck(loss, tuple(params.values()), eps=1e-6, atol=1e-6, fast_mode=True)


def test_recomputed_and_float32_decoders_give_the_same_predictions(images, ids):
    want = autoencoder()(images, ids, KEEP)
    for options in (Options(checkpoint_blocks="all"), Options(fp32_attention=True)):
        mae = autoencoder(options=options)
        assert_close(mae(images, ids, KEEP), want, rtol=0, atol=1e-5)
        mae(images, ids, KEEP).sum().backward()


def test_decoders_have_the_papers_sizes_and_names():
    """recipes §1.4: 512 x 8 with 16 heads adds about 26M; long sequences halve the encoder's width."""
    with torch.device("meta"):
        mae = MaskedAutoencoder(VARIANTS["vit_l16"], 224, DecoderShape())
    own = {n: tuple(p.shape) for n, p in mae.named_parameters() if n.startswith(("decoder", "mask"))}
    assert own["decoder_pos_embed"] == (1, 197, 512) and own["decoder_pred.weight"] == (768, 512)
    assert own["decoder_embed.weight"] == (512, 1024) and own["decoder_blocks.7.mlp.fc1.weight"] == (2048, 512)
    assert own["mask_token"] == (1, 1, 512)
    assert sum(p.numel() for n, p in mae.named_parameters() if n in own) == pytest.approx(26.1e6, rel=0.01)
    assert {b.norm1.eps for b in mae.decoder_blocks} == {mae.decoder_norm.eps} == {1e-6}
    assert long_sequence_decoder(VARIANTS["vit_b16"]) == DecoderShape(384, 8, 12)
    assert long_sequence_decoder(VARIANTS["vit_l16"]) == DecoderShape(512, 8, 16)


def test_patchify_is_row_column_channel_and_unpatchify_undoes_it():
    x = torch.randn(2, 3, 24, 32)
    patches = patchify(x, 8)
    assert_close(patches[1, 4 + 2, 3 * 5 + 8 * 3 * 2 + 1], x[1, 1, 8 + 2, 16 + 5])
    assert torch.equal(unpatchify(patches, 8, (3, 4)), x)


def test_normalised_targets_have_the_unbiased_statistics_of_each_patch():
    patches = torch.randn(2, 4, 48) * 3 + 5
    target, mean, std = normalise_patches(patches)
    one = patches[1, 2]
    assert_close(target[1, 2], (one - one.mean()) / (one.var(unbiased=True) + 1e-6).sqrt())
    assert_close(target * std + mean, patches)


@pytest.mark.parametrize(
    ("shape", "decoder", "message"),
    [
        ({"positions": "relative"}, DecoderShape(8, 1, 2), "needs sincos or learned positions, not relative"),
        ({}, DecoderShape(8, 1, 2, "max"), "reductions are none, conv, average; not 'max'"),
        ({"patch": 4}, DecoderShape(8, 1, 2, "conv"), "needs an even grid, not 3 x 3"),
        ({}, DecoderShape(8, 1, 2, "none", True), "decoder.restore undoes a reduction, and there is none"),
    ],
)
def test_what_cannot_be_built_is_refused(shape, decoder, message):
    with pytest.raises(ValueError, match=message):
        MaskedAutoencoder(replace(SHAPE, **shape), 12, decoder)


def test_the_whole_of_a_step_equals_the_mae_papers_algorithm(images):
    """recipes §2.1-§2.2 to the letter for a batch: ids_restore, mask, normalised targets, mean over the masked."""
    mae = autoencoder()
    noise = torch.rand(2, N, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    ids_shuffle = noise.argsort(dim=1)
    ids_restore = ids_shuffle.argsort(dim=1)
    mask = torch.ones(2, N, dtype=torch.float64)
    mask[:, :KEEP] = 0
    mask = mask.gather(1, ids_restore)  # 1 = removed, in row-major order
    prediction = torch.stack([by_hand(mae, images[i], ids_shuffle[i].tolist()) for i in range(2)])
    total = torch.zeros((), dtype=torch.float64)
    for i in range(2):
        for p in range(N):
            y, x = 2 * (p // 6), 2 * (p % 6)
            values = torch.stack([images[i, c, y + r, x + s] for r in range(2) for s in range(2) for c in range(3)])
            mean = values.sum() / 12
            variance = ((values - mean) ** 2).sum() / 11
            target = (values - mean) / torch.sqrt(variance + 1e-6)
            total += mask[i, p] * ((prediction[i, p] - target) ** 2).sum() / 12
    want = total / mask.sum()
    target = normalise_patches(patchify(images, 2))[0].take_along_dim(ids_shuffle[:, KEEP:, None], dim=1)
    assert_close(F.mse_loss(mae(images, ids_shuffle, KEEP), target), want, rtol=0, atol=1e-10)
