"""What our API server and a real one have in common: these tests pass against both."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
from typing import Any

import pytest

from pipeline.cluster.kube.errors import (
    ApiError,
    ConflictError,
    ExistsError,
    ExpiredError,
    MissingError,
)
from pipeline.cluster.kube.kinds import (
    CONFIG_MAPS,
    CRON_JOBS,
    JOBS,
    LEASES,
    PODS,
    RAY_JOBS,
    RETRAIN,
    Kind,
)
from pipeline.cluster.kube.retraining import job_of
from pipeline.cluster.kube.watch import _events
from tests.infra.kube_cluster import (
    Cluster,
    api_server,
    cluster,
    eventually,
    manifest,
    typed,
)

__all__ = ["api_server", "cluster"]


def config_map(name: str, **data: str) -> dict[str, Any]:
    return typed(CONFIG_MAPS, {"metadata": {"name": name}, "data": data})


def job(name: str, **spec: Any) -> dict[str, Any]:
    pod = {
        "restartPolicy": "Never",
        "nodeSelector": {"metaloom.dev/no-such-node": "true"},
        "containers": [{"name": "driver", "image": "none"}],
    }
    template = {"metadata": {}, "spec": pod}
    return typed(JOBS, {"metadata": {"name": name}, "spec": {"template": template, **spec}})


def test_an_object_has_a_version_and_a_stale_write_is_refused(cluster: Cluster) -> None:
    kube = cluster.kube
    first = kube.create(CONFIG_MAPS, config_map("a", x="1"))
    assert first["metadata"]["uid"] and first["metadata"]["creationTimestamp"]
    second = kube.replace(CONFIG_MAPS, {**first, "data": {"x": "2"}})
    assert second["metadata"]["resourceVersion"] != first["metadata"]["resourceVersion"]
    with pytest.raises(ConflictError, match="changed by somebody else"):
        kube.replace(CONFIG_MAPS, {**first, "data": {"x": "3"}})
    stale = {"metadata": {"resourceVersion": first["metadata"]["resourceVersion"]}, "data": {}}
    with pytest.raises(ConflictError):
        kube.patch(CONFIG_MAPS, "a", stale)
    assert kube.get(CONFIG_MAPS, "a")["data"] == {"x": "2"}


def test_names_are_taken_once_and_missing_ones_are_said(cluster: Cluster) -> None:
    kube = cluster.kube
    kube.create(CONFIG_MAPS, config_map("a"))
    with pytest.raises(ExistsError, match="'a' exists in namespace"):
        kube.create(CONFIG_MAPS, config_map("a"))
    with pytest.raises(MissingError, match="there is no configmaps 'b'"):
        kube.get(CONFIG_MAPS, "b")
    with pytest.raises(MissingError):
        kube.delete(CONFIG_MAPS, "b")
    generated = typed(CONFIG_MAPS, {"metadata": {"generateName": "made-"}})
    names = {kube.create(CONFIG_MAPS, generated)["metadata"]["name"] for _ in range(3)}
    assert len(names) == 3 and all(name.startswith("made-") for name in names)


def test_a_dry_run_checks_all_and_keeps_nothing(cluster: Cluster) -> None:
    kube = cluster.kube
    assert kube.create(JOBS, job("a"), dry_run=True)["spec"]["backoffLimit"] == 6
    with pytest.raises(MissingError):
        kube.get(JOBS, "a")
    made = kube.create(CONFIG_MAPS, config_map("c", x="1"))
    shown = kube.patch(CONFIG_MAPS, "c", {"data": {"x": "2"}}, dry_run=True)
    assert shown["data"] == {"x": "2"}
    kube.delete(CONFIG_MAPS, "c", dry_run=True)
    kept = kube.get(CONFIG_MAPS, "c")
    assert kept["data"] == {"x": "1"}
    assert kept["metadata"]["resourceVersion"] == made["metadata"]["resourceVersion"]
    with pytest.raises(ApiError, match="restartPolicy"):
        wrong = job("b")
        wrong["spec"]["template"]["spec"]["restartPolicy"] = "Always"
        kube.create(JOBS, wrong, dry_run=True)


def test_a_merge_patch_removes_with_null_and_replaces_lists(cluster: Cluster) -> None:
    kube = cluster.kube
    kube.create(CONFIG_MAPS, config_map("a", x="1", y="2"))
    kube.patch(CONFIG_MAPS, "a", {"metadata": {"labels": {"k": "v"}}, "data": {"x": None}})
    found = kube.get(CONFIG_MAPS, "a")
    assert found["data"] == {"y": "2"} and found["metadata"]["labels"] == {"k": "v"}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"spec": {"bakcoffLimit": 3}}, "unknown field"),
        ({"spec": {"backoffLimit": "three"}}, "backoffLimit"),
        ({"spec": {"backoffLimit": -1}}, "backoffLimit"),
        ({"metadata": {"name": "Not_A_Name"}}, "metadata.name"),
        ({"metadata": {"labels": {"k": "no spaces"}}}, "metadata.labels"),
        ({"spec": {"template": {"spec": {"containers": []}}}}, "containers"),
    ],
)
def test_what_is_wrong_is_refused_by_its_field(
    change: dict[str, Any], expected: str, cluster: Cluster
) -> None:
    wrong = job("a")
    for part, values in change.items():
        for key, value in values.items():
            if key == "template":
                wrong["spec"]["template"]["spec"] |= value["spec"]
            else:
                wrong[part][key] = value
    with pytest.raises(ApiError, match=expected) as refused:
        cluster.kube.create(JOBS, wrong)
    assert refused.value.code in (400, 422)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("schedule", "61 2 * * *"),
        ("schedule", "every night"),
        ("schedule", "0 2 * *"),
        ("timeZone", "Europe/Nowhere"),
        ("concurrencyPolicy", "Never"),
    ],
)
def test_a_cron_job_is_checked(field: str, value: str, cluster: Cluster) -> None:
    wrong = manifest("retrain.yaml", "CronJob")
    wrong["spec"][field] = value
    with pytest.raises(ApiError, match=field):
        cluster.kube.create(CRON_JOBS, wrong)


def test_the_manifests_are_accepted(cluster: Cluster) -> None:
    cluster.needs_ray_jobs()
    assert cluster.apply_retraining()["spec"]["concurrencyPolicy"] == "Forbid"
    train = manifest("train.yaml", "RayJob")
    assert cluster.kube.create(RAY_JOBS, train)["spec"]["suspend"] is True


def test_a_job_s_template_cannot_change(cluster: Cluster) -> None:
    kube = cluster.kube
    kube.create(JOBS, job("a", suspend=True))
    change = {"spec": {"template": {"spec": {"restartPolicy": "OnFailure"}}}}
    with pytest.raises(ApiError, match="immutable"):
        kube.patch(JOBS, "a", change)
    assert kube.patch(JOBS, "a", {"spec": {"activeDeadlineSeconds": 5}})["spec"]["suspend"] is True


def test_status_is_written_apart(cluster: Cluster) -> None:
    kube = cluster.kube
    kube.create(JOBS, job("a", suspend=True))
    kube.patch(JOBS, "a", {"status": {"ready": 1}, "metadata": {"labels": {"k": "v"}}})
    found = kube.get(JOBS, "a")
    assert found["metadata"]["labels"]["k"] == "v" and not found["status"].get("ready")


def test_selectors_and_pages(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    kube = cluster.kube
    for number in range(7):
        item = config_map(f"m{number}")
        item["metadata"]["labels"] = {"parity": "even" if number % 2 == 0 else "odd"}
        kube.create(CONFIG_MAPS, item)

    def names(**selectors: str) -> list[str]:
        found = kube.select(CONFIG_MAPS, **selectors)
        return [i["metadata"]["name"] for i in found if i["metadata"]["name"] != "kube-root-ca.crt"]

    monkeypatch.setattr("pipeline.cluster.kube.api._PAGE", 2)
    assert names() == [f"m{number}" for number in range(7)]
    assert names(labels="parity=odd") == ["m1", "m3", "m5"]
    assert names(labels="parity!=odd,parity") == ["m0", "m2", "m4", "m6"]
    assert names(labels="parity in (even, none)") == ["m0", "m2", "m4", "m6"]
    assert names(fields="metadata.name=m3") == ["m3"]


def test_a_watch_tells_each_change_in_order(cluster: Cluster) -> None:
    kube = cluster.kube
    version = kube.select_with_version(CONFIG_MAPS)[1]
    item = config_map("a", x="1")
    item["metadata"]["labels"] = {"seen": "yes"}
    made = kube.create(CONFIG_MAPS, item)
    kube.replace(CONFIG_MAPS, {**made, "data": {"x": "2"}})
    kube.patch(CONFIG_MAPS, "a", {"metadata": {"labels": {"seen": "no"}}})
    kube.patch(CONFIG_MAPS, "a", {"metadata": {"labels": {"seen": "yes"}}})
    kube.delete(CONFIG_MAPS, "a")
    events = itertools.islice(_events(kube, CONFIG_MAPS, "seen=yes", "", version, 20), 5)
    told = [(e.what, e.item["data"]["x"]) for e in events if e.what != "BOOKMARK"]
    assert told == [
        ("ADDED", "1"),
        ("MODIFIED", "2"),
        ("DELETED", "2"),
        ("ADDED", "2"),
        ("DELETED", "2"),
    ]


def test_bookmarks_and_an_expired_version(cluster: Cluster) -> None:
    kube, server = cluster.kube, cluster.ours
    version = kube.select_with_version(CONFIG_MAPS)[1]
    kube.create(LEASES, typed(LEASES, {"metadata": {"name": "other"}, "spec": {}}))
    mark = next(_events(kube, CONFIG_MAPS, "", "", version, 20))
    assert mark.what == "BOOKMARK"
    assert int(mark.item["metadata"]["resourceVersion"]) > int(version)
    server.store.forget_history()
    with pytest.raises(ExpiredError, match="too old resource version"):
        next(_events(kube, CONFIG_MAPS, "", "", version, 20))


def test_what_belongs_to_a_deleted_object_goes_with_it(cluster: Cluster) -> None:
    kube = cluster.kube
    cluster.apply_retraining()
    made = kube.create(JOBS, job("a"))
    assert cluster.pod("a")
    with pytest.raises(ConflictError):
        kube.delete(JOBS, "a", uid="00000000-0000-0000-0000-000000000000")
    kube.delete(JOBS, "a", uid=made["metadata"]["uid"])
    eventually(lambda: not kube.select(PODS))


def test_a_namespace_must_exist(cluster: Cluster) -> None:
    from dataclasses import replace

    elsewhere = replace(cluster.kube, namespace="metaloom-no-such-namespace")
    with pytest.raises(MissingError, match="namespace 'metaloom-no-such-namespace' does not exist"):
        elsewhere.create(CONFIG_MAPS, config_map("a"))
    assert elsewhere.select(CONFIG_MAPS) == []


def test_an_unknown_resource_is_told_from_a_missing_object(cluster: Cluster) -> None:
    unknown = Kind("ray.io", "v9", "rayjobs", "RayJob")
    with pytest.raises(ApiError, match=r"does not know.*CustomResourceDefinition.*KubeRay") as got:
        cluster.kube.select(unknown)
    assert not isinstance(got.value, MissingError)


def test_kubectl_finds_its_way(cluster: Cluster) -> None:
    """A client that others wrote: discovery, tables, apply and delete."""
    if shutil.which("kubectl") is None:
        pytest.skip("there is no kubectl")
    cluster.apply_retraining()

    def kubectl(*arguments: str, told: str = "") -> str:
        done = subprocess.run(
            ["kubectl", *arguments, "-n", cluster.namespace, "--cache-dir=/dev/null/none"],
            input=told,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "metaloom-retrain" in kubectl("get", "cronjobs", "-o", "name")
    from_template = ["create", "job", "by-hand", "--from=cronjob/metaloom-retrain"]
    text = kubectl(*from_template, "--dry-run=client", "-o", "json")
    # As JSON: ours does not read the binary form that kubectl has for kinds that it knows.
    assert "job.batch/by-hand created" in kubectl("create", "-f-", "--validate=false", told=text)
    theirs = cluster.kube.get(JOBS, "by-hand")
    template = cluster.kube.get(CRON_JOBS, RETRAIN)["spec"]["jobTemplate"]
    ours = job_of(template, "ours", commit=None, because="cron")
    assert json.loads(text)["spec"]["template"]["spec"].keys() == pod_of(ours).keys()
    environment = {entry["name"]: entry for entry in pod_of(theirs)["containers"][0]["env"]}
    assert {e["name"]: e for e in pod_of(ours)["containers"][0]["env"]} == environment
    kubectl("delete", "job", "by-hand", "--wait=false")


def pod_of(made: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = made["spec"]["template"]["spec"]
    return found
