"""Values of which there are only a few, where schemas take any string."""

from __future__ import annotations

import re
from collections.abc import Sequence

from infra.manifests.documents import Documents, Finding, inside, look, of_kind, title
from infra.manifests.pods import pods

_PULL = ("Always", "IfNotPresent", "Never")
_OPERATORS = ("In", "NotIn", "Exists", "DoesNotExist")
ENUMS: Sequence[tuple[str, tuple[str, ...]]] = (
    (r"concurrencyPolicy", ("Allow", "Forbid", "Replace")),
    (r"imagePullPolicy", _PULL),
    (r"policyTypes\[\d+\]", ("Ingress", "Egress")),
    (r"protocol", ("TCP", "UDP", "SCTP")),
    (r"tolerations\[.+\]\.operator", ("Exists", "Equal", "Lt", "Gt")),
    (r"(?:taints|tolerations)\[.+\]\.effect", ("NoSchedule", "PreferNoSchedule", "NoExecute")),
    (r"matchExpressions\[.+\]\.operator", (*_OPERATORS, "Gt", "Lt")),
    (r"whenUnsatisfiable", ("DoNotSchedule", "ScheduleAnyway")),
    (r"seccompProfile\.type", ("RuntimeDefault", "Localhost", "Unconfined")),
    (r"strategy\.type", ("RollingUpdate", "Recreate")),
    (r"accessModes\[\d+\]", ("ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod")),
    (r"emptyDir\.medium", ("", "Memory")),
    (r"unhealthyPodEvictionPolicy", ("IfHealthyBudget", "AlwaysAllow")),
    (r"podFailurePolicy\.rules\[.+\]\.action", ("FailJob", "FailIndex", "Ignore", "Count")),
    (r"metrics\[.+\]\.type", ("Resource", "Pods", "Object", "External", "ContainerResource")),
    (r"target\.type", ("Utilization", "Value", "AverageValue")),
    (r"fsGroupChangePolicy", ("OnRootMismatch", "Always")),
    (r"dnsPolicy", ("ClusterFirst", "Default", "ClusterFirstWithHostNet", "None")),
    (r"terminationMessagePolicy", ("File", "FallbackToLogsOnError")),
    (
        r"RayJob/[^:]+: spec\.submissionMode",
        ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"),
    ),
    (
        r"RayService/[^:]+: spec\.upgradeStrategy\.type",
        ("NewCluster", "NewClusterWithIncrementalUpgrade", "None"),
    ),
)
"""By the end of the path."""
_RESTARTS = {
    "Deployment": ("Always",),
    "StatefulSet": ("Always",),
    "DaemonSet": ("Always",),
    "Job": ("Never", "OnFailure"),
    "CronJob": ("Never", "OnFailure"),
}


def enums(documents: Documents) -> list[Finding]:
    """Each is one of those that there are."""
    found = []
    for where, value in inside(documents):
        for key, inner in value.items():
            items = enumerate(inner) if isinstance(inner, list) else [(None, inner)]
            for index, one in items:
                number = "" if index is None else f"[{index}]"
                path = f"{where}{'.' if ': ' in where else ': '}{key}{number}"
                known = _known(path)
                if known and isinstance(one, str) and one not in known:
                    found.append(_unknown(path, one, known))
    return found


def _known(path: str) -> tuple[str, ...]:
    for pattern, values in ENUMS:
        if re.search(rf"(?:^|[.: ]){pattern}$", path):
            return values
    return ()


def _unknown(where: str, value: str, known: Sequence[str]) -> Finding:
    return Finding(where, f"there is no {value!r}", f"Set one of {', '.join(known)}.")


def restarts(documents: Documents) -> list[Finding]:
    """Pods restart as their owners need it."""
    found = []
    for pod in pods(documents):
        policy = pod.spec.get("restartPolicy")
        known = _RESTARTS.get(pod.kind, ("Always", "OnFailure", "Never"))
        if pod.kind in ("Job", "CronJob") and policy is None:
            found.append(_unknown(f"{pod.where}.restartPolicy", "Always", known))
        if policy is not None and policy not in known:
            found.append(_unknown(f"{pod.where}.restartPolicy", str(policy), known))
    for one in of_kind(documents, "CronJob", "Job"):
        path = "spec.jobTemplate.spec" if one["kind"] == "CronJob" else "spec"
        if (
            look(one, f"{path}.podFailurePolicy")
            and look(one, f"{path}.template.spec.restartPolicy") != "Never"
        ):
            found.append(
                Finding(
                    f"{title(one)}: {path}.podFailurePolicy",
                    "it needs pods that are not restarted",
                    "Set restartPolicy: Never.",
                )
            )
    return found
