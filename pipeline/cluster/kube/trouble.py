"""Why a pod does not run, or a Job has none: one sentence that says how to mend it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.cluster.kube.kinds import GPU

_PULL = ("ImagePullBackOff", "ErrImagePull", "InvalidImageName", "ErrImageNeverPull")
_CONFIG = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError")


def pod_trouble(pod: Mapping[str, Any], events: Iterable[Mapping[str, Any]] = ()) -> str | None:
    """What keeps a pod from running, or ended it; None if nothing does.

    Args:
        events: of this pod; they have the words that its status lacks.
    """
    status = pod.get("status") or {}
    told = [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]
    for container in told:
        state = container.get("state") or {}
        if trouble := _waiting(state.get("waiting") or {}, container.get("image", ""), events):
            return trouble
        if trouble := _ended(state.get("terminated") or {}, container.get("name", "")):
            return trouble
    for condition in status.get("conditions", []):
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            return _unschedulable(pod, str(condition.get("message", "")))
    if status.get("reason") == "Evicted":
        return f"its node put it out: {status.get('message', '').strip()}. It will be tried again."
    for event in events:
        if event.get("reason") in ("FailedMount", "FailedAttachVolume"):
            words = str(event.get("message", "")).strip()
            return f"a volume cannot be mounted: {words}. Look whether that secret or claim exists."
    return None


def _waiting(
    waiting: Mapping[str, Any], image: str, events: Iterable[Mapping[str, Any]]
) -> str | None:
    reason = waiting.get("reason", "")
    words = str(waiting.get("message", "")).strip().rstrip(".")
    if reason in _PULL:
        pulls = [str(e.get("message", "")) for e in events if "Failed to pull" in str(e)]
        why = (pulls[-1] if pulls else words)[:300].rstrip(".")
        zeros = "0" * 64 in image or "0" * 64 in why
        mend = (
            "It is the placeholder of the manifests: set your image's digest under images: in your "
            "overlay (docs/kubernetes-pods.md)"
            if zeros
            else "Look whether it was pushed, and at imagePullSecrets if the registry wants a login"
        )
        return f"the image {image or 'of a container'} cannot be pulled ({why or reason}). {mend}."
    if reason in _CONFIG:
        return f"a container cannot be made: {words or reason}. Make what is missing."
    if reason == "CrashLoopBackOff":
        return f"a container ends again and again: {words}. See `metaloom cluster logs`."
    return None


def _ended(ended: Mapping[str, Any], name: str) -> str | None:
    if not ended or ended.get("exitCode", 0) == 0:
        return None
    if ended.get("reason") == "OOMKilled":
        return (
            f"container {name} was killed for want of memory. Raise its limit in infra/kubernetes."
        )
    return f"container {name} ended with status {ended['exitCode']}. See `metaloom cluster logs`."


def _unschedulable(pod: Mapping[str, Any], words: str) -> str:
    """Of the scheduler's message, what matters first."""
    gpus = _asked_gpus(pod)
    if f"Insufficient {GPU}" in words:
        return (
            f"it waits for {gpus or 'a'} free GPU{'s' if gpus > 1 else ''}: {_short(words)}. It "
            "starts when some are free; add GPU nodes, or lower the number of workers."
        )
    if "untolerated taint" in words or "didn't match Pod's node affinity" in words:
        return f"no node takes it: {_short(words)}. Look at its tolerations and nodeSelector."
    if "persistentvolumeclaim" in words or "PersistentVolumeClaim" in words:
        return f"its volume is not there: {_short(words)}. Make the claim, or a storage class."
    return f"no node has room for it: {_short(words)}. Add nodes, or lower its requests."


def _short(words: str) -> str:
    return words.partition(" preemption:")[0].strip().rstrip(".")


def _asked_gpus(pod: Mapping[str, Any]) -> int:
    containers = (pod.get("spec") or {}).get("containers", [])
    limits = [(c.get("resources") or {}).get("limits") or {} for c in containers]
    return sum(int(str(limit.get(GPU, 0))) for limit in limits)


def job_trouble(events: Iterable[Mapping[str, Any]]) -> str | None:
    """Why a Job has no pod, by its events."""
    for event in reversed(list(events)):
        words = str(event.get("message", ""))
        if event.get("reason") != "FailedCreate":
            continue
        if "exceeded quota" in words:
            quota = re.sub(r"^.*exceeded quota: ", "", words)
            return (
                f"the namespace's quota is used up: {quota}. Wait for other work to end, ask for "
                "less in infra/kubernetes, or have the ResourceQuota raised."
            )
        if "serviceaccount" in words:
            return f"it has no service account: {words}. Apply the manifests."
        return f"no pod can be made for it: {words}."
    return None
