"""The driver of a nightly run as a process: a git server on disk, real S3, MLflow with a login."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from infra.local.servers import Server
from pipeline.deploy.registry import Registry
from tests.cluster.dvc_machines import add_remote, environment, succeed
from tests.e2e import test_pipeline as e2e

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

SMALLER: dict[str, dict[str, Any]] = {
    "evaluate": {"baselines": ["pixels"], "example_episodes": 0},
    "deploy": {
        "robustness": {"num_episodes": 10, "seed": 0},
        "smoke": {"timeout_seconds": 600.0, "max_queries": 20, "tolerance": 1e-4},
    },
}
STAGES = ("preprocess", "sample_tasks", "pretrain@mlp", "meta_train", "evaluate", "deploy")


@dataclass(frozen=True)
class Team:
    """A repository on a git server, and the keys to everything."""

    origin: Path
    env: dict[str, str]
    model: str

    def driver(self, work: Path) -> subprocess.Popen[str]:
        """As the pod's container runs it; a pod that is new has an empty disk."""
        command = [sys.executable, "-m", "pipeline.cli", "retrain", "--json", "--because", "cron"]
        command += ["--repository", str(self.origin), "--commit", "main", "--work", str(work)]
        work.mkdir()
        return subprocess.Popen(
            command,
            cwd=work,
            env={**self.env, "HOME": str(work)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def runs_to_its_end(self, work: Path) -> dict[str, Any]:
        process = self.driver(work)
        told, said = process.communicate()
        assert process.returncode == 0, said[-6000:]
        found: dict[str, Any] = json.loads(told)
        return found

    def branches(self) -> dict[str, str]:
        """Of retrainings, by name: their tips."""
        form = "--format=%(refname:short) %(objectname)"
        listed = succeed(self.origin, self.env, "git", "for-each-ref", form, "refs/heads/retrain")
        return dict(line.split() for line in listed.splitlines())

    def weights(self, branch: str) -> dict[str, Any]:
        """What DVC's lock says of the model that a branch holds."""
        lock = yaml.safe_load(succeed(self.origin, self.env, "git", "show", f"{branch}:dvc.lock"))
        return {out["path"]: out["md5"] for out in lock["stages"]["meta_train"]["outs"]}


def team(folder: Path, s3: Server, mlflow_server: Server) -> Team:
    """A commit of this repository, cut to size, on a git server of its own."""
    first = folder / "first"
    first.mkdir()
    e2e.fresh_clone(first)
    name = f"{folder.name.replace('_', '-')}-{os.getpid()}"
    params = yaml.safe_load((first / "params.yaml").read_text())
    for section, values in SMALLER.items():
        params[section] |= values
    params["deploy"]["model_name"] = name
    (first / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    env = {**environment(first, s3.environment), **mlflow_server.environment}
    env |= {
        "METALOOM_STORAGE": f"{s3.environment['METALOOM_S3']}/{name}-checkpoints",
        "MLFLOW_TRACKING_URI": mlflow_server.record.url,
    }
    add_remote(first, env, f"{s3.environment['METALOOM_S3']}/{name}")
    e2e.commit(first, "remote")
    origin = folder / "origin.git"
    succeed(folder, env, "git", "clone", "--quiet", "--bare", str(first), str(origin))
    return Team(origin, env, f"{name}-glyphs")


def end_of_the_pod(process: subprocess.Popen[str], work: Path) -> None:
    """kill -9 of everything that has its home there, as the end of a pod is."""
    process.kill()
    process.wait()
    while alive := list(_at_home(work)):
        for one in alive:
            with contextlib.suppress(psutil.Error):
                one.kill()
        time.sleep(0.1)


def _at_home(work: Path) -> Iterator[psutil.Process]:
    for one in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if one.environ().get("HOME") == str(work) and one.status() != psutil.STATUS_ZOMBIE:
                yield one


def killed_at(team: Team, work: Path, mark: str) -> bool:
    """Run the driver until it prints a mark, and end its pod there; False where it ended before."""
    process = team.driver(work)
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if mark in line:
            end_of_the_pod(process, work)
            return True
    assert process.wait() == 0, "".join(said)[-6000:]
    return False


@pytest.mark.parametrize(
    "marks",
    [
        [f"Running stage '{name}'" for name in STAGES],
        ['"event": "meta-train', "Updating lock file 'dvc.lock'\n"],
    ],
    ids=["each stage", "training"],
)
def test_killed_and_started_on_another_machine_it_promotes_once(
    marks: list[str], tmp_path: Path, s3: Server, mlflow_server: Server, monkeypatch: Any
) -> None:
    us = team(tmp_path, s3, mlflow_server)
    killed = [killed_at(us, tmp_path / f"pod-{i}", mark) for i, mark in enumerate(marks)]
    assert all(killed), list(zip(marks, killed, strict=True))
    told = us.runs_to_its_end(tmp_path / "last")
    assert told["state"] == "promoted" and told["branch"].startswith("retrain/")
    assert list(us.branches()) == [told["branch"]]
    again = us.runs_to_its_end(tmp_path / "after")
    assert (again["state"], again["branch"]) == ("no_change", f"origin/{told['branch']}")
    for name, value in us.env.items():
        monkeypatch.setenv(name, value)
    registry = Registry(tmp_path, us.model)
    standing = registry.standing()
    assert standing.champion == 1 and registry.aliases() == {"champion": 1}
    with pytest.raises(Exception, match="2"):
        registry.version(2)  # however often it was begun
    (tmp_path / "beside").mkdir()
    undisturbed = team(tmp_path / "beside", s3, mlflow_server)
    plain = undisturbed.runs_to_its_end(tmp_path / "plain")
    assert undisturbed.weights(plain["branch"]) == us.weights(told["branch"])
