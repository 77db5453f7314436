"""Kueue: the queue is there, takes such jobs, and has room for one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from infra.manifests.documents import (
    Document,
    Documents,
    Finding,
    find,
    look,
    mapping,
    named,
    namespace,
    of_kind,
    title,
)
from infra.manifests.pods import RAY_CLUSTERS
from infra.manifests.rules.quantities import amount

QUEUE = "metaloom.dev/queue"
_LABEL = "kueue.x-k8s.io/queue-name"
_MOST_GROUPS = 7


def queue_links(documents: Documents) -> list[Finding]:
    """A template's queue, that one's ClusterQueue, and its flavours are there."""
    found = []
    for one in of_kind(documents, "RayJob"):
        queue = mapping(look(one, "metadata.annotations")).get(QUEUE)
        if queue is not None and named(documents, "LocalQueue", queue, namespace(one)) is None:
            found.append(_missing(f"{title(one)}: metadata.annotations", "LocalQueue", queue))
        if queue is not None and _LABEL in mapping(look(one, "metadata.labels")):
            what = f"the template has the label {_LABEL}, so Kueue would run it"
            found.append(Finding(title(one), what, f"Use the annotation {QUEUE}."))
    for one in of_kind(documents, "LocalQueue"):
        name = look(one, "spec.clusterQueue")
        cluster_queue = named(documents, "ClusterQueue", str(name))
        if cluster_queue is None:
            found.append(_missing(f"{title(one)}: spec.clusterQueue", "ClusterQueue", name))
        elif not _takes(cluster_queue, namespace(one)):
            what = f"it takes no jobs of the namespace {namespace(one)}"
            mend = "Correct spec.namespaceSelector."
            found.append(Finding(title(cluster_queue), what, mend))
    for one in of_kind(documents, "ClusterQueue"):
        for place in find(one, "spec.resourceGroups[].flavors[].name"):
            if named(documents, "ResourceFlavor", place.value) is None:
                found.append(
                    _missing(f"{title(one)}: {place.where}", "ResourceFlavor", place.value)
                )
    return found


def _missing(where: str, kind: str, name: Any) -> Finding:
    return Finding(where, f"there is no {kind} {name!r}", "Add it, or correct the name.")


def _takes(cluster_queue: Document, space: str) -> bool:
    selector = look(cluster_queue, "spec.namespaceSelector")
    wanted = mapping(look(selector, "matchLabels"))
    return selector is not None and wanted.get("kubernetes.io/metadata.name", space) == space


def queued_jobs(documents: Documents) -> list[Finding]:
    """Kueue admits a RayJob only if its pods can be counted beforehand."""
    found = []
    for one in _queued(documents):
        cluster = mapping(look(one, RAY_CLUSTERS["RayJob"]))
        groups = find(cluster, "workerGroupSpecs[]")
        checks = (
            (
                cluster.get("enableInTreeAutoscaling"),
                "Kueue refuses Ray's autoscaler",
                "Set enableInTreeAutoscaling: false.",
            ),
            (
                look(one, "spec.shutdownAfterJobFinishes") is not True,
                "the cluster would keep its quota",
                "Set shutdownAfterJobFinishes.",
            ),
            (
                len(groups) > _MOST_GROUPS,
                f"Kueue takes {_MOST_GROUPS} groups of workers",
                "Use fewer.",
            ),
            (
                any(g.value.get("groupName") == "head" for g in groups),
                "a group is called head, as Kueue calls the head",
                "Rename it.",
            ),
            (
                any(g.value.get("replicas") != g.value.get("maxReplicas") for g in groups),
                "without an autoscaler replicas is all that there will ever be",
                "Set minReplicas and maxReplicas to replicas.",
            ),
        )
        found += [Finding(title(one), what, mend) for wrong, what, mend in checks if wrong]
    return found


def quotas(documents: Documents) -> list[Finding]:
    """The queue covers what a job's pods ask for, and has room for one job."""
    found = []
    for one in _queued(documents):
        queue = named(
            documents, "LocalQueue", look(one, "metadata.annotations")[QUEUE], namespace(one)
        )
        cluster_queue = named(documents, "ClusterQueue", str(look(queue, "spec.clusterQueue")))
        if cluster_queue is None:
            continue
        room: Counter[str] = Counter()
        for place in find(cluster_queue, "spec.resourceGroups[].flavors[].resources[]"):
            room[str(place.value.get("name"))] += amount(place.value.get("nominalQuota")) or 0  # type: ignore[assignment]
        for name, needed in asked(one).items():
            if name not in room:
                what = f"{name} is in no quota, so a job that asks for it waits for ever"
                found.append(Finding(title(cluster_queue), what, "Add it to coveredResources."))
            elif needed > room[name]:
                what = f"a job asks for {needed} {name}, and the quota is {room[name]}"
                found.append(
                    Finding(title(cluster_queue), what, "Raise the quota, or ask for less.")
                )
    return found


def asked(job: Document) -> Mapping[str, Decimal]:
    """What all pods of a RayJob ask for together, with the submitter's."""
    whole: dict[str, Decimal] = {}
    cluster = look(job, RAY_CLUSTERS["RayJob"])
    pods = [(1, p.value) for p in find(job, "spec.submitterPodTemplate.spec")]
    pods += [(1, p.value) for p in find(cluster, "headGroupSpec.template.spec")]
    for group in find(cluster, "workerGroupSpecs[]"):
        number = int(group.value.get("replicas", 0))
        pods += [(number, p.value) for p in find(group.value, "template.spec")]
    for number, spec in pods:
        for place in find(spec, "containers[].resources.requests"):
            for name, value in place.value.items():
                whole[name] = whole.get(name, Decimal(0)) + number * (amount(value) or 0)
    return whole


def _queued(documents: Documents) -> list[Document]:
    return [
        one
        for one in of_kind(documents, "RayJob")
        if QUEUE in mapping(look(one, "metadata.annotations"))
    ]
