"""What KubeRay refuses when it is too late, and what makes a Ray cluster safe."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from infra.manifests.documents import (
    Documents,
    Finding,
    Place,
    find,
    look,
    mapping,
    of_kind,
    title,
)
from infra.manifests.pods import RAY_CLUSTERS, environment, ray_clusters

_OLDEST = (2, 56, 0)
"""Of Ray: those before have published holes through which data runs code."""


def ray_jobs(documents: Documents) -> list[Finding]:
    """RayJobs clean up after themselves, and their fields go together."""
    found = []
    for one in of_kind(documents, "RayJob"):
        spec = mapping(one.get("spec"))
        wrong = [*_ending(spec), *_submission(spec)]
        found += [Finding(f"{title(one)}: spec", what, mend) for what, mend in wrong]
    return found


def _ending(spec: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    shuts = spec.get("shutdownAfterJobFinishes") is True
    lives = spec.get("ttlSecondsAfterFinished")
    if lives and not shuts:
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes", "Set it to true."
    if spec.get("suspend") and not shuts:
        yield "suspend needs shutdownAfterJobFinishes", "Set it to true."
    if shuts and not lives:
        yield "without ttlSecondsAfterFinished its logs go at once", "Set 600 or so."
    if spec.get("clusterSelector") and spec.get("rayClusterSpec"):
        yield "it has a cluster of its own and selects another", "Drop clusterSelector."


def _submission(spec: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    mode = spec.get("submissionMode", "K8sJobMode")
    submitter = spec.get("submitterPodTemplate")
    if mode == "K8sJobMode" and not submitter:
        what = "KubeRay's own submitter pod is not `restricted`, and is refused"
        yield what, "Write submitterPodTemplate."
    if mode == "SidecarMode" and (submitter or spec.get("submitterConfig")):
        mend = "Drop submitterPodTemplate and submitterConfig."
        yield "SidecarMode knows no submitter pod", mend
    if mode == "InteractiveMode" and spec.get("backoffLimit"):
        yield "InteractiveMode knows no retries", "Drop backoffLimit."
    if mode != "InteractiveMode" and not str(spec.get("entrypoint") or "").strip():
        yield "it has no entrypoint", "Write one."
    if not isinstance(_yaml(spec.get("runtimeEnvYAML", "")), dict):
        yield "runtimeEnvYAML is no mapping in YAML", "Correct it."


def _yaml(text: Any) -> Any:
    try:
        return yaml.safe_load(str(text)) or {}
    except yaml.YAMLError:
        return None


def ray_clusters_closed(documents: Documents) -> list[Finding]:
    """A token is asked for, and Ray is new enough; KubeRay wants its version said then."""
    found = []
    for _, cluster in ray_clusters(documents):
        if look(cluster.value, "authOptions.mode") != "token":
            what = "whoever reaches this cluster runs code in it"
            found.append(Finding(f"{cluster.where}.authOptions", what, "Set mode: token."))
        if look(cluster.value, "authOptions.enableK8sTokenAuth"):
            what = "enableK8sTokenAuth does not go with RayJob and RayService"
            found.append(Finding(f"{cluster.where}.authOptions", what, "Drop it."))
        version = str(look(cluster.value, "rayVersion", ""))
        numbers = tuple(int(part) for part in version.split(".") if part.isdecimal())
        if len(numbers) != 3 or numbers < _OLDEST:
            what = f"Ray {version or '(not said)'} is too old, or no version"
            mend = f"Write that of the image, {'.'.join(map(str, _OLDEST))} or newer."
            found.append(Finding(f"{cluster.where}.rayVersion", what, mend))
    return found


def ray_groups(documents: Documents) -> list[Finding]:
    """The head does no work, groups have bounds, and the autoscaler's wishes are met."""
    found = []
    for _, cluster in ray_clusters(documents):
        scales = look(cluster.value, "enableInTreeAutoscaling") is True
        head = Place(f"{cluster.where}.headGroupSpec", look(cluster.value, "headGroupSpec"))
        groups = find(cluster.value, "workerGroupSpecs[]", cluster.where)
        if look(head.value, "rayStartParams.num-cpus") != "0":
            what = "workers may be placed on the head, and take it down with them"
            found.append(Finding(f"{head.where}.rayStartParams", what, 'Set num-cpus: "0".'))
        if len({str(g.value.get("groupName")) for g in groups}) != len(groups):
            found.append(Finding(cluster.where, "two groups have one name", "Rename one."))
        for group in (head, *groups):
            found += _group(group, scales)
        if not scales and look(cluster.value, "autoscalerOptions"):
            what = "autoscalerOptions are there, and no autoscaler"
            found.append(Finding(cluster.where, what, "Set enableInTreeAutoscaling, or drop them."))
        if scales and look(cluster.value, "autoscalerOptions.version") != "v2":
            what = "Ray's first autoscaler is on its way out"
            found.append(Finding(f"{cluster.where}.autoscalerOptions", what, "Set version: v2."))
    return found


