"""What all autograd functions of our own have in common."""

from __future__ import annotations

import inspect
from typing import Any

from torch.autograd.function import Function


def remember_signature(function: type[Function]) -> None:
    """Save `Function.apply` from parsing the signature of forward on every call: 50 µs each."""
    forward: Any = function.forward
    forward.__signature__ = inspect.signature(forward)
