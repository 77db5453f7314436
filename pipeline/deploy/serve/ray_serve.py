"""The service on a Ray cluster: the same application in every replica, behind Ray Serve's proxies.

Replicas share the database of learners and keys; each follows the aliases itself. There is nothing
for Ray's own multiplexing to do: a replica holds what learners are pinned to beside what serves.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from pipeline.core.errors import MachineError
from pipeline.core.ray_cluster import ray_cluster
from pipeline.deploy.serve.settings import ServeSettings

NAME = "metaloom"
_GRACE_SECONDS = 20.0
_WAITING = 64
"""Requests that wait at a proxy while all replicas are full; what is over gets 503 at once."""
_BUSY_REQUESTS = 4.0
"""In work at a replica, on average: with more, another one is started."""
_TRACKING = "MLFLOW_TRACKING_URI"


class Replicas(NamedTuple):
    """How many there are: as many as the load asks for, between these."""

    least: int
    most: int


def serve_on_ray(
    model: str, settings: ServeSettings, host: str, port: int, replicas: Replicas
) -> None:
    """Serve on the cluster of RAY_ADDRESS, or on this machine, until SIGTERM or Ctrl-C.

    Raises:
        MachineError: Ray is not installed, there is no such cluster, or no replica could start.
    """
    ended = threading.Event()
    with ray_cluster(show_workers=False):
        for number in (signal.SIGTERM, signal.SIGINT):  # now, for Ray sets its own when it begins
            signal.signal(number, lambda *_: ended.set())
        with deployed(model, settings, host, port, replicas):
            many = f"{replicas.least} to {replicas.most} replicas"
            print(f"{model} on http://{host}:{port}/ ({many}; Ctrl-C ends)", flush=True)
            ended.wait()


@contextmanager
def deployed(
    model: str, settings: ServeSettings, host: str, port: int, replicas: Replicas
) -> Iterator[None]:
    """The application runs on the connected cluster; it is removed afterwards, its work done."""
    from ray import serve

    serve.start(
        proxy_location="EveryNode",
        http_options={
            "host": host,
            "port": port,
            "request_timeout_s": settings.rates.answer_seconds + settings.rates.body_seconds,
        },
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
    )
    try:
        serve.run(bound_application(model, settings, replicas), name=NAME, route_prefix="/")
    except RuntimeError as error:
        serve.shutdown()
        raise MachineError(
            f"no replica could start: {str(error).splitlines()[0][:300]}. Ray's dashboard shows "
            "their logs; every node needs this code, and the folder that this command runs in."
        ) from None
    try:
        yield
    finally:
        serve.shutdown()


def bound_application(model: str, settings: ServeSettings, replicas: Replicas) -> Any:
    """What `serve.run`, or a RayService, deploys."""
    from ray import serve

    ingress = serve.ingress(_builder(model, settings, Path.cwd()))(Health)
    made = serve.deployment(
        ingress,
        name=NAME,
        ray_actor_options={
            "num_cpus": settings.threads * settings.passes,
            "runtime_env": _environment(),
        },
        autoscaling_config={
            "min_replicas": replicas.least,
            "initial_replicas": replicas.least,
            "max_replicas": replicas.most,
            "target_ongoing_requests": _BUSY_REQUESTS,
        },
        max_ongoing_requests=settings.rates.waiting,
        max_queued_requests=_WAITING,
        graceful_shutdown_timeout_s=_GRACE_SECONDS,
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
    )
    return made.bind()


def _environment() -> dict[str, Any]:
    """What replicas need of ours. Ray shows it in its state, so no password is in it: those are to
    be in the nodes' own environment."""
    uri = os.environ.get(_TRACKING, "")
    return {"env_vars": {_TRACKING: uri}} if uri and not urlsplit(uri).password else {}


def _builder(model: str, settings: ServeSettings, root: Path) -> Callable[[], Any]:
    """Makes the application in a replica, with its model loaded."""
    told = settings.model_dump_json()

    def build() -> Any:
        from pipeline.deploy.serve import ray_serve

        return ray_serve.application_of(model, told, root)

    return build


def application_of(model: str, told: str, root: Path) -> Any:
    """What a replica runs.

    Raises:
        MachineError: this node does not see the folder that the service was started in.
    """
    from pipeline.deploy.serve.app import build_app
    from pipeline.deploy.serve.sources import source_of

    if not root.is_dir():
        raise MachineError(f"this node does not see {root}, where the service was started.")
    os.chdir(root)
    app, service = build_app(source_of(model, root), ServeSettings.model_validate_json(told))
    Health.desk = service.desk
    service.fleet.look()  # requests come as soon as this returns
    return app


class Health:
    """Whether a replica works: Ray asks, and replaces one that does not."""

    desk: Any = None

    def check_health(self) -> None:
        """Raises RuntimeError where a thread that runs the network has ended, or hangs."""
        if (trouble := self.desk.trouble) is not None:
            raise RuntimeError(trouble)
