"""Batch normalisation whose statistics are arguments and results, never hidden state.

B examples, C channels, T tasks, P pieces of a batch, M = B * H * W numbers in a channel.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable

from pipeline.backbones.functions import remember_signature
from pipeline.core.types import Statistics

EPSILON = 1e-5
_NUMBERS_AT_A_TIME = 4096


class BatchNorm(nn.Module):
    """Normalise each channel of [B, C] or [B, C, H, W] inputs.

    References:
        Ioffe and Szegedy, Batch Normalization, 2015, algorithm 1, arXiv:1502.03167.
        The variance is the biased one in training and in evaluation.
    """

    def __init__(self, name: str, channels: int) -> None:
        super().__init__()
        self.name = name
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, statistics: Statistics | None, collected: Statistics) -> Tensor:
        """Normalise by given statistics, or by the batch's own, which go into `collected`.

        Gradients flow through both kinds of statistics.
        """
        if statistics is not None:
            if not torch.is_grad_enabled():
                return self.given(x, statistics)
            mean, var = statistics[f"{self.name}.mean"], statistics[f"{self.name}.var"]
            given: Tensor = _NormaliseByGiven.apply(x, self.weight, self.bias, mean, var)  # type: ignore[no-untyped-call]
            return given
        result, mean, inverse = _Normalise.apply(x, self.weight, self.bias)  # type: ignore[no-untyped-call]
        collected[f"{self.name}.mean"] = mean
        collected[f"{self.name}.var"] = inverse**-2 - EPSILON
        return result  # type: ignore[no-any-return]

    def given(self, x: Tensor, statistics: Statistics, signs: Tensor | None = None) -> Tensor:
        """By given statistics, without gradients.

        Args:
            signs: [C] of 1 and -1; the latter's channels come with the opposite sign.
        """
        mean, var = statistics[f"{self.name}.mean"], statistics[f"{self.name}.var"]
        weight: Tensor = self.weight
        if signs is not None:
            mean, weight = mean * signs, weight * signs
        return F.batch_norm(x, mean, var, weight, self.bias, False, 0.0, EPSILON)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel [C].

    PyTorch's CPU kernel adds channels-last numbers up one by one, in their own precision: 500,000
    of them leave a variance wrong by 2e-4. Here it sees a few thousand at a time, and float64 joins
    what it finds.
    """
    size = max(1, _NUMBERS_AT_A_TIME * x.shape[1] // x[0].numel())
    if size >= len(x):
        return torch.batch_norm_update_stats(x, None, None, 0.0)
    pieces = torch.split(x, size)
    parts = [torch.batch_norm_update_stats(piece, None, None, 0.0) for piece in pieces]
    shares = torch.tensor([len(piece) for piece in pieces], dtype=torch.float64) / len(x)
    means_PC = torch.stack([mean for mean, _ in parts]).double()
    vars_PC = torch.stack([var for _, var in parts]).double()
    mean = shares @ means_PC
    var = shares @ (vars_PC + (means_PC - mean) ** 2)
    kind = torch.promote_types(x.dtype, torch.float32)
    return mean.to(kind), var.to(kind)


def _channels(values: Tensor, x: Tensor) -> Tensor:
    """[C] as something that broadcasts over x."""
    return values.view([1, -1] + [1] * (x.ndim - 2))


def _backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    inverse: Tensor,
    wanted: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor, Tensor, Tensor]:
    """(w r (g - mean(g) - x' mean(g x')), sum(g x'), sum(g)) with x' = (x - mean) r."""
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_batch_norm_backward(
        g, x, weight, None, None, mean, inverse, True, EPSILON, list(wanted)
    )
    return result


