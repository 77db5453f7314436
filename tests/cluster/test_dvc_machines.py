"""One machine computes, others take over; and a run in a clone survives being killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.local.servers import Server
from tests.cluster.dvc_machines import (
    REMOTE,
    add_remote,
    attempt,
    contents,
    environment,
    only_stage,
    succeed,
)
from tests.e2e import test_pipeline as e2e

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

STEPS = 120
RESULTS = ("data/store", "data/tasks", "models")
METRICS = [f"results/{s}.json" for s in ("preprocess/metrics", "sample_tasks/metrics")] + [
    f"results/{s}.json" for s in ("pretrain/mlp", "meta_train/metrics", "evaluate/metrics")
]


@dataclass(frozen=True)
class Machine:
    folder: Path
    env: dict[str, str]

    def do(self, *command: str) -> str:
        return succeed(self.folder, self.env, *command)

    def contents(self) -> dict[str, bytes]:
        return contents(self.folder, *RESULTS, *METRICS)


@dataclass(frozen=True)
class Done:
    """What machine A went through."""

    machine: Machine
    commit: str
    """That was run: it has no dvc.lock."""
    dirty: subprocess.CompletedProcess[str]
    progress_at_kill: int
    beside: subprocess.CompletedProcess[str]
    """A second run, begun while the first one's stage was still at work."""
    clones: list[Path]
    result: dict[str, Any]
    said: str


def new_machine(folder: Path, origin: Path, s3: Server) -> Machine:
    env = environment(folder, s3.environment)
    succeed(folder.parent, env, "git", "clone", "--quiet", str(origin), str(folder))
    return Machine(folder, env)


