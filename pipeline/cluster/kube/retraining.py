"""Jobs of retraining: made from the CronJob, cancelled, and run again."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, NamedTuple

from pipeline.cluster.kube.api import Kube
from pipeline.cluster.kube.errors import ConflictError, ExistsError, MissingError
from pipeline.cluster.kube.kinds import (
    BECAUSE_NOTE,
    CANCELLED_NOTE,
    COMMIT_NOTE,
    COMPONENT,
    CONTAINER,
    CRON_JOBS,
    JOBS,
    RETRAIN,
)
from pipeline.core.errors import ConfigError, MachineError

_APPLY = "Apply the manifests: kubectl apply -k infra/kubernetes/overlays/gpu"
_GONE_SECONDS = 120.0
_POLL_SECONDS = 0.5


class Submitted(NamedTuple):
    """What came of a submission."""

    run: str
    new: bool
    """False: a Job of this name was there already"""
    state: str


def job_name(commit: str, params_hash: str) -> str:
    """The same for the same commit and parameters, so that submitting twice is submitting once.

    Args:
        commit: its full hash.
        params_hash: hex, of params.yaml in that commit.
    """
    return f"retrain-{commit[:10]}-{params_hash[:8]}"


def cron_job(kube: Kube) -> dict[str, Any]:
    """The CronJob of the manifests.

    Raises:
        MachineError: it is not there.
    """
    try:
        return kube.get(CRON_JOBS, RETRAIN)
    except MissingError as error:
        if "namespace" in str(error).partition(" is ")[0] and "does not exist" in str(error):
            raise
        raise MachineError(
            f"there is no CronJob {RETRAIN} in namespace {kube.namespace}. {_APPLY}; or name "
            "another --namespace."
        ) from None


def job_of(
    template: Mapping[str, Any], name: str, *, commit: str | None, because: str, cron: str = RETRAIN
) -> dict[str, Any]:
    """A Job out of the CronJob's own template, as `kubectl create job --from=cronjob/...` does.

    Args:
        template: `spec.jobTemplate` of the CronJob.
        commit: what to retrain; None: what the template says.
        because: what set it off.
    """
    spec = copy.deepcopy(dict(template["spec"]))
    containers = spec["template"]["spec"]["containers"]
    driver = next((c for c in containers if c["name"] == CONTAINER), containers[0])
    told = {"METALOOM_BECAUSE": because, **({"METALOOM_COMMIT": commit} if commit else {})}
    others = [entry for entry in driver.get("env", []) if entry["name"] not in told]
    driver["env"] = [*({"name": k, "value": v} for k, v in told.items()), *others]
    metadata = copy.deepcopy(dict(template.get("metadata") or {}))
    notes = {
        **(metadata.get("annotations") or {}),
        "cronjob.kubernetes.io/instantiate": "manual",
        BECAUSE_NOTE: because,
        **({COMMIT_NOTE: commit} if commit else {}),
    }
    labels = {**(metadata.get("labels") or {}), COMPONENT: "retrain", "metaloom.dev/cronjob": cron}
    return {
        "apiVersion": JOBS.api_version,
        "kind": JOBS.kind,
        "metadata": {"name": name, "labels": labels, "annotations": notes},
        "spec": spec,
    }


def submit(
    kube: Kube, commit: str, params_hash: str, *, because: str = "manual", dry_run: bool = False
) -> Submitted:
    """Have a commit retrained; a Job that is there already is left as it is until it has succeeded.

    Then it is replaced: new data may have come since, of which its driver knows.

    Args:
        dry_run: let the server check everything and keep nothing.

    Raises:
        MachineError: the CronJob is missing, or the server refuses.
    """
    template = cron_job(kube)["spec"]["jobTemplate"]
    name = job_name(commit, params_hash)
    wanted = job_of(template, name, commit=commit, because=because)
    for _ in range(5):
        try:
            return Submitted(name, True, state_of(kube.create(JOBS, wanted, dry_run=dry_run)))
        except ExistsError:
            pass
        with suppress(MissingError):  # whoever submits it at the same moment has just removed it
            there = kube.get(JOBS, name)
            if state_of(there) != "succeeded" or not is_ours(there):
                return Submitted(name, False, state_of(there))
            if dry_run:
                return _checked_again(kube, wanted)
            _remove(kube, there)
    raise MachineError(f"the Job {name} changes all the time. Try again.")


def state_of(job: Mapping[str, Any]) -> str:
    """waiting, running, suspended, succeeded, failed or cancelled."""
    status = job.get("status") or {}
    ended = {c["type"] for c in status.get("conditions", []) if c.get("status") == "True"}
    if "Complete" in ended:
        return "succeeded"
    if "Failed" in ended:
        cancelled = CANCELLED_NOTE in (job["metadata"].get("annotations") or {})
        return "cancelled" if cancelled else "failed"
    if (job["metadata"].get("annotations") or {}).get(CANCELLED_NOTE):
        return "cancelling"
    if (job.get("spec") or {}).get("suspend"):
        return "suspended"
    return "running" if status.get("ready") else "waiting"


def why_failed(job: Mapping[str, Any]) -> str:
    """The Job's own words for its end."""
    for condition in (job.get("status") or {}).get("conditions", []):
        if condition["type"] == "Failed" and condition.get("status") == "True":
            return f"{condition.get('reason', '')}: {condition.get('message', '')}".strip(": ")
    return ""


