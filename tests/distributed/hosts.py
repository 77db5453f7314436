"""Entries of workers that play several hosts, each with a disk of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.core.config import Section
from pipeline.runtime import resume
from pipeline.runtime.collectives import gather_shares
from pipeline.runtime.context import Context
from pipeline.runtime.resume import Keeper

RUN = "run"
"""Of every host, the folder of the one run."""


class Hosts(Section):
    """Which worker is on which host, and what is on their disks, case by case."""

    cases: list[Path]
    """Folders with one folder for each host"""
    hosts: list[int]
    """Of each worker"""
    local_ranks: list[int]


def tensors(step: int) -> dict[str, Tensor]:
    """What a checkpoint of a step holds."""
    return {"vector": torch.arange(50.0) * step, "first": torch.full((3,), float(step))}


def values(step: int) -> dict[str, Any]:
    """The numbers beside them."""
    return {"progress": {"step": step, "history": [step] * 3}}


def keep(plan: Hosts, context: Context) -> list[list[list[int]]]:
    """Resume, then save the next step; by case and worker: step, hash, and how often it wrote."""
    local = replace(context, local_rank=plan.local_ranks[context.rank])
    wrote, save = 0, resume.save_checkpoint

    def counted(folder: Path, step: int, t: Mapping[str, Tensor], s: Mapping[str, Any]) -> None:
        nonlocal wrote
        wrote += 1
        save(folder, step, t, s)

    resume.save_checkpoint = counted
    found = []
    for case in plan.cases:
        wrote = 0
        with Keeper(case / str(plan.hosts[context.rank]) / RUN, local) as keeper:
            saved = keeper.resume()
            step = 0 if saved is None else int(saved.state["progress"]["step"])
            fetched = wrote
            keeper.save(step + 10, tensors(step + 10), values(step + 10))
        digest = hashlib.sha256(b"".join(t.numpy().tobytes() for t in _sorted(saved))).digest()
        own = [[step, int.from_bytes(digest[:7]), fetched, wrote - fetched]]
        found.append(gather_shares(torch.tensor(own), context.world_size, context).tolist())
    return found


def _sorted(saved: Any) -> list[Tensor]:
    return [] if saved is None else [saved.tensors[n] for n in sorted(saved.tensors)]
