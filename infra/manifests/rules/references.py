"""What one document calls by its name is in another one."""

from __future__ import annotations

import re
from typing import Any

from infra.manifests.documents import (
    Document,
    Documents,
    Finding,
    Place,
    find,
    look,
    mapping,
    named,
    namespace,
    of_kind,
    sequence,
    title,
)
from infra.manifests.pods import ELSEWHERE, Pod, environment, matches, pods

SECRETS = {
    "metaloom-git": "credential",
    "metaloom-s3": "credentials",
    "metaloom-mlflow": "credentials",
    "metaloom-database": "pg_service.conf",
    "metaloom-ray-token": "auth_token",
    "metaloom-webhook": "address",
}
"""By name, and the key that is read of each; docs/kubernetes-pods.md says how to make them."""
_MADE_BY_KUBERNETES = ("kube-root-ca.crt",)
_VARIABLE = re.compile(r"(?<!\$)\$\(([^)]*)\)")


def selected(documents: Documents, selector: Any, space: str) -> list[Pod]:
    """The pods of a namespace that a label selector takes."""
    return [p for p in pods(documents) if p.namespace == space and matches(selector, p.labels)]


def selectors(documents: Documents) -> list[Finding]:
    """Selectors take a pod of these documents, and a Deployment's its own."""
    found = []
    for one in documents:
        for place in _selectors(one):
            elsewhere = any(matches(place.value, labels) for labels in ELSEWHERE)
            if not elsewhere and not selected(documents, place.value, namespace(one)):
                found.append(
                    Finding(
                        f"{title(one)}: {place.where}",
                        "no pod of these documents has such labels",
                        "Compare them with the template's labels.",
                    )
                )
    for pod in pods(documents):
        own = look(pod.owner, "spec.selector")
        if pod.kind in ("Deployment", "StatefulSet", "DaemonSet") and not matches(own, pod.labels):
            what = "it does not take the pods of its own template"
            found.append(
                Finding(f"{title(pod.owner)}: spec.selector", what, "Use the same labels.")
            )
    return found


def _selectors(one: Document) -> list[Place]:
    """As `{matchLabels, matchExpressions}`; peers of other namespaces are left out."""
    kind = one.get("kind")
    if kind == "Service":
        return [Place(p.where, {"matchLabels": p.value}) for p in find(one, "spec.selector")]
    if kind == "PodDisruptionBudget":
        return find(one, "spec.selector")
    if kind != "NetworkPolicy":
        return find(one, "spec.template.spec.topologySpreadConstraints[].labelSelector")
    peers = [*find(one, "spec.ingress[].from[]"), *find(one, "spec.egress[].to[]")]
    near = [p for p in peers if "namespaceSelector" not in mapping(p.value)]
    return [
        *find(one, "spec.podSelector"),
        *(found for p in near for found in find(p.value, "podSelector", p.where)),
    ]


def service_ports(documents: Documents) -> list[Finding]:
    """A Service leads to a port on which each of its pods listens."""
    found = []
    for one in of_kind(documents, "Service"):
        taken = selected(documents, {"matchLabels": look(one, "spec.selector")}, namespace(one))
        for place in find(one, "spec.ports[]"):
            port = mapping(place.value)
            target = port.get("targetPort", port.get("port"))
            found += [
                _no_port(f"{title(one)}: {place.where}.targetPort", target, pod)
                for pod in taken
                if not pod.listens(target)
            ]
    return found


def _no_port(where: str, port: Any, pod: Pod) -> Finding:
    known = [f"{one.get('name')} {one.get('containerPort')}" for one in pod.ports]
    return Finding(
        where,
        f"{pod.where} has no port {port!r}",
        f"Name one of its ports ({', '.join(known) or 'none'}), or add it to a container.",
    )


