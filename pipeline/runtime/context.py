"""One worker of a run: its rank, its device, its group; torch.distributed starts here."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pipeline.core.errors import ConfigError

_TIMEOUT = timedelta(seconds=300)


@dataclass(frozen=True)
class Context:
    """Who this worker is."""

    rank: int
    world_size: int
    device: torch.device
    workers_per_device: int = 1
    """Of a GPU: how many workers share it."""

    @property
    def is_main(self) -> bool:
        """Whether this worker writes files and shows progress."""
        return self.rank == 0


SINGLE = Context(rank=0, world_size=1, device=torch.device("cpu"))
"""A process of its own, for tests and for evaluation."""


@contextmanager
def worker_context() -> Iterator[Context]:
    """Join the group that the launcher's environment describes (RANK, WORLD_SIZE, ...).

    After an error the group is left as it is, and the process is expected to end.

    Raises:
        ConfigError: the environment describes no group.
    """
    try:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        raise ConfigError(
            "RANK and WORLD_SIZE are not set: this module is started by a launcher, not by hand. "
            "Run `python -m stages.meta_train`."
        ) from None
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    device = _device()
    sharing = math.ceil(local_size / torch.cuda.device_count()) if device.type == "cuda" else 1
    context = Context(rank, world_size, device, sharing)
    make_deterministic()
    if world_size > 1 or device.type == "cuda":
        backend = backend_for(device, sharing)
        dist.init_process_group(
            backend,
            init_method=os.environ.get("METALOOM_RENDEZVOUS", "env://"),
            rank=rank,
            world_size=world_size,
            timeout=_TIMEOUT,
            device_id=device if backend == "nccl" else None,
        )
    yield context
    if dist.is_initialized():  # not after an error: this may wait for a peer that waits for us
        dist.destroy_process_group()


def backend_for(device: torch.device, workers_per_device: int) -> str:
    """NCCL between GPUs; it refuses two workers on one, which talk over gloo by way of the host."""
    return "nccl" if device.type == "cuda" and workers_per_device == 1 else "gloo"


def make_deterministic() -> None:
    """One intra-op thread and deterministic kernels: the same bits whatever the world size.

    On a GPU fp32 then means fp32: PyTorch's default rounds the inputs of convolutions to TF32.
    """
    torch.set_num_threads(1)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # The default then writes NaN over all fresh memory, which costs a pass for every result.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False


def default_num_workers() -> int:
    """GPUs if there are any, else the physical cores that this process may use."""
    if torch.cuda.is_available():
        return torch.cuda.device_count()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(usable or 1, _physical_cores()))


def fingerprint() -> dict[str, Any]:
    """What the bits of a run depend on beside code, data and configuration."""
    facts: dict[str, Any] = {
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "dtype": "float32",
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    return {**facts, "id": digest}


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _physical_cores() -> int:
    """Distinct (package, core) pairs of /proc/cpuinfo; all logical cores where it says nothing."""
    pairs, package = set(), "0"
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                key, _, value = line.partition(":")
                if key.strip() == "physical id":
                    package = value.strip()
                elif key.strip() == "core id":
                    pairs.add((package, value.strip()))
    except OSError:
        pass
    return len(pairs) or os.cpu_count() or 1
