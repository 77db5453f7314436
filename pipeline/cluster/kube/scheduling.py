"""Retraining by the clock: the CronJob's schedule, shown before it is changed."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, NamedTuple

from pipeline.cluster.kube.api import Kube
from pipeline.cluster.kube.cron import check_zone, parse_cron
from pipeline.cluster.kube.errors import ConflictError
from pipeline.cluster.kube.kinds import CRON_JOBS, RETRAIN
from pipeline.cluster.kube.retraining import cron_job
from pipeline.core.errors import MachineError


class Preview(NamedTuple):
    """A change of the CronJob that the server has checked and not kept."""

    change: dict[str, Any]
    """The merge patch; it holds the version that it was made for"""
    difference: str
    """Lines of a diff; empty if nothing would change"""


def preview_schedule(kube: Kube, cron: str, zone: str) -> Preview:
    """Begin, or change, the runs by the clock.

    Raises:
        ConfigError: no such schedule or time zone.
        MachineError: the CronJob is missing, or the server refuses.
    """
    parse_cron(cron)
    check_zone(zone)
    return _preview(kube, {"schedule": cron, "timeZone": zone, "suspend": False})


def preview_unschedule(kube: Kube) -> Preview:
    """End the runs by the clock; one that runs goes on."""
    return _preview(kube, {"suspend": True})


def _preview(kube: Kube, spec: Mapping[str, Any]) -> Preview:
    now = cron_job(kube)
    version = now["metadata"]["resourceVersion"]
    change = {"metadata": {"resourceVersion": version}, "spec": dict(spec)}
    then = kube.patch(CRON_JOBS, RETRAIN, change, dry_run=True)
    return Preview(change, _difference(now, then))


def apply(kube: Kube, preview: Preview) -> None:
    """Make the change that was shown, and no other.

    Raises:
        MachineError: somebody has changed the CronJob since.
    """
    try:
        kube.patch(CRON_JOBS, RETRAIN, preview.change)
    except ConflictError:
        raise MachineError(
            f"the CronJob {RETRAIN} was changed while you looked at the preview. Run the same "
            "command again to see what it is now."
        ) from None


def _difference(now: Mapping[str, Any], then: Mapping[str, Any]) -> str:
    import yaml

    def text(item: Mapping[str, Any]) -> list[str]:
        spec = {k: v for k, v in item["spec"].items() if k != "jobTemplate"}
        return str(yaml.safe_dump({"spec": spec}, sort_keys=True)).splitlines()

    lines = difflib.unified_diff(text(now), text(then), "now", "then", lineterm="", n=1)
    return "\n".join(lines)
