"""Requests and watches: what is tried again, what is told, and that nothing is lost."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.cluster.kube.api import backoff
from pipeline.cluster.kube.connect import connect
from pipeline.cluster.kube.errors import ApiError, BusyError, UnreachableError
from pipeline.cluster.kube.kinds import CONFIG_MAPS, JOBS, PODS, RAY_JOBS
from pipeline.cluster.kube.watch import changes_of, watch
from pipeline.core.errors import ConfigError, MachineError
from tests.infra.api_server.certificates import certificate
from tests.infra.api_server.server import TOKEN, DroppedError
from tests.infra.api_server.status import RefusedError, over_quota
from tests.infra.kube_cluster import Cluster, api_server, cluster, eventually, typed

__all__ = ["api_server", "cluster"]


def config_map(name: str, **data: str) -> dict[str, Any]:
    return typed(CONFIG_MAPS, {"metadata": {"name": name}, "data": data})


def unavailable() -> RefusedError:
    return RefusedError(503, "ServiceUnavailable", "etcdserver: leader changed")


def test_a_busy_server_is_asked_again_when_it_says(cluster: Cluster) -> None:
    server = cluster.ours
    server.throttle("create", "configmaps", seconds=1, times=2)
    server.requests.clear()
    begin = time.monotonic()
    cluster.kube.create(CONFIG_MAPS, config_map("a"))
    assert len(server.requests) == 3
    assert time.monotonic() - begin >= 2, "Retry-After was honoured twice"


@pytest.mark.parametrize("fault", [unavailable(), DroppedError()])
def test_a_fault_that_passes_is_not_noticed(fault: Exception, cluster: Cluster) -> None:
    cluster.ours.refuse(".*", "configmaps", fault, times=3)
    assert cluster.kube.create(CONFIG_MAPS, config_map("a"))["metadata"]["uid"]


def test_patience_ends(cluster: Cluster) -> None:
    server = cluster.ours
    brief = replace(cluster.kube, patience_seconds=0.7)
    server.refuse("get", "configmaps", unavailable())
    with pytest.raises(BusyError, match=r"status 503: etcdserver.*Try again later"):
        brief.get(CONFIG_MAPS, "a")
    server.rules.clear()
    server.throttle("get", "configmaps", seconds=3600, times=10**6)
    server.requests.clear()
    with pytest.raises(BusyError):
        brief.get(CONFIG_MAPS, "a")
    assert len(server.requests) == 1, "an hour is longer than our patience: nobody waits for it"


def test_the_waits_grow_and_are_spread() -> None:
    for attempt in range(12):
        full = min(0.25 * 2**attempt, 10)
        waits = {backoff(attempt) for _ in range(20)}
        assert len(waits) > 1 and all(full / 2 <= wait <= full for wait in waits)


def test_nobody_listens(cluster: Cluster) -> None:
    cluster.ours.stop()
    with pytest.raises(UnreachableError, match=r"https://127.0.0.1:\d+ does not answer.*refused"):
        replace(cluster.kube, patience_seconds=0.5).get(JOBS, "a")


def test_a_wrong_certificate_is_no_traceback(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = cluster.ours
    path = server.kubeconfig(tmp_path / "other", cluster.namespace)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line for line in lines if "certificate-authority" not in line))
    monkeypatch.setenv("KUBECONFIG", str(path))
    with pytest.raises(UnreachableError, match="certificate"):
        connect(patience_seconds=0.1).get(JOBS, "a")


def test_a_login_that_has_expired(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = cluster.ours.kubeconfig(tmp_path / "other", cluster.namespace, token="old")
    monkeypatch.setenv("KUBECONFIG", str(path))
    with pytest.raises(ApiError, match="has expired. Log in again"):
        connect().get(JOBS, "a")


def test_what_is_forbidden_is_said_with_the_rule_that_allows_it(cluster: Cluster) -> None:
    cluster.ours.denied.append(("create", "configmaps"))
    expected = (
        r'not allowed to create configmaps in namespace \S+\. .*apiGroups: \[""\], '
        r'resources: \["configmaps"\], verbs: \["create"\].*knows you as "tester"'
    )
    with pytest.raises(ApiError, match=expected):
        cluster.kube.create(CONFIG_MAPS, config_map("a"))
    assert not cluster.kube.allowed("create", CONFIG_MAPS)
    assert cluster.kube.allowed("get", CONFIG_MAPS)
    assert cluster.kube.allowed("get", PODS, "log")


def test_a_quota_is_no_missing_role(cluster: Cluster) -> None:
    server = cluster.ours
    asked = "requested: requests.nvidia.com/gpu=1, used: requests.nvidia.com/gpu=4, limited: 4"
    server.refuse("create", "jobs", over_quota(server.resource("jobs"), "a", "gpus", asked))
    with pytest.raises(ApiError, match=r"quota.*is used up: gpus, requested.*gpu=1") as refused:
        cluster.kube.create(JOBS, typed(JOBS, {"metadata": {"name": "a"}, "spec": {}}))
    assert "Role" not in str(refused.value)


def test_no_kubeconfig(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(MachineError, match=r"there is no kubeconfig .*none.*set KUBECONFIG"):
        connect()
    (tmp_path / "broken").write_text("clusters: [")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "broken"))
    with pytest.raises(ConfigError, match=r"broken cannot be used"):
        connect()


def test_another_context(cluster: Cluster) -> None:
    with pytest.raises(ConfigError, match=r"cannot be used: .*nowhere.*get-contexts"):
        connect(context="nowhere")


def test_the_namespace_is_the_contexts_unless_one_is_given(cluster: Cluster) -> None:
    _ = cluster.ours
    assert connect().namespace == cluster.namespace
    assert connect("elsewhere").namespace == "elsewhere"


def follow_all(cluster: Cluster, seconds: float, seen: dict[str, str], log: list[str]) -> None:
    for change in watch(cluster.kube, CONFIG_MAPS, labels="watched", seconds=seconds):
        name, log_line = change.item["metadata"]["name"], change.what
        log.append(f"{log_line} {name}")
        if change.what == "DELETED":
            assert seen.pop(name, None) is not None, f"{name} was deleted before it was there"
        else:
            assert (change.what == "ADDED") == (name not in seen), (change.what, name)
            seen[name] = change.item["data"]["x"]


@pytest.mark.parametrize("faults", ["none", "cuts", "forgets", "errors"])
def test_a_watch_ends_with_what_there_is(faults: str, cluster: Cluster) -> None:
    """A hundred random writes while connections are cut and the history is forgotten."""
    rng, kube = random.Random(7), cluster.kube
    server = cluster.ours if faults != "none" else cluster.server
    seen: dict[str, str] = {}
    log: list[str] = []
    watcher = threading.Thread(target=follow_all, args=(cluster, 7, seen, log))
    watcher.start()
    truth: dict[str, str] = {}
    for number in range(100):
        name = f"m{rng.randrange(8)}"
        if name not in truth:
            item = config_map(name, x=str(number))
            item["metadata"]["labels"] = {"watched": "yes"}
            kube.create(CONFIG_MAPS, item)
            truth[name] = str(number)
        elif rng.random() < 0.3:
            kube.delete(CONFIG_MAPS, name)
            del truth[name]
        else:
            kube.patch(CONFIG_MAPS, name, {"data": {"x": str(number)}})
            truth[name] = str(number)
        if server is not None and number % 10 == 0:
            _break(server, faults)
        time.sleep(0.02)
    if server is not None:
        server.rules.clear()
    eventually(lambda: seen == truth, seconds=7)
    watcher.join()
    assert seen == truth and len(log) >= len(truth)


def _break(server: Any, faults: str) -> None:
    if faults == "cuts":
        server.cut_watches()
        server.refuse("watch", "configmaps", DroppedError(), times=1)
    if faults == "forgets":
        server.cut_watches()
        server.store.forget_history()
    if faults == "errors":
        server.cut_watches()
        server.refuse("watch", "configmaps", unavailable(), times=2)


def test_a_watch_gives_up_after_many_failures_in_a_row(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.cluster.kube.watch._FAILURES_IN_A_ROW", 2)
    cluster.ours.refuse("watch", "configmaps", DroppedError())
    with pytest.raises(UnreachableError):
        list(watch(cluster.kube, CONFIG_MAPS, seconds=60))


def test_a_watch_of_what_is_forbidden_ends_at_once(cluster: Cluster) -> None:
    cluster.ours.denied.append(("watch", "configmaps"))
    with pytest.raises(ApiError, match="not allowed to watch configmaps"):
        list(watch(cluster.kube, CONFIG_MAPS, seconds=60))
    with changes_of(cluster.kube, CONFIG_MAPS, "a") as changes:
        assert isinstance(changes.get(timeout=10), ApiError)


def test_a_missing_crd(cluster: Cluster) -> None:
    server = cluster.ours
    server.resources = [r for r in server.resources if r.group != "ray.io"]
    with pytest.raises(ApiError, match=r"does not know the resource rayjobs.*KubeRay operator"):
        cluster.kube.get(RAY_JOBS, "a")


def test_a_pod_uses_its_service_account(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = cluster.ours
    public, _ = certificate()
    for name, content in (("token", TOKEN), ("namespace", cluster.namespace)):
        (tmp_path / name).write_text(content)
    (tmp_path / "ca.crt").write_bytes(public)
    monkeypatch.delenv("KUBECONFIG")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.port))
    monkeypatch.setattr("pipeline.cluster.kube.connect._MOUNTED_NAMESPACE", tmp_path / "namespace")
    mounted = "kubernetes.config.incluster_config.SERVICE"
    monkeypatch.setattr(f"{mounted}_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr(f"{mounted}_CERT_FILENAME", str(tmp_path / "ca.crt"))
    kube = connect()
    assert kube.namespace == cluster.namespace
    assert kube.create(CONFIG_MAPS, config_map("a"))["metadata"]["uid"]
