"""`metaloom run` on a pipeline of one short stage: what it refuses, and how it ends."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.cluster import clone as clones
from pipeline.cluster.clone import changed_files, check_branch, only_runner, resolve_commit
from pipeline.cluster.commands import git, safe_name
from pipeline.cluster.run import RunRequest, RunResult, run_commit
from pipeline.core.errors import ConfigError, DataError, MachineError
from tests.cluster.dvc_machines import attempt, contents, environment, succeed
from tests.conftest import REPOSITORY

pytestmark = [pytest.mark.timeout(600)]

MAKE = """
import json, os, pathlib, signal, sys, time
out, results = pathlib.Path("out"), pathlib.Path("results")
out.mkdir(exist_ok=True), results.mkdir(exist_ok=True)
with open(os.environ["RUNS_LOG"], "a") as file:
    print(os.getcwd(), file=file)
wish = json.load(open("wish.json"))
if wish == "fail":
    sys.exit("the stage cannot")
if wish == "wait":
    def stop(*_):
        time.sleep(1)
        pathlib.Path(os.environ["RUNS_LOG"]).with_name("checkpoint").write_text("saved")
        sys.exit(143)
    signal.signal(signal.SIGTERM, stop)
    pathlib.Path(os.environ["RUNS_LOG"]).with_name("waiting").touch()
    time.sleep(120)
(out / "big").write_text("big")
(results / "metrics.json").write_text(json.dumps({"raw": sorted(os.listdir("data/raw"))}))
"""
PIPELINE = {
    "stages": {
        "make": {
            "cmd": "python make.py",
            "deps": ["make.py", "wish.json", "data/raw"],
            "outs": ["out"],
            "metrics": [{"results/metrics.json": {"cache": False}}],
        }
    }
}


class Tiny:
    """A repository with that pipeline."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder.parent / "runs.log"
        self.env = {**environment(folder, {}), "RUNS_LOG": str(self.log)}
        self.env["PYTHONPATH"] = str(REPOSITORY)
        folder.mkdir()
        (folder / "data/raw").mkdir(parents=True)
        self.write("data/raw/README.md", "raw")
        self.write("make.py", MAKE)
        self.write("wish.json", '"fine"')
        self.write("dvc.yaml", yaml.safe_dump(PIPELINE))
        self.write("params.yaml", yaml.safe_dump({"preprocess": {"source": "data/raw"}}))
        self.write(".gitignore", ".metaloom/\n/out/\n")
        shutil.copy(REPOSITORY / "data/raw/.gitignore", folder / "data/raw")
        self.do("git", "init", "--quiet", "--initial-branch=main")
        self.do("dvc", "init", "--quiet")
        self.do("git", "config", "user.name", "Ada")
        self.do("git", "config", "user.email", "ada@example.invalid")
        self.commit("first")

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    def do(self, *command: str) -> str:
        return succeed(self.folder, self.env, *command)

    def commit(self, message: str) -> str:
        self.do("git", "add", "--all")
        self.do("git", "commit", "--quiet", "--allow-empty", "-m", message)
        return self.do("git", "rev-parse", "HEAD").strip()

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return attempt(
            self.folder, self.env, sys.executable, "-m", "pipeline.cli", "run", *arguments
        )

    def result(self, *arguments: str) -> dict[str, Any]:
        done = self.run("--json", *arguments)
        assert done.returncode == 0, done.stderr[-4000:]
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def stages_run(self) -> int:
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0

    def clones(self) -> list[Path]:
        return [p for p in (self.folder / ".metaloom/runs").glob("*") if p.is_dir()]


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    return Tiny(tmp_path / "tiny")


@pytest.mark.slow
def test_without_a_remote_the_cache_is_shared_and_the_note_says_so(tiny: Tiny) -> None:
    commit = tiny.do("git", "rev-parse", "HEAD").strip()
    first = tiny.result()
    assert any("no DVC remote" in note for note in first["notes"])
    assert (first["data_remote"], first["differed"]) == (None, [])
    tiny.do("git", "merge", "--quiet", first["branch"])
    tiny.do("dvc", "checkout")
    assert (tiny.folder / "out/big").read_text() == "big"
    assert "up to date" in tiny.do("dvc", "status")
    author = tiny.do("git", "show", "--no-patch", "--format=%an <%ae>", first["branch"])
    assert author.strip() == "Ada <ada@example.invalid>"
    again = tiny.result(commit)  # from the cache: the metrics too
    assert tiny.stages_run() == 1
    assert again["recorded"] != first["recorded"] and again["branch"] != first["branch"]
    nothing = tiny.run()
    assert "there is nothing to merge" in nothing.stdout
    assert tiny.stages_run() == 1


