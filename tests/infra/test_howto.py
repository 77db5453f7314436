"""What the how-to pages tell people to type exists."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.manifests.documents import Document, look, named, render
from infra.manifests.table import check, rules
from tests.conftest import REPOSITORY

PAGES = [
    REPOSITORY / name
    for name in (
        "docs/kubernetes.md",
        "docs/kubernetes-pods.md",
        "infra/images/README.md",
        "infra/mlflow/README.md",
    )
]
MINE = "my-cluster/kustomization.yaml"


def typed(page: Path) -> list[list[str]]:
    """Commands of a page's blocks, continued lines joined, without what follows a pipe."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    text = "\n".join(block for language, block in blocks if not language).replace("\\\n", " ")
    lines = [line for line in text.splitlines() if re.match(r"(metaloom|python -m|kubectl) ", line)]
    return [
        shlex.split(line.partition(" | ")[0].partition(" > ")[0], comments=True) for line in lines
    ]


COMMANDS = [command for page in PAGES for command in typed(page)]


def _inner(command: list[str]) -> list[str]:
    """`kubectl exec ... -- metaloom keys make` as `metaloom keys make`."""
    return (
        command[command.index("--") + 1 :]
        if "--" in command and command[0] == "kubectl"
        else command
    )


METALOOM = [c for c in map(_inner, COMMANDS) if c[0] == "metaloom"]


def test_the_pages_tell_people_to_type_something() -> None:
    assert len(COMMANDS) > 20 and len(METALOOM) >= 6


@pytest.mark.parametrize("command", METALOOM, ids=" ".join)
def test_a_command_and_its_options_exist(command: list[str]) -> None:
    words = [word for word in command[1:] if not word.startswith("-")]
    names: list[str] = []
    for word in words:
        done = _help([*names, word])
        if done.returncode != 0:
            break
        names.append(word)
        if "COMMAND" not in done.stdout.splitlines()[0]:
            break
    assert names, command
    text = _help(names).stdout
    assert "Commands:" not in text, f"{command} names a group"
    for option in (word for word in command if word.startswith("--")):
        assert option in text, (command, option)


def _help(names: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *names, "--help"],
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
    )


def test_modules_and_files_exist() -> None:
    for command in COMMANDS:
        if command[:2] == ["python", "-m"]:
            module = REPOSITORY / command[2].replace(".", "/")
            assert module.with_suffix(".py").exists() or (module / "__main__.py").exists(), command
    for page in PAGES:
        text = page.read_text()
        for path in re.findall(r"`((?:infra|tests|docs)/[\w./-]+)`", text):
            assert (REPOSITORY / path).exists(), (page, path)
        for link in re.findall(r"\]\(([\w./-]+\.md)\)", text):
            assert (page.parent / link).exists(), (page, link)
        for path in re.findall(
            r"(?:-k|-f|--file|--values|--resources) ((?:\.\./)?infra/\S+)", text
        ):
            assert (REPOSITORY / path.removeprefix("../")).exists(), (page, path)


def test_the_secrets_are_those_that_the_manifests_ask_for() -> None:
    manifests = "".join(p.read_text() for p in (REPOSITORY / "infra/kubernetes").rglob("*.yaml"))
    asked = set(re.findall(r"secretName: (metaloom-[a-z0-9-]+)", manifests))
    values = (REPOSITORY / "infra/mlflow/values.yaml").read_text()
    asked |= set(re.findall(r"(?:secretName|name): (metaloom-(?:mlflow-server|s3))\b", values))
    made = {command[command.index("generic") + 1] for command in COMMANDS if "generic" in command}
    assert asked <= made, asked - made


def test_no_secret_is_an_argument() -> None:
    for page in PAGES:
        assert "--from-literal" not in page.read_text(), page


def _shown(first_line: str) -> list[Any]:
    """The YAML blocks of the pages that begin with this comment; digests made up."""
    text = "".join(page.read_text() for page in PAGES)
    blocks = re.findall(rf"^```yaml\n# {re.escape(first_line)}\n(.*?)^```", text, re.M | re.S)
    assert blocks, first_line
    return [
        yaml.safe_load(b.replace("REGISTRY", "registry.test").replace("...", 64 * "1"))
        for b in blocks
    ]


def _site(folder: Path, overlay: str = "gpu") -> dict[str, Any]:
    """A checkout's manifests with the page's overlay, every patch of the pages, and the drift one."""
    shutil.copytree(REPOSITORY / "infra/kubernetes", folder / "infra/kubernetes")
    mine: dict[str, Any] = _shown(MINE)[0]
    for patches in _shown(f"patches of {MINE}"):
        mine["patches"] += patches
    mine["resources"] = [one.replace("/gpu", f"/{overlay}") for one in mine["resources"]]
    _write(folder / MINE, mine)
    for path in (
        "my-cluster-drift/kustomization.yaml",
        "my-cluster-drift/cron-job/kustomization.yaml",
    ):
        _write(folder / path, _shown(path)[0])
    return mine


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content))


def _complaints(documents: list[Document]) -> list[str]:
    """Of our own check; a secret that a reader makes by himself is none of ours."""
    said = [str(finding) for _, finding in check(documents, rules(None))]
    return [one for one in said if "'metaloom-webhook'" not in one]


def _driver(documents: list[Document], cron_job: str) -> dict[str, Any]:
    env = look(
        named(documents, "CronJob", cron_job),
        "spec.jobTemplate.spec.template.spec.containers",
    )[0]["env"]
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in env}


def test_the_overlay_and_the_patches_of_the_pages_do_what_they_say(tmp_path: Path) -> None:
    _site(tmp_path)
    documents = render(tmp_path / "my-cluster-drift")
    assert _complaints(documents) == []
    night = named(documents, "CronJob", "metaloom-retrain")
    drift = named(documents, "CronJob", "metaloom-retrain-drift")
    assert look(night, "spec.suspend") is False and look(drift, "spec.suspend") is False
    assert look(night, "spec.timeZone") == "Europe/Berlin"
    assert look(night, "spec.schedule") != look(drift, "spec.schedule")
    first, second = (_driver(documents, f"metaloom-retrain{end}") for end in ("", "-drift"))
    assert (first.pop("METALOOM_BECAUSE"), second.pop("METALOOM_BECAUSE")) == ("cron", "drift")
    assert first == second and first["METALOOM_WEBHOOK"]["secretKeyRef"]["optional"] is True
    service = named(documents, "Deployment", "metaloom-serve")
    assert look(service, "spec.replicas") is None
    names = look(named(documents, "NetworkPolicy", "metaloom-dns"), "spec.egress")
    assert [rule["ports"][0]["port"] for rule in names] == [53, 53, 5353]
    alone = render(tmp_path / "my-cluster")
    assert len(documents) == len(alone) + 1, "the second CronJob, and nothing else"


def test_a_ray_service_runs_in_the_image_that_has_ray(tmp_path: Path) -> None:
    mine = _site(tmp_path, "rayservice")
    (mine["images"],) = _shown("images of an overlay on rayservice")
    mine["patches"] = [one for one in mine["patches"] if "Deployment" not in str(one)]
    _write(tmp_path / MINE, mine)
    documents = render(tmp_path / "my-cluster")
    assert _complaints(documents) == []
    images = set(re.findall(r"'image': '([^']+)'", str(documents)))
    assert images == {f"registry.test/metaloom-train@sha256:{64 * '1'}"}
