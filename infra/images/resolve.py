"""Which packages an image gets, asked of pip: `pip install --dry-run --report`."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.markers import Marker, default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from infra.images.contents import PYTHON, Image
from pipeline.core.errors import MachineError, PipelineError

_PIP = "pip==26.3"  # the first reports without `license_expression` were before 24.1
_GLIBC = range(17, 37)  # of the base image, Debian 12, and what runs on it
_OURS = "metaloom"
_ERROR_LINES = 12


class LockError(PipelineError):
    """No lock could be made."""


@dataclass(frozen=True)
class Package:
    """One package of an image."""

    name: str
    version: str
    hashes: tuple[str, ...]
    """SHA-256 of the files that may be installed, one for each machine at most."""
    machines: tuple[str, ...]
    """On which it is installed."""
    requires: tuple[str, ...]
    """Canonical names of what it needs, of what is in the image."""
    metadata: Mapping[str, Any]
    """As pip reports it."""


def resolve(
    image: Image, root: Path, pins: Mapping[str, str], more: Sequence[str]
) -> list[Package]:
    """Ask pip for an image's packages: once in full, then for the files of each other machine.

    Args:
        root: of the repository.
        pins: version by canonical name; anything else is pip's choice.
        more: arguments for pip, such as `--find-links`.

    Raises:
        LockError: pip finds no such set, or a package has no file for a machine.
        MachineError: this is another Python or machine than the image's.
    """
    _same_platform(image)
    with tempfile.TemporaryDirectory(prefix="metaloom-lock-") as folder:
        pip = _Pip(Path(folder), tuple(more))
        wanted = f"{root}[{','.join(image.extras)}]"
        first = pip.report(["--ignore-installed", *pip.constraints(pins), wanted])
        nodes: dict[str, Mapping[str, Any]] = {
            canonicalize_name(entry["metadata"]["name"]): entry for entry in first
        }
        ours = nodes.pop(_OURS)
        edges = {
            machine: _edges(nodes, ours["metadata"], image.extras, machine)
            for machine in image.machines
        }
        files = {name: {_sha256(entry)} for name, entry in nodes.items()}
        for machine in image.machines[1:]:
            names = [n for n in nodes if n in edges[machine]]
            chosen = [f"{n}=={nodes[n]['metadata']['version']}" for n in names]
            for entry in pip.report([*_for_machine(machine), *chosen]):
                files[canonicalize_name(entry["metadata"]["name"])].add(_sha256(entry))
    return [_package(image, nodes[name], files[name], edges, name) for name in sorted(nodes)]


def _package(
    image: Image,
    entry: Mapping[str, Any],
    hashes: Iterable[str],
    edges: Mapping[str, Mapping[str, set[str]]],
    name: str,
) -> Package:
    needed: set[str] = set().union(*(edges[m].get(name, set()) for m in image.machines))
    return Package(
        name=entry["metadata"]["name"],
        version=entry["metadata"]["version"],
        hashes=tuple(sorted(hashes)),
        machines=tuple(m for m in image.machines if name in edges[m]),
        requires=tuple(sorted(needed)),
        metadata=entry["metadata"],
    )


class _Pip:
    """A pip that is new enough, in an environment of its own."""

    def __init__(self, folder: Path, more: tuple[str, ...]) -> None:
        self._folder, self._more = folder, more
        venv.create(folder / "venv", with_pip=True)
        self._python = str(folder / "venv" / "bin" / "python")
        self._run(["install", "--quiet", _PIP])

    def constraints(self, pins: Mapping[str, str]) -> list[str]:
        """`===`: a plain `==2.13.0` would take `2.13.0+cpu` too."""
        path = self._folder / "constraints.txt"
        path.write_text("".join(f"{n}==={v}\n" for n, v in sorted(pins.items())))
        return ["--constraint", str(path)]

    def report(self, arguments: Sequence[str]) -> list[Mapping[str, Any]]:
        """What pip would install."""
        path = self._folder / "report.json"
        own = ["install", "--dry-run", "--quiet", "--report", str(path)]
        self._run([*own, *self._more, *arguments])
        installs: list[Mapping[str, Any]] = json.loads(path.read_text())["install"]
        return installs

    def _run(self, arguments: Sequence[str]) -> None:
        command = [self._python, "-m", "pip", "--disable-pip-version-check", *arguments]
        environment = {k: v for k, v in os.environ.items() if k != "PIP_CONSTRAINT"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode != 0:
            said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-_ERROR_LINES:])
            raise LockError(
                f"pip could not resolve the image's packages:\n{said}\nArguments after `--` go to "
                "pip: the image `serve` needs PyTorch's CPU build, so name a folder or page that "
                "has it (`-- --find-links FOLDER`)."
            )


def _same_platform(image: Image) -> None:
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if here != PYTHON or sys.platform != "linux" or platform.machine() != image.machines[0]:
        raise MachineError(
            f"the image {image.name} is of Python {PYTHON} on Linux, {image.machines[0]}, and pip "
            "judges what a package needs by the Python that runs it: this is Python "
            f"{here} on {sys.platform}, {platform.machine()}. Run the command in the base image."
        )


def _for_machine(machine: str) -> list[str]:
    """Take the files that this machine would; what is needed has been found out before."""
    tags = [f"manylinux_2_{minor}_{machine}" for minor in _GLIBC] + [f"manylinux2014_{machine}"]
    platforms = [part for tag in tags for part in ("--platform", tag)]
    target = ["--target", "nowhere", "--python-version", PYTHON, "--implementation", "cp"]
    return ["--no-deps", *target, *platforms]


def _edges(
    nodes: Mapping[str, Mapping[str, Any]],
    ours: Mapping[str, Any],
    extras: Sequence[str],
    machine: str,
) -> dict[str, set[str]]:
    """What is reached from our extras on a machine, and what each of it needs.

    Raises:
        LockError: something is needed there that is not needed on the first machine.
    """
    reached: dict[str, set[str]] = {}
    seen: set[tuple[str, tuple[str, ...]]] = set()
    todo = [(_OURS, tuple(extras))]
    while todo:
        name, wanted = todo.pop()
        if (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        metadata = ours if name == _OURS else nodes[name]["metadata"]
        for requirement in _needed(metadata, wanted, machine):
            other = canonicalize_name(requirement.name)
            if other == _OURS:
                todo.append((other, tuple(sorted(requirement.extras))))
                continue
            if other not in nodes:
                raise LockError(f"{name} needs {other} on {machine} alone: that is not handled.")
            reached.setdefault(name, set()).add(other)
            reached.setdefault(other, set())
            todo.append((other, tuple(sorted(requirement.extras))))
    reached.pop(_OURS, None)
    return reached


def _needed(
    metadata: Mapping[str, Any], extras: Sequence[str], machine: str
) -> Iterable[Requirement]:
    environment = {**default_environment(), "platform_machine": machine}
    for text in metadata.get("requires_dist", []):
        requirement = Requirement(text)
        if _holds(requirement.marker, {**environment, "extra": ""}) or any(
            _holds(requirement.marker, {**environment, "extra": extra}) for extra in extras
        ):
            yield requirement


def _holds(marker: Marker | None, environment: Mapping[str, Any]) -> bool:
    return marker is None or marker.evaluate(dict(environment))


def _sha256(entry: Mapping[str, Any]) -> str:
    found = entry["download_info"].get("archive_info", {}).get("hashes", {}).get("sha256", "")
    if not re.fullmatch("[0-9a-f]{64}", found):
        raise LockError(
            f"pip says no SHA-256 of {entry['metadata']['name']} {entry['metadata']['version']}: "
            "the index that it comes from gives none."
        )
    return str(found)
