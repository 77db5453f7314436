"""What `metaloom retrain` reads before the night begins."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from tests.cluster.dvc_machines import attempt, environment, succeed
from tests.conftest import REPOSITORY


def test_the_model_is_the_one_that_the_commit_names_not_the_working_tree(tmp_path: Path) -> None:
    """The driver's repository is fetched each night, and its working tree stays as it was cloned."""
    origin = tmp_path / "origin"
    origin.mkdir()
    env = {**environment(origin, {}), "PYTHONPATH": str(REPOSITORY)}
    env["MLFLOW_TRACKING_URI"] = f"sqlite:///{tmp_path}/mlflow.db"
    succeed(origin, env, "git", "init", "--quiet", "--initial-branch=main")
    command = [sys.executable, "-m", "pipeline.cli", "retrain", "--because", "drift"]
    command += ["--repository", str(origin), "--commit", "main", "--work", str(tmp_path / "work")]
    for model in ("old", "new"):
        params = {"deploy": {"model_name": model}, "preprocess": {"domain": "letters"}}
        (origin / "params.yaml").write_text(yaml.safe_dump(params))
        succeed(origin, env, "git", "add", ".")
        who = ("-c", "user.name=a", "-c", "user.email=a@example.invalid")
        succeed(origin, env, "git", *who, "commit", "--quiet", "-m", model)
        done = attempt(tmp_path, env, *command)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert f"{model}-letters has no champion yet" in done.stderr
