"""The manifests of infra/kubernetes are right, and the checker would say if they were not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from infra.manifests.documents import (
    OVERLAYS,
    Document,
    find,
    look,
    named,
    of_kind,
    overlay_names,
    render,
)
from infra.manifests.planted import Mistake, findings, mistakes, rendered, spoil
from infra.manifests.pods import pods
from infra.manifests.table import CUSTOM, RULES, check, rules
from pipeline.cluster.kube.ray_jobs import ray_job_name, ray_job_of
from pipeline.cluster.kube.retraining import job_of
from pipeline.core.errors import ConfigError
from tests.conftest import REPOSITORY

CRDS = Path(os.environ.get("METALOOM_CRDS", REPOSITORY.parent / "shared" / "data" / "crds"))
HAS_CRDS = any(CRDS.glob("*.yaml"))
NAMES = overlay_names()
MISTAKES = mistakes()

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")
needs_definitions = pytest.mark.skipif(
    not HAS_CRDS, reason=f"needs the definitions of KubeRay and Kueue in {CRDS} (METALOOM_CRDS)"
)


@pytest.mark.parametrize("overlay", NAMES)
def test_an_overlay_has_no_mistakes(overlay: str) -> None:
    assert [f"[{rule}] {one}" for rule, one in check(rendered(overlay), RULES)] == []


@needs_definitions
@pytest.mark.parametrize("overlay", NAMES)
def test_custom_resources_are_those_of_their_definitions(overlay: str) -> None:
    assert [str(one) for one in rules(CRDS)[CUSTOM](rendered(overlay))] == []


@pytest.mark.parametrize(
    "mistake",
    [
        pytest.param(
            one, id=f"{one.rule}: {one.name}", marks=needs_definitions if one.rule == CUSTOM else ()
        )
        for one in MISTAKES
    ],
)
def test_a_planted_mistake_is_found(mistake: Mistake) -> None:
    spoilt = spoil(rendered(mistake.overlay), mistake)
    assert spoilt != list(rendered(mistake.overlay))
    known = rules(CRDS if HAS_CRDS else None)
    found = findings(mistake, known)
    assert found, [str(one) for one in known[mistake.rule](spoilt)]
    assert all(one.where and one.what and one.mend.endswith(".") for one in found)


def test_there_are_many_mistakes_for_every_rule_and_overlay() -> None:
    assert len(MISTAKES) >= 60
    assert len({one.name for one in MISTAKES}) == len(MISTAKES)
    assert {one.rule for one in MISTAKES} == {*RULES, CUSTOM}
    assert {one.overlay for one in MISTAKES} == set(NAMES)


def test_the_overlays_are_those_of_the_documentation() -> None:
    assert NAMES == ["cpu", "gpu", "kueue", "minimal", "rayservice"]
    text = (REPOSITORY / "docs" / "kubernetes-pods.md").read_text()
    assert all(f"`{name}`" in text for name in NAMES)


def test_a_folder_that_kustomize_refuses_is_named(tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").write_text("resources: [nothing.yaml]\n")
    with pytest.raises(ConfigError, match="cannot be rendered"):
        render(tmp_path)


def test_without_the_definitions_their_tests_are_skipped_by_name(tmp_path: Path) -> None:
    which = ["-k", "test_custom_resources or custom-schema"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", __file__, *which],
        cwd=REPOSITORY,
        env={**os.environ, "METALOOM_CRDS": str(tmp_path), "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    wanted = len(NAMES) + sum(one.rule == CUSTOM for one in MISTAKES)
    assert done.returncode == 0 and f"{wanted} skipped" in done.stdout, done.stdout
    assert f"needs the definitions of KubeRay and Kueue in {tmp_path}" in done.stdout


@pytest.mark.parametrize("overlay", [name for name in NAMES if name != "minimal"])
def test_what_the_launcher_makes_of_the_template_is_right_too(overlay: str) -> None:
    """Its RayJob, in the place of the template, passes every rule and the definition of KubeRay."""
    template = one(overlay, "RayJob", "metaloom-train")
    made = ray_job_of(
        template,
        ray_job_name("0123456789abcdef"),
        entrypoint="python -m pipeline.launch.kubernetes_entry",
        environment={"METALOOM_JOB": "0" * 32},
        code="/workspace",
    )
    made["metadata"]["namespace"] = "metaloom"
    documents = [made if d is template else d for d in rendered(overlay)]
    assert [str(f) for _, f in check(documents, rules(CRDS if HAS_CRDS else None))] == []
    assert look(made, "spec.suspend") is (True if overlay == "kueue" else None)
    initial = [p for pod in pods([made]) for p in pod.containers if "initContainers" in p.where]
    assert len(initial) == 2
    for place in initial:
        assert {"name": "METALOOM_JOB", "value": "0" * 32} in place.value["env"]


@pytest.mark.parametrize("overlay", NAMES)
def test_what_is_submitted_out_of_the_cron_job_is_right_too(overlay: str) -> None:
    template = one(overlay, "CronJob", "metaloom-retrain")["spec"]["jobTemplate"]
    made = job_of(template, "retrain-0123456789-01234567", commit="a" * 40, because="manual")
    made["metadata"]["namespace"] = "metaloom"
    assert [str(f) for _, f in check([*rendered(overlay), made], RULES)] == []
    assert not {"METALOOM_COMMIT", "METALOOM_BECAUSE"} & {
        entry["name"]
        for entry in template["spec"]["template"]["spec"]["containers"][0]["env"]
        if entry in made["spec"]["template"]["spec"]["containers"][0]["env"]
    }


# what the overlays are for


def one(overlay: str, kind: str, name: str) -> Document:
    found = named(rendered(overlay), kind, name)
    assert found is not None
    return found


def test_training_pods_ask_for_gpus_where_there_are_some() -> None:
    path = "spec.rayClusterSpec.workerGroupSpecs[].template.spec.containers[].resources.limits"
    asked = {
        name: [
            p.value.get("nvidia.com/gpu") for p in find(one(name, "RayJob", "metaloom-train"), path)
        ]
        for name in ("cpu", "gpu", "kueue")
    }
    assert asked == {"cpu": [None], "gpu": ["1"], "kueue": ["1"]}


@pytest.mark.parametrize("overlay", [name for name in NAMES if name != "minimal"])
def test_the_training_job_is_a_template_that_never_runs_itself(overlay: str) -> None:
    job = one(overlay, "RayJob", "metaloom-train")
    assert look(job, "spec.suspend") is True
    assert "kueue.x-k8s.io/queue-name" not in job["metadata"]["labels"]


def test_only_the_driver_is_given_a_token_and_its_role_is_small() -> None:
    for overlay in NAMES:
        given = {
            p.where.partition(":")[0]
            for p in pods(rendered(overlay))
            if p.spec["automountServiceAccountToken"]
        }
        assert given == {"CronJob/metaloom-retrain"}
        assert [r["metadata"]["name"] for r in of_kind(rendered(overlay), "Role")] == [
            "metaloom-retrain"
        ]
    allowed = {
        (thing, verb)
        for rule in one("gpu", "Role", "metaloom-retrain")["rules"]
        for thing in rule["resources"]
        for verb in rule["verbs"]
    }
    assert allowed == {
        *(("rayjobs", verb) for verb in ("get", "list", "watch", "create", "delete")),
        *(("leases", verb) for verb in ("get", "update", "create")),
        ("pods", "list"),
        ("events", "list"),
    }


def test_the_smallest_needs_nothing_that_must_be_installed() -> None:
    groups = {document["apiVersion"].rpartition("/")[0] for document in rendered("minimal")}
    assert not groups & {"ray.io", "kueue.x-k8s.io", "autoscaling"}


def test_ray_is_the_version_that_is_pinned() -> None:
    pins = (REPOSITORY / "constraints.txt").read_text().split()
    for overlay in NAMES:
        for document in rendered(overlay):
            for path in ("spec.rayClusterSpec.rayVersion", "spec.rayClusterConfig.rayVersion"):
                for place in find(document, path):
                    assert f"ray=={place.value}" in pins


def test_git_takes_its_credential_from_the_file(tmp_path: Path) -> None:
    """The helper of the ConfigMap, with the path of the secret replaced, asked by git itself.

    A submodule's or an import's host, a name that only ends alike, and plain http get nothing.
    """
    text = one("cpu", "ConfigMap", "metaloom-git-config")["data"]["gitconfig"]
    (tmp_path / "credential").write_text("username=robot\npassword=from-the-file\n")
    config = tmp_path / "gitconfig"
    config.write_text(text.replace("/secrets/git/credential", str(tmp_path / "credential")))
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": str(config), "GIT_TERMINAL_PROMPT": "0"}
    environment["GIT_CONFIG_SYSTEM"] = os.devnull

    def told(repository: str, protocol: str, host: str) -> bool:
        done = subprocess.run(
            ["git", "credential", "fill"],
            input=f"protocol={protocol}\nhost={host}\n\n",
            env={**environment, "METALOOM_REPOSITORY": repository},
            capture_output=True,
            text=True,
            check=False,
        )
        assert ("username=robot\npassword=from-the-file" in done.stdout) == (done.returncode == 0)
        return done.returncode == 0

    ours = one("cpu", "ConfigMap", "metaloom-settings")["data"]["METALOOM_REPOSITORY"]
    assert told(ours, "https", "git.example.org")
    assert told("https://robot@git.example.org:8443/a.git", "https", "git.example.org:8443")
    for protocol, host in [
        *(("https", name) for name in ("example.com", "xgit.example.org", "gitxexample.org")),
        *(("https", "git.example.org:8443"), ("http", "git.example.org")),
    ]:
        assert not told(ours, protocol, host)
    assert not told("", "https", "git.example.org")


# the command


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "infra.manifests", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_counts_and_says_what_it_left_out(tmp_path: Path) -> None:
    done = run("minimal", "gpu", "--crds", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == [
        *("minimal", str(len(rendered("minimal"))), "documents", str(len(RULES)), "rules"),
        *("0", "findings"),
    ]
    assert "custom resources: own rules alone" in lines[1]
    assert lines[2] == f"custom-schema was left out: there are no definitions in {tmp_path}."


def test_the_command_finds_what_an_overlay_of_ones_own_spoils(tmp_path: Path) -> None:
    patch = {"apiVersion": "batch/v1", "kind": "CronJob", "metadata": {"name": "metaloom-retrain"}}
    own = {
        "resources": [os.path.relpath(OVERLAYS / "minimal", tmp_path)],
        "patches": [{"patch": yaml.safe_dump({**patch, "spec": {"schedule": "30 24 * * *"}})}],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(own))
    done = run(str(tmp_path))
    assert done.returncode == 1
    assert "[cron] CronJob/metaloom-retrain: spec.schedule" in done.stdout
    assert "'24' is no hour (0 to 23)" in done.stdout


def test_an_unknown_overlay_is_refused_by_name() -> None:
    done = run("gpus")
    assert done.returncode == 1 and "no overlay 'gpus'" in done.stderr
    assert "Traceback" not in done.stderr
