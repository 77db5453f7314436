"""One worker of a run: its rank, its device, its group; torch.distributed starts here."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store
from torch.distributed.rendezvous import rendezvous

from pipeline.core.errors import ConfigError
from pipeline.runtime.faults import HungPeerError, LostPeerError, timed_out
from pipeline.runtime.metric_log import JournalLog, MetricLog
from pipeline.runtime.pulse import Pulse, missing

TIMEOUT_SECONDS = 60.0
"""How long a collective waits for the slowest worker, unless METALOOM_TIMEOUT_SECONDS says else."""
_MEETING = "METALOOM_INIT"
"""Environment: where the workers of a group find each other; by default as torchrun has it."""
_START_SECONDS = 60.0
"""Workers come with some seconds between them: at least so long the first waits for the last."""
_MAIN_WORK_SECONDS = 1800.0
_MOST_SECONDS = 86_400.0


@dataclass(frozen=True)
class Context:
    """Who this worker is."""

    rank: int
    world_size: int
    device: torch.device
    workers_per_device: int = 1
    """Of a GPU: how many workers share it."""
    local_rank: int = 0
    """Place among the workers of this host; the first one keeps the host's checkpoints."""
    leads: bool | None = None
    """Whether this is the main worker; None makes it the first."""
    timeout_seconds: float = TIMEOUT_SECONDS
    """How long a collective waits for the slowest worker."""
    store: Store | None = field(default=None, repr=False, compare=False)
    """Where the workers of a group leave each other short messages; None for one worker."""
    pulse: Pulse | None = field(default=None, repr=False, compare=False)
    stopping: Callable[[], bool] = field(default=lambda: False, repr=False, compare=False)
    """Whether this worker was asked to stop: at the next step, behind a checkpoint."""
    open_log: Callable[[Path | None], MetricLog] = field(
        default=JournalLog, repr=False, compare=False
    )
    """Where metrics go: by default to a journal on this machine."""

    @property
    def is_main(self) -> bool:
        """Whether this worker writes files and shows progress."""
        return self.rank == 0 if self.leads is None else self.leads

    def at_step(self, step: int) -> None:
        """Note how far this worker is, for the others to see when they wait in vain."""
        if self.pulse is not None:
            self.pulse.step = step

    def wait_for_main(self, what: str) -> None:
        """Wait while the main worker does something alone that may last longer than a collective.

        Every worker calls it, the main one when it has done; once per name and group.

        Raises:
            HungPeerError: a worker shows no sign of life for the timeout; or it took half an hour.
        """
        if self.store is None:
            return
        key = f"done-{what}"
        if self.is_main:
            self.store.set(key, "1")
        self._wait_for(key, f"waiting for the main worker ({what})")

    def wait_for_all(self, what: str) -> None:
        """Wait until every worker is here, longer than a collective would: before one that ends
        work of some length, of which one worker may have more than another.

        Raises:
            HungPeerError: a worker shows no sign of life for the timeout; or it took half an hour.
        """
        if self.store is None:
            return
        number = self.store.add(f"all-{what}", 1)
        key = f"all-{what}-{math.ceil(number / self.world_size)}"
        if number % self.world_size == 0:
            self.store.set(key, "1")
        self._wait_for(key, f"waiting for all workers ({what})")

    def _wait_for(self, key: str, what: str) -> None:
        store = self.store
        assert store is not None and self.pulse is not None
        self.pulse.wait(lambda: store.check([key]), what, _MAIN_WORK_SECONDS)


SINGLE = Context(rank=0, world_size=1, device=torch.device("cpu"))
"""A process of its own, for tests and for evaluation."""


@contextmanager
def worker_context(
    *,
    stopping: Callable[[], bool] = lambda: False,
    open_log: Callable[[Path | None], MetricLog] = JournalLog,
) -> Iterator[Context]:
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
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    main = os.environ.get("METALOOM_MAIN_HOST")
    timeout = timeout_from_environment()
    device = _device()
    sharing = math.ceil(local_size / torch.cuda.device_count()) if device.type == "cuda" else 1
    make_deterministic()
    store = None
    if world_size > 1 or device.type == "cuda":
        store = _join(rank, world_size, device, sharing, timeout)
    pulse = None
    if store is not None:
        in_a_file = os.environ.get(_MEETING, "").startswith("file:")
        pulse = Pulse(store, rank, world_size, timeout, None if in_a_file else 0)
    yield Context(
        rank,
        world_size,
        device,
        sharing,
        local_rank=local_rank,
        leads=None if main is None else main == "1" and local_rank == 0,
        timeout_seconds=timeout,
        store=store,
        pulse=pulse,
        stopping=stopping,
        open_log=open_log,
    )
    if pulse is not None:
        pulse.close()
    if dist.is_initialized():  # not after an error: this may wait for a peer that waits for us
        dist.destroy_process_group()


