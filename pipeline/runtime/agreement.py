"""Whether all workers still hold the same numbers."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.core.errors import DataError
from pipeline.runtime.collectives import gather_shares
from pipeline.runtime.context import Context, fingerprint
from pipeline.runtime.faults import DivergenceError


def check_agreement(tensors: Mapping[str, Tensor], step: int, context: Context) -> None:
    """Compare a hash of everything that a checkpoint would hold, over all workers.

    Raises:
        DivergenceError: on every worker, when one holds other bits: its memory or processor erred.
    """
    if context.world_size == 1:
        return
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].detach().cpu().numpy().tobytes())
    own = torch.tensor([int.from_bytes(digest.digest()[:7])], device=context.device)
    held = gather_shares(own, context.world_size, context).tolist()
    if len(set(held)) == 1:
        return
    most, count = Counter(held).most_common(1)[0]
    others = [rank for rank, value in enumerate(held) if value != most]
    who = f"worker {', '.join(map(str, others))}" if 2 * count > len(held) else "some workers"
    raise DivergenceError(
        f"{who} of {len(held)} held other parameters than the rest at step {step}, which no sound "
        "machine does; nothing of it was kept"
    )


def check_same_inputs(facts: Mapping[str, str], context: Context) -> None:
    """Compare what the workers are about to read; hosts with disks of their own may differ.

    Args:
        facts: a name and a digest of each input.

    Raises:
        DataError: on every worker, when one holds others; names it.
    """
    if context.world_size == 1:
        return
    own = torch.tensor([[_number(facts[name]) for name in sorted(facts)]], device=context.device)
    held = gather_shares(own, context.world_size, context).tolist()
    names = sorted(facts)
    other = {
        (rank, name)
        for rank, row in enumerate(held)
        for name, value, first in zip(names, row, held[0], strict=True)
        if value != first
    }
    if other:
        which = ", ".join(sorted({name for _, name in other}))
        who = ", ".join(map(str, sorted({rank for rank, _ in other})))
        raise DataError(
            f"the workers do not hold the same data: {which} of worker {who} is not what worker 0 "
            "has. Bring every host to the same commit and data (`git checkout`, `dvc pull`)."
        )


def kinds_of_machines(context: Context) -> str:
    """The compute fingerprint of the workers; where they differ, each one, with + between."""
    own = torch.tensor([int(fingerprint()["id"], 16)], device=context.device)
    held = gather_shares(own, context.world_size, context).tolist()
    return "+".join(sorted({f"{value:012x}" for value in held}))


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])
