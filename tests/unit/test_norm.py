"""Our batch norm against PyTorch's, and its gradients against finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.backbones.norm import EPSILON, BatchNorm


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
@pytest.mark.parametrize("keep", [False, True])
def test_batch_statistics_match_pytorch(shape: tuple[int, ...], keep: bool) -> None:
    ours, theirs = twin(3, len(shape))
    x = torch.randn(shape, dtype=torch.float64) * 3 + 1
    collected: dict[str, torch.Tensor] = {}
    torch.testing.assert_close(ours(x, None, collected, keep), theirs(x), rtol=1e-10, atol=1e-10)
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
    torch.testing.assert_close(ours(x, given, {}, False), theirs(x), rtol=1e-12, atol=1e-12)


def test_gradients_flow_through_kept_statistics_twice() -> None:
    ours, _ = twin(2, 2)

    def through(support: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        statistics: dict[str, torch.Tensor] = {}
        ours(support, None, statistics, True)
        return ours(query, statistics, {}, False)

    support = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    query = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(through, (support, query))
    assert torch.autograd.gradgradcheck(through, (support, query))
