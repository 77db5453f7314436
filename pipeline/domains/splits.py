"""Which classes are held out: a seeded choice that does not hang on what other classes exist."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def hold_out(names: Iterable[str], count: int, *, seed: int) -> set[str]:
    """Choose `count` names, those of lowest SHA-256(seed, name).

    Each name's rank is its own, so that adding a class moves at most one other in or out.
    """
    return set(sorted(set(names), key=lambda name: (_rank(seed, name), name))[: max(count, 0)])


def _rank(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{name}".encode("utf-8", "surrogateescape")).digest()
