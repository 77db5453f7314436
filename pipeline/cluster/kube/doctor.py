"""What a cluster has and lacks for retraining: one finding a line, each with its remedy."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.cluster.kube.api import Kube
from pipeline.cluster.kube.errors import ApiError, MissingError, install_hint
from pipeline.cluster.kube.kinds import (
    CONFIG_MAPS,
    CRON_JOBS,
    EVENTS,
    GPU,
    JOBS,
    LEASES,
    NAMESPACES,
    NODES,
    PODS,
    QUEUE_NOTE,
    RAY_JOBS,
    RETRAIN,
    TRAIN,
    Kind,
)
from pipeline.cluster.kube.lease import holder_of
from pipeline.cluster.kube.references import Finding, check_references, having, images

_OLDEST = (1, 32)
"""What the manifests are checked against; docs/kubernetes.md says so too."""
_PLACEHOLDER = "https://git.example.org/team/metaloom.git"
"""What infra/kubernetes/base/settings.yaml names as the repository."""
_APPLY = "kubectl apply -k infra/kubernetes/overlays/gpu"
NEEDS: tuple[tuple[Kind, str, tuple[str, ...]], ...] = (
    (JOBS, "", ("get", "list", "watch", "create", "patch", "delete")),
    (CRON_JOBS, "", ("get", "patch")),
    (PODS, "", ("get", "list", "watch")),
    (PODS, "log", ("get",)),
    (EVENTS, "", ("list",)),
    (LEASES, "", ("get",)),
    (RAY_JOBS, "", ("get", "list", "watch")),
)
"""What the commands of `metaloom cluster` do."""


def examine(kube: Kube) -> list[Finding]:
    """All findings, from the outside in; where the server does not answer, that alone.

    Raises:
        ApiError: the API server does not answer, or not to us.
    """
    findings = [_version(kube)]
    findings += _namespace(kube)
    findings += _permissions(kube)
    cron = _look(kube, CRON_JOBS, RETRAIN)
    findings.append(_template("CronJob", RETRAIN, cron))
    train = None
    if cron is None or _trains_in_ray_jobs(cron):
        findings += _resources(kube)
        if findings[-1].ok:
            train = _look(kube, RAY_JOBS, TRAIN)
            findings.append(_template("RayJob", TRAIN, train))
    for item in (cron, train):
        findings += check_references(kube, item, _APPLY) if item else []
    findings += _storage(kube)
    findings += _gpus(kube, train)
    findings += _queue(kube, train)
    findings.append(_flight(kube))
    return list(dict.fromkeys(findings))


def _trains_in_ray_jobs(cron: Mapping[str, Any]) -> bool:
    """Unless the driver trains in its own pod, as in the overlay `minimal`."""
    told = [e for c in having(cron, "env") for e in c["env"] if e["name"] == "METALOOM_LAUNCHER"]
    return any(entry.get("value") == "kubernetes" for entry in told)


def _look(kube: Kube, kind: Kind, name: str) -> dict[str, Any] | None:
    try:
        return kube.get(kind, name)
    except ApiError as error:
        if error.code in (403, 404):
            return None
        raise


def _version(kube: Kube) -> Finding:
    told = kube.ask("/version")
    found = tuple(int(re.sub(r"\D", "", told.get(k, "")) or 0) for k in ("major", "minor"))
    text = f"{told.get('gitVersion', 'unknown')} at {kube.client.configuration.host}"
    if found < _OLDEST:
        return Finding(False, "Kubernetes", text, "1.32 or later is needed; update the cluster")
    return Finding(True, "Kubernetes", text)


def _namespace(kube: Kube) -> Iterator[Finding]:
    try:
        kube.get(NAMESPACES, kube.namespace)
    except MissingError:
        yield Finding(False, "namespace", f"{kube.namespace} does not exist", _APPLY)
    except ApiError:
        yield Finding(True, "namespace", f"{kube.namespace} (we may not look whether it exists)")
    else:
        yield Finding(True, "namespace", kube.namespace)


def _permissions(kube: Kube) -> Iterator[Finding]:
    missing = []
    for kind, subresource, verbs in NEEDS:
        what = kind.qualified + (f"/{subresource}" if subresource else "")
        lacking = [verb for verb in verbs if not kube.allowed(verb, kind, subresource)]
        if lacking:
            missing.append(f"{', '.join(lacking)} {what}")
    if missing:
        mend = "have a Role with these bound to you (docs/kubernetes.md, The client)"
        yield Finding(False, "permissions", f"not allowed: {'; '.join(missing)}", mend)
    else:
        yield Finding(True, "permissions", f"all that the client does in {kube.namespace}")


def _template(kind: str, name: str, item: Mapping[str, Any] | None) -> Finding:
    if item is None:
        return Finding(False, kind, f"{name} is missing, or we may not read it", _APPLY)
    zeros = [image for image in images(item) if image.endswith("0" * 64)]
    if zeros:
        mend = "set your image's digest under images: in your overlay (docs/kubernetes-pods.md)"
        return Finding(False, kind, f"{name}: {zeros[0][:50]} is the placeholder image", mend)
    state = ""
    if kind == "CronJob":
        spec = item["spec"]
        when = f"{spec['schedule']} {spec.get('timeZone') or 'UTC'}"
        state = (
            ", not scheduled (metaloom cluster schedule)" if spec.get("suspend") else f", {when}"
        )
    return Finding(True, kind, f"{name}{state}")


def _resources(kube: Kube) -> Iterator[Finding]:
    known = kube.ask(f"/apis/{RAY_JOBS.api_version}").get("resources", [])
    if any(row["name"] == RAY_JOBS.plural for row in known):
        yield Finding(True, "KubeRay", f"{RAY_JOBS.qualified} {RAY_JOBS.version}")
    else:
        text = f"the cluster does not know {RAY_JOBS.qualified} {RAY_JOBS.version}"
        yield Finding(False, "KubeRay", text, install_hint(RAY_JOBS))


def _storage(kube: Kube) -> Iterator[Finding]:
    try:
        settings = kube.get(CONFIG_MAPS, "metaloom-settings").get("data") or {}
    except ApiError:
        return
    where = settings.get("METALOOM_STORAGE", "")
    if not where.startswith(("s3://", "file://")):
        text = f"METALOOM_STORAGE is {where!r}"
        yield Finding(False, "storage", text, "set it to s3://bucket/path in metaloom-settings")
    elif settings.get("METALOOM_REPOSITORY", "") in ("", _PLACEHOLDER):
        text = f"METALOOM_REPOSITORY is {settings.get('METALOOM_REPOSITORY')!r}"
        yield Finding(False, "repository", text, "set it in metaloom-settings (your overlay)")
        yield Finding(True, "storage", where)
    else:
        yield Finding(True, "storage", where)


def _gpus(kube: Kube, train: Mapping[str, Any] | None) -> Iterator[Finding]:
    wanted = sum(
        int(group.get("minReplicas") or group.get("replicas") or 1) * _limit(group)
        for group in ((train or {}).get("spec", {}).get("rayClusterSpec") or {}).get(
            "workerGroupSpecs", []
        )
    )
    try:
        nodes = kube.select(NODES)
    except ApiError as error:
        if error.code != 403:
            raise
        yield Finding(True, "GPUs", f"{wanted} needed (we may not look at the nodes)")
        return
    have = sum(int((n.get("status", {}).get("allocatable") or {}).get(GPU, 0)) for n in nodes)
    text = f"{have} on {len(nodes)} nodes, {wanted} needed at least"
    if have < wanted:
        mend = "add GPU nodes with NVIDIA's device plugin (an autoscaler may do so when a run asks)"
        yield Finding(False, "GPUs", text, mend)
    else:
        yield Finding(True, "GPUs", text)


def _limit(group: Mapping[str, Any]) -> int:
    containers = group["template"]["spec"]["containers"]
    limits = [(c.get("resources") or {}).get("limits") or {} for c in containers]
    return sum(int(limit.get(GPU, 0)) for limit in limits)


def _queue(kube: Kube, train: Mapping[str, Any] | None) -> Iterator[Finding]:
    name = ((train or {}).get("metadata", {}).get("annotations") or {}).get(QUEUE_NOTE)
    if not name:
        yield Finding(True, "queue", "none is used")
        return
    groups = kube.ask("/apis").get("groups", [])
    version = next(
        (g["preferredVersion"]["version"] for g in groups if g["name"] == "kueue.x-k8s.io"), None
    )
    queues = Kind("kueue.x-k8s.io", version or "v1beta2", "localqueues", "LocalQueue")
    if version is None:
        text = f"{TRAIN} is for the queue {name}, and the cluster has no Kueue"
        yield Finding(False, "queue", text, install_hint(queues))
        return
    queue = _look(kube, queues, name)
    if queue is None:
        mend = "kubectl apply -k infra/kubernetes/overlays/kueue"
        yield Finding(False, "queue", f"there is no LocalQueue {name}", mend)
        return
    status = queue.get("status") or {}
    active = [c for c in status.get("conditions", []) if c["type"] == "Active"]
    if active and active[0]["status"] != "True":
        text = f"{name} admits nothing: {active[0].get('message', '')}"
        yield Finding(False, "queue", text, "look at its ClusterQueue and ResourceFlavor")
        return
    yield Finding(True, "queue", f"{name}, {status.get('pendingWorkloads', 0)} waiting")


def _flight(kube: Kube) -> Finding:
    lease = _look(kube, LEASES, RETRAIN)
    holder = holder_of(lease) if lease else ""
    return Finding(True, "retraining", f"{holder} runs" if holder else "none runs")
