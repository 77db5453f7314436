"""The command teaches, checks the machine, and says what is wrong without a traceback."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.main import get_command

from pipeline.cli import app
from pipeline.doctor import PACKAGES, SECTIONS, Finding, examine
from pipeline.domains.glyphs import GlyphsConfig

REPOSITORY = Path(__file__).resolve().parents[2]
COMMANDS = {
    "cluster",
    "retrain",
    *("doctor", "promote", "release", "replay", "report", "rollback", "run", "schema", "serve"),
    *("share", "ui", "upload", "lineage", "join", "keys", "export", "reproduce"),
}


def metaloom(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    return subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *arguments],
        cwd=folder,
        env={**environment, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "80"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_command_explains_itself() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert set(commands) == COMMANDS
    for name, command in commands.items():
        assert len(command.help.split()) >= 10, name
        assert all(p.help for p in command.params if p.name not in {"help", "show"}), name


def test_help_names_the_commands_and_fits_the_screen(tmp_path: Path) -> None:
    done = metaloom(tmp_path, "--help")
    assert done.returncode == 0
    assert all(f"  {name} " in done.stdout for name in COMMANDS)
    assert "dvc repro" in done.stdout
    assert max(len(line) for line in done.stdout.splitlines()) <= 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["release"], "params.yaml does not exist. Run from the top of the repository"),
        (["report"], "results/evaluate/report.html does not exist. Run `dvc repro evaluate`"),
        (["promote"], "params.yaml does not exist"),
        (["rollback", "--model", "none"], "none has no champion"),
    ],
)
def test_an_error_is_one_message(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = metaloom(tmp_path, *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert "Traceback" not in done.stderr and not done.stdout


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_doctor_finds_what_is_there_and_says_how_to_mend_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    found = by_name(examine(tmp_path))
    assert {f"packages: {extra}" for extra in PACKAGES} <= set(found)
    assert found["packages: training"].ok and "torch 2." in found["packages: training"].found
    for name in ("git", "dvc repository", "params.yaml"):
        assert not found[name].ok and found[name].mend, name
    assert "mlflow.db" in found["mlflow"].found
    assert not (tmp_path / "mlflow.db").exists(), "looking must not make a database"


def test_doctor_names_a_missing_package_and_a_dead_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setitem(PACKAGES, "track", ("mlflow", "no-such-package"))  # type: ignore[arg-type]
    found = by_name(examine(tmp_path))
    missing = found["packages: track"]
    assert not missing.ok and "no-such-package missing: pip install" in missing.mend
    assert not found["mlflow"].ok and "http://127.0.0.1:9" in found["mlflow"].found


def test_doctor_counts_the_typefaces_and_names_those_that_are_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = GlyphsConfig().packages
    found = by_name(examine(tmp_path))["typefaces"]
    assert found.ok and found.found == f"{len(wanted)} of {len(wanted)} packages as pinned"
    real = importlib.metadata.version
    wrong = {"font-lato": "9.9", "font-rhd": None}

    def version(name: str) -> str:
        if name not in wrong:
            return real(name)
        if wrong[name] is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return wrong[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = by_name(examine(tmp_path))["typefaces"]
    told = f"{len(wanted) - 2} of {len(wanted)} packages as pinned; font-lato 9.9; no font-rhd"
    assert not found.ok and found.found == told
    pins = f"font-lato=={wanted['font-lato']} font-rhd=={wanted['font-rhd']}"
    assert found.mend.startswith(f"pip install {pins}:")


def test_doctor_checks_what_the_installation_promises() -> None:
    """All that pyproject.toml requires, and no more."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    required = {re.split("[<>=]", name)[0] for name in project["dependencies"]}
    assert set(PACKAGES["training"]) == required
    glyphs = {re.split("[<>=]", name)[0] for name in project["optional-dependencies"]["glyphs"]}
    assert {*PACKAGES["glyphs"], *GlyphsConfig().packages} == glyphs


def test_doctor_names_unknown_sections(tmp_path: Path) -> None:
    text = (REPOSITORY / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(text)
    assert by_name(examine(tmp_path))["params.yaml"].found == "valid"
    (tmp_path / "params.yaml").write_text(text + "\nevaluat:\n  seed: 1\n")
    found = by_name(examine(tmp_path))["params.yaml"]
    assert not found.ok
    assert found.found == f"unknown section evaluat. Known sections: {', '.join(SECTIONS)}"


def test_doctor_speaks_json_and_fails_where_something_is_missing(tmp_path: Path) -> None:
    done = metaloom(tmp_path, "doctor", "--json")
    assert done.returncode == 1
    findings = json.loads(done.stdout)
    assert {"name", "ok", "found", "mend"} == set(findings[0])
    assert any(not finding["ok"] for finding in findings)


def test_every_section_that_a_stage_reads_is_checked() -> None:
    """One model for each stage module, and each can be imported."""
    stages = {path.stem for path in (REPOSITORY / "stages").glob("*.py")} - {"__init__"}
    assert stages <= set(SECTIONS)