def find_job(kube: Kube, run: str) -> dict[str, Any]:
    """The Job of a run.

    Raises:
        MachineError: there is none; or it is none of ours.
    """
    try:
        job = kube.get(JOBS, run)
    except MissingError:
        raise MachineError(
            f"there is no run {run!r} in namespace {kube.namespace}; `metaloom cluster status` "
            "lists those that there are."
        ) from None
    if not is_ours(job):
        raise ConfigError(f"the Job {run!r} is no retraining of Metaloom; it is left alone.")
    return job


def is_ours(job: Mapping[str, Any]) -> bool:
    """Made by our CronJob, or from it."""
    metadata = job["metadata"]
    owners = {owner.get("name") for owner in metadata.get("ownerReferences") or []}
    labels = metadata.get("labels") or {}
    pods = ((job.get("spec") or {}).get("template", {}).get("metadata") or {}).get("labels") or {}
    return RETRAIN in owners or "retrain" in (labels.get(COMPONENT), pods.get(COMPONENT))


def cancel(kube: Kube, run: str, *, dry_run: bool = False) -> str:
    """End a run; its record stays, and `resume` runs it again. Returns its state before.

    By its deadline: a suspended Job would count as running and keep the CronJob from the next one.
    """
    for _ in range(5):
        job = find_job(kube, run)
        before = state_of(job)
        if before in ("succeeded", "failed", "cancelled", "cancelling"):
            return before
        if before == "suspended":
            kube.delete(JOBS, run, uid=job["metadata"]["uid"], dry_run=dry_run)
            return before
        change = {
            "metadata": {
                "resourceVersion": job["metadata"]["resourceVersion"],
                "annotations": {CANCELLED_NOTE: datetime.now(UTC).isoformat(timespec="seconds")},
            },
            "spec": {"activeDeadlineSeconds": 1},
        }
        try:
            kube.patch(JOBS, run, change, dry_run=dry_run)
        except ConflictError:  # its controller has just written its status
            continue
        return before
    raise MachineError(f"the Job {run} changes all the time. Try again.")


def resume(kube: Kube, run: str, *, dry_run: bool = False) -> Submitted:
    """Run a failed or cancelled run again, under its name, with the template as it is now.

    Raises:
        ConfigError: it succeeded.
        MachineError: it is being cancelled, so its driver still works; or the server refuses.
    """
    job = find_job(kube, run)
    state = state_of(job)
    if state == "succeeded":
        raise ConfigError(f"the run {run} has succeeded; there is nothing to resume.")
    if state == "cancelling":
        raise MachineError(
            f"the run {run} is still being cancelled: its driver has a minute for its checkpoint. "
            "Resume it when `metaloom cluster status` says that it is cancelled."
        )
    if state not in ("failed", "cancelled"):
        return Submitted(run, False, state)
    template = cron_job(kube)["spec"]["jobTemplate"]
    notes = job["metadata"].get("annotations") or {}
    again = job_of(
        template, run, commit=notes.get(COMMIT_NOTE), because=notes.get(BECAUSE_NOTE, "manual")
    )
    if dry_run:
        return _checked_again(kube, again)
    _remove(kube, job)
    made = kube.create(JOBS, again)
    return Submitted(run, True, state_of(made))


def _checked_again(kube: Kube, job: Mapping[str, Any]) -> Submitted:
    """What the server would say to a Job whose name is still taken."""
    name = job["metadata"]["name"]
    kube.create(
        JOBS, {**job, "metadata": {**job["metadata"], "name": f"{name}-again"}}, dry_run=True
    )
    return Submitted(name, True, "waiting")


def _remove(kube: Kube, job: Mapping[str, Any]) -> None:
    name, uid = job["metadata"]["name"], job["metadata"]["uid"]
    end = time.monotonic() + _GONE_SECONDS
    try:
        kube.delete(JOBS, name, uid=uid)
        while kube.get(JOBS, name)["metadata"]["uid"] == uid:
            if time.monotonic() > end:
                raise MachineError(
                    f"the old Job {name} is still being deleted after {_GONE_SECONDS:g} s. Look at "
                    "its finalizers, then try again."
                )
            time.sleep(_POLL_SECONDS)
    except (MissingError, ConflictError):  # gone; or another of that name is there already
        return
