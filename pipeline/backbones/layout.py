"""How pictures lie in memory: channels last, the layout in which CPUs convolve fastest."""

from __future__ import annotations

from torch import Tensor


def channels_last(x: Tensor) -> Tensor:
    """The same pictures [B, C, H, W], each pixel's channels side by side in memory.

    `Tensor.contiguous(memory_format=torch.channels_last)` leaves one-channel pictures as they are,
    for both layouts fit them, and the convolution then answers in the slow one. The strides are
    therefore written out, by way of a flat view.
    """
    batch, channels, height, width = x.shape
    flat = x.permute(0, 2, 3, 1).reshape(-1)
    return flat.view(batch, height, width, channels).permute(0, 3, 1, 2)
