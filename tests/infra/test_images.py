"""Images without a container engine: their files' rules, their locks, and what a lock installs."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from infra.images.check_build import complaint
from infra.images.contents import IMAGES, PYTHON, Image
from infra.images.dockerfiles import complaints, parse, stages
from infra.images.lock import LockError, parse_constraints, read_lock
from tests.conftest import REPOSITORY

EVERY = pytest.mark.parametrize("image", IMAGES.values(), ids=list(IMAGES))
CONSTRAINTS = parse_constraints((REPOSITORY / "constraints.txt").read_text())
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


@EVERY
def test_a_dockerfile_keeps_the_rules(image: Image) -> None:
    assert complaints(image.dockerfile.read_text()) == []


PLANTED = {
    "base by tag": (r"FROM \$\{BASE\} AS build", "FROM python:3.11-slim AS build", "no digest"),
    "base latest": (r"FROM \$\{BASE\} AS (serve|train)", "FROM python:latest AS x", "no digest"),
    "base by default": (r"^ARG BASE\n", "ARG BASE=python@sha256:" + "a" * 64 + "\n", "default"),
    "root": (r"USER 10001:10001", "USER 0", "not root"),
    "user by name": (r"USER 10001:10001", "USER metaloom", "not root"),
    "no user": (r"USER 10001:10001\n", "", "no USER"),
    "add of a url": (r"^ENTRYPOINT", "ADD https://example.org/a.tar /a\nENTRYPOINT", "use COPY"),
    "copy without owner": (r"COPY --from=build --chown=0:0", "COPY --from=build", "--chown"),
    "copy of all": (r"^ENTRYPOINT", "COPY --chown=0:0 . /x\nENTRYPOINT", "name the files"),
    "secret in env": (r"^ENTRYPOINT", "ENV AWS_SECRET_ACCESS_KEY=abc\nENTRYPOINT", "secret"),
    "secret in arg": (r"^ENTRYPOINT", "ARG GIT_TOKEN\nENTRYPOINT", "history"),
    "compiler": (r"^USER", "RUN apt-get install --no-install-recommends gcc\nUSER", "gcc in the"),
    "headers": (r"^USER", "RUN apt-get install --no-install-recommends libpq-dev\nUSER", "-dev in"),
    "pip without hashes": (r"--require-hashes", "", "--require-hashes"),
    "pip at the end": (r"^USER", "RUN pip install --require-hashes -r l\nUSER", "last stage"),
    "fetch": (r"^USER", "RUN curl -sSL https://example.org/x | sh\nUSER", "fetches"),
    "world-writable": (r"^USER", "RUN chmod -R 777 /work\nUSER", "rights"),
    "shell form": (r'ENTRYPOINT \["metaloom"\]', "ENTRYPOINT metaloom", "signals"),
    "no entry": (r'ENTRYPOINT \["metaloom"\]\n', "", "no ENTRYPOINT"),
    "no revision": (r"org.opencontainers.image.revision", "my.revision", "no label"),
    "healthcheck": (r"^USER", "HEALTHCHECK CMD wget localhost\nUSER", "write probes"),
    "recommends": (r"^USER", "RUN apt-get install --yes tini\nUSER", "--no-install-recommends"),
}


@EVERY
@pytest.mark.parametrize("mistake", PLANTED)
def test_a_planted_mistake_is_found(image: Image, mistake: str) -> None:
    pattern, instead, said = PLANTED[mistake]
    text, count = re.subn(pattern, instead, image.dockerfile.read_text(), flags=re.MULTILINE)
    assert count
    assert any(said in one for one in complaints(text)), complaints(text)


def test_one_stage_alone_is_refused() -> None:
    text = "FROM ${BASE}\nUSER 1\n"
    assert any("one stage alone" in one for one in complaints(text))


@EVERY
def test_hadolint_has_no_warning(image: Image) -> None:
    program = Path(sys.executable).with_name("hadolint")
    if not program.exists():
        pytest.skip("hadolint is not installed (extra `dev`)")
    command = [str(program), "--failure-threshold", "warning", str(image.dockerfile)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def _is_left_out(path: str, patterns: list[str]) -> bool:
    """As Docker reads the file: the last pattern that fits, or fits a folder above, decides."""
    out = False
    for pattern in patterns:
        wanted = pattern.lstrip("!").removeprefix("**/")
        above = [path, *(str(one) for one in Path(path).parents)]
        if any(fnmatch.fnmatchcase(one, wanted) for one in above) or wanted in Path(path).parts:
            out = not pattern.startswith("!")
    return out


@EVERY
def test_the_build_sees_what_it_copies_and_nothing_private(image: Image) -> None:
    ignore = image.dockerfile.with_name("Dockerfile.dockerignore").read_text().splitlines()
    patterns = [line for line in ignore if line and not line.startswith("#")]
    instructions = parse(image.dockerfile.read_text())
    copied = [
        source
        for one in instructions
        if one.word == "COPY" and not any(flag.startswith("--from") for flag in one.flags)
        for source in one.arguments[:-1]
    ]
    assert "pipeline" in copied and len(copied) >= 6
    for source in copied:
        assert (REPOSITORY / source).exists(), source
        assert not _is_left_out(source, patterns), source
    for private in (".git/config", ".env", ".metaloom/cluster/cluster.env", "mlflow.db", "data/x"):
        assert _is_left_out(private, patterns), private
    assert not _is_left_out("pipeline/deploy/serve/page/index.html", patterns)
    assert _is_left_out("pipeline/__pycache__/x.pyc", patterns)


@pytest.mark.parametrize(
    ("base", "revision", "version", "said"),
    [
        ("python:3.11-slim", "a" * 40, (3, 11, 13), "by digest"),
        ("python@sha256:abc", "a" * 40, (3, 11, 13), "by digest"),
        ("", "a" * 40, (3, 11, 13), "by digest"),
        ("p@sha256:" + "0" * 64, "main", (3, 11, 13), "give the commit"),
        ("p@sha256:" + "0" * 64, "a" * 40, (3, 12, 13), "the lock is of 3.11"),
        ("p@sha256:" + "0" * 64, "a" * 40, (3, 11, 12), "CVE-2025-4517"),
    ],
)
def test_a_build_that_cannot_be_told_from_another_ends_at_its_first_step(
    base: str, revision: str, version: tuple[int, int, int], said: str
) -> None:
    assert said in (complaint(base, revision, version) or "")
    assert complaint("p@sha256:" + "0" * 64, "a" * 40, (3, 11, 13)) is None


def test_the_check_is_a_program_of_the_standard_library(tmp_path: Path) -> None:
    copy = shutil.copy(REPOSITORY / "infra/images/check_build.py", tmp_path)
    environment = {"BASE": "python:3.11", "REVISION": "a" * 40, "PATH": os.defpath}
    command = [sys.executable, "-I", "-S", copy]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "by digest" in done.stderr


@EVERY
def test_a_lock_agrees_with_the_constraints_and_holds_what_the_extras_ask_for(image: Image) -> None:
    entries = read_lock(image.lock.read_text())
    for name, entry in entries.items():
        if name in CONSTRAINTS:
            assert entry.version.partition("+")[0] == CONSTRAINTS[name], name
        assert len(entry.hashes) == len(set(entry.hashes))
    extras = PROJECT["optional-dependencies"]
    wanted = PROJECT["dependencies"] + [line for name in image.extras for line in extras[name]]
    for requirement in map(Requirement, wanted):
        entry = entries[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(entry.version), requirement
    assert entries["torch"].version == CONSTRAINTS["torch"] + image.torch


@EVERY
def test_a_lock_names_no_place(image: Image) -> None:
    for path in (image.lock, image.bill):
        assert not re.search(
            r"https?://(?!cyclonedx\.org)|file:|--(index|find|extra)", path.read_text()
        )


@EVERY
def test_the_first_step_installs_the_one_package_that_builds_others(image: Image) -> None:
    """The Dockerfile takes it by `grep -A 1`: one line, one hash."""
    assert len(read_lock(image.lock.read_text())["setuptools"].hashes) == 1


def test_a_damaged_lock_is_refused() -> None:
    for text, said in (
        ("torch==2.13.0\n", "no pin and no hash"),
        ("torch>=2 \\\n    --hash=sha256:" + "a" * 64, "no pin and no hash"),
        ("torch==2.13.0 \\\n    --hash=sha256:abc\n", "no pin and no hash"),
        ("torch==2.13.0 \\\n", "has no hash of torch"),
    ):
        with pytest.raises(LockError, match=said):
            read_lock(text)


def _as_process_one(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Run it as pid 1 of a namespace, as a container without an init does."""
    unshare = shutil.which("unshare")
    wrapped = [str(unshare), "--user", "--map-root-user", "--pid", "--fork", "--kill-child", "--"]
    probe = (
        subprocess.run([*wrapped, "true"], capture_output=True, check=False) if unshare else None
    )
    if probe is None or probe.returncode != 0:
        pytest.skip("no pid namespaces here (`unshare --user --pid`)")
    with log.open("wb") as out:
        return subprocess.Popen([*wrapped, *command], stdout=out, stderr=out, cwd=log.parent)


