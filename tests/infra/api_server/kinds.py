"""The resources that this server serves."""

from __future__ import annotations

from typing import NamedTuple


class Resource(NamedTuple):
    """One row of the discovery documents."""

    group: str
    version: str
    plural: str
    kind: str
    namespaced: bool = True
    has_status: bool = False

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def qualified(self) -> str:
        """As messages name it: `jobs.batch`, `pods`."""
        return f"{self.plural}.{self.group}" if self.group else self.plural

    @property
    def qualified_kind(self) -> str:
        return f"{self.kind}.{self.group}" if self.group else self.kind


BUILT_IN = [
    Resource("", "v1", "namespaces", "Namespace", namespaced=False, has_status=True),
    Resource("", "v1", "nodes", "Node", namespaced=False, has_status=True),
    Resource("", "v1", "pods", "Pod", has_status=True),
    Resource("", "v1", "events", "Event"),
    Resource("", "v1", "secrets", "Secret"),
    Resource("", "v1", "configmaps", "ConfigMap"),
    Resource("", "v1", "serviceaccounts", "ServiceAccount"),
    Resource("", "v1", "persistentvolumeclaims", "PersistentVolumeClaim", has_status=True),
    Resource("", "v1", "resourcequotas", "ResourceQuota", has_status=True),
    Resource("batch", "v1", "jobs", "Job", has_status=True),
    Resource("batch", "v1", "cronjobs", "CronJob", has_status=True),
    Resource("coordination.k8s.io", "v1", "leases", "Lease"),
    Resource(
        "authorization.k8s.io",
        "v1",
        "selfsubjectaccessreviews",
        "SelfSubjectAccessReview",
        namespaced=False,
    ),
    Resource(
        "apiextensions.k8s.io",
        "v1",
        "customresourcedefinitions",
        "CustomResourceDefinition",
        namespaced=False,
    ),
]
CUSTOM = [
    Resource("ray.io", "v1", "rayjobs", "RayJob", has_status=True),
    Resource("ray.io", "v1", "rayclusters", "RayCluster", has_status=True),
    Resource("kueue.x-k8s.io", "v1beta1", "localqueues", "LocalQueue", has_status=True),
    Resource("kueue.x-k8s.io", "v1beta1", "workloads", "Workload", has_status=True),
]