def _fold(dim: int | None, x: Tensor, tasks: int) -> Tensor:
    """Tasks as more channels: [B, T C, ...]."""
    x = x.unsqueeze(0).expand(tasks, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.movedim(0, 1).flatten(1, 2) if x.ndim > 2 else x.flatten()


class _Normalise(Function):
    """(w x' + b, mean(x), r) with x' = (x - mean(x)) r and r = (var(x) + eps)^(-1/2)."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if x.device.type != "cpu" or x.dtype == torch.bfloat16:  # bfloat16 rounds more than it errs
            return torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, EPSILON)
        mean, var = moments(x)
        result = F.batch_norm(x, mean, var, weight, bias, False, 0.0, EPSILON)
        return result, mean, torch.rsqrt(var + EPSILON)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        ctx.save_for_backward(inputs[0], inputs[1], output[1], output[2])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, g: Tensor | None, g_mean: Tensor | None, g_inverse: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight, mean, inverse = ctx.saved_tensors
        gx = gw = gb = None
        if g is not None:
            gx, gw, gb = _NormaliseBackward.apply(g, x, weight, mean, inverse)  # type: ignore[no-untyped-call]
        if g_mean is not None or g_inverse is not None:
            through = _through_statistics(g_mean, g_inverse, x, mean, inverse)
            gx = through if gx is None else gx + through
        return gx, gw, gb

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, weight: Tensor, bias: Tensor) -> Any:
        tasks = info.batch_size
        folded = [
            _fold(dim, value, tasks) for dim, value in zip(in_dims, (x, weight, bias), strict=True)
        ]
        y, mean, inverse = _Normalise.apply(*folded)  # type: ignore[no-untyped-call]
        outputs = (
            y.unflatten(1, (tasks, -1)),
            mean.unflatten(0, (tasks, -1)),
            inverse.unflatten(0, (tasks, -1)),
        )
        return outputs, (1, 0, 0)


def _through_statistics(
    g_mean: Tensor | None, g_inverse: Tensor | None, x: Tensor, mean: Tensor, inverse: Tensor
) -> Tensor:
    """Gradient to x by way of its mean and its r: dmean/dx = 1/M, dr/dx = -r^2 x'/M."""
    count = x.numel() // mean.numel()
    slope = torch.zeros_like(mean)
    offset = torch.zeros_like(mean)
    if g_mean is not None:
        offset = g_mean / count
    if g_inverse is not None:
        slope = -g_inverse * inverse**3 / count
        offset = offset - slope * mean
    return torch.addcmul(_channels(offset, x), x, _channels(slope, x)).to(x.dtype)


class _NormaliseBackward(Function):
    """First derivative of `_Normalise`; its gradient in closed form, for double backward.

    PyTorch's own double backward is some forty passes over the activations; this is eight.
    With u, v, w the cotangents of gx, gw, gb; a, b the means of u x' and g x'; s the mean of u g;
    gamma the weight, k = v r - gamma r^2 a, and t = gamma r (u - mean(u) - x' a):
      d/dg = t + v x' + w
      d/dx = -r b t + k (g - mean(g) - x' b) - gamma r^2 x' (s - mean(u) mean(g) - a b)
      d/dgamma = M r (s - mean(u) mean(g) - a b)
    """

    @staticmethod
    def forward(
        g: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _backward(g, x, weight, mean, inverse)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        ctx.save_for_backward(*inputs, *output[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor | None, ...]:
        g, x, weight, mean, r, sum_gx, sum_g = ctx.saved_tensors
        count = x.numel() // mean.numel()
        t, sum_ux, sum_u = _backward(u, x, weight, mean, r)
        zero, one = torch.zeros_like(mean), torch.ones_like(mean)
        sum_ug = _backward(u, g, one, zero, one, (False, True, False))[1]
        a, b = sum_ux / count, sum_gx / count
        rest = sum_ug / count - sum_u * sum_g / count**2 - a * b
        k = v * r - weight * r**2 * a
        slope = -k * b * r - weight * r**3 * rest
        gx = torch.addcmul(_channels(-k * sum_g / count - slope * mean, x), x, _channels(slope, x))
        gx = gx.addcmul_(g, _channels(k, x)).addcmul_(t, _channels(-r * b, x))
        gg = torch.addcmul(_channels(w - v * r * mean, x), x, _channels(v * r, x)).add_(t)
        return gg.to(g.dtype), gx.to(x.dtype), count * r * rest, None, None


class _NormaliseByGiven(Function):
    """w (x - mean) r + b for a given mean and variance that gradients flow to."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, EPSILON)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x, weight, _, mean, var = inputs
        ctx.save_for_backward(x, weight, mean, var)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, ...]:
        x, weight, mean, var = ctx.saved_tensors
        r = torch.rsqrt(var + EPSILON)
        if torch.is_grad_enabled():  # to be differentiated again: plain operations, slower
            dims = [d for d in range(x.ndim) if d != 1]
            gx = g * _channels(weight * r, x)
            gw = (g * (x - _channels(mean, x))).sum(dims) * r
            gb = g.sum(dims)
        else:
            gx, gw, gb = torch.ops.aten.native_batch_norm_backward(
                g, x, weight, mean, var, mean, r, False, EPSILON, [True, True, True]
            )
        return gx, gw, gb, -weight * r * gb, -0.5 * weight * r**2 * gw

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Tensor) -> Any:
        tasks = info.batch_size
        folded = [_fold(dim, value, tasks) for dim, value in zip(in_dims, inputs, strict=True)]
        y = _NormaliseByGiven.apply(*folded)  # type: ignore[no-untyped-call]
        return y.unflatten(1, (tasks, -1)), 1


for _function in (_Normalise, _NormaliseBackward, _NormaliseByGiven):
    remember_signature(_function)
