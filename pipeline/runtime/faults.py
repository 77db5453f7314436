"""What another start may mend, told apart from what it may not."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch.distributed import DistNetworkError

if TYPE_CHECKING:
    from pipeline.runtime.context import Context

_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Connection refused",
    "Failed to recv",
    "Failed to send",
)
_TIMED_OUT = ("Timed out", "timed out", "Timeout", "Wait timeout", "wait timeout")


class FaultError(Exception):
    """The launcher starts the workers again, from the last checkpoint."""


class LostPeerError(FaultError):
    """Another worker went away; it has the story, not this one."""


class HungPeerError(FaultError):
    """A worker did not come within the timeout."""


class DivergenceError(FaultError):
    """Workers that must hold the same parameters do not."""


def timed_out(error: RuntimeError) -> bool:
    """Whether that is what an error of torch.distributed says."""
    return any(sign in str(error) for sign in _TIMED_OUT)


@contextmanager
def peers_watched(context: Context) -> Iterator[None]:
    """Turn what the collectives raise into faults; one that timed out names the worker.

    Raises:
        LostPeerError: a connection broke.
        HungPeerError: nothing broke, but somebody did not come.
    """
    try:
        yield
    except RuntimeError as error:  # torch.distributed raises nothing narrower over gloo
        text = str(error)
        if context.world_size == 1:  # there is nobody to be lost
            raise
        if isinstance(error, DistNetworkError) or any(sign in text for sign in _GONE):
            raise LostPeerError(text.splitlines()[0]) from error
        if timed_out(error) and context.pulse is not None:
            traceback.print_tb(error.__traceback__)  # where this one waited; the others tell theirs
            found = context.pulse.roll_call()
            raise HungPeerError(
                f"no answer within {context.timeout_seconds:g} s at step {context.pulse.step}: "
                f"{found}"
            ) from error
        raise
