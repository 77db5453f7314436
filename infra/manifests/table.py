"""All rules, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from infra.manifests import schemas
from infra.manifests.documents import Documents, Finding
from infra.manifests.rules import (
    enums,
    names,
    networks,
    quantities,
    queues,
    ray,
    references,
    schedule,
    security,
    settings,
)

Rule = Callable[[Documents], list[Finding]]
CUSTOM = "custom-schema"

RULES: Mapping[str, Rule] = {
    "kubernetes-schema": schemas.kubernetes_schema,
    "names": names.names,
    "name-lengths": names.name_lengths,
    "labels": names.labels,
    "common-labels": names.common_labels,
    "namespaces": names.namespaces,
    "duplicates": names.duplicates,
    "cron": schedule.cron,
    "time-zones": schedule.time_zones,
    "deadlines": schedule.deadlines,
    "enums": enums.enums,
    "restarts": enums.restarts,
    "quantities": quantities.quantities,
    "limits": quantities.limits,
    "resources": quantities.resources,
    "folders": quantities.folders,
    "selectors": references.selectors,
    "service-ports": references.service_ports,
    "probes": references.probes,
    "network-ports": references.network_ports,
    "accounts": references.accounts,
    "volumes": references.volumes,
    "held": references.held,
    "secrets": references.secrets,
    "scaled": references.scaled,
    "bindings": references.bindings,
    "variables": references.variables,
    "restricted": security.restricted,
    "read-only": security.read_only,
    "tokens": security.tokens,
    "images": security.images,
    "literal-secrets": security.literal_secrets,
    "service-links": security.service_links,
    "enforced": security.enforced,
    "rights": security.rights,
    "default-deny": networks.default_deny,
    "name-service": networks.name_service,
    "open-doors": networks.open_doors,
    "ray-jobs": ray.ray_jobs,
    "ray-clusters": ray.ray_clusters_closed,
    "ray-groups": ray.ray_groups,
    "ray-workers": ray.ray_workers,
    "serve-config": ray.serve_config,
    "queue-links": queues.queue_links,
    "queued-jobs": queues.queued_jobs,
    "quotas": queues.quotas,
    "variables-known": settings.variables_known,
    "commands": settings.commands,
    "service-settings": settings.service_settings,
    "grace": settings.grace,
}


def rules(crds: Path | None) -> Mapping[str, Rule]:
    """Those of RULES, and that of the custom resources where their definitions are at hand."""
    if crds is None:
        return RULES
    return {**RULES, CUSTOM: partial(schemas.custom_schema, crds=crds)}


def check(documents: Documents, asked: Mapping[str, Rule]) -> list[tuple[str, Finding]]:
    """All findings, each with the name of its rule."""
    return [(name, finding) for name, rule in asked.items() for finding in rule(documents)]
