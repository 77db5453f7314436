"""Convolutions of many tasks, each with its own filters, as batched matrix products.

T tasks, B examples, I input channels, O output channels, H and W pixels, K filter side; P = B H W
output pixels of a task, F = K K I numbers under a filter.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def convolve_each(x: Tensor, weight: Tensor) -> Tensor:
    """y_t = x_t * w_t: [T, B, O, H, W] of [T, B, I, H, W] and filters [T, O, I, K, K].

    One product [T, P, F] x [T, F, O] of the pixels under the filters. A grouped convolution says
    the same, but libraries have no fast kernel for groups of 64 channels and more, least of all for
    its derivatives; matrix products run on tensor cores.
    """
    num_tasks, batch, _, height, width = x.shape
    filters_TFO = weight.permute(0, 3, 4, 2, 1).reshape(num_tasks, -1, weight.shape[1])
    y_TPO = torch.bmm(_patches(x, weight.shape[-1]), filters_TFO)
    return y_TPO.view(num_tasks, batch, height, width, -1).movedim(-1, 2)


def input_gradient_each(g: Tensor, weight: Tensor) -> Tensor:
    """Cotangent of x for the cotangent g [T, B, O, H, W] of y: a convolution turned around."""
    return convolve_each(g, weight.transpose(1, 2).flip(-2, -1))


def weight_gradient_each(g: Tensor, x: Tensor, side: int) -> Tensor:
    """Cotangent of the filters, [T, O, I, K, K]: a product [T, F, P] x [T, P, O]."""
    num_tasks, outputs = len(g), g.shape[2]
    g_TPO = g.movedim(2, -1).reshape(num_tasks, -1, outputs)
    w_TFO = torch.bmm(_patches(x, side).transpose(1, 2), g_TPO)
    return w_TFO.view(num_tasks, side, side, -1, outputs).permute(0, 4, 3, 1, 2)


def _patches(x: Tensor, side: int) -> Tensor:
    """What lies under the filter at every pixel, zeros outside of the picture: [T, P, F].

    Channels come last before anything is copied, so that reads and writes are side by side.
    """
    pad = side // 2
    padded = F.pad(x.movedim(2, -1), [0, 0, pad, pad, pad, pad])
    windows = padded.unfold(2, side, 1).unfold(3, side, 1)  # [T, B, H, W, I, K, K], a view
    return windows.permute(0, 1, 2, 3, 5, 6, 4).reshape(len(x), -1, side * side * x.shape[2])
