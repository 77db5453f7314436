"""Our batch norm and convolution against PyTorch's, and their derivatives against differences."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.backbones.conv4 import Conv4, Conv4Config
from pipeline.backbones.convolution import Convolution, _Convolve
from pipeline.backbones.layout import channels_last
from pipeline.backbones.norm import EPSILON, BatchNorm, _Normalise, moments
from pipeline.backbones.products import convolve_each


def twin(channels: int, dims: int) -> tuple[BatchNorm, nn.Module]:
    torch.manual_seed(0)
    ours = BatchNorm("n", channels).double()
    theirs = (nn.BatchNorm1d if dims == 2 else nn.BatchNorm2d)(channels, eps=EPSILON, momentum=1.0)
    theirs = theirs.double()
    for parameter in ("weight", "bias"):
        values = torch.randn(channels, dtype=torch.float64)
        getattr(ours, parameter).data = values.clone()
        getattr(theirs, parameter).data = values.clone()
    return ours, theirs


@pytest.mark.parametrize("shape", [(12, 3), (6, 3, 4, 5)])
def test_batch_statistics_match_pytorch(shape: tuple[int, ...]) -> None:
    ours, theirs = twin(3, len(shape))
    x = torch.randn(shape, dtype=torch.float64) * 3 + 1
    collected: dict[str, torch.Tensor] = {}
    torch.testing.assert_close(ours(x, None, collected), theirs(x), rtol=1e-10, atol=1e-10)
    count = x.numel() // 3
    torch.testing.assert_close(collected["n.mean"], theirs.running_mean)
    unbiased = collected["n.var"] * count / (count - 1)
    torch.testing.assert_close(unbiased, theirs.running_var)


@pytest.mark.parametrize("shape", [(12, 3), (6, 3, 4, 5)])
def test_given_statistics_match_pytorch_in_evaluation(shape: tuple[int, ...]) -> None:
    ours, theirs = twin(3, len(shape))
    theirs.running_mean, theirs.running_var = torch.randn(3).double(), torch.rand(3).double() + 0.1
    theirs.eval()
    given = {"n.mean": theirs.running_mean, "n.var": theirs.running_var}
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(ours(x, given, {}), theirs(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("width", "side"), [(64, 28), (5, 33), (7, 84)])
def test_normalising_behind_the_pooling_has_the_same_bits(width: int, side: int) -> None:
    """Whatever the sign of a channel's weight."""
    made = torch.Generator().manual_seed(width)
    net = Conv4(Conv4Config(width=width), (3, side, side))
    with torch.no_grad():
        for norm in net.norms:
            norm.weight.copy_(torch.randn(width, generator=made))
            norm.bias.copy_(torch.randn(width, generator=made))
            norm.weight[:2] = torch.tensor([0.0, -0.7])
        _, statistics = net(torch.randn(16, 3, side, side, generator=made))
        x = torch.randn(9, 3, side, side, generator=made)
        found, _ = net(x, statistics)
        expected = channels_last(x)
        for conv, norm in zip(net.convs, net.norms, strict=True):
            expected = F.relu(F.max_pool2d(norm(conv(expected), statistics, {}), 2))
    assert torch.equal(found, expected.flatten(1))


def test_gradients_flow_through_statistics_twice() -> None:
    ours, _ = twin(2, 2)

    def through(support: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        statistics: dict[str, torch.Tensor] = {}
        ours(support, None, statistics)
        return ours(query, statistics, {})

    support = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    query = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(through, (support, query))
    assert torch.autograd.gradgradcheck(through, (support, query))


@pytest.mark.parametrize("shape", [(12, 3), (6, 3, 4, 5)])
def test_first_and_second_derivatives_match_finite_differences(shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(_Normalise.apply, (x, weight, bias))
    assert torch.autograd.gradgradcheck(_Normalise.apply, (x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_second_derivatives_match_pytorch(dtype: torch.dtype) -> None:
    """Its own double backward, from the same bits; in bfloat16 within that type's rounding."""
    torch.manual_seed(2)
    x = torch.randn(6, 3, 4, 5).to(dtype).requires_grad_()
    weight, bias = (torch.randn(3, requires_grad=True) for _ in range(2))

    def products(normalise: Callable[[Tensor, Tensor, Tensor], Tensor]) -> list[Tensor]:
        torch.manual_seed(3)
        g = torch.randn(6, 3, 4, 5).to(dtype).requires_grad_()
        inputs = (x, weight, bias)
        first = torch.autograd.grad(normalise(*inputs), inputs, g, create_graph=True)
        second = torch.autograd.grad(first, [g, x, weight], [torch.randn_like(f) for f in first])
        return [*first, *second]

    ours = products(lambda *inputs: _Normalise.apply(*inputs)[0])
    theirs = products(lambda *i: torch.native_batch_norm(*i, None, None, True, 0.0, EPSILON)[0])
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        error = (one.float() - other.float()).norm() / other.float().norm()
        assert error < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("shape", [(75, 4, 84, 84), (75, 4, 3, 3), (50_000, 4)])
def test_moments_of_many_numbers_are_accurate(shape: tuple[int, ...]) -> None:
    torch.manual_seed(5)
    x = torch.randn(shape) * 3 + 2
    x = channels_last(x) if x.ndim == 4 else x
    dims = [d for d in range(x.ndim) if d != 1]
    mean, var = moments(x)
    torch.testing.assert_close(mean.double(), x.double().mean(dims), rtol=1e-6, atol=1e-6)
    exact = x.double().var(dims, correction=0)
    torch.testing.assert_close(var.double(), exact, rtol=2e-6, atol=0)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("side", [1, 3])
def test_convolution_derivatives_match_finite_differences(groups: int, side: int) -> None:
    torch.manual_seed(4)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 4 // groups, side, side, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(_Convolve.apply, (x, weight, groups))
    assert torch.autograd.gradgradcheck(_Convolve.apply, (x, weight, groups))


@pytest.mark.parametrize("channels", [1, 3])
def test_convolutions_stay_in_the_fast_layout(channels: int) -> None:
    """One-channel pictures fit both layouts, and PyTorch would answer in the slow one."""
    x = channels_last(torch.randn(4, channels, 8, 8))
    torch.testing.assert_close(channels_last(x), x, rtol=0, atol=0)
    answer = Convolution(channels, 6)(x)
    assert answer.stride() == (8 * 8 * 6, 1, 8 * 6, 6)


@pytest.mark.parametrize("side", [1, 3])
def test_filters_of_many_tasks_match_one_task_at_a_time_and_finite_differences(side: int) -> None:
    torch.manual_seed(6)
    x = channels_last(torch.randn(6, 3, 5, 4, dtype=torch.float64)).unflatten(0, (2, 3))
    weight = torch.randn(2, 4, 3, side, side, dtype=torch.float64)
    one_by_one = [
        nn.functional.conv2d(a, w, padding="same") for a, w in zip(x, weight, strict=True)
    ]
    found = convolve_each(x, weight)
    torch.testing.assert_close(found, torch.stack(one_by_one), rtol=1e-12, atol=1e-12)

    def convolve(x: Tensor, weight: Tensor) -> Tensor:
        return _Convolve.apply(x, weight, 1)  # type: ignore[no-any-return]

    leaves = (x[:, :2].requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(convolve, leaves)
    assert torch.autograd.gradgradcheck(convolve, leaves)