def probes(documents: Documents) -> list[Finding]:
    """Probes and Prometheus ask a port that is there; what is long-lived is asked at all."""
    found = []
    for pod in pods(documents):
        for where, container in pod.containers:
            own = Pod(where, pod.owner, {}, {}, (Place(where, container),))
            for field in ("startupProbe", "livenessProbe", "readinessProbe"):
                for way in ("httpGet", "tcpSocket", "grpc"):
                    for place in find(container, f"{field}.{way}.port", where):
                        if not own.listens(place.value):
                            found.append(_no_port(place.where, place.value, own))
                if pod.kind == "Deployment" and not container.get(field) and "initC" not in where:
                    found.append(Finding(f"{where}.{field}", "there is none", "Add one."))
        template = look(pod.owner, "spec.template.metadata.annotations") or {}
        port = mapping(template).get("prometheus.io/port")
        if port is not None and not (str(port).isdecimal() and pod.listens(int(port))):
            found.append(_no_port(f"{title(pod.owner)}: prometheus.io/port", port, pod))
    return found


def network_ports(documents: Documents) -> list[Finding]:
    """A network policy opens ports on which somebody listens."""
    found = []
    for one in of_kind(documents, "NetworkPolicy"):
        taken = selected(documents, look(one, "spec.podSelector"), namespace(one))
        for place in find(one, "spec.ingress[].ports[].port"):
            if taken and not any(pod.listens(place.value) for pod in taken):
                found.append(_no_port(f"{title(one)}: {place.where}", place.value, taken[0]))
    return found


def accounts(documents: Documents) -> list[Finding]:
    """Every pod runs as an account of its own kind, which is there."""
    found = []
    for pod in pods(documents):
        name = str(pod.spec.get("serviceAccountName") or "default")
        if name == "default" or named(documents, "ServiceAccount", name, pod.namespace) is None:
            found.append(
                Finding(
                    f"{pod.where}.serviceAccountName",
                    f"there is no ServiceAccount {name!r} of ours",
                    "Add it to accounts.yaml, or correct the name.",
                )
            )
    return found


def volumes(documents: Documents) -> list[Finding]:
    """Mounts have volumes, volumes are mounted, and what they hold is there."""
    found = []
    for pod in pods(documents):
        there = {str(p.value.get("name")): p for p in find(pod.spec, "volumes[]", pod.where)}
        mounted = set()
        for where, container in pod.containers:
            for place in find(container, "volumeMounts[]", where):
                name = str(mapping(place.value).get("name"))
                mounted.add(name)
                if name not in there:
                    mend = f"Mount one of {', '.join(there) or 'none'}, or add it."
                    found.append(Finding(place.where, f"there is no volume {name!r}", mend))
        for name in there.keys() - mounted:
            found.append(Finding(there[name].where, "no container mounts it", "Mount or drop it."))
    return found


def held(documents: Documents) -> list[Finding]:
    """ConfigMaps, their keys, and claims that pods use are there."""
    found = []
    for pod in pods(documents):
        for where, name, keys in _config_maps(pod):
            config = named(documents, "ConfigMap", name, pod.namespace)
            if name not in _MADE_BY_KUBERNETES and config is None:
                found.append(
                    Finding(where, f"there is no ConfigMap {name!r}", "Add or correct it.")
                )
            for key in keys:
                if config is not None and key not in mapping(config.get("data")):
                    what = f"ConfigMap {name!r} has no key {key!r}"
                    found.append(Finding(where, what, "Add it."))
        for place in find(pod.spec, "volumes[].persistentVolumeClaim.claimName", pod.where):
            if named(documents, "PersistentVolumeClaim", place.value, pod.namespace) is None:
                what = f"there is no claim {place.value!r}"
                found.append(Finding(place.where, what, "Add or correct it."))
    return found


def _config_maps(pod: Pod) -> list[tuple[str, str, list[str]]]:
    """Where, which one, and which of its keys."""
    used = [(p.where, p.value, "name") for p in find(pod.spec, "volumes[].configMap", pod.where)]
    used += [
        (p.where, p.value, "name")
        for p in find(pod.spec, "volumes[].projected.sources[].configMap", pod.where)
    ]
    for where, container in pod.containers:
        used += [
            (p.where, p.value, "name") for p in find(container, "envFrom[].configMapRef", where)
        ]
        used += [
            (p.where, p.value, "name")
            for p in find(container, "env[].valueFrom.configMapKeyRef", where)
        ]
    found = []
    for where, value, field in used:
        keys = [str(mapping(item).get("key")) for item in sequence(mapping(value).get("items"))]
        keys += [str(value["key"])] if "key" in value else []
        found.append((where, str(mapping(value).get(field)), keys))
    return found


