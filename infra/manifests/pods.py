"""Every pod that the documents lead to, wherever its template is, as it will run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from infra.manifests.documents import (
    Document,
    Documents,
    Place,
    find,
    look,
    mapping,
    namespace,
    of_kind,
    sequence,
    title,
)

RAY_CLUSTERS = {
    "RayJob": "spec.rayClusterSpec",
    "RayService": "spec.rayClusterConfig",
    "RayCluster": "spec",
}
_TEMPLATES = {
    "Deployment": "spec.template",
    "StatefulSet": "spec.template",
    "DaemonSet": "spec.template",
    "ReplicaSet": "spec.template",
    "Job": "spec.template",
    "CronJob": "spec.jobTemplate.spec.template",
}
ELSEWHERE: Sequence[Mapping[str, str]] = ({"app.kubernetes.io/component": "mlflow"},)
"""Labels of pods that others bring into the namespace: MLflow's, by its Helm chart."""


@dataclass(frozen=True)
class Pod:
    """One template."""

    where: str
    owner: Document
    labels: Mapping[str, Any]
    spec: Mapping[str, Any]
    containers: tuple[Place, ...]
    """Those that run, then those that run before them; Ray's autoscaler too, which KubeRay adds."""

    @property
    def namespace(self) -> str:
        """The owner's."""
        return namespace(self.owner)

    @property
    def kind(self) -> str:
        """The owner's."""
        return str(self.owner.get("kind"))

    @property
    def ports(self) -> list[Mapping[str, Any]]:
        """Of all containers."""
        return [mapping(port) for c in self.containers for port in sequence(look(c.value, "ports"))]

    def listens(self, port: Any) -> bool:
        """Whether a container has such a port, by its name or number."""
        field = "name" if isinstance(port, str) else "containerPort"
        return any(one.get(field) == port for one in self.ports)


def pods(documents: Documents) -> list[Pod]:
    """Of all documents."""
    found = []
    for one in documents:
        kind = str(one.get("kind"))
        if kind == "Pod":
            found.append(_pod(one, Place("", one)))
        for place in find(one, _TEMPLATES.get(kind, "?")):
            found.append(_pod(one, place))
        if kind == "RayJob":
            found += [_pod(one, place) for place in find(one, "spec.submitterPodTemplate")]
        for cluster in find(one, RAY_CLUSTERS.get(kind, "?")):
            found += _ray_pods(one, cluster)
    return found


def ray_clusters(documents: Documents) -> list[tuple[Document, Place]]:
    """Every specification of a Ray cluster, with its document."""
    return [
        (one, Place(f"{title(one)}: {place.where}", place.value))
        for one in of_kind(documents, *RAY_CLUSTERS)
        for place in find(one, RAY_CLUSTERS[str(one["kind"])])
    ]


def _ray_pods(document: Document, cluster: Place) -> list[Pod]:
    found = []
    for head in find(cluster.value, "headGroupSpec.template", cluster.where):
        extra = {"ray.io/node-type": "head", "ray.io/is-ray-node": "yes"}
        found.append(_pod(document, head, extra, _autoscaler(cluster, head)))
    for worker in find(cluster.value, "workerGroupSpecs[].template", cluster.where):
        found.append(
            _pod(document, worker, {"ray.io/node-type": "worker", "ray.io/is-ray-node": "yes"})
        )
    return found


def _autoscaler(cluster: Place, head: Place) -> tuple[Place, ...]:
    """What KubeRay puts beside the head, with the head's image unless told another."""
    if look(cluster.value, "enableInTreeAutoscaling") is not True:
        return ()
    options = mapping(look(cluster.value, "autoscalerOptions"))
    image = look(head.value, "spec.containers[].image")
    return (
        Place(
            f"{cluster.where}.autoscalerOptions", {"name": "autoscaler", "image": image, **options}
        ),
    )


def _pod(
    document: Document,
    template: Place,
    labels: Mapping[str, str] | None = None,
    more: tuple[Place, ...] = (),
) -> Pod:
    spec = mapping(look(template.value, "spec"))
    at = f"{template.where}.spec" if template.where else "spec"
    containers = [*find(spec, "containers[]", at), *more, *find(spec, "initContainers[]", at)]
    return Pod(
        where=f"{title(document)}: {at}",
        owner=document,
        labels={**mapping(look(template.value, "metadata.labels")), **(labels or {})},
        spec=spec,
        containers=tuple(
            Place(f"{title(document)}: {c.where}", mapping(c.value)) for c in containers
        ),
    )


def matches(selector: Any, labels: Mapping[str, Any]) -> bool:
    """Whether a label selector (matchLabels, matchExpressions) takes a pod with such labels."""
    wanted = mapping(look(selector, "matchLabels", {}))
    if any(labels.get(key) != value for key, value in wanted.items()):
        return False
    return all(_holds(mapping(one), labels) for one in sequence(look(selector, "matchExpressions")))


def _holds(expression: Mapping[str, Any], labels: Mapping[str, Any]) -> bool:
    key, values = expression.get("key"), sequence(expression.get("values"))
    value = labels.get(str(key))
    match expression.get("operator"):
        case "In":
            return value in values
        case "NotIn":
            return value not in values
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None
    return False


def environment(container: Mapping[str, Any], documents: Documents, space: str) -> dict[str, str]:
    """Names and literal values that a container sees; "" for what comes from elsewhere."""
    seen: dict[str, str] = {}
    for name in (p.value for p in find(container, "envFrom[].configMapRef.name")):
        for config in of_kind(documents, "ConfigMap"):
            if look(config, "metadata.name") == name and namespace(config) == space:
                seen |= {str(k): str(v) for k, v in mapping(config.get("data")).items()}
    for one in sequence(container.get("env")):
        seen[str(mapping(one).get("name"))] = str(mapping(one).get("value") or "")
    return seen
