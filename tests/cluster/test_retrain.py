"""`metaloom retrain` on a pipeline of two short stages: what it takes for new, and how it ends."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.cluster.clone import only_runner, take_clone
from pipeline.cluster.retrain.data import Inputs, compare, earlier, inputs_of
from pipeline.cluster.retrain.night import Outcome, Request, _publish, _too_few, retrain
from pipeline.cluster.retrain.policy import RetrainConfig
from pipeline.cluster.retrain.report import PAGE
from pipeline.cluster.retrain.repository import bring_repository
from pipeline.cluster.retrain.start import CHAMPION, TRACKED, place_start
from pipeline.cluster.retrain.tell import tell, webhook
from pipeline.core.errors import ConfigError, MachineError
from pipeline.deploy.retrain_command import DECIDED
from tests.chaos.campaign import is_full
from tests.cluster.dvc_machines import attempt, environment, succeed
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.timeout(3600 if is_full() else 900)

PREPROCESS = """
import json, pathlib
raw = pathlib.Path("data/raw/letters")
names = sorted(p.name for p in raw.iterdir())
store = pathlib.Path("data/store/image_folder")
store.mkdir(parents=True, exist_ok=True)
counts = [len(list((raw / name).iterdir())) for name in names]
columns = {"name": names, "group": ["all"] * len(names), "split": ["train"] * len(names)}
(store / "manifest.json").write_text(json.dumps({"classes": {**columns, "count": counts}}))
"""
DEPLOY = """
import json, os, pathlib, signal, sys, time
log = pathlib.Path(os.environ["RUNS_LOG"])
with log.open("a") as file:
    print(os.getcwd(), file=file)
wish = json.load(open("pipeline/wish.json"))
if wish == "fail":
    sys.exit("the stage cannot")
if wish == "wait":
    def stop(*_):
        log.with_name("checkpoint").write_text("saved")
        sys.exit(143)
    signal.signal(signal.SIGTERM, stop)
    time.sleep(120)
