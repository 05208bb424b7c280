import pytest
import torch
from torch import nn
from torch.testing import assert_close

from maws.models import init
from maws.models.batch_norm import BatchNorm1d
from maws.models.heads import NORMS, Head


def ours_and_torchs(channels: int) -> tuple[BatchNorm1d, nn.BatchNorm1d]:
    """Two norms of the same parameters, in float64."""
    torch.manual_seed(0)
    ours, torchs = BatchNorm1d(channels).double(), nn.BatchNorm1d(channels).double()
    with torch.no_grad():
        for mine, theirs in zip(ours.parameters(), torchs.parameters(), strict=True):
            mine.copy_(theirs.uniform_(-1, 1))
    return ours, torchs


def test_on_one_rank_it_is_torchs_batch_norm_forward_backward_and_buffers():
    ours, torchs = ours_and_torchs(5)
    assert list(ours.state_dict()) == list(torchs.state_dict())
    for scale in (1.0, 100.0):
        x = (torch.randn(7, 5, dtype=torch.float64) * scale + 3 * scale).requires_grad_()
        y = x.detach().clone().requires_grad_()
        weight = torch.randn(7, 5, dtype=torch.float64)
        mine, theirs = ours(x), torchs(y)
        (mine * weight).sum().backward()
        (theirs * weight).sum().backward()
        assert_close(mine, theirs, rtol=0, atol=1e-9)
        assert_close(x.grad, y.grad, rtol=0, atol=1e-9)
    for name, value in torchs.state_dict().items():
        assert_close(ours.state_dict()[name], value, rtol=1e-9, atol=0)
    for mine, theirs in zip(ours.parameters(), torchs.parameters(), strict=True):
        assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-9)
    x = torch.randn(1, 5, dtype=torch.float64)
    assert_close(ours.eval()(x), torchs.eval()(x), rtol=0, atol=1e-9)


def test_running_statistics_stay_float32_when_the_model_is_cast_down():
    norm = nn.Sequential(BatchNorm1d(3)).bfloat16()[0]
    assert norm.weight.dtype == torch.bfloat16 and norm.running_mean.dtype == norm.running_var.dtype == torch.float32
    with torch.no_grad():
        norm.weight.fill_(1), norm.bias.fill_(0)
    x = torch.randn(400, 3) * 0.01 + 5
    assert norm(x.bfloat16()).dtype == torch.bfloat16
    seen = x.bfloat16().float()
    assert_close(norm.running_mean, 0.1 * seen.mean(0))
    assert_close(norm.running_var, 0.9 + 0.1 * seen.var(0))  # torch.var: unbiased


def test_one_row_has_no_variance():
    with pytest.raises(ValueError, match="more than one row"):
        BatchNorm1d(3)(torch.zeros(1, 3))


def test_a_head_is_linear_layers_without_bias_with_norm_and_relu_between():
    head = Head(6, hidden=10, depth=3)
    init.fill(head, head.init_rules(""), seed=2)
    init.check(head, head.init_rules(""), at_most=100)
    shapes = {n: tuple(p.shape) for n, p in head.named_parameters()}
    assert shapes == {
        "0.weight": (10, 6), "1.weight": (10,), "1.bias": (10,),
        "3.weight": (10, 10), "4.weight": (10,), "4.bias": (10,), "6.weight": (6, 10),
    }  # fmt: skip
    x = want = torch.randn(8, 6)
    for linear, norm in (("0", "1"), ("3", "4"), ("6", None)):
        want = torch.einsum("ri,oi->ro", want, head.get_parameter(f"{linear}.weight"))
        if norm:
            mean, var = want.mean(0), want.var(0, unbiased=False)
            want = ((want - mean) / (var + 1e-5).sqrt()).clamp(min=0)  # a new norm's weight is 1 and its bias 0
    assert_close(head(x), want)
    norms = {n for n, p in head.named_parameters() if p.ndim == 1 and n.endswith("weight")}
    import re

    assert norms == {n for n in shapes if re.fullmatch(NORMS, n)}
    assert torch.equal(Head(6, depth=0)(x), x)
