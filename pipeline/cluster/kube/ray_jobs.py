"""RayJobs made from the suspended one of the manifests."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from pipeline.cluster.kube.api import Kube
from pipeline.cluster.kube.errors import ApiError, ExistsError, MissingError
from pipeline.cluster.kube.kinds import (
    COMPONENT,
    PODS,
    QUEUE_LABEL,
    QUEUE_NOTE,
    RAY_JOBS,
    TRAIN,
)
from pipeline.cluster.kube.runs import events_of
from pipeline.cluster.kube.trouble import pod_trouble
from pipeline.core.errors import MachineError

_ENDED = ("Complete", "Failed", "ValidationFailed")


def ray_job_name(digest: str) -> str:
    """Of the RayJob for a job: a driver that comes again finds it."""
    return f"metaloom-{digest[:10]}"


def ray_job_of(
    template: Mapping[str, Any],
    name: str,
    *,
    entrypoint: str,
    environment: Mapping[str, str],
    code: str,
) -> dict[str, Any]:
    """A RayJob that runs, out of the template, which is suspended.

    Where the template names a queue, Kueue decides when it runs: it stays suspended until then.

    Args:
        environment: of all containers of head and workers.
        code: the folder that Python takes code from, once the init containers have brought it.
    """
    spec = copy.deepcopy(dict(template["spec"]))
    spec["entrypoint"] = entrypoint
    metadata = template["metadata"]
    labels = {**(metadata.get("labels") or {}), COMPONENT: "train"}
    queue = (metadata.get("annotations") or {}).get(QUEUE_NOTE)
    spec.pop("suspend", None)
    if queue:
        spec["suspend"] = True
        labels[QUEUE_LABEL] = queue
    cluster = spec["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])):
        pod = group["template"]["spec"]
        for container in pod.get("initContainers", []):
            _set_environment(container, environment)
        for container in pod["containers"]:
            _set_environment(container, {**environment, "PYTHONPATH": code})
    return {
        "apiVersion": RAY_JOBS.api_version,
        "kind": RAY_JOBS.kind,
        "metadata": {"name": name, "labels": labels},
        "spec": spec,
    }


def _set_environment(container: dict[str, Any], environment: Mapping[str, str]) -> None:
    others = [entry for entry in container.get("env", []) if entry["name"] not in environment]
    container["env"] = [*others, *({"name": k, "value": v} for k, v in environment.items())]


def template_ray_job(kube: Kube) -> dict[str, Any]:
    """The suspended RayJob of the manifests.

    Raises:
        MachineError: it is not there.
    """
    try:
        return kube.get(RAY_JOBS, TRAIN)
    except MissingError:
        raise MachineError(
            f"there is no RayJob {TRAIN} in namespace {kube.namespace}, of which training jobs are "
            "made. Apply the manifests: kubectl apply -k infra/kubernetes/overlays/gpu"
        ) from None


def start_ray_job(kube: Kube, item: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Make it; or find the one of its name. Returns it, and whether it is new."""
    try:
        return kube.create(RAY_JOBS, item), True
    except ExistsError:
        return kube.get(RAY_JOBS, item["metadata"]["name"]), False


def delete_ray_job(kube: Kube, item: Mapping[str, Any]) -> None:
    """Delete this very RayJob, with its cluster; one that is gone is fine."""
    try:
        kube.delete(RAY_JOBS, item["metadata"]["name"], uid=item["metadata"]["uid"])
    except MissingError:
        return


def has_ended(item: Mapping[str, Any]) -> bool:
    """KubeRay has given it up, or is done with it."""
    return (item.get("status") or {}).get("jobDeploymentStatus") in _ENDED


def is_queued(item: Mapping[str, Any]) -> bool:
    """It waits for Kueue."""
    return bool(item["spec"].get("suspend"))


def describe_end(kube: Kube, item: Mapping[str, Any]) -> str:
    """How it ended, in KubeRay's words and its pods'."""
    status = item.get("status") or {}
    words = status.get("message") or status.get("jobStatus") or status.get("jobDeploymentStatus")
    reason = status.get("reason")
    told = f"{reason}: {words}" if reason else str(words)
    trouble = ray_trouble(kube, item)
    return f"{told}; {trouble}" if trouble else told


def ray_trouble(kube: Kube, item: Mapping[str, Any]) -> str | None:
    """What keeps its pods from running; None if nothing does, or we may not look."""
    cluster = (item.get("status") or {}).get("rayClusterName")
    if not cluster:
        return None
    try:
        pods = kube.select(PODS, labels=f"ray.io/cluster={cluster}")
    except ApiError:
        return None
    for pod in sorted(pods, key=lambda pod: str(pod["metadata"]["name"])):
        if trouble := pod_trouble(pod, events_of(kube, pod["metadata"]["name"], "Pod")):
            return f"pod {pod['metadata']['name']}: {trouble}"
    return None
