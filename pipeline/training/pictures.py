"""The training rows' pictures on their way to the device: travelling as uint8, or there already.

R training rows, C channels, H and W pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.store.reader import Rows, Store

_RESIDENT_SHARE = 0.25
"""Of a GPU's free memory, how much the training rows may take to lie there for good."""
_ROWS_PER_COPY = 16_384


class Pictures(Protocol):
    """Where the pictures of training rows come from: a host half and a device half."""

    def fetch(self, rows: Rows) -> Tensor:
        """What has to travel for rows [...]; host memory, any thread."""

    def pictures(self, fetched: Tensor) -> Tensor:
        """Pictures [..., C, H, W], uint8, of what was fetched and now lies on the device."""


@dataclass(frozen=True)
class FromStore:
    """The pictures themselves travel, as uint8."""

    store: Store

    def fetch(self, rows: Rows) -> Tensor:
        """Pictures [..., C, H, W]."""
        return torch.from_numpy(self.store.gather(rows))

    def pictures(self, fetched: Tensor) -> Tensor:
        """They are what was fetched."""
        return fetched


@dataclass(frozen=True)
class OnDevice:
    """All training rows lie on the device; only row numbers travel."""

    store: Store
    first: int
    """The first training row."""
    resident: Tensor
    """[R, C, H, W] uint8"""

    def fetch(self, rows: Rows) -> Tensor:
        """Places [...] in the resident rows.

        Raises:
            ArtefactError: a row is not in the store.
        """
        places = self.store.checked(rows) - self.first
        if places.size and places.view(np.uint64).max() >= len(self.resident):
            raise ValueError("a row that is not of the training split")
        return torch.from_numpy(places)

    def pictures(self, fetched: Tensor) -> Tensor:
        """Gathered on the device."""
        found = self.resident.index_select(0, fetched.flatten())
        return found.view(*fetched.shape, *self.resident.shape[1:])


def training_pictures(store: Store, device: torch.device) -> Pictures:
    """Resident on a GPU with room for them; else, and on a CPU, read from the mapped store."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if len(_training_rows(store)) * math.prod(store.image_shape) <= _RESIDENT_SHARE * free:
            return resident_pictures(store, device)
    return FromStore(store)


def resident_pictures(store: Store, device: torch.device) -> OnDevice:
    """Copy all training rows to the device, a piece at a time."""
    rows = _training_rows(store)
    resident = torch.empty(len(rows), *store.image_shape, dtype=torch.uint8, device=device)
    for start in range(0, len(rows), _ROWS_PER_COPY):
        piece = np.arange(start, min(start + _ROWS_PER_COPY, len(rows))) + rows.start
        resident[start : start + len(piece)] = torch.from_numpy(store.gather(piece))
    return OnDevice(store, rows.start, resident)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The same tensor on the device; to a GPU from pinned memory, without waiting for it."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _training_rows(store: Store) -> range:
    """Rows of the training classes: the store is sorted by split, so they are one range."""
    classes = [store.classes[i] for i in store.class_ids("train")]
    if not classes:
        return range(0)
    return range(classes[0].offset, classes[-1].offset + classes[-1].count)
