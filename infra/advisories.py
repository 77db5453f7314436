"""Known vulnerabilities of packages: from an advisory service by pip-audit, or from files."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from pipeline.core.errors import ConfigError, MachineError

_ECOSYSTEM = "PyPI"


@dataclass(frozen=True)
class Found:
    """One vulnerability that a version is known to have."""

    package: str
    version: str
    id: str
    aliases: tuple[str, ...]
    fixed: tuple[str, ...]
    """Versions without it."""

    @property
    def ids(self) -> frozenset[str]:
        """All its names."""
        return frozenset((self.id, *self.aliases))


@dataclass(frozen=True)
class Answer:
    """What is known, and of which packages nothing could be learnt."""

    found: tuple[Found, ...]
    not_audited: Mapping[str, str]
    """Why, by package."""


def public(version: str) -> str:
    """Advisories know `2.13.0`, not the build `2.13.0+cpu`."""
    return version.partition("+")[0]


def ask_service(packages: Mapping[str, str], arguments: Sequence[str]) -> Answer:
    """Ask pip-audit, which asks an advisory service.

    pip-audit ends with "no known vulnerabilities" where its service does not know a package at all,
    or a mirror of the index has no advisories: such packages are told apart here.

    Args:
        packages: version by name.
        arguments: more of pip-audit's, such as `--vulnerability-service osv`.

    Raises:
        MachineError: pip-audit is not installed.
    """
    with tempfile.TemporaryDirectory(prefix="metaloom-audit-") as folder:
        path = Path(folder) / "requirements.txt"
        path.write_text("".join(f"{n}=={public(v)}\n" for n, v in packages.items()))
        own = ["--requirement", str(path), "--no-deps", "--disable-pip", "--format", "json"]
        own += ["--progress-spinner", "off", "--desc", "off", "--aliases", "on"]
        done = subprocess.run(
            [sys.executable, "-m", "pip_audit", *own, *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
    if "No module named pip_audit" in done.stderr:
        raise MachineError(
            "pip-audit is not installed: pip install -e '.[audit]', or `make setup`."
        )
    try:
        told = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1][-300:]
        return Answer((), dict.fromkeys(packages, f"pip-audit could not ask: {said}"))
    return _answer(packages, told)


def _answer(packages: Mapping[str, str], told: Sequence[Mapping[str, Any]]) -> Answer:
    by_name = {canonicalize_name(one["name"]): one for one in told}
    found, missing = [], {}
    for name, version in packages.items():
        one = by_name.get(canonicalize_name(name), {"skip_reason": "pip-audit left it out"})
        if "skip_reason" in one:
            missing[name] = str(one["skip_reason"])
            continue
        found += [
            Found(
                name,
                version,
                str(entry["id"]),
                tuple(entry.get("aliases", ())),
                tuple(entry.get("fix_versions", ())),
            )
            for entry in one["vulns"]
        ]
    return Answer(tuple(found), missing)


def read_files(packages: Mapping[str, str], path: Path) -> Answer:
    """Look into advisories in OSV's format: a file, a folder of them, or OSV's own `all.zip`.

    Raises:
        ConfigError: there is none, or one cannot be read.
    """
    wanted = {canonicalize_name(name): (name, version) for name, version in packages.items()}
    found, number = [], 0
    for advisory in _advisories(path):
        number += 1
        if advisory.get("withdrawn"):
            continue
        for affected in advisory.get("affected", ()):
            package = affected.get("package", {})
            key = canonicalize_name(str(package.get("name", "")))
            if package.get("ecosystem") == _ECOSYSTEM and key in wanted:
                name, version = wanted[key]
                if is_affected(public(version), affected):
                    ids = str(advisory["id"]), tuple(advisory.get("aliases", ()))
                    found.append(Found(name, version, *ids, _fixed(affected)))
    if not number:
        raise ConfigError(f"{path} holds no advisory (OSV's format, .json or .zip).")
    return Answer(tuple(found), {})


def is_affected(version: str, affected: Mapping[str, Any]) -> bool:
    """Whether a version is in the list or in one of the ranges, as OSV's schema defines them."""
    if version in affected.get("versions", ()):
        return True
    here = Version(version)
    for span in affected.get("ranges", ()):
        if span.get("type") != "ECOSYSTEM":
            continue
        inside = False
        for event in sorted(span.get("events", ()), key=_moment):
            if "introduced" in event and here >= _moment(event):
                inside = True
            elif _is_over(event, here):
                inside = False
        if inside:
            return True
    return False


def _is_over(event: Mapping[str, str], here: Version) -> bool:
    return ("fixed" in event and here >= _moment(event)) or (
        "last_affected" in event and here > _moment(event)
    )


def _moment(event: Mapping[str, str]) -> Version:
    (text,) = (
        v for k, v in event.items() if k in ("introduced", "fixed", "last_affected", "limit")
    )
    try:
        return Version(text)
    except InvalidVersion:
        raise ConfigError(f"an advisory speaks of a version {text!r}, which is none.") from None


def _fixed(affected: Mapping[str, Any]) -> tuple[str, ...]:
    events = (event for span in affected.get("ranges", ()) for event in span.get("events", ()))
    return tuple(event["fixed"] for event in events if "fixed" in event)


def _advisories(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    if name.endswith(".json"):
                        yield json.loads(archive.read(name))
            return
        for one in sorted(path.rglob("*.json")) if path.is_dir() else [path]:
            yield json.loads(one.read_text())
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ConfigError(f"the advisories in {path} cannot be read: {error}") from None
