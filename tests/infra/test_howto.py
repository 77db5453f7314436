"""What the how-to pages tell people to type exists."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

PAGES = [
    REPOSITORY / name
    for name in ("docs/kubernetes.md", "infra/images/README.md", "infra/mlflow/README.md")
]


def typed(page: Path) -> list[list[str]]:
    """Commands of a page's blocks, continued lines joined, without what follows a pipe."""
    blocks = re.findall(r"^```\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    text = "\n".join(blocks).replace("\\\n", " ")
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
