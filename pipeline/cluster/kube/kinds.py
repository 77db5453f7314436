"""The kinds of objects that are read or written, and the names that the manifests give them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

Object = Mapping[str, Any]
"""One Kubernetes object, as the API server sends it."""


class Kind(NamedTuple):
    """One resource of the API."""

    group: str
    version: str
    plural: str
    kind: str
    namespaced: bool = True

    @property
    def api_version(self) -> str:
        """As in a manifest: `batch/v1`."""
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def qualified(self) -> str:
        """As kubectl takes it: `jobs.batch`."""
        return f"{self.plural}.{self.group}" if self.group else self.plural

    def path(self, namespace: str, name: str = "", subresource: str = "") -> str:
        """Where it is on an API server."""
        root = f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"
        space = f"/namespaces/{namespace}" if self.namespaced else ""
        tail = "".join(f"/{part}" for part in (name, subresource) if part)
        return f"{root}{space}/{self.plural}{tail}"


JOBS = Kind("batch", "v1", "jobs", "Job")
CRON_JOBS = Kind("batch", "v1", "cronjobs", "CronJob")
PODS = Kind("", "v1", "pods", "Pod")
EVENTS = Kind("", "v1", "events", "Event")
SECRETS = Kind("", "v1", "secrets", "Secret")
CONFIG_MAPS = Kind("", "v1", "configmaps", "ConfigMap")
SERVICE_ACCOUNTS = Kind("", "v1", "serviceaccounts", "ServiceAccount")
CLAIMS = Kind("", "v1", "persistentvolumeclaims", "PersistentVolumeClaim")
NAMESPACES = Kind("", "v1", "namespaces", "Namespace", namespaced=False)
NODES = Kind("", "v1", "nodes", "Node", namespaced=False)
LEASES = Kind("coordination.k8s.io", "v1", "leases", "Lease")
RAY_JOBS = Kind("ray.io", "v1", "rayjobs", "RayJob")
REVIEWS = Kind(
    "authorization.k8s.io",
    "v1",
    "selfsubjectaccessreviews",
    "SelfSubjectAccessReview",
    namespaced=False,
)

NAMESPACE = "metaloom"
RETRAIN = "metaloom-retrain"
"""The CronJob, the Lease and the ServiceAccount of retraining."""
TRAIN = "metaloom-train"
"""The suspended RayJob that runs of the `kubernetes` launcher are made of."""
CONTAINER = "driver"
COMPONENT = "app.kubernetes.io/component"
COMMIT_NOTE = "metaloom.dev/commit"
BECAUSE_NOTE = "metaloom.dev/because"
CANCELLED_NOTE = "metaloom.dev/cancelled"
PROGRESS_NOTE = "metaloom.dev/progress"
QUEUE_NOTE = "metaloom.dev/queue"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
GPU = "nvidia.com/gpu"
"""The resource that nodes count GPUs by."""
