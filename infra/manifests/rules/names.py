"""Names, labels and namespaces."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from infra.manifests.documents import (
    Documents,
    Finding,
    find,
    inside,
    look,
    mapping,
    namespace,
    of_kind,
    sequence,
    title,
)
from infra.manifests.pods import pods
from infra.manifests.schemas import group_of

_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_LETTER_FIRST = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
_PORT = re.compile(r"(?=.*[a-z])(?!.*--)[a-z0-9]([-a-z0-9]{0,13}[a-z0-9])?")
_KEY = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
_LETTER_FIRST_KINDS = ("Service", "RayJob", "RayService", "RayCluster")
_LONGEST = {"RayJob": 47, "RayService": 47, "RayCluster": 63, "CronJob": 52, "Job": 63}
"""KubeRay and the CronJob controller append to these names, and the result must be a label."""
CLUSTER_WIDE = (
    "Namespace",
    "ClusterRole",
    "ClusterRoleBinding",
    "ClusterQueue",
    "ResourceFlavor",
    "WorkloadPriorityClass",
)


def names(documents: Documents) -> list[Finding]:
    """Objects, containers, volumes and ports have names that DNS takes."""
    found = []
    for one in documents:
        letter_first = one.get("kind") in _LETTER_FIRST_KINDS
        form = _LETTER_FIRST if letter_first else _SUBDOMAIN
        name = str(look(one, "metadata.name", ""))
        if not form.fullmatch(name):
            found.append(_bad_name(f"{title(one)}: metadata.name", name))
    for pod in pods(documents):
        for place in [*pod.containers, *find(pod.spec, "volumes[]", pod.where)]:
            name = str(mapping(place.value).get("name", ""))
            if not _LABEL.fullmatch(name):
                found.append(_bad_name(f"{place.where}.name", name))
        for container in pod.containers:
            for port in find(container.value, "ports[].name", container.where):
                if not _PORT.fullmatch(str(port.value)):
                    found.append(_bad_name(port.where, port.value))
    return found


def _bad_name(where: str, name: Any) -> Finding:
    return Finding(
        where,
        f"{name!r} is no DNS-1123 name",
        "Use lower-case letters, digits and `-`, a letter or digit at both ends (a letter first "
        "for services and Ray's kinds; at most 15 characters for a port).",
    )


def name_lengths(documents: Documents) -> list[Finding]:
    """No name is too long for what controllers append to it."""
    return [
        Finding(
            f"{title(one)}: metadata.name",
            f"the name has {len(name)} characters; a {one['kind']} takes {most}",
            "Shorten it.",
        )
        for one in documents
        if (most := _LONGEST.get(str(one.get("kind")), 253))
        and len(name := str(look(one, "metadata.name", ""))) > most
    ]


def labels(documents: Documents) -> list[Finding]:
    """Labels, selectors and the keys of annotations have the syntax of Kubernetes."""
    found = []
    for where, value in inside(documents):
        for field in ("labels", "matchLabels", "nodeSelector", "annotations"):
            for key, one in mapping(value.get(field)).items():
                wrong = None if _is_key(str(key)) else "key"
                if field != "annotations" and not _VALUE.fullmatch(str(one)):
                    wrong = "value"
                if wrong:
                    found.append(
                        Finding(
                            f"{where}.{field}",
                            f"{key}: {one} has no valid {wrong}",
                            "A key is `name` or `domain/name`; name and value have at most 63 "
                            "letters, digits, `-`, `_` and `.`, and no sign at either end.",
                        )
                    )
    return found


def _is_key(key: str) -> bool:
    domain, slash, name = key.rpartition("/")
    good_domain = not slash or (len(domain) <= 253 and bool(_SUBDOMAIN.fullmatch(domain)))
    return good_domain and bool(_KEY.fullmatch(name))


def common_labels(documents: Documents) -> list[Finding]:
    """Whatever we make says that it is ours, so that one selector finds it all."""
    wanted = {"app.kubernetes.io/name": "metaloom", "app.kubernetes.io/part-of": "metaloom"}
    found = []
    for one in documents:
        if group_of(one) == "kueue.x-k8s.io" and one.get("kind") in CLUSTER_WIDE:
            continue
        have = mapping(look(one, "metadata.labels"))
        if any(have.get(key) != value for key, value in wanted.items()):
            found.append(_unlabelled(title(one), wanted))
    for pod in pods(documents):
        component = pod.labels.get("app.kubernetes.io/component")
        if any(pod.labels.get(k) != v for k, v in wanted.items()) or not component:
            found.append(_unlabelled(pod.where, {**wanted, "app.kubernetes.io/component": "..."}))
    return found


def _unlabelled(where: str, wanted: Mapping[str, str]) -> Finding:
    text = ", ".join(f"{key}: {value}" for key, value in wanted.items())
    return Finding(where, "it lacks a label that all of Metaloom has", f"Set {text}.")


def namespaces(documents: Documents) -> list[Finding]:
    """All is in the namespace that the documents make; what is of the whole cluster is in none."""
    made = [str(look(one, "metadata.name")) for one in of_kind(documents, "Namespace")]
    found = []
    for one in documents:
        space = namespace(one)
        if one.get("kind") in CLUSTER_WIDE and space:
            found.append(
                Finding(title(one), f"it is of the whole cluster, but in {space!r}", "Drop it.")
            )
        if one.get("kind") not in CLUSTER_WIDE and space not in made:
            found.append(
                Finding(
                    f"{title(one)}: metadata.namespace",
                    f"the namespace {space!r} is none that these documents make",
                    f"Set {', '.join(made) or 'one, and add a Namespace'}.",
                )
            )
    return found


def duplicates(documents: Documents) -> list[Finding]:
    """Nothing is there twice: objects, containers, volumes, ports, variables, mounts."""
    whole = [f"{group_of(one)} {title(one)} {namespace(one)}" for one in documents]
    found = [Finding(name.strip(), "it is there twice", "Drop one.") for name in _twice(whole)]
    for pod in pods(documents):
        lists = [(f"{pod.where}.volumes", _names(pod.spec.get("volumes"), "name"))]
        lists.append(
            (
                f"{pod.where}.containers",
                [
                    str(c.value.get("name"))
                    for c in pod.containers
                    if "initContainers" not in c.where
                ],
            )
        )
        for where, container in pod.containers:
            for field, key in (("env", "name"), ("volumeMounts", "mountPath"), ("ports", "name")):
                lists.append((f"{where}.{field}", _names(container.get(field), key)))
        for where, items in lists:
            found += [Finding(where, f"{one} is there twice", "Drop one.") for one in _twice(items)]
    return found


def _names(items: Any, key: str) -> list[str]:
    return [str(mapping(item)[key]) for item in sequence(items) if key in mapping(item)]


def _twice(items: Iterable[str]) -> list[str]:
    return [item for item, number in Counter(items).items() if number > 1]