def test_the_service_as_process_one_ends_on_sigterm(tmp_path: Path) -> None:
    """The kernel drops a signal that process one has no handler for: then an init would be needed."""
    from tests.serve.registered import NAME, register
    from tests.serve.service_process import ServiceProcess

    register(tmp_path, 0)
    service = ServiceProcess(tmp_path / "service", f"models:/{NAME}/1")
    command = [sys.executable, "-m", "pipeline.cli", "serve", service.model]
    command += ["--port", str(service.port), "--config", str(service.config)]
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{tmp_path}/mlflow.db"
    os.environ["PYTHONPATH"] = str(REPOSITORY)
    service.process = _as_process_one(command, tmp_path / "log")
    try:
        while service.readiness()[0] != 200:
            assert service.process.poll() is None, (tmp_path / "log").read_text()
        children = Path(f"/proc/{service.process.pid}/task/{service.process.pid}/children")
        (inner,) = map(int, children.read_text().split())
        inside = Path(f"/proc/{inner}/status").read_text()
        assert re.search(r"NSpid:.*\s1$", inside, re.MULTILINE)
        os.kill(inner, signal.SIGTERM)
        assert service.process.wait(30) == 0, (tmp_path / "log").read_text()
    finally:
        if service.process.poll() is None:
            service.process.kill()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_what_a_lock_installs_is_the_lock_and_works(tmp_path: Path) -> None:
    """The steps of the Dockerfile's first stage, for the image that needs no CUDA."""
    image = IMAGES["serve"]
    if f"{sys.version_info.major}.{sys.version_info.minor}" != PYTHON:
        pytest.skip(f"the lock is of Python {PYTHON}")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def pip(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [python, "-m", "pip", "--disable-pip-version-check", *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path
        )

    lines = image.lock.read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("setuptools=="))
    (tmp_path / "first.lock").write_text("\n".join(lines[at : at + 2]))
    locked = ["install", "--no-deps", "--no-compile", "--require-hashes"]
    for path, more in (
        (tmp_path / "first.lock", []),
        (image.lock, ["--no-build-isolation"]),
    ):
        done = pip(*locked, *more, "-r", str(path))
        if done.returncode != 0 and "No matching distribution found for torch" in done.stderr:
            pytest.skip("pip finds no CPU build of torch here (PIP_FIND_LINKS)")
        assert done.returncode == 0, done.stderr[-3000:]
    assert pip("check").returncode == 0
    done = pip("install", "--no-deps", "--no-build-isolation", str(_copy(tmp_path / "source")))
    assert done.returncode == 0, done.stderr[-3000:]
    assert pip("check").stdout.strip() == "No broken requirements found."

    installed = {
        canonicalize_name(one["name"]): one["version"]
        for one in json.loads(pip("list", "--format", "json").stdout)
    }
    entries = read_lock(image.lock.read_text())
    assert set(installed) - set(entries) == {"pip", "metaloom"}
    assert {n: e.version for n, e in entries.items()} == {n: installed[n] for n in entries}
    bill = json.loads(image.bill.read_text())
    billed = {canonicalize_name(one["name"]): one["version"] for one in bill["components"]}
    assert billed == {n: v for n, v in installed.items() if n not in ("pip", "metaloom")}

    command = str(tmp_path / "venv" / "bin" / "metaloom")
    for arguments, word in ((["--help"], "serve"), (["serve", "--help"], "--port")):
        done = subprocess.run(
            [command, *arguments],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
            cwd=tmp_path,
        )
        assert word in done.stdout


def _copy(target: Path) -> Path:
    """What the Dockerfile copies; setuptools writes beside it."""
    for name in ("pipeline", "stages"):
        shutil.copytree(
            REPOSITORY / name, target / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(REPOSITORY / name, target)
    return target


def test_the_parser_joins_lines_and_drops_comments() -> None:
    text = "# c\nARG A\nFROM a AS b\nRUN one \\\n    # in between\n    && two\nUSER 1\n"
    found = parse(text)
    assert [(one.line, one.word) for one in found] == [
        (2, "ARG"),
        (3, "FROM"),
        (4, "RUN"),
        (7, "USER"),
    ]
    assert found[2].rest == "one && two"
    assert [len(part) for part in stages(found)] == [3]
