"""The hosts of a run under torchrun, and the agent on this one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from pipeline.core.errors import ConfigError
from pipeline.launch.base import Job, bounds_from_environment
from pipeline.launch.local import STOP_SECONDS, WORKER_ENVIRONMENT, worker_arguments
from pipeline.launch.network import Endpoint, free_endpoint, interface_towards, parse_endpoint
from pipeline.launch.processes import end_workers_of
from pipeline.launch.torchrun_story import AGENT_LOG
from pipeline.launch.worker import PARENT

MANY = 1_000_000
"""The agents start the workers again without end; how often is enough, the driver counts."""
_LAST_CALL_SECONDS = 2
"""How long the agents wait for more hosts once there are enough."""


class Hosts(NamedTuple):
    """The hosts of a run."""

    least: int
    most: int
    rendezvous: Endpoint


def hosts_from_environment() -> Hosts:
    """METALOOM_NODES and METALOOM_RENDEZVOUS; without the latter a free port, another each time.

    Raises:
        ConfigError: they do not say where the hosts meet, or how many there are.
    """
    value = os.environ.get("METALOOM_NODES") or "1"
    least, most = bounds_from_environment("METALOOM_NODES", value)
    place = os.environ.get("METALOOM_RENDEZVOUS", "")
    if most > 1 and not place:
        raise ConfigError(
            f"METALOOM_NODES is {value}, but METALOOM_RENDEZVOUS does not say where the other "
            "hosts find this one. Set it to <this host's address>:<a free port>, and on each "
            "other host run `metaloom join` with the same."
        )
    rendezvous = parse_endpoint(place) if place else free_endpoint()
    return Hosts(least or most, most, rendezvous)


def shared_out(job: Job, hosts: Hosts) -> Job:
    """The job with no more workers here than leave work for every other host.

    Raises:
        ConfigError: the workers or hosts that were asked for leave some without any.
    """
    most = job.most_workers
    if most is None or hosts.most == 1:
        return job
    here = job.num_workers
    if not os.environ.get("METALOOM_NUM_WORKERS"):
        here = max(1, min(here, most // hosts.most))
    if here + hosts.most - 1 > most:
        raise ConfigError(
            f"{here} workers on this host leave some of the {hosts.most} hosts that METALOOM_NODES "
            f"allows without any: there is work for {most} in all. Lower METALOOM_NUM_WORKERS or "
            "METALOOM_NODES, or raise num_groups (which changes the run)."
        )
    return job._replace(num_workers=here)


def workers_left(job: Job, hosts: Hosts) -> int:
    """How many workers each host that joins may bring."""
    if job.most_workers is None:
        return MANY
    return (job.most_workers - job.num_workers) // (hosts.most - 1)


def start_agent(
    job: Job, folder: Path, hosts: Hosts, run: str, *, is_main: bool
) -> subprocess.Popen[bytes]:
    """Begin to serve a run on this host.

    Args:
        is_main: this is the driver's host, which holds the rendezvous.
    """
    local = interface_towards(hosts.rendezvous, listening=is_main)
    restarts = MANY if job.max_restarts or not is_main else 0
    others = ",".join(f"{rank}:3" for rank in range(0 if not is_main else 1, job.num_workers))
    conf = f"is_host={int(is_main)},last_call_timeout={_LAST_CALL_SECONDS},keep_alive_interval=2"
    options = {
        "nnodes": f"{hosts.least}:{hosts.most}",
        "nproc-per-node": str(job.num_workers),
        "rdzv-backend": "c10d",
        "rdzv-endpoint": str(hosts.rendezvous),
        "rdzv-id": run,
        "rdzv-conf": conf,
        "max-restarts": str(restarts),
        "monitor-interval": "0.1",
        "local-addr": local.address,
        "log-dir": str(folder / "logs"),
        **({"redirects": others} if others else {}),
    }
    command = [sys.executable, "-m", "pipeline.launch.torchrun_agent", str(folder / AGENT_LOG)]
    command += [f"--{name}={value}" for name, value in options.items()]
    command += ["--module", "pipeline.launch.worker", *worker_arguments(job, folder)]
    environment = {
        **os.environ,
        **WORKER_ENVIRONMENT,
        PARENT: str(os.getpid()),
        "METALOOM_MAIN_HOST": str(int(is_main)),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(int(STOP_SECONDS)),
        # With it, a host that comes later waits for an address that nobody tells it (torch 2.13).
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", local.interface),
    }
    return subprocess.Popen(command, env=environment, start_new_session=True)


def end_agent(agent: subprocess.Popen[bytes]) -> None:
    """At once, and its workers with it: a checkpoint is whole at any moment."""
    if agent.poll() is None:
        agent.kill()
    agent.wait()
    end_workers_of(agent.pid)
