"""The values that flow between packages.

S support examples, Q query examples, N ways, C channels, H and W pixels.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from torch import Tensor

Params: TypeAlias = dict[str, Tensor]
"""Meta-parameters by dotted name: everything that the outer loop learns."""

Statistics: TypeAlias = dict[str, Tensor]
"""Batch-norm means and variances by `<layer>.mean` and `<layer>.var`."""

Metrics: TypeAlias = dict[str, Tensor]
"""Detached scalars of one task, by name."""


class Task(NamedTuple):
    """One episode's tensors (a NamedTuple, because vmap refuses dataclasses)."""

    support_x: Tensor
    """Float images [S, C, H, W], already normalised."""
    support_y: Tensor
    """Labels [S] in [0, N)."""
    query_x: Tensor
    """Float images [Q, C, H, W]."""
    query_y: Tensor
    """Labels [Q] in [0, N)."""
    num_ways: int
    """N, the number of classes in this episode."""
