"""Learning rates as pure functions of the step."""

from __future__ import annotations

import math


def warmup_cosine(step: int, *, peak: float, num_steps: int, warmup: int, final: float) -> float:
    """Rise linearly over `warmup` steps to `peak`, then fall along a half cosine.

    Args:
        step: in [0, num_steps].
        final: the last value, as a fraction of `peak`.

    References:
        Loshchilov and Hutter, SGDR, 2017, eq. 5 without restarts, arXiv:1608.03983.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    share = min(1.0, (step - warmup) / max(1, num_steps - warmup))
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * share)))
