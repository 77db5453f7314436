"""Sums and exchanges over workers whose bits do not depend on how many workers there are.

G groups, V values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.core.errors import ConfigError, StoppedError
from pipeline.runtime.context import Context


def owned_groups(num_groups: int, context: Context) -> range:
    """The contiguous groups that this worker computes.

    Raises:
        ConfigError: more workers than groups, so that some would idle.
    """
    if context.world_size > num_groups:
        raise ConfigError(
            f"{context.world_size} workers share {num_groups} groups: some would have none. Raise "
            "num_groups (which changes the run) or lower METALOOM_NUM_WORKERS (which does not)."
        )
    return share(num_groups, context.rank, context.world_size)


def share(count: int, rank: int, world_size: int) -> range:
    """A worker's contiguous share of `count` items; the first workers take one more each."""
    base, extra = divmod(count, world_size)
    start = rank * base + min(rank, extra)
    return range(start, start + base + (rank < extra))


def tree_sum(parts: Sequence[Tensor]) -> Tensor:
    """Sum in the shape of one fixed binary tree over the positions of the parts.

    The left subtree is the largest power of two below the count, so the tree over 2^k parts is the
    perfect one and each aligned block of parts is a subtree of it.
    """
    if len(parts) == 1:
        return parts[0]
    split = 1 << (len(parts) - 1).bit_length() - 1
    return tree_sum(parts[:split]) + tree_sum(parts[split:])


def exact_sum(parts: Sequence[Tensor], num_groups: int, context: Context) -> Tensor:
    """`tree_sum` over all groups of all workers; every worker gets the same bits.

    Where the workers' shares are aligned subtrees (both counts powers of two), partial sums go up
    the tree by pairwise exchange, log2(world) messages of V values; a + b = b + a exactly, so both
    partners agree. Otherwise every worker gathers all parts and sums the tree itself.

    Args:
        parts: [V] for each group that this worker owns, in order.

    Returns:
        [V], the same bits for every world size.
    """
    if context.world_size == 1:
        return tree_sum(parts)
    if _power_of_two(context.world_size) and _power_of_two(num_groups):
        total = tree_sum(parts)
        distance = 1
        while distance < context.world_size:
            total = total + _exchange(total, context.rank ^ distance)
            distance *= 2
        return total
    gathered = gather_shares(torch.stack(list(parts)), num_groups, context)
    return tree_sum(list(gathered))


def fast_sum(parts: Sequence[Tensor]) -> Tensor:
    """Sum by the backend's all-reduce: quicker on many workers, other bits for each world size."""
    total = tree_sum(parts)
    if not dist.is_initialized():
        return total
    shared = _sendable(total).clone()
    dist.all_reduce(shared)
    return shared.to(total.device)


def gather_shares(values: Tensor, count: int, context: Context) -> Tensor:
    """Every worker's share of `count` items on every worker, in order.

    Args:
        values: [own items, ...] of this worker, as `share` deals them.

    Returns:
        [count, ...]
    """
    if context.world_size == 1:
        return values
    most = len(share(count, 0, context.world_size))
    padded = torch.zeros(most, *values.shape[1:], dtype=values.dtype, device=values.device)
    padded[: len(values)] = values
    sent = _sendable(padded)
    received = [torch.empty_like(sent) for _ in range(context.world_size)]
    dist.all_gather(received, sent)
    shares = [len(share(count, r, context.world_size)) for r in range(context.world_size)]
    everyone = torch.cat([part[:n] for part, n in zip(received, shares, strict=True)])
    return everyone.to(values.device)


def broadcast_bytes(content: bytes | None, source: int, context: Context) -> bytes:
    """One worker's bytes, on every worker.

    Args:
        content: what to send; None on all but the source.
    """
    own = torch.tensor([len(content or b"")], device=context.device)
    length = int(gather_shares(own, context.world_size, context)[source])
    sent = torch.frombuffer(bytearray(content or bytes(length)), dtype=torch.uint8)
    shared = sent if dist.get_backend() == "gloo" else sent.to(context.device)
    dist.broadcast(shared, source)
    return shared.cpu().numpy().tobytes()


def stop_together(context: Context, what: str) -> None:
    """End what all workers do, if any of them was asked to stop; every worker calls it.

    Raises:
        StoppedError: on every worker.
    """
    own = torch.tensor([float(context.stopping())], device=context.device)
    if bool(gather_shares(own, context.world_size, context).any()):
        raise StoppedError(f"stopped in {what}, as asked")


def barrier() -> None:
    """Wait until every worker is here."""
    if dist.is_initialized():
        dist.barrier()


def _exchange(mine: Tensor, partner: int) -> Tensor:
    sent = _sendable(mine)
    theirs = torch.empty_like(sent)
    sends = [dist.P2POp(dist.isend, sent, partner), dist.P2POp(dist.irecv, theirs, partner)]
    for work in dist.batch_isend_irecv(sends):
        work.wait()
    return theirs.to(mine.device)


def _sendable(tensor: Tensor) -> Tensor:
    """On the host where the workers talk over gloo, which sends nothing from a GPU."""
    return tensor.cpu() if dist.get_backend() == "gloo" else tensor


def _power_of_two(number: int) -> bool:
    return number & (number - 1) == 0
