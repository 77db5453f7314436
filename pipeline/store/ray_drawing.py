"""Drawing a plan on the nodes of a Ray cluster, to the bytes that one machine would draw.

Plain Ray tasks, one for each job. Ray does a job again whose node has died; the pictures' places
follow from the plan, so it does not matter who drew what, or when.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.core.errors import MachineError, PipelineError
from pipeline.core.files import sha256_bytes
from pipeline.core.ray_cluster import ray_cluster
from pipeline.domains.base import Domain, Drawn, Job
from pipeline.store.drawing import draw_jobs, limited_memory

_RETRIES = 5
"""Deaths of a worker or its node after which a job is drawn on this machine: here a picture that
kills its decoder is found and refused, and the others of its job are drawn."""


class _Answer(NamedTuple):
    node: str
    drawn: Drawn


def draw_on_ray(
    domain: Domain, jobs: Sequence[Job], *, num_workers: int | None = None
) -> Iterator[tuple[Job, Drawn]]:
    """Draw every job on the cluster of RAY_ADDRESS, or on one of this machine.

    The nodes must see the raw data by the same path. Each node's first job is drawn here too and
    compared, and so is every job of which a picture was refused: a node with other data, or other
    libraries, ends the work instead of changing it.

    Args:
        num_workers: for what is drawn here; on the cluster a job takes one CPU.

    Raises:
        MachineError: there is no such cluster, or a node does not see what this machine sees.
        PipelineError: a domain's own.
    """
    with ray_cluster(show_workers=False) as ray:
        at_once = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
        task = ray.remote(_draw).options(
            num_cpus=1, max_retries=_RETRIES, scheduling_strategy="SPREAD"
        )
        shared, folder = ray.put(domain), os.environ.get("METALOOM_WORKSPACE") or str(Path.cwd())
        waiting, running = deque(jobs), dict[Any, Job]()
        known, lost, doubtful = set[str](), list[Job](), list[tuple[Job, _Answer]]()
        while waiting or running:
            while waiting and len(running) < at_once:
                job = waiting.popleft()
                running[task.remote(shared, job, folder)] = job
            for done in ray.wait(list(running))[0]:
                job = running.pop(done)
                answer = _fetch(ray, done)
                if answer is None:
                    lost.append(job)
                    continue
                if answer.node not in known or answer.drawn.refused:
                    doubtful.append((job, answer))
                    known.add(answer.node)
                yield job, answer.drawn
    if lost:
        yield from draw_jobs(domain, lost, num_workers=num_workers)
    _compare(domain, doubtful, num_workers)


def _draw(domain: Domain, job: Job, folder: str) -> _Answer:
    """A task: draw one job, on whichever node."""
    import ray

    node = f"{ray.util.get_node_ip_address()} ({ray.get_runtime_context().get_node_id()[:8]})"
    if not Path(folder).is_dir() or not (Path(folder) / job.source).exists():
        raise MachineError(
            f"node {node} does not see {Path(folder) / job.source}. Mount the raw data on all "
            "nodes by the path that they have here (METALOOM_WORKSPACE says where the workspace "
            "is on the nodes), or unset METALOOM_LAUNCHER to draw on this machine alone."
        )
    os.chdir(folder)  # the process is Ray's, and does nothing but our tasks
    with limited_memory():
        return _Answer(node, domain.draw(job))


def _fetch(ray: Any, reference: Any) -> _Answer | None:
    """A task's answer; None if its workers died again and again.

    Raises:
        PipelineError: the task's own.
    """
    try:
        answer: _Answer = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, PipelineError):
            raise error.cause from None
        if isinstance(error.cause, MemoryError):
            return None
        raise
    except ray.exceptions.RayError:
        return None
    return answer


def _compare(
    domain: Domain, doubtful: Sequence[tuple[Job, _Answer]], num_workers: int | None
) -> None:
    """Draw these jobs here too.

    Raises:
        MachineError: a node drew something else.
    """
    ours: dict[int, str] = {}
    for job, drawn in draw_jobs(domain, [job for job, _ in doubtful], num_workers=num_workers):
        ours |= _hashes(job, drawn)
    for job, answer in doubtful:
        theirs = _hashes(job, answer.drawn)
        if theirs != {row: ours[row] for row in _rows(job) if row in ours}:
            raise MachineError(
                f"node {answer.node} draws {job.source} otherwise than this machine: it sees other "
                "raw data by that path, or has other versions of the libraries. Give all nodes the "
                "same data and the same image, or unset METALOOM_LAUNCHER to draw on this machine "
                "alone."
            )


def _rows(job: Job) -> range:
    return range(job.first, job.first + len(job.items))


def _hashes(job: Job, drawn: Drawn) -> dict[int, str]:
    """Hash of each picture that could be drawn, by its place in the plan."""
    pictures = zip(drawn.kept, drawn.pixels, strict=True)
    return {job.first + place: sha256_bytes(picture.tobytes()) for place, picture in pictures}
