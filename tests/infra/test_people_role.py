"""The Role for people allows what the commands do, and nothing else."""

from __future__ import annotations

import re

import yaml

from pipeline.cluster.kube.doctor import NEEDS
from tests.conftest import REPOSITORY

FILE = "infra/kubernetes/people/role.yaml"


def allowed() -> set[tuple[str, str, str]]:
    """(group, resource, verb) of every rule."""
    role = yaml.safe_load((REPOSITORY / FILE).read_text())
    assert (role["kind"], role["metadata"]["namespace"]) == ("Role", "metaloom")
    return {
        (group, resource, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def test_the_role_is_what_doctor_asks_for() -> None:
    needed = {
        (kind.group, f"{kind.plural}/{sub}" if sub else kind.plural, verb)
        for kind, sub, verbs in NEEDS
        for verb in verbs
    }
    assert allowed() == needed


def test_the_page_lists_the_same_rights() -> None:
    page = (REPOSITORY / "docs/kubernetes.md").read_text()
    assert "\n## The client\n" in page, "doctor refers to it"
    assert FILE in page
    rows = re.findall(r"^\| `([\w/]+)` of (`[\w.]+`|the core) \| ([a-z, ]+) \|", page, re.MULTILINE)
    listed = {
        ("" if group == "the core" else group.strip("`"), resource, verb)
        for resource, group, verbs in rows
        for verb in verbs.split(", ")
    }
    assert listed == allowed()
