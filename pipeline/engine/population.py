"""Population statistics for batch norm, measured on training examples."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pipeline.core.types import Params, Statistics
from pipeline.engine.learner import Learner
from pipeline.runtime.collectives import gather_shares, share, tree_sum
from pipeline.runtime.context import SINGLE, Context
from pipeline.store.reader import Store

NUM_BATCHES, _BATCH_SIZE = 16, 128


def population_statistics(
    learner: Learner, params: Params, store: Store, context: Context = SINGLE
) -> Statistics:
    """Mean and variance of every batch norm's input over up to 2,048 training examples.

    Batches are normalised by their own statistics, as in training, and the moments averaged:
    E[x] = mean of means, Var[x] = mean of (var + mean^2) - E[x]^2. Every worker gets the same bits
    for every world size.

    References:
        Wu and Johnson, Rethinking "Batch" in BatchNorm, 2021, section 3 (PreciseBN),
        arXiv:2105.07576.
    """
    model = learner.model.with_statistics(None)
    own = share(NUM_BATCHES, context.rank, context.world_size)
    moments, names, sizes = [], [], []
    for batch in own or [0]:  # a worker without a batch still needs the names and sizes
        pictures = torch.as_tensor(store.gather(_batch_rows(store, batch))).to(context.device)
        with torch.no_grad():
            _, found = model.features(params, learner.preprocessing(pictures))
        names = sorted(n.removesuffix(".mean") for n in found if n.endswith(".mean"))
        sizes = [found[f"{n}.mean"].numel() for n in names]
        if names:
            moments.append(torch.cat([_moments(found, n) for n in names]))
    if not names:
        return {}
    local = torch.stack(moments)[: len(own)]
    total = tree_sum(list(gather_shares(local, NUM_BATCHES, context))) / NUM_BATCHES
    statistics: Statistics = {}
    for name, pair in zip(names, torch.split(total, [2 * s for s in sizes]), strict=True):
        mean, second = pair.chunk(2)
        statistics[f"{name}.mean"] = mean.float()
        statistics[f"{name}.var"] = (second - mean**2).clamp_min(0).float()
    return statistics


def _batch_rows(store: Store, batch: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Rows spread evenly over all training classes; batches are interleaved."""
    classes = [store.classes[i] for i in store.class_ids("train")]
    num_rows = sum(c.count for c in classes)
    spread = np.linspace(0, num_rows - 1, min(num_rows, NUM_BATCHES * _BATCH_SIZE)).astype(np.int64)
    start = batch if len(spread) >= 2 * NUM_BATCHES else 0
    step = NUM_BATCHES if len(spread) >= 2 * NUM_BATCHES else 1
    return classes[0].offset + spread[start::step]


def _moments(found: Statistics, name: str) -> Tensor:
    mean, var = found[f"{name}.mean"].double(), found[f"{name}.var"].double()
    return torch.cat([mean, var + mean**2])