@pytest.mark.slow
def test_a_dirty_tree_is_refused_or_marked(tiny: Tiny) -> None:
    tiny.write("wish.json", '"fail"')
    tiny.write("-rf new.py", "")
    refused = tiny.run()
    assert refused.returncode == 1 and not tiny.clones()
    assert "wish.json" in refused.stderr and "-rf new.py" in refused.stderr
    marked = tiny.result("--allow-dirty")  # the commit is fine, what differs is not
    assert sorted(marked["differed"]) == ["-rf new.py", "wish.json"]
    text = tiny.do("git", "show", "--no-patch", "--format=%B", marked["branch"])
    assert "Working tree: differed in 2 files" in text
    named = tiny.result("main")  # whoever names a commit means that commit
    assert named["differed"] == marked["differed"]


@pytest.mark.slow
def test_what_the_pipeline_writes_makes_no_tree_dirty(tiny: Tiny) -> None:
    tiny.do("dvc", "repro")
    assert changed_files(tiny.folder) == ["results/metrics.json"]
    assert changed_files(tiny.folder, ["results/metrics.json"]) == []
    assert tiny.run().returncode == 0


@pytest.mark.slow
def test_a_failed_stage_shares_nothing_twice_and_says_what_to_do(tiny: Tiny) -> None:
    tiny.write("wish.json", '"fail"')
    tiny.commit("it cannot")
    done = tiny.run()
    assert done.returncode == 1
    assert "ended with status" in done.stderr and "the stage cannot" in done.stderr
    assert "Traceback" not in done.stderr
    assert tiny.do("git", "branch", "--list", "runs/*") == ""
    assert len(tiny.clones()) == 1


@pytest.mark.slow
def test_a_folder_named_relative_to_the_original_is_a_remote_too(
    tiny: Tiny, tmp_path: Path
) -> None:
    tiny.do("dvc", "remote", "add", "--default", "near", "../store")
    tiny.commit("remote")
    assert tiny.result()["data_remote"] == "near"
    assert (tmp_path / "store/files/md5").is_dir()
    assert not list(tiny.folder.glob(".metaloom/**/store"))
    other = tmp_path / "elsewhere/other"  # as far from the store, with a cache of its own
    other.parent.mkdir()
    tiny.do("git", "clone", "--quiet", str(tiny.folder), str(other))
    succeed(
        other, tiny.env, "dvc", "remote", "modify", "--local", "near", "url", f"{tmp_path}/store"
    )
    succeed(other, tiny.env, "dvc", "repro", "--pull")
    assert tiny.stages_run() == 1
    assert contents(other, "out", "results") == contents(tiny.clones()[0], "out", "results")


@pytest.mark.slow
@pytest.mark.parametrize("name", [[], ["--branch", "runs/mine"]], ids=["own", "given"])
def test_a_remote_that_was_gone_costs_another_try_and_no_computing(
    name: list[str], tiny: Tiny, tmp_path: Path
) -> None:
    tiny.do("dvc", "remote", "add", "--default", "near", "../store")
    tiny.commit("remote")
    first = tiny.result("--no-push", *name)
    assert (first["branch"], first["data_remote"]) == (None, None)
    mark = Path(first["clone"]) / ".metaloom/run.json"
    mark.write_text(json.dumps({**json.loads(mark.read_text()), "done": False}))
    (tmp_path / "store").write_text("not a folder")
    refused = tiny.run(*name)
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert tiny.do("git", "branch", "--list", "runs/*") == ""
    (tmp_path / "store").unlink()
    for attempt_number in (3, 4):  # the last as after a kill between the push and the mark
        again = tiny.result(*name)
        assert (again["clone"], again["attempt"]) == (first["clone"], attempt_number)
        assert (again["recorded"], again["data_remote"]) == (first["recorded"], "near")
        assert tiny.do("git", "rev-parse", again["branch"]).strip() == first["recorded"]
        mark.write_text(json.dumps({**json.loads(mark.read_text()), "done": False}))
    assert tiny.stages_run() == 1