def _group(group: Place, scales: bool) -> list[Finding]:
    found = []
    for key, value in mapping(look(group.value, "rayStartParams")).items():
        if not isinstance(value, str):
            found.append(
                Finding(f"{group.where}.rayStartParams.{key}", "it is no string", "Quote it.")
            )
    numbers = [look(group.value, f) for f in ("minReplicas", "replicas", "maxReplicas")]
    if None not in numbers and numbers != sorted(numbers):
        low, now, high = numbers
        what = f"minReplicas {low}, replicas {now}, maxReplicas {high}"
        found.append(Finding(group.where, what, "Put them in this order."))
    if scales and look(group.value, "template.spec.restartPolicy") != "Never":
        what = "the autoscaler replaces pods, so they must not restart themselves"
        found.append(Finding(f"{group.where}.template.spec", what, "Set restartPolicy: Never."))
    return found


def ray_workers(documents: Documents) -> list[Finding]:
    """Training asks for no more workers than there are places, and finds one when it begins.

    The launcher looks for GPUs then: without a worker it would find none, and train on CPUs.
    """
    found = []
    for one in of_kind(documents, "RayJob"):
        cluster = Place("spec.rayClusterSpec", look(one, RAY_CLUSTERS["RayJob"]))
        places = sum(int(p.value) for p in find(cluster.value, "workerGroupSpecs[].maxReplicas"))
        for head in find(cluster.value, "headGroupSpec.template.spec.containers[]", cluster.where):
            space = str(look(one, "metadata.namespace", ""))
            asked = environment(head.value, documents, space).get("METALOOM_NUM_WORKERS")
            least, _, most = (asked or "").partition(":")
            if not (asked and least.isdecimal() and int(most or least) <= places):
                what = f"METALOOM_NUM_WORKERS is {asked}, and there is room for {places} pods"
                mend = "Set it to `least:most`, with most no more than maxReplicas together."
                found.append(Finding(f"{title(one)}: {head.where}", what, mend))
        if not any(int(p.value) for p in find(cluster.value, "workerGroupSpecs[].minReplicas")):
            what = "no worker is there when training begins"
            found.append(Finding(f"{title(one)}: {cluster.where}", what, "Set minReplicas to 1."))
    return found


def serve_config(documents: Documents) -> list[Finding]:
    """What a RayService serves can be read and imported, and listens where its pods do."""
    found = []
    for one in of_kind(documents, "RayService"):
        where = f"{title(one)}: spec.serveConfigV2"
        config = mapping(_yaml(look(one, "spec.serveConfigV2", "")))
        applications = find(config, "applications[]", where)
        if not applications:
            found.append(Finding(where, "it names no application", "Write `applications:`."))
        for place in applications:
            path = str(mapping(place.value).get("import_path"))
            module, colon, name = path.partition(":")
            if not (colon and name and _importable(module)):
                what = f"{path!r} cannot be imported"
                found.append(Finding(place.where, what, "Write module:name of this repository."))
        port = look(config, "http_options.port")
        if look(config, "http_options.host") != "0.0.0.0":
            what = "the proxies listen on one interface alone"
            found.append(Finding(where, what, "Set http_options.host: 0.0.0.0."))
        for group in find(one, "spec.rayClusterConfig.workerGroupSpecs[]", f"{title(one)}: spec"):
            ports = [p.value for p in find(group.value, "template.spec.containers[].ports[]")]
            if {"name": "serve", "containerPort": port} not in ports:
                what = f"no port `serve` is {port}, where the proxies listen"
                found.append(Finding(group.where, what, "Add it to the container."))
    return found


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
