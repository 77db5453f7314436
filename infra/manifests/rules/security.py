"""What pods may do on their node, and with which rights."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from infra.manifests.documents import (
    Documents,
    Finding,
    find,
    look,
    mapping,
    of_kind,
    sequence,
    title,
)
from infra.manifests.pods import Pod, environment, pods

_DIGEST = re.compile(r"[a-z0-9][a-z0-9._:/-]*@sha256:[0-9a-f]{64}")
_VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
_SECRET_NAME = re.compile(r"(?i)(password|passwd|secret|token|api_?key|access_?key|private_?key)")
_BY_REFERENCE = ("_PATH", "_FILE", "_DIR", "_MODE")
_SECRET_VALUES = (
    ("a private key", re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----")),
    ("an access key of AWS", re.compile(r"\b(AKIA|ASIA)[0-9A-Z]{16}\b")),
    ("a token of GitHub or GitLab", re.compile(r"\b(gh[pousr]_[A-Za-z0-9]{20,}|glpat-[\w-]{20,})")),
    ("a password in an address", re.compile(r"[a-z][a-z0-9+.-]*://[^/\s:@]*:[^/\s@]+@")),
)


def restricted(documents: Documents) -> list[Finding]:
    """Every pod is at the level `restricted` of the Pod Security Standards."""
    return [
        Finding(where, what, f"The level `restricted` wants {mend}.")
        for pod in pods(documents)
        for where, what, mend in (*_pod_level(pod), *_container_level(pod))
    ]


def _pod_level(pod: Pod) -> Iterator[tuple[str, str, str]]:
    for field in ("hostNetwork", "hostPID", "hostIPC", "hostUsers"):
        if pod.spec.get(field) is (field != "hostUsers"):
            yield f"{pod.where}.{field}", "it shares the node's own", "none of that"
    for place in find(pod.spec, "volumes[]", pod.where):
        kinds = set(mapping(place.value)) - {"name"}
        if kinds - _VOLUMES:
            yield (
                place.where,
                f"{', '.join(kinds)} is no kind for a pod",
                f"{', '.join(sorted(_VOLUMES))}",
            )
    if sequence(look(pod.spec, "securityContext.sysctls")):
        yield f"{pod.where}.securityContext.sysctls", "it sets the kernel's", "none"


def _container_level(pod: Pod) -> Iterator[tuple[str, str, str]]:
    outer = mapping(pod.spec.get("securityContext"))
    for where, container in pod.containers:
        own = mapping(container.get("securityContext"))
        both = {**outer, **own}
        at = f"{where}.securityContext"
        if both.get("runAsNonRoot") is not True:
            yield f"{at}.runAsNonRoot", "it may run as root", "runAsNonRoot: true"
        if both.get("runAsUser") == 0 or both.get("runAsGroup") == 0:
            yield f"{at}.runAsUser", "it runs as root", "another user and group than 0"
        if look(both, "seccompProfile.type") not in ("RuntimeDefault", "Localhost"):
            yield f"{at}.seccompProfile", "any system call is allowed", "type: RuntimeDefault"
        if own.get("allowPrivilegeEscalation") is not False:
            yield f"{at}.allowPrivilegeEscalation", "it may gain rights", "false"
        if own.get("privileged"):
            yield f"{at}.privileged", "it has the node's rights", "false"
        if "ALL" not in sequence(look(own, "capabilities.drop")):
            yield f"{at}.capabilities", "it keeps capabilities", "drop: [ALL]"
        if set(sequence(look(own, "capabilities.add"))) - {"NET_BIND_SERVICE"}:
            yield f"{at}.capabilities.add", "it adds capabilities", "none"
        if own.get("procMount") not in (None, "Default"):
            yield f"{at}.procMount", "it sees the node's processes", "Default"
        for port in find(container, "ports[].hostPort", where):
            yield port.where, "it takes a port of the node", "none"


def read_only(documents: Documents) -> list[Finding]:
    """Containers cannot write into their image, and what is written to is a volume."""
    found = []
    for pod in pods(documents):
        for where, container in pod.containers:
            if look(container, "securityContext.readOnlyRootFilesystem") is not True:
                found.append(
                    Finding(
                        f"{where}.securityContext.readOnlyRootFilesystem",
                        "it can change the files of its image",
                        "Set true, and mount an emptyDir where it writes.",
                    )
                )
            paths = [str(p.value) for p in find(container, "volumeMounts[].mountPath")]
            home = environment(container, documents, pod.namespace).get("HOME", "/root")
            for needed in ("/tmp", home):
                if needed not in paths:
                    what = f"nothing is mounted at {needed}, where it cannot but write"
                    found.append(Finding(f"{where}.volumeMounts", what, "Mount an emptyDir."))
    return found


def tokens(documents: Documents) -> list[Finding]:
    """No pod is given a token of the API server but those whose account has a role."""
    found = []
    for account in of_kind(documents, "ServiceAccount"):
        if account.get("automountServiceAccountToken") is not False:
            found.append(
                _token(f"{title(account)}: automountServiceAccountToken", "any pod gets its token")
            )
    bound = {
        str(p.value) for b in of_kind(documents, "RoleBinding") for p in find(b, "subjects[].name")
    }
    for pod in pods(documents):
        given = pod.spec.get("automountServiceAccountToken")
        where = f"{pod.where}.automountServiceAccountToken"
        if not isinstance(given, bool):
            found.append(_token(where, "it is not said"))
        elif given and pod.spec.get("serviceAccountName") not in bound:
            found.append(_token(where, "the account has no role, and the pod its token"))
        for p in find(pod.spec, "volumes[]", pod.where):
            if find(p.value, "projected.sources[].serviceAccountToken"):
                name = mapping(p.value).get("name")
                users = [
                    c
                    for c in pod.containers
                    if name in [m.value for m in find(c.value, "volumeMounts[].name")]
                ]
                if any(mapping(c.value).get("name") != "autoscaler" for c in users):
                    found.append(
                        _token(p.where, "another container than Ray's autoscaler mounts a token")
                    )
    return found


def _token(where: str, what: str) -> Finding:
    return Finding(where, what, "Set false; true only for a pod whose account is bound to a role.")


def images(documents: Documents) -> list[Finding]:
    """Images are named by what they hold, not by a tag that may be moved."""
    return [
        Finding(
            f"{where}.image",
            f"{container.get('image')} has no digest",
            "Write registry/name@sha256:..., by `images:` in kustomization.yaml.",
        )
        for pod in pods(documents)
        for where, container in pod.containers
        if not _DIGEST.fullmatch(str(container.get("image")))
    ]


def literal_secrets(documents: Documents) -> list[Finding]:
    """No document holds a secret, only its name."""
    found = []
    for one in documents:
        if one.get("kind") == "Secret":
            what = "a secret with its content in a file"
            found.append(Finding(title(one), what, "Make it in the cluster; refer to it by name."))
        for where, text in _texts(one):
            for what, pattern in _SECRET_VALUES:
                if pattern.search(text):
                    mend = "Move it to a secret, and withdraw it: it is in git."
                    found.append(Finding(f"{title(one)}: {where}", f"it holds {what}", mend))
    for pod in pods(documents):
        for where, container in pod.containers:
            found += [
                _literal(f"{where}.env[{name}]", name)
                for name, value in ((str(e.get("name")), e.get("value")) for e in _env(container))
                if value and _is_secret(name)
            ]
    for config in of_kind(documents, "ConfigMap"):
        for name in mapping(config.get("data")):
            if _is_secret(str(name)):
                found.append(_literal(f"{title(config)}: data.{name}", str(name)))
    return found


def _literal(where: str, name: str) -> Finding:
    return Finding(where, f"{name} is set to a literal value", "Mount it as a file from a secret.")


def _is_secret(name: str) -> bool:
    return (
        bool(_SECRET_NAME.search(name))
        and not name.upper().endswith(_BY_REFERENCE)
        and "CREDENTIALS_FILE" not in name
    )


def _env(container: Any) -> list[Mapping[str, Any]]:
    return [mapping(e) for e in sequence(mapping(container).get("env"))]


def _texts(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Every string, with its path."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(inner, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _texts(inner, f"{where}[{index}]")
    elif isinstance(value, str):
        yield where, value


def service_links(documents: Documents) -> list[Finding]:
    """Pods do not get a variable for each Service: one called mlflow would set MLFLOW_PORT."""
    return [
        Finding(f"{pod.where}.enableServiceLinks", "it is not false", "Set false.")
        for pod in pods(documents)
        if pod.spec.get("enableServiceLinks") is not False
    ]


def enforced(documents: Documents) -> list[Finding]:
    """The namespace refuses pods that are not `restricted`."""
    label = "pod-security.kubernetes.io/enforce"
    return [
        Finding(
            f"{title(one)}: metadata.labels",
            f"{label} is {mapping(look(one, 'metadata.labels')).get(label)}",
            "Set restricted.",
        )
        for one in of_kind(documents, "Namespace")
        if mapping(look(one, "metadata.labels")).get(label) != "restricted"
    ]


def rights(documents: Documents) -> list[Finding]:
    """Roles are for one namespace, list what they allow, and lead to no more rights or secrets."""
    found = [
        Finding(title(one), "it gives rights in the whole cluster", "Use Role and RoleBinding.")
        for one in of_kind(documents, "ClusterRole", "ClusterRoleBinding")
    ]
    for one in of_kind(documents, "Role"):
        for place in find(one, "rules[]"):
            rule = mapping(place.value)
            where = f"{title(one)}: {place.where}"
            verbs, things = (sequence(rule.get(f)) for f in ("verbs", "resources"))
            words = [*verbs, *things, *sequence(rule.get("apiGroups"))]
            if any("*" in str(word) for word in words):
                found.append(Finding(where, "it has a wildcard", "List what is needed."))
            if bad := [v for v in verbs if v not in _VERBS]:
                found.append(
                    Finding(
                        where, f"{', '.join(bad)} is no verb for it", f"Known: {', '.join(_VERBS)}."
                    )
                )
            if bad := [t for t in things if t in _NEVER]:
                found.append(
                    Finding(where, f"it allows {', '.join(bad)}", "Nobody here needs that.")
                )
            if rule.get("resourceNames") and "create" in verbs:
                what = "create knows no names, so with resourceNames it allows nothing"
                found.append(Finding(where, what, "Put it into a rule without names."))
    return found


_VERBS = ("get", "list", "watch", "create", "update", "patch", "delete")
_NEVER = (
    "secrets",
    "pods/exec",
    "pods/attach",
    "pods/portforward",
    "pods/ephemeralcontainers",
    "serviceaccounts/token",
    "roles",
    "rolebindings",
    "nodes/proxy",
)