classes = json.load(open("data/store/image_folder/manifest.json"))["classes"]
rule = {"rule": "beats_champion", "setting": "5w1s", "value": 0.1, "limit": 0.0, "passed": True}
rule = {**rule, "passed": wish == "good", "reason": "5w1s: against the champion it differs"}
verdict = "champion" if wish == "good" else "challenger"
decision = {"verdict": verdict, "reason": "It is " + wish + ".", "rules": [rule]}
record = {"model": "m", "version": 1, "aliases": {verdict: 1}, "decision": decision}
results = pathlib.Path("results/deploy")
results.mkdir(parents=True, exist_ok=True)
(results / "release.json").write_text(json.dumps(record))
evaluate = pathlib.Path("results/evaluate")
evaluate.mkdir(parents=True, exist_ok=True)
found = {"accuracy": sum(classes["count"]) / 1000, "ci95": 0.01}
(evaluate / "metrics.json").write_text(json.dumps({"image_folder": {"5w1s": found}}))
"""
STAGES = {
    "preprocess": {
        "cmd": "python pipeline/preprocess.py",
        "deps": ["pipeline/preprocess.py", "data/raw/letters"],
        "outs": ["data/store/image_folder"],
    },
    "deploy": {
        "cmd": "python pipeline/deploy.py",
        "deps": ["pipeline/deploy.py", "pipeline/wish.json", "data/store/image_folder"],
        "outs": [{"results/deploy/release.json": {"cache": False}}],
        "metrics": [{"results/evaluate/metrics.json": {"cache": False}}],
    },
}
POLICY = {"min_new_examples": 2, "max_hours": 1.0, "on_failed_gate": "report", "webhook": ""}


class Small:
    """A repository whose letters are imported from a folder that somebody else fills."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.source = folder, folder.parent / "source"
        self.log = folder.parent / "runs.log"
        self.env = {**environment(folder, {}), "RUNS_LOG": str(self.log)}
        self.env |= {"PYTHONPATH": str(REPOSITORY), "MLFLOW_TRACKING_URI": "sqlite:///none.db"}
        for place in ("pipeline", "data/raw"):
            (folder / place).mkdir(parents=True)
        self.add("a", 3)
        self.write("pipeline/preprocess.py", PREPROCESS)
        self.write("pipeline/deploy.py", DEPLOY)
        self.write("pipeline/wish.json", '"good"')
        self.write("dvc.yaml", yaml.safe_dump({"stages": STAGES}))
        self.settings(**POLICY)
        self.write(".gitignore", ".metaloom/\n/data/store/\n/results/deploy/\n")
        shutil.copy(REPOSITORY / "data/raw/.gitignore", folder / "data/raw")
        self.do("git", "init", "--quiet", "--initial-branch=main")
        self.do("dvc", "init", "--quiet")
        self.do("git", "config", "user.name", "Ada")
        self.do("git", "config", "user.email", "ada@example.invalid")
        self.do(
            "dvc", "import-url", "--quiet", "--no-download", str(self.source), "data/raw/letters"
        )
        self.commit("first")

    def add(self, label: str, count: int) -> None:
        place = self.source / label
        place.mkdir(parents=True, exist_ok=True)
        first = len(list(place.iterdir()))
        for number in range(first, first + count):
            (place / f"{number}.png").write_text(f"{label}{number}")

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    def settings(self, **policy: Any) -> None:
        preprocess = {"domain": "image_folder", "source": "data/raw/letters"}
        document = {"preprocess": preprocess, "retrain": {**POLICY, **policy}}
        self.write("params.yaml", yaml.safe_dump(document))

    def do(self, *command: str) -> str:
        return succeed(self.folder, self.env, *command)

    def commit(self, message: str) -> str:
        self.do("git", "add", "--all")
        self.do("git", "commit", "--quiet", "--allow-empty", "-m", message)
        return self.do("git", "rev-parse", "HEAD").strip()

    def retrain(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pipeline.cli", "retrain", *(arguments or ("--local",))]
        return attempt(self.folder, {**self.env, **env}, *command)

    def told(self, *arguments: str, **env: str) -> dict[str, Any]:
        done = self.retrain(*(arguments or ("--local",)), "--json", **env)
        assert done.returncode == 0, done.stderr[-4000:]
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def branches(self) -> list[str]:
        form = "--format=%(refname:short)"
        return self.do("git", "for-each-ref", form, "refs/heads/retrain").split()

    def num_runs(self) -> int:
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0

    def show(self, branch: str, name: str) -> str:
        return self.do("git", "show", f"{branch}:{name}")


@pytest.fixture
def small(tmp_path: Path) -> Small:
    return Small(tmp_path / "small")


@contextmanager
def listener(statuses: list[int]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A webhook on loopback that answers with these statuses in turn, the last one from then on."""
    heard: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(statuses[min(len(heard), len(statuses)) - 1])
            self.send_header("location", "http://127.0.0.1:9/")
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/hook", heard
    finally:
        server.shutdown()
        server.server_close()


def test_nights_with_and_without_new_data(small: Small) -> None:
    with listener([200]) as (url, heard):
        first = small.told(METALOOM_WEBHOOK=url)
        assert (first["state"], first["data"]["compared"]) == ("promoted", False)
        again = small.told(METALOOM_WEBHOOK=url)
        assert (again["state"], again["branch"]) == ("no_change", first["branch"])
        assert "was promoted" in again["reason"] and small.num_runs() == 1
        small.add("a", 1)
        few = small.told(METALOOM_WEBHOOK=url)
        assert (few["state"], few["branch"]) == ("too_few", None)
        assert "1 new training examples; retrain.min_new_examples asks for 2" in few["reason"]
        small.add("b", 1)  # with the one of last night it is enough
        second = small.told(METALOOM_WEBHOOK=url)
    assert second["state"] == "promoted" and second["branch"] != first["branch"]
    assert second["data"]["new_examples"]["train"] == 2
    assert (second["data"]["new_classes"], second["data"]["compared"]) == (["b"], True)
    assert [one["retraining"]["state"] for one in heard] == ["promoted", "promoted"]
    assert small.num_runs() == 2
    page = small.show(second["branch"], "results/retrain/report.md")
    assert "| train | 1 -> 2 | 3 -> 5 | +2 |" in page and "New classes: b." in page
    assert "5w1s | 0.50% ± 1.00%" in page
    # The commit that was run holds the new data, and is in the branch: lineage can name it.
    assert small.do("git", "rev-parse", f"{second['branch']}^").strip() == second["commit"]
    changed = small.do("git", "show", "--name-only", "--format=", second["commit"]).split()
    assert changed == ["data/raw/letters.dvc"]
    small.do("git", "merge", "--quiet", second["branch"])  # the night's work can be taken over
    small.do("dvc", "checkout")
    assert sorted(p.name for p in (small.folder / "data/raw/letters").iterdir()) == ["a", "b"]
    assert "preprocess" not in small.do("dvc", "status")
    assert small.told()["state"] == "no_change"  # the merge is nothing new
    for name in small.branches():
        small.do("git", "branch", "--quiet", "-D", name)
    merged = small.told()  # what was merged is remembered without its branch
    assert merged["state"] == "no_change" and small.num_runs() == 2


def test_the_champion_becomes_an_input_and_goes_again(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in small.env.items():
        monkeypatch.setenv(name, value)
    who = ["-c", "user.name=test", "-c", "user.email=test@example.invalid"]

    def bring(folder: Path) -> str:
        folder.mkdir(parents=True)
        (folder / "weights").write_text("one")
        return "letters version 1"

    def never(folder: Path) -> str:
        raise AssertionError

    head = small.do("git", "rev-parse", "HEAD").strip()
    with only_runner(small.folder, "retrain"):
        clone = take_clone(small.folder, head, None, (), kind="retrain")
    inputs = inputs_of(clone.folder)
    placed, name = place_start(clone, "champion", bring, who)
    assert name == "letters version 1" and placed.commit != clone.commit
    changed = small.do("git", "-C", str(clone.folder), "show", "--name-only", "--format=", "HEAD")
    assert set(changed.split()) == {TRACKED, "data/start/.gitignore"}
    assert inputs_of(clone.folder) == inputs
    assert place_start(placed, "champion", never, who) == (placed, name)  # killed behind it
    small.do("git", "-C", str(clone.folder), *who, "commit", "-q", "--allow-empty", "-m", "a night")
    gone, name = place_start(placed, "scratch", never, who)
    assert name == "fresh weights" and gone.commit != placed.commit
    assert not (clone.folder / TRACKED).exists() and not (clone.folder / CHAMPION).exists()


@pytest.mark.slow
def test_a_retraining_begins_where_the_policy_says(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commit that runs names the champion's hash; another champion alone is no reason."""
    for name, value in small.env.items():
        monkeypatch.setenv(name, value)
    champions: list[str] = []

    def bring(folder: Path) -> str | None:
        if not champions:
            return None
        folder.mkdir(parents=True)
        (folder / "weights").write_text(champions[-1])
        return f"letters version {len(champions)}"

    def night() -> Outcome:
        return retrain(small.folder, Request(), champion=bring)

    def kept(branch: str | None) -> str:
        return small.show(f"{branch}^", "data/start/champion.dvc")

    small.settings(start="champion")
    small.commit("from the champion")
    first = night()
    assert (first.record["state"], first.record["start"]) == ("promoted", "fresh weights")
    champions.append("one")
    assert night().record["state"] == "no_change"
    small.add("b", 2)
    second = night()
    assert second.record["start"] == "letters version 1"
    assert second.branch and "letters version 1" in small.show(second.branch, PAGE)
    md5 = hashlib.md5(b"one").hexdigest()
    listing = f'[{{"md5": "{md5}", "relpath": "weights"}}]'
    assert hashlib.md5(listing.encode()).hexdigest() in kept(second.branch)
    small.do("git", "merge", "--quiet", second.branch)
    champions.append("two")
    small.add("b", 2)
    monkeypatch.setenv("RUNS_LOG", "/nowhere/log")
    with pytest.raises(MachineError):
        night()  # ended behind the choice of a start
    monkeypatch.setenv("RUNS_LOG", small.env["RUNS_LOG"])
    champions.append("three")
    third = night()  # the same run goes on
    assert third.record["start"] == "letters version 2"
    assert kept(third.branch) != kept(second.branch)
    small.settings(start="scratch")
    small.add("b", 2)
    small.commit("from scratch")
    fourth = night()
    assert fourth.record["start"] == "fresh weights"
    with pytest.raises(AssertionError, match="champion.dvc"):
        kept(fourth.branch)


def test_fresh_weights_and_the_champions_at_once_are_refused(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in small.env.items():
        monkeypatch.setenv(name, value)
    small.settings(start="champion")
    params = yaml.safe_load((small.folder / "params.yaml").read_text())
    params["meta_train"] = {"warm_start": False}
    small.write("params.yaml", yaml.safe_dump(params))
    small.commit("both")
    with pytest.raises(ConfigError, match="begins with fresh weights"):
        retrain(small.folder, Request())


@pytest.mark.slow
def test_what_another_machine_did_is_not_done_again(small: Small, tmp_path: Path) -> None:
    """Nobody fetches by hand."""
    small.do("git", "clone", "--quiet", "--bare", str(small.folder), str(tmp_path / "origin"))
    small.do("git", "remote", "add", "origin", str(tmp_path / "origin"))
    other = tmp_path / "other"
    small.do("git", "clone", "--quiet", str(tmp_path / "origin"), str(other))
    command = [sys.executable, "-m", "pipeline.cli", "retrain", "--local", "--remote", "origin"]
    done = attempt(other, small.env, *command)
    assert done.returncode == 0 and "promoted" in done.stdout, done.stderr
    told = small.told("--local", "--remote", "origin")
    assert told["state"] == "no_change" and told["branch"].startswith("origin/retrain/")
    assert small.num_runs() == 1


def test_a_name_that_somebody_took_meanwhile_is_left_to_them(small: Small, tmp_path: Path) -> None:
    """And what cannot be pushed at all is said once, not renamed."""
    small.do("git", "clone", "--quiet", "--bare", str(small.folder), str(tmp_path / "origin"))
    small.do("git", "remote", "add", "origin", str(tmp_path / "origin"))
    day = "retrain/2026-11-30"
    small.do("git", "push", "--quiet", "origin", f"main:refs/heads/{day}")
    small.do("git", "update-ref", "-d", f"refs/remotes/origin/{day}")  # since we looked
    ours = small.commit("ours")
    small.do("git", "reset", "--quiet", "--hard", "HEAD^")
    theirs = small.commit("theirs")
    small.do("git", "push", "--quiet", "--force", "origin", f"main:refs/heads/{day}")
    small.do("git", "update-ref", "-d", f"refs/remotes/origin/{day}")
    small.do("git", "branch", day, ours)
    assert _publish(small.folder, "origin", day, "2026-11-30") == f"{day}-2"
    form = "--format=%(refname:short) %(objectname)"
    listed = small.do("git", "ls-remote", "origin", "refs/heads/retrain/*").split()
    assert listed == [theirs, f"refs/heads/{day}", ours, f"refs/heads/{day}-2"]
    kept = small.do("git", "for-each-ref", form, "refs/heads/retrain").split()
    assert kept == [f"{day}-2", ours]
    assert _publish(small.folder, "origin", f"{day}-2", "2026-11-30") == f"{day}-2"
    shutil.rmtree(tmp_path / "origin")
    with pytest.raises(MachineError, match="origin"):
        _publish(small.folder, "origin", f"{day}-2", "2026-11-30")


@pytest.mark.slow
def test_a_branch_that_was_merged_and_deleted_is_not_pushed_again(
    small: Small, tmp_path: Path
) -> None:
    small.do("git", "clone", "--quiet", "--bare", str(small.folder), str(tmp_path / "origin"))
    small.do("git", "remote", "add", "origin", str(tmp_path / "origin"))
    night = ("--local", "--remote", "origin")
    branch = small.told(*night)["branch"]
    assert branch in small.do("git", "ls-remote", "origin")
    small.do("git", "merge", "--quiet", branch)
    small.do("git", "push", "--quiet", "origin", "main", f":{branch}")
    assert small.told(*night)["state"] == "no_change"
    assert branch not in small.do("git", "ls-remote", "origin")
    assert small.branches() == [branch]


@pytest.mark.slow
def test_code_is_reason_enough_and_the_policy_is_none(small: Small) -> None:
    small.told()
    small.settings(min_new_examples=5)
    small.commit("another policy")
    assert small.told()["state"] == "no_change"
    small.write("pipeline/deploy.py", DEPLOY + "\n# better\n")
    small.commit("better code")
    assert small.told()["state"] == "promoted"


@pytest.mark.slow
def test_what_is_not_promoted_is_reported_and_fails_where_the_policy_says_so(small: Small) -> None:
    small.write("pipeline/wish.json", '"bad"')
    small.commit("bad")
    told = small.told()
    assert (told["state"], told["reason"]) == ("not_promoted", "It is bad.")
    assert "FAILED" in small.show(told["branch"], "results/retrain/report.md")
    small.settings(on_failed_gate="fail")
    small.add("c", 5)
    small.commit("strict")
    done = small.retrain()
    assert done.returncode == DECIDED and "not promoted" in done.stdout
    assert "Traceback" not in done.stderr and len(small.branches()) == 2
    again = small.retrain()  # a pod that was killed behind its last step comes again
    assert again.returncode == DECIDED and "nothing has changed" in again.stdout


def test_the_budget_counts_from_the_first_stage_on(small: Small) -> None:
    waits = "import os, pathlib, signal, time\n"
    waits += "place = pathlib.Path(os.environ['RUNS_LOG']).with_name('checkpoint')\n"
    waits += "signal.signal(signal.SIGTERM, lambda *_: place.write_text('saved') and exit(143))\n"
    small.write("pipeline/preprocess.py", f"{waits}time.sleep(300)\n{PREPROCESS}")
    small.settings(max_worker_hours=60 / 3600)
    small.commit("slow from the start")
    with listener([200]) as (url, heard):
        done = small.retrain(METALOOM_NUM_WORKERS="2", METALOOM_WEBHOOK=url)
    assert done.returncode == DECIDED and "over its budget" in done.stdout, done.stderr[-3000:]
    assert small.log.with_name("checkpoint").read_text() == "saved"
    assert [one["retraining"]["state"] for one in heard] == ["over_budget"]
    assert small.num_runs() == 0 and not small.branches()


@pytest.mark.slow
def test_over_its_budget_it_stops_behind_a_checkpoint(small: Small) -> None:
    """Two workers; the earlier stages take up little of it."""
    small.told()
    small.write("pipeline/wish.json", '"wait"')
    small.settings(max_worker_hours=90 / 3600)
    small.commit("slow")
    with listener([200]) as (url, heard):
        done = small.retrain(METALOOM_NUM_WORKERS="2", METALOOM_WEBHOOK=url)
    assert done.returncode == DECIDED and "over its budget" in done.stdout, done.stderr[-3000:]
    assert small.log.with_name("checkpoint").read_text() == "saved"
    assert [one["retraining"]["state"] for one in heard] == ["over_budget"]
    assert len(small.branches()) == 1


def test_a_stage_that_fails_is_told_of_and_leaves_no_branch(small: Small) -> None:
    small.write("pipeline/wish.json", '"fail"')
    small.commit("broken")
    with listener([200]) as (url, heard):
        done = small.retrain(METALOOM_WEBHOOK=url)
    assert done.returncode == 1 and "the stage cannot" in done.stderr
    assert "Traceback" not in done.stderr and not small.branches()
    assert [one["retraining"]["state"] for one in heard] == ["failed"]


@pytest.mark.slow
def test_a_source_that_is_away_changes_nothing(small: Small) -> None:
    small.told()
    shutil.move(small.source, f"{small.source}-away")
    done = small.retrain()
    assert done.returncode == 1 and "the source of these data does not answer" in done.stderr
    shutil.move(f"{small.source}-away", small.source)
    assert small.told()["state"] == "no_change"


@pytest.mark.slow
def test_from_a_repository_somewhere_else(small: Small, tmp_path: Path) -> None:
    origin = tmp_path / "origin.git"
    small.do("git", "clone", "--quiet", "--bare", str(small.folder), str(origin))
    work = ("--work", str(tmp_path / "work"))
    wanted = ("--repository", str(origin), "--commit", "main", *work)
    told = small.told(*wanted)
    assert told["state"] == "promoted"
    names = small.do("git", "--git-dir", str(origin), "branch", "--list", "retrain/*")
    assert told["branch"] in names
    # Another machine finds the branch of the first one.
    other = small.told(*wanted[:-1], str(tmp_path / "other"))
    assert (other["state"], small.num_runs()) == ("no_change", 1)
    assert other["branch"] == f"origin/{told['branch']}"
    missing = small.retrain(
        "--repository", str(tmp_path / "none.git"), *work[:1], str(tmp_path / "w")
    )
    assert missing.returncode == 1 and "git -c" not in missing.stderr
    assert "Traceback" not in missing.stderr and "none.git" in missing.stderr
    for strange in ("ext::sh -c id", "--upload-pack=id", "-x", "http://example.org/x"):
        with pytest.raises(MachineError, match="no address of a git repository"):
            bring_repository(strange, tmp_path / "strange")


@pytest.mark.slow
def test_two_at_once_do_not_overlap(small: Small) -> None:
    small.write("pipeline/wish.json", '"wait"')
    small.commit("slow")
    command = [sys.executable, "-m", "pipeline.cli", "retrain", "--local"]
    first = subprocess.Popen(command, cwd=small.folder, env=small.env, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while small.num_runs() == 0:
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        done = small.retrain()
        assert done.returncode == 1 and "is being run already" in done.stderr
    finally:
        first.send_signal(signal.SIGTERM)
        assert first.wait(120) != 0
    assert small.log.with_name("checkpoint").read_text() == "saved"


KILLER = """#!{python}
import os, pathlib, signal, sys
count = pathlib.Path({count!r})
number = 1 + (int(count.read_text()) if count.exists() else 0)
count.write_text(str(number))
if str(number) == os.environ.get("KILL_AT"):
    os.kill(os.getppid(), signal.SIGKILL)
    sys.exit(137)
os.execv({git!r}, ["git", *sys.argv[1:]])
"""


def killer(small: Small) -> Path:
    """A `git` that kills whoever calls it, at the call of KILL_AT; returns where it counts."""
    programs, count = small.folder.parent / "programs", small.folder.parent / "count"
    programs.mkdir()
    git = shutil.which("git")
    script = programs / "git"
    script.write_text(KILLER.format(python=sys.executable, count=str(count), git=git))
    script.chmod(0o755)
    small.env["PATH"] = f"{programs}{os.pathsep}{small.env['PATH']}"
    return count


def test_killed_at_every_step_and_run_again_it_ends_the_same(small: Small, tmp_path: Path) -> None:
    plain = small.told()
    count = killer(small)
    small.add("b", 4)
    expected = {"state": "promoted", "new_examples": {"train": 4, "val": 0, "test": 0}}
    total = _calls_of_a_night(tmp_path, small)
    places = range(1, total + 1) if is_full() else [total - 1]
    killed = 0
    for place in places:
        folder = tmp_path / f"try-{place}"
        shutil.copytree(small.folder, folder, symlinks=True)
        one = _copy_of(small, folder)
        count.unlink(missing_ok=True)
        died = one.retrain(KILL_AT=str(place))
        killed += died.returncode == -signal.SIGKILL
        ended = one.told()
        branches = [name for name in one.branches() if name != plain["branch"]]
        assert len(branches) == 1, (place, branches)
        record = json.loads(one.show(branches[0], "results/retrain/report.json"))
        found = {"state": record["state"], "new_examples": record["data"]["new_examples"]}
        assert found == expected, place
        assert ended["state"] in ("promoted", "no_change")
        assert one.told()["state"] == "no_change"
        shutil.rmtree(folder)
    assert killed == len(places)  # or some were no kills at all


def _copy_of(small: Small, folder: Path) -> Small:
    one = object.__new__(Small)
    one.folder, one.source, one.log, one.env = folder, small.source, small.log, small.env
    return one


def _calls_of_a_night(tmp_path: Path, small: Small) -> int:
    folder = tmp_path / "counted"
    shutil.copytree(small.folder, folder, symlinks=True)
    (tmp_path / "count").unlink(missing_ok=True)
    assert _copy_of(small, folder).told()["state"] == "promoted"
    return int((tmp_path / "count").read_text())


def test_what_changed_is_told_by_class() -> None:
    def of(**classes: tuple[str, int]) -> dict[str, Any]:
        rows = {n: {"group": "", "split": s, "examples": c} for n, (s, c) in classes.items()}
        return {"domain": "d", "classes": rows}

    told = compare(
        of(a=("train", 5), b=("val", 1), d=("test", 2)),
        of(a=("train", 3), b=("test", 4), c=("val", 7)),
    )
    assert told["new_examples"] == {"train": 2, "val": 0, "test": 2}
    assert told["lost_examples"] == 3 + 7
    assert (told["new_classes"], told["lost_classes"], told["moved_classes"]) == (
        ["d"],
        ["c"],
        ["b"],
    )
    assert told["splits"]["val"] == {
        "before": {"classes": 1, "examples": 7},
        "now": {"classes": 1, "examples": 1},
    }
    assert compare(of(a=("train", 5)), {**of(a=("train", 5)), "domain": "e"})["compared"] is False


def test_labels_that_were_corrected_are_reason_enough() -> None:
    one = {"group": "", "split": "train", "examples": 5}
    before = {"domain": "d", "classes": {"a": one}, "inputs": {"code": "c", "data": "old"}}
    now = {**before, "inputs": {"code": "c", "data": "new"}}
    few = RetrainConfig(min_new_examples=100)
    assert _too_few(few, compare(now, before), Inputs("c", "new"), before) is None
    more = {**now, "classes": {"a": {**one, "examples": 6}}}
    assert "1 new" in str(_too_few(few, compare(more, before), Inputs("c", "new"), before))


def test_data_that_no_commit_knows_are_read_for_the_digest(small: Small) -> None:
    before = inputs_of(small.folder)
    (small.folder / "README.md").write_text("words")
    assert inputs_of(small.folder) == before
    document = {"preprocess": {"domain": "image_folder", "source": str(small.source)}}
    small.write("params.yaml", yaml.safe_dump(document))
    first = inputs_of(small.folder)
    small.add("a", 1)
    second = inputs_of(small.folder)
    assert first.code == second.code and first.data != second.data
    assert list(earlier(small.folder, "HEAD")) == []


def _speak_nonsense(server: socket.socket) -> None:
    while True:
        try:
            client, _ = server.accept()
        except OSError:
            return
        with client:
            client.recv(65536)
            client.sendall(b"garbage\r\n\r\n")


def test_a_webhook_is_asked_again_but_never_in_the_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    record = {"state": "promoted", "date": "2026-11-29", "reason": "It is good."}
    monkeypatch.setattr("pipeline.cluster.retrain.tell._PAUSE_SECONDS", 0.01)
    with listener([503, 200]) as (url, heard):
        assert tell(url, record) is None and len(heard) == 2
        assert heard[0]["text"] == "Retraining of 2026-11-29: promoted. It is good."
        assert tell(url, {**record, "state": "no_change"}) is None and len(heard) == 2
    with listener([404]) as (url, heard):
        assert tell(url, record) == "the webhook answered 404" and len(heard) == 1
    with listener([302]) as (url, heard):
        assert "302" in str(tell(url, record))
    assert tell(url, record) == "the webhook cannot be reached (ConnectionRefusedError)"
    with socket.create_server(("127.0.0.1", 0)) as odd:
        thread = threading.Thread(target=_speak_nonsense, args=(odd,), daemon=True)
        thread.start()
        found = tell(f"http://127.0.0.1:{odd.getsockname()[1]}/SECRET", record)
    assert found is not None and "SECRET" not in found
    for unsafe in (
        "http://example.org/",
        "http://localhost.example.org/",
        "http://127.0.0.1@example.org/",
        "https://name@example.org/",
        "https://example.org/a b",
        "ftp://127.0.0.1/",
    ):
        monkeypatch.setenv("METALOOM_WEBHOOK", unsafe)
        with pytest.raises(ConfigError, match="no https address") as caught:
            webhook("")
        assert unsafe not in str(caught.value)
    assert RetrainConfig(max_hours=2, max_worker_hours=6).budget_seconds(4) == 5400
