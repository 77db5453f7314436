"""Convolution whose second derivative is as fast as its first.

B examples, I input channels, O output channels, H and W pixels, K kernel side, T tasks.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable

from pipeline.backbones.functions import remember_signature
from pipeline.backbones.products import (
    convolve_each,
    input_gradient_each,
    weight_gradient_each,
)

_aten = torch.ops.aten


class Convolution(nn.Module):
    """K x K convolution with stride 1, zero padding that keeps the size, and no bias.

    There is no bias because the batch norm behind it subtracts the mean.
    """

    def __init__(self, before: int, after: int, side: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(after, before, side, side))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # nn.Conv2d's own rule

    def forward(self, x: Tensor, signs: Tensor | None = None) -> Tensor:
        """[B, O, H, W] of [B, I, H, W].

        Args:
            signs: [O] of 1 and -1; the latter's filters are taken with the opposite sign.
        """
        weight: Tensor = self.weight
        if signs is not None:
            weight = weight * signs[:, None, None, None]
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):  # it does not see _Convolve
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
        result: Tensor = _Convolve.apply(x, weight, 1)  # type: ignore[no-untyped-call]
        return result


def _convolve(x: Tensor, weight: Tensor, groups: int) -> Tensor:
    if weight.ndim == 5:
        return convolve_each(x, weight)
    return F.conv2d(x, weight, padding=weight.shape[-1] // 2, groups=groups)


def _gradients(
    g: Tensor, x: Tensor, weight: Tensor, groups: int, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Cotangents of x and weight, where wanted, for the cotangent g of their convolution."""
    if weight.ndim == 5:
        gx = input_gradient_each(g, weight) if wanted[0] else None
        return gx, weight_gradient_each(g, x, weight.shape[-1]) if wanted[1] else None
    pad = weight.shape[-1] // 2
    mask = [*wanted, False]
    ones = [1, 1]
    result: tuple[Tensor | None, Tensor | None, None] = _aten.convolution_backward(
        g, x, weight, None, ones, [pad, pad], ones, False, [0, 0], groups, mask
    )
    return result[0], result[1]


def products_win(device_type: str) -> bool:
    """Whether filters of many tasks are applied by matrix products rather than by groups.

    On a CPU they are half as fast as groups, and groups are slower than one task at a time.
    """
    return device_type == "cuda"


class _Convolve(Function):
    """y = x * w; PyTorch's own second derivative takes slow paths for small batches on CPUs.

    Filters [T, O, I, K, K] are those of T tasks, for x [T, B, I, H, W].
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, groups: int) -> Tensor:
        return _convolve(x, weight, groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, ctx.groups = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        gx, gw = _ConvolveBackward.apply(g, x, weight, ctx.groups, ctx.needs_input_grad[0])  # type: ignore[no-untyped-call]
        return gx, gw, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, weight: Tensor, groups: int) -> Any:
        """Tasks become examples where they share weights; else matrix products, or groups."""
        if in_dims[1] is None:
            x = x.movedim(in_dims[0], 0)
            y = _Convolve.apply(x.flatten(0, 1), weight, groups)  # type: ignore[no-untyped-call]
            return y.unflatten(0, x.shape[:2]), 0
        weight = weight.movedim(in_dims[1], 0)
        tasks = len(weight)
        x = x.expand(tasks, *x.shape) if in_dims[0] is None else x.movedim(in_dims[0], 0)
        if products_win(x.device.type):
            return _Convolve.apply(x, weight, groups), 0  # type: ignore[no-untyped-call]
        folded_x, folded_w = x.movedim(0, 1).flatten(1, 2), weight.flatten(0, 1)
        y = _Convolve.apply(folded_x, folded_w, groups * tasks)  # type: ignore[no-untyped-call]
        return y.unflatten(1, (tasks, -1)), 1


class _ConvolveBackward(Function):
    """(gx, gw) of (g, x, w), linear in g; its own gradient is four more convolutions.

    With s = <u, gx> + <v, gw>: ds/dg = u * w + x * v; ds/dx and ds/dw are the input and weight
    gradients of convolutions with v for w and u for x.
    """

    @staticmethod
    def forward(
        g: Tensor, x: Tensor, weight: Tensor, groups: int, wants_x: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        return _gradients(g, x, weight, groups, (wants_x, True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        g, x, weight, ctx.groups, ctx.wants_x = inputs
        ctx.save_for_backward(g, x, weight)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor | None, v: Tensor | None) -> tuple[Tensor | None, ...]:
        g, x, weight = ctx.saved_tensors
        gg = gx = gw = None
        if u is not None:
            gg = _convolve(u, weight, ctx.groups)
            gw = _gradients(g, u, weight, ctx.groups, (False, True))[1]
        if v is not None:
            more = _convolve(x, v, ctx.groups)
            gg = more if gg is None else gg.add_(more)
            if ctx.needs_input_grad[1]:
                gx = _gradients(g, x, v, ctx.groups, (True, False))[0]
        return gg, gx, gw, None, None


for _function in (_Convolve, _ConvolveBackward):
    remember_signature(_function)
