"""`metaloom retrain`: the command line of a retraining."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.core.config import load_value
from pipeline.core.errors import ConfigError, RegistryError
from pipeline.deploy.commands import AsJson
from pipeline.deploy.serve import commands

if TYPE_CHECKING:
    from pipeline.deploy.registry import Registry

DECIDED = 3
"""Exit status of a run that came to its end, and to a decision that the policy calls a failure:
starting it again would not change that (the Job's podFailurePolicy knows it)."""


class Because(StrEnum):
    """What set it off."""

    cron = "cron"
    data = "data"
    drift = "drift"
    manual = "manual"


def retrain(
    local: Annotated[
        bool, typer.Option("--local", help="Retrain HEAD of the repository here, on this machine.")
    ] = False,
    repository: Annotated[
        str | None, typer.Option(help="Retrain a commit of this git repository.")
    ] = None,
    commit: Annotated[str, typer.Option(help="Hash, branch or tag.")] = "HEAD",
    work: Annotated[Path, typer.Option(help="Folder for its clone, with --repository.")] = Path(
        ".metaloom/retrain"
    ),
    because: Annotated[Because, typer.Option(help="What sets it off.")] = Because.manual,
    remote: Annotated[
        str | None, typer.Option(help="Git remote to push the branch on to, with --local.")
    ] = None,
    config: commands.Config = None,
    as_json: AsJson = False,
) -> None:
    """Learn anew from what is new; promote it if the gate lets it.

    Brings imported data up to date (`dvc update`), and ends there if neither they, nor code, nor
    parameters have changed since the last time. Otherwise it runs the pipeline in a clone, and the
    branch `retrain/<date>` holds the new lock, the metrics and a report of what changed, what the
    candidate gained and lost, the decision and the cost. Section `retrain` of params.yaml is the
    policy: how much must be new, what it may cost, who is told. Killed, it goes on where it was.
    With --because drift it ends at once unless the served traffic has drifted, which it reads from
    the services' database (--config names the file that they were started with). Status 3: over
    its budget, or not promoted where the policy calls that a failure.

    \b
      metaloom retrain --local
      git show retrain/2026-11-29:results/retrain/report.md
      metaloom retrain --repository https://example.org/team/models.git --commit main
    """
    from pipeline.cluster.kube.driving import driving
    from pipeline.cluster.retrain.night import Request
    from pipeline.cluster.retrain.night import retrain as go
    from pipeline.cluster.retrain.repository import bring_repository, commit_of
    from pipeline.launch.base import num_workers_from_environment
    from pipeline.runtime.mlflow_tracker import tracking_uri

    if local == (repository is not None):
        raise ConfigError("say which: --local (the repository here) or --repository URL.")
    _, workers = num_workers_from_environment(10**6)
    request = Request(because=because.value, commit=commit, remote=remote, num_workers=workers)
    root = Path.cwd()
    if repository is not None:
        root = bring_repository(repository, work)
        request = replace(request, commit=commit_of(root, commit), remote="origin")
    uri = os.environ.get("MLFLOW_TRACKING_URI") or tracking_uri(root)
    if because is Because.drift and (steady := _no_drift(root, request.commit, config)):
        print(json.dumps(steady, indent=2) if as_json else steady["reason"])
        return
    with driving() as listen:
        outcome = go(
            root,
            request,
            champion=lambda folder: _champion(root, request.commit, folder),
            environment={"MLFLOW_TRACKING_URI": uri},
            listen=listen,
        )
    print(json.dumps(outcome.as_json(), indent=2) if as_json else outcome.summary())
    if outcome.fails:
        raise typer.Exit(DECIDED)


def _registry(root: Path, commit: str) -> Registry:
    """Of the model that a commit retrains: the working tree may be another, or out of date."""
    from pipeline.cluster.clone import resolve_commit
    from pipeline.cluster.commands import git
    from pipeline.deploy.registry import Registry

    text = git(root, "show", f"{resolve_commit(root, commit)}:params.yaml")
    with tempfile.TemporaryDirectory() as scratch:
        params = Path(scratch) / "params.yaml"
        params.write_text(text, encoding="utf-8", errors="surrogateescape")
        model = load_value(params, "deploy.model_name", str)
        domain = load_value(params, "preprocess.domain", str)
    return Registry(root, f"{model}-{domain}")


def _champion(root: Path, commit: str, folder: Path) -> str | None:
    """Leave the champion's learner in a folder; says which version it is, None if there is none."""
    from pipeline.core.files import new_folder
    from pipeline.engine.learner import save_learner

    registry = _registry(root, commit)
    if (version := registry.champion()) is None:
        return None
    with tempfile.TemporaryDirectory() as scratch, new_folder(folder, kind="learner") as building:
        save_learner(building, registry.fetch(version, Path(scratch) / "bundle").learner)
    return f"{version.name} version {version.number}"


def _no_drift(root: Path, commit: str, config: Path | None) -> dict[str, Any] | None:
    """Why drift is no reason to retrain; None where the champion's traffic has drifted."""
    from pipeline.deploy.drift import served_drift

    registry = _registry(root, commit)
    champion = registry.aliases().get("champion")
    if champion is None:
        raise RegistryError(f"{registry.name} has no champion yet, whose traffic could drift.")
    settings = commands.settings_from(config)
    found = served_drift(settings.database, registry.version(champion).digest)
    if found.verdict == "drift":
        return None
    return {
        "state": "steady",
        "reason": f"Nothing to do. Traffic of version {champion}: {found.verdict}. {found.why}.",
        "drift": found.as_json(),
    }