def secrets(documents: Documents) -> list[Finding]:
    """Secrets are those that the documentation says how to make, by name and key."""
    found = []
    for pod in pods(documents):
        uses: list[tuple[str, Any, list[Any]]] = []
        for p in find(pod.spec, "volumes[].secret", pod.where):
            keys = [mapping(item).get("key") for item in sequence(p.value.get("items"))]
            uses.append((p.where, p.value.get("secretName"), keys))
        for where, container in pod.containers:
            for p in find(container, "env[].valueFrom.secretKeyRef", where):
                uses.append((p.where, p.value.get("name"), [p.value.get("key")]))
            for p in find(container, "envFrom[].secretRef", where):
                uses.append((p.where, p.value.get("name"), ["(all of it, into the environment)"]))
        found += [
            Finding(
                where,
                f"nobody makes a secret {name!r} with {', '.join(map(str, keys)) or 'files'}",
                f"Known are {', '.join(f'{k} ({v})' for k, v in SECRETS.items())}.",
            )
            for where, name, keys in uses
            if name not in SECRETS or any(key != SECRETS[name] for key in keys)
        ]
    return found


def scaled(documents: Documents) -> list[Finding]:
    """Autoscalers and disruption budgets name what is there, and leave room for a drain."""
    found = []
    least: dict[str, int] = {}
    for one in of_kind(documents, "HorizontalPodAutoscaler"):
        target = mapping(look(one, "spec.scaleTargetRef"))
        kind, name = str(target.get("kind")), str(target.get("name"))
        if named(documents, kind, name, namespace(one)) is None:
            what = f"there is no {kind} {name!r}"
            found.append(Finding(f"{title(one)}: spec.scaleTargetRef", what, "Correct the name."))
        low, high = look(one, "spec.minReplicas", 1), look(one, "spec.maxReplicas", 1)
        least[name] = low
        if low > high:
            what = f"minReplicas is {low}, maxReplicas {high}"
            found.append(Finding(f"{title(one)}: spec", what, "Swap them."))
    for one in of_kind(documents, "PodDisruptionBudget"):
        kept = look(one, "spec.minAvailable")
        for pod in selected(documents, look(one, "spec.selector"), namespace(one)):
            name = str(look(pod.owner, "metadata.name"))
            number = least.get(name, look(pod.owner, "spec.replicas", 2))
            if not isinstance(kept, int) or kept < 1 or kept >= number:
                what = (
                    f"{kept} of {number} pods must stay, so a drain waits for ever or spares none"
                )
                mend = "Set minAvailable to 1 or more, and less than the number of pods."
                found.append(Finding(f"{title(one)}: spec.minAvailable", what, mend))
    return found


def bindings(documents: Documents) -> list[Finding]:
    """Bindings name accounts and roles that are there."""
    found = []
    for one in of_kind(documents, "RoleBinding"):
        role = mapping(one.get("roleRef"))
        space = namespace(one)
        if named(documents, str(role.get("kind")), str(role.get("name")), space) is None:
            what = f"there is no {role.get('kind')} {role.get('name')!r}"
            found.append(Finding(f"{title(one)}: roleRef", what, "Correct the name."))
        for place in find(one, "subjects[]"):
            subject = mapping(place.value)
            there = named(
                documents, "ServiceAccount", str(subject.get("name")), subject.get("namespace")
            )
            if subject.get("kind") != "ServiceAccount" or there is None:
                what = f"there is no account {subject.get('kind')}/{subject.get('name')} here"
                mend = "Bind an account of accounts.yaml, with its namespace."
                found.append(Finding(f"{title(one)}: {place.where}", what, mend))
    return found


def variables(documents: Documents) -> list[Finding]:
    """`$(NAME)` in a command is a variable of the container: others stay as they are."""
    found = []
    for pod in pods(documents):
        for where, container in pod.containers:
            seen = environment(container, documents, pod.namespace)
            words = [*sequence(container.get("command")), *sequence(container.get("args"))]
            for name in (name for word in words for name in _VARIABLE.findall(str(word))):
                if name not in seen:
                    what = f"$({name}) stays as it is: the container has no such variable"
                    found.append(Finding(where, what, "Set it in env, or in metaloom-settings."))
    return found
