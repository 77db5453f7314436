"""A step that must not go into the weights: what is known of it, kept for a replay."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from pipeline.core.config import Section
from pipeline.core.files import new_folder, write_json
from pipeline.engine.meta_gradient import Engine
from pipeline.engine.runner import Runner
from pipeline.runtime.collectives import gather_shares
from pipeline.runtime.context import Context, fingerprint
from pipeline.runtime.lineage import code_hash, code_root, content_hash
from pipeline.runtime.logs import say

NON_FINITE, SPIKE = "non-finite numbers", "a spike"
KIND = "incident"
"""Of the sealed folder."""
RECORD, WEIGHTS = "incident.json", "vector.safetensors"


class Incident(Section):
    """Groups whose loss or gradient is not finite, or far from the usual."""

    kind: str
    """`non-finite numbers` or `a spike`"""
    step: int
    position: int
    """Of the meta-batch in the stream."""
    groups: list[int]
    items: list[int]
    """Indices in the stream of all items of these groups: with the stream's seed, the items."""
    losses: list[list[float | str]]
    """By group and item; numbers that JSON does not know as text"""
    norms: list[float | str]
    """By group, of its own mean gradient"""
    norm: float | str
    """Of the whole meta-batch's"""
    unit: str
    """What an item is."""
    kept: Path | None = None

    @property
    def setting(self) -> str:
        """Which setting says what is to be done."""
        return "on_spike" if self.kind == SPIKE else "on_non_finite"

    def sentence(self) -> str:
        """What happened, where."""
        which = ", ".join(map(str, self.items[:8])) + (", ..." if len(self.items) > 8 else "")
        return (
            f"{self.kind} at step {self.step} (meta-batch {self.position}, groups "
            f"{', '.join(map(str, self.groups))}), {self.unit}: {which}"
        )

    def replay(self) -> str:
        """How to look at it again."""
        return "" if self.kept is None else f" Replay them: metaloom replay {self.kept}"


class IncidentRecord(Section):
    """All that computes an incident's groups again, beside the parameters."""

    incident: Incident
    entry: str
    """`module` whose `program(job, context, engine)` makes the run's program"""
    job_type: str
    """`module:class`"""
    job: dict[str, Any]
    inputs: dict[str, str | None]
    """Hash of what each of these paths of the job held"""
    engine: Engine | None
    """By which the gradients were computed; None where a program has no choice"""
    code: str
    machine: str
    """Fingerprint of what the bits depend on"""


class Incidents(NamedTuple):
    """Where the incidents of a run are kept, with what is needed to compute them again."""

    folder: Path
    entry: str
    """`module` whose `program(job, context, engine)` makes the run's program"""
    job: Section
    inputs: tuple[str, ...] = ()
    """Fields of the job: sealed folders that it reads"""
    runner: Runner | None = None
    """Computes the gradients, by an engine that is to be remembered"""

    def keep(self, found: Incident, vector: Tensor, context: Context) -> Incident:
        """Seal the parameters of that moment with the run's job, by the main worker.

        Returns:
            The incident with its place; without one where the disk refused.
        """
        target = self.folder / f"step-{found.step:08d}-{found.position:08d}"
        kept = found.model_copy(update={"kept": target})
        sealed = context.is_main and self._seal(target, kept, vector)
        context.wait_for_all("incident")  # or the others would end the run meanwhile
        told = torch.tensor([float(sealed)], device=context.device)
        there = bool(gather_shares(told, context.world_size, context).any())
        return kept if there else found

    def _seal(self, target: Path, kept: Incident, vector: Tensor) -> bool:
        record = self._record(kept).model_dump(mode="json")
        try:
            with new_folder(target, kind=KIND) as building:
                content = safetensors.torch.save({"vector": vector.cpu()})
                (building / WEIGHTS).write_bytes(content)
                write_json(building / RECORD, record)
        except OSError as error:  # what is kept for later must not stop the run
            say("incident not kept", folder=str(target), why=str(error))
            return False
        return True

    def _record(self, found: Incident) -> IncidentRecord:
        kind = type(self.job)
        return IncidentRecord(
            incident=found,
            entry=self.entry,
            job_type=f"{kind.__module__}:{kind.__qualname__}",
            job=self.job.model_dump(mode="json"),
            inputs={name: content_hash(getattr(self.job, name)) for name in self.inputs},
            engine=None if self.runner is None else self.runner.engine,
            code=code_hash(code_root()),
            machine=fingerprint()["id"],
        )


def plain(number: float) -> float | str:
    """As JSON knows it: what is not finite, as text."""
    return number if math.isfinite(number) else str(number)