@pytest.fixture(scope="module")
def origin(s3: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The team's git server: a bare repository whose one commit names the DVC remote."""
    top = tmp_path_factory.mktemp("origin")
    (top / "first").mkdir()
    first = e2e.fresh_clone(top / "first")
    e2e.set_steps(first, STEPS)
    env = environment(first, s3.environment)
    add_remote(first, env, f"{s3.environment['METALOOM_S3']}/{top.name}-{os.getpid()}")
    e2e.commit(first, "remote")
    succeed(top, env, "git", "clone", "--quiet", "--bare", str(first), str(top / "origin.git"))
    return top / "origin.git"


@pytest.fixture(scope="module")
def done(origin: Path, s3: Server, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """A: refused on a dirty tree; then killed half way, and run again."""
    a = new_machine(tmp_path_factory.mktemp("a") / "a", origin, s3)
    commit = a.do("git", "rev-parse", "HEAD").strip()
    (a.folder / "pipeline/half_done.py").write_text("")
    dirty = attempt(a.folder, a.env, "metaloom", "run")
    (a.folder / "pipeline/half_done.py").unlink()
    step, beside = kill_half_way(a)
    clones = sorted((a.folder / ".metaloom/runs").glob(f"{commit[:12]}-*"))
    again = attempt(a.folder, a.env, "metaloom", "run", "--json", "--remote", "origin")
    assert again.returncode == 0, again.stderr[-6000:]
    return Done(a, commit, dirty, step, beside, clones, json.loads(again.stdout), again.stderr)


def kill_half_way(a: Machine) -> tuple[int, subprocess.CompletedProcess[str]]:
    """kill -9 of `metaloom run`, then of what it left, once meta-training has a checkpoint."""
    log = a.folder.parent / "killed.log"
    with log.open("w") as file:
        run = subprocess.Popen(["metaloom", "run"], cwd=a.folder, env=a.env, stderr=file)
    end = time.monotonic() + 600
    while not (steps := checkpoints(a.folder)):
        assert run.poll() is None, log.read_text()[-6000:]
        assert time.monotonic() < end, "no checkpoint after ten minutes"
        time.sleep(0.02)
    run.kill()
    run.wait()
    left = processes_of(a.folder)
    assert left, "the stage ended before it was killed: nothing is proved"
    beside = attempt(a.folder, a.env, "metaloom", "run")
    for pid in processes_of(a.folder):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    while processes_of(a.folder):
        time.sleep(0.05)
    return max(steps), beside


def checkpoints(root: Path) -> list[int]:
    found = root.glob(".metaloom/runs/*/.metaloom/checkpoints/meta_train-*/step-*")
    return [int(path.name.removeprefix("step-")) for path in found]


def processes_of(root: Path) -> list[int]:
    """Of its clones, by working folder: a second way to see them, beside the variable."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            inside = Path(os.readlink(entry / "cwd")).is_relative_to(root / ".metaloom/runs")
            words = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if inside and b"pipeline.runtime.recorder" not in words:
            found.append(int(entry.name))
    return found


def test_a_dirty_tree_is_refused_and_nothing_is_made(done: Done) -> None:
    assert done.dirty.returncode == 1
    assert "pipeline/half_done.py" in done.dirty.stderr
    assert "--allow-dirty" in done.dirty.stderr
    assert "Traceback" not in done.dirty.stderr
    assert len(done.clones) == 1


def test_nobody_works_in_a_clone_where_a_killed_run_left_its_stage(done: Done) -> None:
    assert done.beside.returncode == 1
    assert "processes of a run that was killed still work in" in done.beside.stderr
    assert str(done.clones[0]) in done.beside.stderr


def test_a_killed_run_goes_on_in_its_clone(done: Done) -> None:
    """Finished stages are not run again, and meta-training goes on from its checkpoint."""
    assert 0 < done.progress_at_kill < STEPS
    print(f"progress_at_kill={done.progress_at_kill} of {STEPS} steps")
    assert [Path(done.result["clone"])] == done.clones
    assert done.result["attempt"] == 2  # one that is refused does not count
    assert e2e.ran(done.said) == ["meta_train", "evaluate", "deploy"]


def test_the_lock_comes_back_as_a_branch_here_and_on_the_git_server(
    done: Done, origin: Path
) -> None:
    a, result = done.machine, done.result
    assert (result["commit"], result["git_remote"]) == (done.commit, "origin")
    for repository in (a.folder, origin):
        tip = succeed(repository, a.env, "git", "rev-parse", f"refs/heads/{result['branch']}")
        assert tip.strip() == result["recorded"]
    parent = a.do("git", "rev-parse", f"{result['recorded']}^").strip()
    assert parent == done.commit
    changed = a.do("git", "diff", "--name-only", done.commit, result["recorded"]).split()
    assert sorted(changed) == sorted(["dvc.lock", *METRICS])
    text = a.do("git", "show", "--no-patch", "--format=%B", result["recorded"])
    metrics = json.loads(a.do("git", "show", f"{result['recorded']}:results/evaluate/metrics.json"))
    assert f"Commit: {done.commit}" in text
    assert f"{result['model']['model']} version 1 (@champion)" in text
    for setting, found in metrics["glyphs"].items():
        assert f"Accuracy {setting}: {found['accuracy']:.2%}" in text
    assert a.do("git", "rev-parse", "HEAD").strip() == done.commit
    assert a.do("git", "status", "--porcelain") == ""


def test_lineage_names_the_clean_commit_in_the_registry_of_the_original(done: Done) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{done.machine.folder / 'mlflow.db'}")
    version = client.get_model_version(done.result["model"]["model"], "1")
    assert version.tags["git.commit"] == done.commit
    assert version.tags["git.dirty"] == "false"
    experiment = client.get_experiment_by_name("metaloom")
    runs = client.search_runs([experiment.experiment_id])
    assert {run.data.tags["git.commit"] for run in runs} == {done.commit}
    assert {run.data.tags["git.dirty"] for run in runs} == {"false"}


def test_the_results_can_be_merged_and_checked_out(done: Done) -> None:
    a = done.machine
    a.do("git", "checkout", "--quiet", "-b", "merged")
    a.do("git", "merge", "--quiet", done.result["branch"])
    a.do("dvc", "checkout")
    assert a.contents() == contents(done.clones[0], *RESULTS, *METRICS)
    changed = yaml.safe_load(a.do("dvc", "status", "--json"))
    assert set(changed) <= {"deploy"}  # its record is kept by neither git nor DVC
    a.do("git", "checkout", "--quiet", "-")


def test_a_machine_that_has_the_lock_gets_all_by_dvc_pull(
    done: Done, origin: Path, s3: Server, tmp_path: Path
) -> None:
    b = new_machine(tmp_path / "b", origin, s3)
    b.do("git", "checkout", "--quiet", done.result["branch"])
    guarded, tried = only_stage(b.folder, b.env, "deploy")
    succeed(b.folder, guarded, "dvc", "pull", "--run-cache")
    assert b.contents() == contents(done.clones[0], *RESULTS, *METRICS)
    assert not tried.exists()
    succeed(b.folder, guarded, "dvc", "repro")
    assert tried.read_text().splitlines() == ["-m stages.deploy"]


def test_a_machine_without_the_lock_computes_nothing_but_deploy(
    done: Done, origin: Path, s3: Server, tmp_path: Path
) -> None:
    b = new_machine(tmp_path / "b", origin, s3)
    assert not (b.folder / "dvc.lock").exists()
    guarded, tried = only_stage(b.folder, b.env, "deploy")
    succeed(b.folder, guarded, "dvc", "repro", "--pull")
    assert tried.read_text().splitlines() == ["-m stages.deploy"]
    assert b.contents() == contents(done.clones[0], *RESULTS, *METRICS)
    assert e2e.output_hashes(b.folder) == e2e.output_hashes(done.clones[0])


def test_dvc_push_alone_is_not_enough(done: Done, origin: Path, s3: Server, tmp_path: Path) -> None:
    """Why there is `metaloom share`: without the metrics' objects B would compute."""
    a, clone = done.machine, done.clones[0]
    url = f"{s3.environment['METALOOM_S3']}/plain-{os.getpid()}"
    env = environment(clone, s3.environment)
    succeed(clone, env, "dvc", "remote", "add", "--local", "plain", url)
    succeed(clone, env, "dvc", "push", "--run-cache", "--remote", "plain")
    computed = {}
    for name in ("before", "after"):
        b = new_machine(tmp_path / name, origin, s3)
        b.do("dvc", "remote", "modify", "--local", REMOTE, "url", url)
        guarded, tried = only_stage(b.folder, b.env, "nothing")
        attempt(b.folder, guarded, "dvc", "repro", "--pull", "sample_tasks")
        computed[name] = tried.exists()
        succeed(clone, env, "dvc", "remote", "modify", "--local", REMOTE, "url", url)
        succeed(clone, env, "metaloom", "share")
    assert computed == {"before": True, "after": False}
    assert a.do("git", "status", "--porcelain") == ""


def test_no_key_of_the_store_is_in_a_file_that_git_keeps(done: Done, s3: Server) -> None:
    kept = done.machine.do("git", "ls-files").split()
    secret = s3.environment["AWS_SECRET_ACCESS_KEY"].encode()
    assert ".dvc/config" in kept
    assert not [n for n in kept if secret in (done.machine.folder / n).read_bytes()]
