"""Who may talk to whom."""

from __future__ import annotations

import ipaddress
from typing import Any

from infra.manifests.documents import (
    Documents,
    Finding,
    Place,
    find,
    look,
    mapping,
    namespace,
    of_kind,
    sequence,
    title,
)
from infra.manifests.pods import matches, pods

_METADATA = ipaddress.ip_network("169.254.169.254/32")
"""Where clouds hand out a node's own keys to whoever asks from it."""


def default_deny(documents: Documents) -> list[Finding]:
    """In every namespace with pods nothing is let in or out, unless another policy says so."""
    closed = {
        namespace(one)
        for one in of_kind(documents, "NetworkPolicy")
        if look(one, "spec.podSelector") == {}
        and {*sequence(look(one, "spec.policyTypes"))} == {"Ingress", "Egress"}
        and not look(one, "spec.ingress")
        and not look(one, "spec.egress")
    }
    return [
        Finding(
            f"Namespace/{space}",
            "no NetworkPolicy closes it in both directions",
            "Add one with podSelector {}, policyTypes [Ingress, Egress] and no rules.",
        )
        for space in sorted({pod.namespace for pod in pods(documents)} - closed)
    ]


def name_service(documents: Documents) -> list[Finding]:
    """Every pod may ask for names, by UDP and TCP."""
    found = []
    for pod in pods(documents):
        ways = {
            str(mapping(port.value).get("protocol", "TCP"))
            for one in of_kind(documents, "NetworkPolicy")
            if namespace(one) == pod.namespace
            and matches(look(one, "spec.podSelector"), pod.labels)
            for port in find(one, "spec.egress[].ports[]")
            if mapping(port.value).get("port") == 53
        }
        if ways != {"UDP", "TCP"}:
            mend = "Allow port 53 of kube-system by UDP and TCP."
            found.append(Finding(pod.where, "no policy lets it ask for names (DNS)", mend))
    return found


def open_doors(documents: Documents) -> list[Finding]:
    """Rules name their peers and ports; nothing reaches the metadata service of a cloud."""
    found = []
    for one in of_kind(documents, "NetworkPolicy"):
        for path, peers in (("spec.ingress[]", "from"), ("spec.egress[]", "to")):
            for place in find(one, path):
                where = f"{title(one)}: {place.where}"
                found += _rule(where, mapping(place.value), peers)
    return found


def _rule(where: str, rule: Any, peers: str) -> list[Finding]:
    if not sequence(rule.get(peers)):
        return [
            Finding(where, f"without `{peers}` it holds for the whole world", "Name the peers.")
        ]
    found = []
    for place in find(rule, f"{peers}[]", where):
        peer = mapping(place.value)
        own = set(peer) == {"podSelector"} and bool(peer["podSelector"])
        if not own and not sequence(rule.get("ports")):
            found.append(Finding(place.where, "all ports are open to it", "List the ports."))
        if peers == "from" and peer == {"namespaceSelector": {}}:
            what = "every pod of the cluster may come in"
            found.append(Finding(place.where, what, "Name a namespace, or pods."))
        found += _block(place)
    return found


def _block(place: Place) -> list[Finding]:
    block = mapping(mapping(place.value).get("ipBlock"))
    if not block:
        return []
    where = f"{place.where}.ipBlock"
    try:
        whole = ipaddress.ip_network(str(block.get("cidr")))
        left_out = [ipaddress.ip_network(str(one)) for one in sequence(block.get("except"))]
    except ValueError as error:
        return [Finding(where, f"{error}", "Write address/bits, such as 10.0.0.0/8.")]
    if bad := [str(one) for one in left_out if not _within(one, whole)]:
        return [Finding(where, f"{', '.join(bad)} is not in {whole}", "Correct `except`.")]
    if _within(_METADATA, whole) and not any(_within(_METADATA, one) for one in left_out):
        what = "it leads to the cloud's metadata service, which hands out the node's keys"
        return [Finding(where, what, "Put 169.254.0.0/16 into `except`.")]
    return []


_Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def _within(inner: _Network, outer: _Network) -> bool:
    if isinstance(inner, ipaddress.IPv4Network) and isinstance(outer, ipaddress.IPv4Network):
        return inner.subnet_of(outer)
    if isinstance(inner, ipaddress.IPv6Network) and isinstance(outer, ipaddress.IPv6Network):
        return inner.subnet_of(outer)
    return False