def joined_context(
    *,
    stopping: Callable[[], bool],
    open_log: Callable[[Path | None], MetricLog],
) -> Context:
    """The context of a group that was made already, by a launcher that makes its own.

    RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE describe it.
    """
    make_deterministic()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    local_size = int(os.environ["LOCAL_WORLD_SIZE"])
    device = _device()
    # Not public, and the only way to a store where somebody else made the group.
    store = PrefixStore("metaloom", _get_default_store()) if world_size > 1 else None
    timeout = timeout_from_environment()
    return Context(
        rank,
        world_size,
        device,
        math.ceil(local_size / torch.cuda.device_count()) if device.type == "cuda" else 1,
        local_rank=int(os.environ["LOCAL_RANK"]),
        timeout_seconds=timeout,
        store=store,
        pulse=None if store is None else Pulse(store, rank, world_size, timeout),
        stopping=stopping,
        open_log=open_log,
    )


def _join(rank: int, world_size: int, device: torch.device, sharing: int, timeout: float) -> Store:
    """Make the default group; returns the store by which its workers found each other.

    Raises:
        HungPeerError: not all of them came within a minute, or the timeout if that is longer.
        LostPeerError: one went away meanwhile.
    """
    backend = backend_for(device, sharing)
    patience = timedelta(seconds=max(timeout, _START_SECONDS))
    try:
        store = _meeting_place(rank, world_size, patience)
        _meet(PrefixStore("start", store), rank, world_size, patience)
        dist.init_process_group(
            backend,
            store=PrefixStore("group", store),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
            device_id=device if backend == "nccl" else None,
        )
    except RuntimeError as error:  # torch.distributed raises nothing narrower over gloo
        kind = HungPeerError if timed_out(error) else LostPeerError
        why = str(error).partition("\n")[0]
        raise kind(f"the workers did not find each other: {why}") from error
    return PrefixStore("metaloom", store)


def _meeting_place(rank: int, world_size: int, patience: timedelta) -> Store:
    """The store of a launcher's own, or as torchrun has it.

    torch's own way to the latter waits for all workers inside the store, which cannot tell who is
    missing.
    """
    if (url := os.environ.get(_MEETING)) is not None:
        store: Store = next(rendezvous(url, rank, world_size, timeout=patience))[0]
        return store
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    at_the_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return TCPStore(
        host,
        port,
        world_size,
        is_master=rank == 0 and not at_the_agent,
        timeout=patience,
        wait_for_workers=False,
        multi_tenant=True,
    )


def _meet(store: Store, rank: int, world_size: int, patience: timedelta) -> None:
    """Wait until every worker is here, before torch makes a group with a shorter patience.

    Raises:
        HungPeerError: some did not come; says which.
    """
    store.set(f"here-{rank}", "1")
    keys = {other: f"here-{other}" for other in range(world_size)}
    try:
        store.wait(list(keys.values()), patience)
    except RuntimeError as error:
        if not timed_out(error):
            raise
        late = [other for other, key in keys.items() if not store.check([key])]
        if not late:  # the last one came just now
            return
        seconds = patience.total_seconds()
        raise HungPeerError(f"{missing(late)} not come within {seconds:g} s of the start") from None


def timeout_from_environment() -> float:
    """METALOOM_TIMEOUT_SECONDS, or a minute.

    Raises:
        ConfigError: it is no positive number.
    """
    value = os.environ.get("METALOOM_TIMEOUT_SECONDS", "")
    try:
        seconds = float(value) if value else TIMEOUT_SECONDS
    except ValueError:
        seconds = math.nan
    if not 1 <= seconds <= _MOST_SECONDS:
        raise ConfigError(
            f"METALOOM_TIMEOUT_SECONDS is {value!r}. Set it to seconds, 1 to {_MOST_SECONDS:g}, or "
            f"unset it to wait {TIMEOUT_SECONDS:g} s for the slowest worker."
        )
    return seconds


def backend_for(device: torch.device, workers_per_device: int) -> str:
    """NCCL between GPUs; it refuses two workers on one, which talk over gloo by way of the host."""
    return "nccl" if device.type == "cuda" and workers_per_device == 1 else "gloo"


def make_deterministic() -> None:
    """One intra-op thread and deterministic kernels: the same bits whatever the world size.

    On a GPU fp32 then means fp32: PyTorch's default rounds the inputs of convolutions to TF32.
    """
    torch.set_num_threads(1)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # `use_deterministic_algorithms` does this too, and imports the compiler, which we do not use:
    # that is half of the time in which a worker starts.
    torch.set_deterministic_debug_mode("error")
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