@pytest.mark.slow
def test_private_settings_stay_private(tiny: Tiny) -> None:
    """A key that was set with `--local` goes along, for the owner alone, and into no commit."""
    tiny.do("dvc", "remote", "add", "--default", "near", "../store")
    tiny.commit("remote")
    tiny.do("dvc", "remote", "add", "--local", "far", "s3://bucket/path")
    tiny.do("dvc", "remote", "modify", "--local", "far", "secret_access_key", "hush-0123")
    result = tiny.result()
    copy = Path(result["clone"]) / ".dvc/config.local"
    assert "hush-0123" in copy.read_text()
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    assert "hush-0123" not in tiny.do("git", "show", result["branch"])


def test_sigterm_gives_the_stage_time_and_the_same_command_goes_on(tiny: Tiny) -> None:
    """DVC alone would die at once and leave its stage behind."""
    tiny.write("wish.json", '"wait"')
    tiny.commit("wait")
    run = subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli", "run"],
        cwd=tiny.folder,
        env=tiny.env,
        stderr=subprocess.PIPE,
        text=True,
    )
    waiting, checkpoint = tiny.log.with_name("waiting"), tiny.log.with_name("checkpoint")
    end = time.monotonic() + 120
    while not waiting.exists():
        assert run.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    beside = tiny.run()
    assert beside.returncode == 1
    assert f"is being run already, by process {run.pid} on" in beside.stderr
    run.send_signal(signal.SIGTERM)
    _, said = run.communicate(timeout=90)
    assert checkpoint.read_text() == "saved"
    assert run.returncode == 143, said
    assert "run the same command again: it goes on in" in said
    (folder,) = tiny.clones()
    assert not clones.workers(folder)


def untracked_pictures(tiny: Tiny) -> None:
    (tiny.folder / "data/raw/mine").mkdir()
    tiny.write("data/raw/mine/cat.png", "cat")


@pytest.mark.slow
def test_raw_data_that_nobody_keeps_are_refused_by_name(tiny: Tiny) -> None:
    untracked_pictures(tiny)
    done = tiny.run()
    assert done.returncode == 1 and tiny.stages_run() == 0
    assert "data/raw/mine/cat.png" in done.stderr
    assert "dvc add data/raw/mine" in done.stderr


@pytest.mark.slow
def test_raw_data_that_dvc_keeps_are_there(tiny: Tiny) -> None:
    untracked_pictures(tiny)
    tiny.do("dvc", "add", "--quiet", "data/raw/mine")
    tiny.commit("pictures")
    result = tiny.result()
    metrics = tiny.do("git", "show", f"{result['branch']}:results/metrics.json")
    assert "mine" in json.loads(metrics)["raw"]
    assert (Path(result["clone"]) / "data/raw/mine/cat.png").read_text() == "cat"


@pytest.mark.slow
def test_raw_data_that_dvc_cannot_bring_are_refused(tiny: Tiny) -> None:
    untracked_pictures(tiny)
    tiny.do("dvc", "add", "--quiet", "data/raw/mine")
    tiny.commit("pictures")
    shutil.rmtree(tiny.folder / ".dvc/cache")
    done = tiny.run()
    assert done.returncode == 1 and "data/raw/mine.dvc cannot be brought here" in done.stderr


@pytest.mark.parametrize(
    ("source", "message"),
    [("../elsewhere", "leads out of the repository"), ("/nowhere/pictures", None)],
)
@pytest.mark.slow
def test_raw_data_outside_are_read_where_they_lie(
    source: str, message: str | None, tiny: Tiny
) -> None:
    tiny.write("params.yaml", yaml.safe_dump({"preprocess": {"source": source}}))
    tiny.commit("source")
    if message:
        done = tiny.run()
        assert done.returncode == 1 and message in done.stderr
    else:
        assert f"raw data are read where they lie: {source}" in tiny.result()["notes"]


@pytest.mark.slow
def test_no_branch_is_moved(tiny: Tiny) -> None:
    before = tiny.do("git", "rev-parse", "main")
    done = tiny.run("--branch", "main")
    assert done.returncode == 1 and "has a branch 'main' already" in done.stderr
    assert tiny.stages_run() == 0
    result = tiny.result("--branch", "results/first")
    assert result["branch"] == "results/first"
    assert tiny.do("git", "rev-parse", "main") == before


