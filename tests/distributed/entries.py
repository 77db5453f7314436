"""Entries that worker processes of these tests run."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from pipeline.algorithms.maml import MAML
from pipeline.backbones.table import BackboneSpec, build_model, init_params
from pipeline.core.config import Section
from pipeline.core.errors import DataError
from pipeline.engine.choice import EngineConfig, choose_engine, example_group
from pipeline.runtime.collectives import exact_sum, fast_sum, gather_shares, owned_groups, share
from pipeline.runtime.context import Context
from pipeline.tasks.spec import EpisodeSpec
from pipeline.training.meta_train import MetaTrainJob
from pipeline.training.meta_train import run as run_meta_training


class Sums(Section):
    """Vectors to sum over groups."""

    num_groups: int
    seed: int = 0
    values: int = 1000


def group_vector(config: Sums, group: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(config.seed * 1000 + group)
    return torch.randn(config.values, generator=generator) * 10.0 ** (group % 5)


def sums(config: Sums, context: Context) -> dict[str, Any]:
    """Exact and fast sums, and the gathered groups, as hex so that bits can be compared."""
    own = owned_groups(config.num_groups, context)
    parts = [group_vector(config, g).to(context.device) for g in own]
    gathered = gather_shares(torch.stack(parts), config.num_groups, context)
    uneven = share(5, context.rank, context.world_size)
    places = torch.tensor(list(uneven), dtype=torch.int64, device=context.device)
    odd = gather_shares(places, 5, context)
    return {
        "exact": exact_sum(parts, config.num_groups, context).cpu().numpy().tobytes().hex(),
        "fast": fast_sum(parts).tolist(),
        "gathered": gathered.cpu().numpy().tobytes().hex(),
        "odd": odd.tolist(),
    }


class Plan(Section):
    """What a worker is to do."""

    rank: int
    what: str


def misbehave(plan: Plan, context: Context) -> dict[str, int]:
    """Fail on one rank in the way that is asked for, while the others wait for it."""
    if plan.what == "lost":
        raise RuntimeError("Connection refused by a daemon")  # as torch says of a peer
    if context.rank == plan.rank:
        if plan.what == "user error":
            raise DataError(f"rank {context.rank} met bad data. Mend it.")
        if plan.what == "bug":
            raise ZeroDivisionError("a mistake of ours")
        if plan.what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if plan.what == "exit":
            os._exit(9)
    gather_shares(torch.zeros(1), context.world_size, context)
    return {"rank": context.rank, "world_size": context.world_size}


def modules_of_a_run(job: MetaTrainJob, context: Context) -> list[str]:
    """All that the main worker has imported at the end of a run."""
    run_meta_training(job, context)
    return sorted(sys.modules)


def identify(plan: Plan, context: Context) -> list[list[int]]:
    """Every worker's rank, threads and process id."""
    own = torch.tensor([[context.rank, torch.get_num_threads(), os.getpid()]])
    result: list[list[int]] = gather_shares(own, context.world_size, context).tolist()
    return result


def hang_forever(plan: Plan, context: Context) -> None:
    """Write the process id and wait for the end."""
    Path(plan.what, f"{context.rank}.pid").write_text(str(os.getpid()))
    signal.pause()


class Choices(Section):
    """Where each worker looks for the choices of earlier runs: `<rank>.json`."""

    folder: Path


def engines(config: Choices, context: Context) -> list[int]:
    """The stride of the engine that each worker ends up with."""
    algorithm, shape = MAML(num_inner_steps=2), (1, 8, 8)
    backbone = BackboneSpec(name="mlp", settings={"hidden": [4]}, image_shape=shape)
    model = build_model(backbone, algorithm.batch_norm)
    own = algorithm.init(model.feature_dim, torch.Generator().manual_seed(0))
    engine = choose_engine(
        EngineConfig(),
        algorithm,
        model,
        {**init_params(backbone, 0), **own},
        example_group(EpisodeSpec(ways=2, queries=2), shape, 1, context.device),
        context,
        memory=config.folder / f"{context.rank}.json",
    )
    strides = gather_shares(torch.tensor([engine.stride]), context.world_size, context)
    return strides.tolist()  # type: ignore[no-any-return]
