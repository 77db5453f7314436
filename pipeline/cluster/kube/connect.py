"""The way to a cluster: a kubeconfig, or the service account of the pod that we are in."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from pipeline.cluster.kube.api import Kube
from pipeline.cluster.kube.kinds import NAMESPACE
from pipeline.core.errors import ConfigError, MachineError

_MOUNTED_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_ONE_COMMAND_SECONDS = 10.0


def connect(
    namespace: str | None = None,
    context: str | None = None,
    *,
    patience_seconds: float | None = None,
) -> Kube:
    """Nothing is asked of the cluster yet.

    Args:
        namespace: None: the context's own, or that of our pod, or `metaloom`.
        context: of the kubeconfig; None: its current one.
        patience_seconds: how long a request is tried again; None: 10.

    Raises:
        MachineError: the `kubernetes` package is missing, or nothing says where the cluster is.
        ConfigError: the kubeconfig cannot be read, or has no such context.
    """
    if importlib.util.find_spec("kubernetes") is None:
        raise MachineError(
            "the `kubernetes` package is not installed. Install it: "
            "pip install 'metaloom[kubernetes]'."
        )
    if in_cluster() and context is None:
        configuration, found = _from_pod()
    else:
        configuration, found = _from_kubeconfig(context)
    from kubernetes import client

    configuration.retries = False  # ours know which failures are worth another try
    patience = _ONE_COMMAND_SECONDS if patience_seconds is None else patience_seconds
    return Kube(client.ApiClient(configuration), namespace or found or NAMESPACE, patience)


def in_cluster() -> bool:
    """Whether this is a pod with a service account, and no kubeconfig says otherwise."""
    inside = bool(os.environ.get("KUBERNETES_SERVICE_HOST"))
    return inside and not os.environ.get("KUBECONFIG") and _MOUNTED_NAMESPACE.exists()


def _from_pod() -> tuple[Any, str]:
    from kubernetes import client, config

    configuration = client.Configuration()
    config.load_incluster_config(client_configuration=configuration)
    return configuration, _MOUNTED_NAMESPACE.read_text().strip()


def _from_kubeconfig(context: str | None) -> tuple[Any, str]:
    import yaml
    from kubernetes import client, config

    files = os.environ.get("KUBECONFIG") or str(Path.home() / ".kube" / "config")
    # Given outright: the package looks at the variable once, when it is imported.
    there = os.pathsep.join(n for n in files.split(os.pathsep) if n and Path(n).is_file())
    if not there:
        raise MachineError(
            f"there is no kubeconfig ({files}), and this is no pod with a service account. Get one "
            "from whoever runs the cluster and set KUBECONFIG to its path."
        )
    configuration = client.Configuration()
    try:
        config.load_kube_config(there, context, client_configuration=configuration)
        known, current = config.list_kube_config_contexts(there)
    except (config.ConfigException, yaml.YAMLError, OSError, ValueError) as error:
        said = " ".join(str(error).split())[:300].rstrip(".")
        raise ConfigError(
            f"the kubeconfig {files} cannot be used: {said}. See `kubectl config get-contexts`."
        ) from None
    chosen = current if context is None else next(c for c in known if c["name"] == context)
    return configuration, str((chosen.get("context") or {}).get("namespace") or "")