@pytest.mark.slow
def test_a_clone_whose_making_was_interrupted_is_made_anew(tiny: Tiny) -> None:
    commit = tiny.do("git", "rev-parse", "HEAD").strip()
    half = tiny.folder / ".metaloom/runs" / f"{commit[:12]}-20200101-000000"
    (half / ".git").mkdir(parents=True)
    result = tiny.result()
    assert not half.exists() and result["attempt"] == 1


@pytest.mark.slow
def test_old_finished_clones_go_but_not_unsent_metrics(tiny: Tiny) -> None:
    folder = Path(tiny.result("--no-push", "--", "make")["clone"])
    names = [f"{'0' * 12}-2020010{day}-000000" for day in range(1, 7)]
    for name in names:
        shutil.copytree(folder, folder.with_name(name), symlinks=True)
    (folder.with_name(names[0]) / ".metaloom/journal").mkdir()
    (folder.with_name(names[0]) / ".metaloom/journal/unsent.jsonl").write_text("{}")
    tiny.result()
    left = {path.name for path in tiny.clones()}
    assert names[0] in left and {names[5], names[4]} <= left
    assert not {names[1], names[2]} & left


HOSTILE = [
    "--upload-pack=touch {canary}",
    "-u{canary}",
    "--output={canary}",
    "-c core.sshCommand=touch\t{canary}",
    "ext::sh -c touch% {canary}",
    "$(touch {canary})",
    "`touch {canary}`",
    "main; touch {canary}",
    "main\ntouch {canary}",
    "| touch {canary}",
    "../../{canary}",
    "main..HEAD",
    "\x00{canary}",
    "\x1b]0;{canary}\x07",
    "HEAD\u202e{canary}",
    "",
    " ",
    "file:///{canary}",
    ":/{canary}",
    "@{{-1}}",
]


def hostile_names(canary: Path, count: int) -> list[str]:
    """The list, and what two or three of its entries make together."""
    rng = random.Random(0)
    names = list(HOSTILE)
    while len(names) < count:
        names.append("".join(rng.choices(list(filter(None, HOSTILE)), k=rng.choice((2, 3)))))
    return [text.format(canary=canary) for text in names]


@pytest.mark.slow
def test_no_name_is_ever_an_option_or_a_command(tiny: Tiny, tmp_path: Path) -> None:
    """500 strings as commit, branch and remote: each is refused, and none is executed."""
    canary = tmp_path / "canary"
    refused = 0
    for text in hostile_names(canary, 500):
        for use in (
            lambda name: RunRequest(commit=name, branch="fine"),
            lambda name: RunRequest(commit="HEAD", branch=name),
            lambda name: RunRequest(commit="HEAD", branch="fine", remote=name),
        ):
            with pytest.raises((ConfigError, MachineError)):
                refuse_before_anything_is_made(tiny.folder, use(text))
            refused += 1
        assert not canary.exists(), repr(text)
    print(f"{refused} uses of 500 names refused, none executed")
    assert refused == 1500
    assert not tiny.clones() and tiny.stages_run() == 0
    assert (
        resolve_commit(tiny.folder, "HEAD^{commit}")
        == git(tiny.folder, "rev-parse", "HEAD").strip()
    )
    assert check_branch(tiny.folder, "runs/größe-1") == "runs/größe-1"
    assert safe_name("commit", "HEAD~1") == "HEAD~1"


def refuse_before_anything_is_made(root: Path, request: RunRequest) -> RunResult:
    """Names the request that went through, if an earlier one did."""
    assert not (root / ".metaloom/runs").exists(), request
    return run_commit(root, request)


@pytest.mark.slow
def test_only_one_runs_a_commit(tiny: Tiny) -> None:
    commit = resolve_commit(tiny.folder, "HEAD")
    busy = pytest.raises(MachineError, match=f"by process {os.getpid()} on")
    with only_runner(tiny.folder, commit):
        with busy, only_runner(tiny.folder, commit):
            pass
        with only_runner(tiny.folder, "f" * 40):
            pass
    with only_runner(tiny.folder, commit):
        pass


@pytest.mark.slow
def test_a_folder_that_is_no_repository_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="is not the top of a repository"):
        run_commit(tmp_path, RunRequest())


@pytest.mark.slow
def test_a_source_must_be_a_text(tiny: Tiny) -> None:
    tiny.write("params.yaml", yaml.safe_dump({"preprocess": {"source": 3}}))
    tiny.commit("source")
    with pytest.raises((ConfigError, DataError), match=r"preprocess\.source"):
        run_commit(tiny.folder, RunRequest())
