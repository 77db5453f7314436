"""Runs are recorded whole, or the loss is said; nothing about recording stops a stage."""

from __future__ import annotations

import itertools
import json
import os
import queue
import re
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.config import Section
from pipeline.core.errors import RegistryError, StoppedError, TrainingError
from pipeline.core.files import new_folder
from pipeline.runtime import lineage
from pipeline.runtime.checkpoint import newest_step, save_checkpoint
from pipeline.runtime.journal import FreshPoints, Journal, Point, read_points
from pipeline.runtime.kept import Kept, journal_folder, kept_journals, stamped
from pipeline.runtime.recorder import Patience, Recorder, record
from pipeline.runtime.tracking import (
    FAILED,
    FINISHED,
    KILLED,
    MemoryTracker,
    RunIds,
    RunStart,
    StageRun,
    stage_run,
)
from pipeline.runtime.upload import refuse_unsent, upload

REPOSITORY = Path(__file__).resolve().parents[2]


class Inner(Section):
    rate: float = 0.5
    sizes: tuple[int, ...] = (1, 2)


class Config(Section):
    inner: Inner = Inner()
    name: str = "a"


STAGE = """
import time
from pathlib import Path
from tests.unit.test_tracking import Config
from pipeline.runtime.journal import Journal
from pipeline.runtime.tracking import stage_run

inputs = {{"pictures": Path("in.txt")}}
with stage_run({stage!r}, Config(), inputs=inputs, outputs=[Path({out!r})]) as run:
    journal = Journal(run.journal)
    for step in range(300):
        journal.write(step, {{"loss": 1 / (step + 1)}})
    run.log({{"accuracy": 0.75, "greek & coptic": 0.5}})
    Path({out!r}).write_text({stage!r})
    {body}
"""


def start_stage(
    root: Path, stage: str, body: str = "", **environment: str
) -> subprocess.Popen[str]:
    script = STAGE.format(stage=stage, out=f"{stage}.txt", body=body)
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tracked")
    (folder / "in.txt").write_text("pictures")
    return folder


@pytest.fixture(scope="module")
def client(root: Path) -> Any:
    from pipeline.runtime.mlflow_tracker import connect

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return connect(root)


@pytest.fixture(scope="module")
def first_pair(root: Path) -> list[subprocess.Popen[str]]:
    """Two stages of one pipeline that start at once on a machine without a database."""
    names = ("preprocess", "pretrain@mlp")
    started = [start_stage(root, name, METALOOM_PIPELINE_RUN="pair") for name in names]
    for process in started:
        process.communicate(timeout=120)
    return started


def runs(client: Any, condition: str) -> list[Any]:
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return list(client.search_runs(experiments, condition))


def test_two_processes_make_one_new_database_and_share_one_parent(
    first_pair: Sequence[subprocess.Popen[str]], client: Any
) -> None:
    assert [process.returncode for process in first_pair] == [0, 0]
    children = runs(client, "tags.`metaloom.role` = 'stage' and tags.`metaloom.pipeline` = 'pair'")
    assert {run.info.run_name for run in children} == {"preprocess", "pretrain@mlp"}
    parents = {run.data.tags["mlflow.parentRunId"] for run in children}
    assert len(parents) == 1
    parent = client.get_run(parents.pop())
    assert {run.info.status for run in [*children, parent]} == {FINISHED}
    assert parent.data.metrics.keys() >= {"preprocess.accuracy", "pretrain:mlp.loss"}


def test_a_run_holds_params_points_inputs_and_tags(
    first_pair: Sequence[subprocess.Popen[str]], client: Any, root: Path
) -> None:
    (run,) = runs(client, "tags.`metaloom.stage` = 'preprocess'")
    assert run.data.params == {"inner.rate": "0.5", "inner.sizes": "[1, 2]", "name": "a"}
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [
        (i, 1 / (i + 1)) for i in range(300)
    ]
    assert run.data.metrics["accuracy"] == 0.75
    assert run.data.metrics["greek : coptic"] == 0.5
    (found,) = run.inputs.dataset_inputs
    assert found.dataset.name == "pictures"
    assert json.loads(found.dataset.source)["sha256"] == lineage.content_hash(root / "in.txt")
    assert run.data.tags["output.preprocess.txt"] == lineage.content_hash(root / "preprocess.txt")
    assert re.fullmatch("[0-9a-f]{64}", run.data.tags["code.hash"])
    assert run.data.tags.keys() >= {"git.commit", "git.dirty", "dvc.lock"}
    assert not list(
        (root / ".metaloom/journal").glob(f"preprocess-{run.data.tags['metaloom.key'][:12]}*")
    )


def test_however_a_stage_ends_its_run_is_closed(
    first_pair: Sequence[subprocess.Popen[str]], client: Any, root: Path
) -> None:
    """An exception, and kill -9 in the middle (seen to be running first)."""
    failing = start_stage(root, "failing", "raise ValueError('no more')", METALOOM_PIPELINE_RUN="f")
    killed = start_stage(
        root, "killed", "print(run.ids, flush=True); time.sleep(600)", METALOOM_PIPELINE_RUN="k"
    )
    assert killed.stdout and killed.stdout.readline().startswith("RunIds(")
    (run,) = runs(client, "tags.`metaloom.stage` = 'killed'")
    assert run.info.status == "RUNNING"
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    _, errors = failing.communicate(timeout=120)
    assert failing.returncode == 1 and "no more" in errors
    (run,) = runs(client, "tags.`metaloom.stage` = 'failing'")
    assert run.info.status == FAILED and "no more" in run.data.tags["error"]
    assert client.get_run(run.data.tags["mlflow.parentRunId"]).info.status == FAILED
    (run,) = wait_for(
        lambda: runs(client, "tags.`metaloom.stage` = 'killed' and attributes.status = 'KILLED'")
    )
    assert client.get_run(run.data.tags["mlflow.parentRunId"]).info.status == KILLED


def wait_for(search: Callable[[], list[Any]], seconds: float = 20) -> list[Any]:
    deadline = time.monotonic() + seconds
    while not (found := search()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


def test_restored_stages_are_linked_and_stale_runs_closed(
    first_pair: Sequence[subprocess.Popen[str]],
    client: Any,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from pipeline.runtime.mlflow_tracker import MlflowTracker

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    name = lineage.process_name(gone.pid)
    gone.wait()
    tracker = MlflowTracker(root)
    stale = tracker.start(RunStart("train", "stale", pipeline="old", owner=name, process=name))
    here = lineage.process_name(os.getpid())
    ids = tracker.start(RunStart("deploy", "new", pipeline="new", owner=here, process=here))
    assert ids == tracker.start(RunStart("deploy", "new", pipeline="new", owner=here, process=here))
    assert {client.get_run(run).info.status for run in (stale.parent, stale.child)} == {KILLED}
    made = lineage.content_hash(root / "preprocess.txt")
    outputs = {
        "preprocess": {"preprocess.txt": str(made)},
        "pretrain@mlp": {"pretrain@mlp.txt": "0" * 64},
        "deploy": {"release.json": "0" * 64},
    }
    links = tracker.link(ids, outputs)
    (maker,) = runs(client, "tags.`metaloom.stage` = 'preprocess'")
    assert links == {"preprocess": maker.info.run_id, "pretrain@mlp": "unknown"}
    parent = client.get_run(ids.parent)
    assert parent.data.tags["restored.preprocess"] == maker.info.run_id
    assert client.get_run(maker.info.run_id).data.tags[f"reused_by.{ids.parent}"] == "preprocess"
    tracker.finish(ids, FINISHED, {}, time.time())
    assert client.get_run(ids.parent).info.status == FINISHED


def test_the_twin_links_as_mlflow_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix stage of which one item ran here and one was restored; one stage never seen."""
    from pipeline.runtime.mlflow_tracker import MlflowTracker

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    found = []
    for tracker in (MemoryTracker(), MlflowTracker(tmp_path)):
        links = {}
        for pipeline, items in (("old", ("a", "b")), ("new", ("b",))):
            for item in items:
                ids = tracker.start(RunStart("pretrain", f"{pipeline}-{item}", pipeline=pipeline))
                tracker.finish(
                    ids, FINISHED, {f"output.models/{item}": f"hash-{pipeline}-{item}"}, time.time()
                )
                links[ids.child] = f"{pipeline}-{item}"
        ids = tracker.start(RunStart("deploy", "deploy", pipeline="new"))
        outputs = {
            "pretrain@a": {"models/a": "hash-old-a"},
            "pretrain@b": {"models/b": "hash-new-b"},
            "evaluate": {"results": "hash"},
            "deploy": {},
        }
        makers = tracker.link(ids, outputs)
        tracker.finish(ids, FINISHED, {}, time.time())
        found.append({stage: links.get(maker, maker) for stage, maker in makers.items()})
    assert found[0] == found[1] == {"pretrain@a": "old-a", "evaluate": "unknown"}


class Flaky(MemoryTracker):
    """Fails whenever its plan says so, before or after the call has had its effect."""

    plan: Sequence[str] = ()
    calls = 0

    def _step(self, act: Callable[[], Any]) -> Any:
        fault = self.plan[self.calls] if self.calls < len(self.plan) else "fine"
        self.calls += 1
        if fault == "before":
            raise ConnectionError("refused")
        result = act()
        if fault == "after":
            raise TimeoutError("no answer")
        return result

    def start(self, run: RunStart, known: RunIds | None = None) -> RunIds:
        return self._step(lambda: MemoryTracker.start(self, run))

    def log(self, ids: RunIds, points: Sequence[Point]) -> None:
        self._step(lambda: MemoryTracker.log(self, ids, points))

    def finish(self, ids: RunIds, status: str, tags: Any, ended: float) -> None:
        self._step(lambda: MemoryTracker.finish(self, ids, status, tags, ended))


@settings(max_examples=40, deadline=None)
@given(
    plan=st.lists(st.sampled_from(["fine", "before", "after"]), max_size=12),
    count=st.integers(0, 900),
)
def test_after_any_faults_every_point_is_there_once(
    tmp_path_factory: pytest.TempPathFactory, plan: list[str], count: int
) -> None:
    journal = tmp_path_factory.mktemp("journal") / "points.jsonl"
    tracker = Flaky()
    tracker.plan = plan
    recorder = Recorder(lambda: tracker, journal)
    recorder.accept({"event": "start", "run": {"stage": "s", "key": "k", "inputs": []}})
    writer = Journal(journal)
    for step in range(count):
        writer.write(step, {"loss": float(step)})
    recorder.accept({"event": "end", "status": FINISHED, "tags": {}})
    recorder.accept({"event": "end", "status": KILLED, "tags": {}})
    for _ in range(len(plan) + 1):
        try:
            recorder.flush()
        except OSError:
            continue
    assert recorder.done
    assert sorted(step for _, _, step, _ in tracker.points) == list(range(count))
    assert tracker.finished["k"][0] == FINISHED


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_points_that_a_restarted_worker_writes_again_are_told_once(
    tmp_path_factory: pytest.TempPathFactory, data: Any
) -> None:
    """Against the plain thing: a set of all (metric, step, value) that stood in the journal."""
    journal = tmp_path_factory.mktemp("journal") / "points.jsonl"
    points = data.draw(
        st.lists(
            st.tuples(st.integers(0, 6), st.sampled_from("ab"), st.integers(0, 1)), max_size=40
        )
    )
    writer = Journal(journal)
    expected, known = [], set()
    fresh, found = FreshPoints(journal), []
    for step, name, value in points:
        writer.write(step, {name: float(value)})
        if (step, name, value) not in known:
            expected.append((step, name, value))
        known.add((step, name, value))
        if data.draw(st.booleans()):  # the recorder looks while the worker writes
            found += fresh.take(data.draw(st.integers(1, 5)))
    while taken := fresh.take(7):
        found += taken
    assert [(p.step, n, v) for p in found for n, v in p.metrics.items()] == expected


@given(cut=st.integers(1, 30), count=st.integers(0, 5))
def test_a_torn_line_costs_its_own_point_alone(
    tmp_path_factory: pytest.TempPathFactory, cut: int, count: int
) -> None:
    """A worker is killed in the middle of a line; its successor opens the file and goes on."""
    journal = tmp_path_factory.mktemp("journal") / "points.jsonl"
    Journal(journal).write(0, {"loss": 1.0})
    whole = journal.read_bytes()
    Journal(journal).write(1, {"loss": 2.0})
    journal.write_bytes(journal.read_bytes()[: len(whole) + cut])
    assert [p.step for p, _ in read_points(journal)] == [0]
    after = Journal(journal)
    for step in range(2, 2 + count):
        after.write(step, {"loss": 3.0})
    assert [p.step for p, _ in read_points(journal)] == [0, *range(2, 2 + count)]


def test_a_full_disk_costs_points_and_not_the_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real limit on the file's size (EFBIG, as ENOSPC would be), lifted again."""
    path = tmp_path / "points.jsonl"
    journal = Journal(path)
    journal.write(0, {"loss": 0.0})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, before[1]))
        for step in range(1, 5):
            journal.write(step, {"loss": 0.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    journal.write(5, {"loss": 0.0})
    assert [p.step for p, _ in read_points(path)] == [0, 5]
    assert capsys.readouterr().err.count("takes no more metrics") == 1


def keep_a_run(root: Path, key: str, *, status: str | None = FINISHED, count: int = 450) -> Path:
    """What a stage leaves whose recorder could send nothing."""
    journal = journal_folder(root) / f"meta_train-{key}.jsonl"
    writer, kept = Journal(journal), Kept(journal)
    run = {"stage": "meta_train", "key": key, "inputs": [], "pipeline": "p", "process": "other/1/0"}
    kept.write(stamped("start", run=run))
    for step in range(count):
        writer.write(step, {"loss": float(step)})
    if status is not None:
        kept.write(stamped("end", status=status, tags={"error": "none"}))
    kept.close()
    return journal


def test_uploads_are_idempotent_wherever_they_break(tmp_path: Path) -> None:
    """A fault before or after any call; then once more without: each point once, closed as it was."""
    for broken, fault in itertools.product(range(7), ("before", "after")):
        journal = keep_a_run(tmp_path, f"{broken}{fault}", status=FAILED)
        tracker = Flaky()
        tracker.plan = ["fine"] * broken + [fault]
        outcomes = upload(tmp_path, lambda tracker=tracker: tracker)
        if outcomes[0].outcome == "refused":
            assert journal.exists()
            with pytest.raises(RegistryError, match=r"1 of 1 kept runs could not be sent whole"):
                refuse_unsent(outcomes)
            outcomes = upload(tmp_path, lambda tracker=tracker: tracker)
        refuse_unsent(outcomes)
        assert [(one.outcome, one.points, one.detail) for one in outcomes] == [
            ("sent", 450, FAILED)
        ]
        assert sorted(step for _, _, step, _ in tracker.points) == list(range(450))
        assert tracker.finished[f"{broken}{fault}"][0] == FAILED
        assert not kept_journals(tmp_path) and not list(journal.parent.iterdir())


def test_an_upload_leaves_living_runs_alone_and_closes_killed_ones(tmp_path: Path) -> None:
    living, killed = keep_a_run(tmp_path, "living"), keep_a_run(tmp_path, "killed", status=None)
    tracker = MemoryTracker()
    holder = Kept(living)  # as its stage or its recorder does
    outcomes = {one.journal: one.outcome for one in upload(tmp_path, lambda: tracker)}
    assert outcomes == {living.name: "left", killed.name: "sent"}
    assert set(tracker.finished) == {"killed"} and tracker.finished["killed"][0] == KILLED
    holder.close()
    assert [one.outcome for one in upload(tmp_path, lambda: tracker)] == ["sent"]
    assert tracker.finished["living"][0] == FINISHED


@pytest.mark.parametrize("gone", ["MLflow", "store"])
def test_one_that_is_gone_keeps_nothing_from_the_other(gone: str, tmp_path: Path) -> None:
    """The object store gets the checkpoints, and MLflow the metrics."""
    store = tmp_path / "store"
    if gone == "store":
        store.write_text("no folder")
    else:
        store.mkdir()
    journal = keep_a_run(tmp_path, "r", count=3)
    folder = tmp_path / ".metaloom" / "checkpoints" / "run"
    save_checkpoint(folder, 7, {"weights": torch.zeros(2)}, {})
    uri = "http://127.0.0.1:9" if gone == "MLflow" else f"sqlite:///{tmp_path / 'mlflow.db'}"
    environment = {**os.environ, "METALOOM_STORAGE": store.as_uri(), "MLFLOW_TRACKING_URI": uri}
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", "upload"],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in done.stderr
    if gone == "MLflow":
        assert done.returncode == 1 and "1 runs are still kept in" in done.stderr
        assert newest_step(store / "checkpoints" / "run") == 7 and journal.exists()
    else:
        assert done.returncode == 74 and "takes no checkpoint" in done.stderr
        assert "sent" in done.stdout and not kept_journals(tmp_path)


@pytest.mark.parametrize("how", [KeyboardInterrupt(), StoppedError("as asked"), ValueError("no")])
def test_a_stop_as_asked_is_no_failure(
    how: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = list[str]()
    monkeypatch.setenv("METALOOM_TRACKING", "off")
    monkeypatch.setattr(StageRun, "finish", lambda self, status, tags: told.append(status))
    with pytest.raises(type(how)), stage_run("s", Config(), root=tmp_path):
        raise how
    assert told == [FAILED if isinstance(how, ValueError) else KILLED]


def test_an_upload_without_a_server_keeps_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.runtime.mlflow_tracker import MlflowTracker

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert upload(tmp_path, lambda: MlflowTracker(tmp_path)) == []
    journal = keep_a_run(tmp_path, "k")
    with pytest.raises(RegistryError, match=r"nothing was sent: .* 1 runs are still kept in"):
        upload(tmp_path, lambda: MlflowTracker(tmp_path))
    assert kept_journals(tmp_path) == [journal]


def test_a_late_upload_keeps_the_times_and_the_pipelines_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run gets the times of the stage, and a pipeline that went on keeps its own status."""
    from pipeline.runtime.mlflow_tracker import MlflowTracker

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    here = lineage.process_name(os.getpid())
    tracker = MlflowTracker(tmp_path)
    ids = tracker.start(RunStart("deploy", "later", pipeline="p", owner=here, process=here))
    tracker.finish(ids, FINISHED, {}, time.time())
    keep_a_run(tmp_path, "early", status=FAILED, count=3)
    (sent,) = upload(tmp_path, lambda: MlflowTracker(tmp_path))
    assert sent.run_id is not None
    run = tracker._client.get_run(sent.run_id)
    assert run.info.status == FAILED and run.data.tags["mlflow.parentRunId"] == ids.parent
    assert tracker._client.get_run(ids.parent).info.status == FINISHED
    history = tracker._client.get_metric_history(sent.run_id, "loss")
    assert [m.step for m in history] == [0, 1, 2]
    assert run.info.end_time >= max(m.timestamp for m in history)


def test_a_dead_server_is_said_once_and_given_up_within_the_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real client against a port where nobody listens."""
    from pipeline.runtime.mlflow_tracker import MlflowTracker

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    events: queue.Queue[Any] = queue.Queue()
    events.put({"event": "start", "run": {"stage": "s", "key": "k", "inputs": []}})
    events.put({"event": "end", "status": FINISHED, "tags": {}})
    warnings: list[str] = []
    began = time.monotonic()
    complete = record(
        Recorder(lambda: MlflowTracker(tmp_path), tmp_path / "none.jsonl"),
        events,
        on_start=lambda ids: pytest.fail("no run can have been opened"),
        stage_lives=lambda: True,
        warn=warnings.append,
        patience=Patience(first_backoff=0.1, silent_server=1.0),
    )
    assert not complete
    assert len(warnings) == 1 and "the stage goes on" in warnings[0]
    assert time.monotonic() - began < 20


def test_a_run_is_closed_even_if_its_points_are_refused(tmp_path: Path) -> None:
    class Refusing(MemoryTracker):
        def log(self, ids: RunIds, points: Sequence[Point]) -> None:
            raise ValueError("not this metric")

    journal, tracker = tmp_path / "points.jsonl", Refusing()
    Journal(journal).write(0, {"loss": 1.0})
    events: queue.Queue[Any] = queue.Queue()
    events.put({"event": "start", "run": {"stage": "s", "key": "k", "inputs": []}})
    events.put({"event": "end", "status": FAILED, "tags": {}})
    warnings: list[str] = []
    complete = record(
        Recorder(lambda: tracker, journal),
        events,
        on_start=lambda ids: None,
        stage_lives=lambda: True,
        warn=warnings.append,
        patience=Patience(first_backoff=0.05, silent_server=0.2),
    )
    assert not complete and "not this metric" in warnings[0]
    status, tags = tracker.finished["k"]
    assert status == FAILED and "metaloom.incomplete" in tags


def test_code_that_changes_meanwhile_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METALOOM_TRACKING", "off")
    code = tmp_path / "pipeline" / "a.py"
    code.parent.mkdir()
    code.write_text("x = 1\n")
    with stage_run("s", Config(), root=tmp_path, code_root=tmp_path):
        pass
    with (
        pytest.raises(TrainingError, match="changed while s ran"),
        stage_run("s", Config(), root=tmp_path, code_root=tmp_path),
    ):
        code.write_text("x = 2\n")


def test_params_that_change_meanwhile_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METALOOM_TRACKING", "off")
    (tmp_path / "params.yaml").write_text("s: {steps: 60}\n")
    with stage_run("s", Config(), root=tmp_path, code_root=tmp_path):
        pass
    with (
        pytest.raises(TrainingError, match=r"params\.yaml changed while s ran"),
        stage_run("s", Config(), root=tmp_path, code_root=tmp_path),
    ):
        (tmp_path / "params.yaml").write_text("s: {steps: 50}\n")


def test_without_mlflow_the_stage_runs_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with stage_run("s", Config(), root=tmp_path) as run:
        run.log({"accuracy": 1.0})
        assert run.ids is None
    assert "not installed: runs are not recorded" in capsys.readouterr().err
    assert json.loads(run.journal.read_text())["metrics"] == {"accuracy": 1.0}


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True)


def test_dirty_means_sources_not_what_dvc_writes(tmp_path: Path) -> None:
    assert lineage.git_state(tmp_path) == lineage.GitState("none", dirty=True)
    git(tmp_path, "init")
    git(tmp_path, "config", "user.email", "a@b.c")
    git(tmp_path, "config", "user.name", "a")
    (tmp_path / "results").mkdir()
    for name in ("dvc.lock", "results/metrics.json", "params.yaml"):
        (tmp_path / name).write_text("{}")
    lock = {"stages": {"evaluate": {"outs": [{"path": "results"}, {"path": "new/a/m.json"}]}}}
    (tmp_path / "dvc.lock").write_text(json.dumps(lock))
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "a")
    assert not lineage.git_state(tmp_path).dirty
    (tmp_path / "dvc.lock").write_text(json.dumps({**lock, "schema": "2.0"}))
    (tmp_path / "results/metrics.json").write_text("[]")
    assert not lineage.git_state(tmp_path).dirty
    (tmp_path / "new/a").mkdir(parents=True)  # git shows a new folder as one entry, unless asked
    (tmp_path / "new/a/m.json").write_text("{}")
    assert not lineage.git_state(tmp_path).dirty
    (tmp_path / "params.yaml").write_text("a: 1")
    assert lineage.git_state(tmp_path).dirty


def test_content_hashes_tell_any_two_contents_apart(tmp_path: Path) -> None:
    assert lineage.content_hash(tmp_path / "absent") is None
    for name, text in (("a", "1"), ("b", "1"), ("c", "2")):
        with new_folder(tmp_path / name) as folder:
            (folder / "x").write_text(text)
    hashes = [lineage.content_hash(tmp_path / name) for name in "abc"]
    assert hashes[0] == hashes[1] != hashes[2]
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "x").write_text("1")
    before = lineage.content_hash(plain)
    (plain / "x").rename(plain / "y")
    assert lineage.content_hash(plain) != before


def test_a_dvc_process_above_is_the_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two commands under one process called dvc share a key; under two they do not."""
    fake = tmp_path / "dvc"
    code = "from pipeline.runtime.lineage import pipeline_key; print(pipeline_key()[0])"
    ask = f"{sys.executable} -c '{code}'"
    fake.write_text(
        f"#!{sys.executable}\nimport subprocess\n" + f"subprocess.run({ask!r}, shell=True)\n" * 2
    )
    fake.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if k != "METALOOM_PIPELINE_RUN"}
    environment["PYTHONPATH"] = str(REPOSITORY)
    keys = [
        subprocess.run(
            [fake, "repro"], env=environment, capture_output=True, text=True, check=True
        ).stdout.split()
        for _ in range(2)
    ]
    assert keys[0][0] == keys[0][1] and keys[1][0] == keys[1][1]
    assert keys[0][0] != keys[1][0]


def test_an_experiments_copy_belongs_to_the_main_tree(tmp_path: Path) -> None:
    copy = tmp_path / ".dvc" / "tmp" / "exps" / "standard" / "x"
    copy.mkdir(parents=True)
    assert lineage.home(copy) == lineage.home(tmp_path) == tmp_path.resolve()


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("", "sqlite:///mlflow.db"),
        ("sqlite:///runs/mlflow.db", "sqlite:///runs/mlflow.db"),
        ("https://me:secret@host:5000/mlflow", "https://host:5000/mlflow"),
        ("postgresql://me:secret@host/db", "postgresql://host/db"),
    ],
)
def test_a_server_is_shown_without_password_or_this_machines_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str, shown: str
) -> None:
    from pipeline.runtime.mlflow_tracker import shown_uri

    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert shown_uri(tmp_path) == shown


CHOICES = {"MLFLOW_TRACKING_URI", "METALOOM_PIPELINE_RUN", "METALOOM_TRACKING"}

DVC_STAGE = """
import sys
from pathlib import Path
from pipeline.runtime.tracking import stage_run
from tests.unit.test_tracking import Config

name, = sys.argv[1:]
with stage_run(name, Config(), outputs=[Path(f"{name}.txt")]) as run:
    if name == "last":
        run.link_restored()
    Path(f"{name}.txt").write_text(name + Path("params.yaml").read_text())
"""


def test_what_dvc_restores_is_linked_to_the_run_that_made_it(tmp_path: Path) -> None:
    """Real `dvc repro`, three times: parameter 1, parameter 2, and 1 again from the run-cache."""
    command = f"{sys.executable} stage.py"
    stages = {
        "first": {"cmd": f"{command} first", "params": ["p"], "outs": ["first.txt"]},
        "last": {"cmd": f"{command} last", "deps": ["first.txt"], "outs": ["last.txt"]},
    }
    # Like deploy, whose effect is outside DVC: it is never restored.
    stages["last"]["always_changed"] = True  # type: ignore[assignment]
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    (tmp_path / "stage.py").write_text(DVC_STAGE)
    git(tmp_path, "init")
    environment = {
        **{k: v for k, v in os.environ.items() if k not in CHOICES},
        "PYTHONPATH": str(REPOSITORY),
        "DVC_NO_ANALYTICS": "1",
    }
    dvc = [sys.executable, "-m", "dvc"]

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [*dvc, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("init", "--quiet")
    for value in (1, 2, 1):
        (tmp_path / "params.yaml").write_text(f"p: {value}\n")
        printed = run("repro")
    assert "is cached" in printed or "restored" in printed.lower()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        from pipeline.runtime.mlflow_tracker import connect

        client = connect(tmp_path)
    parents = runs(client, "tags.`metaloom.role` = 'pipeline'")
    children = runs(client, "tags.`metaloom.stage` = 'first'")
    assert (len(parents), len(children)) == (3, 2)
    newest, _, oldest = parents
    (maker,) = [r for r in children if r.data.tags["mlflow.parentRunId"] == oldest.info.run_id]
    assert newest.data.tags["restored.first"] == maker.info.run_id
    assert "restored.first" not in oldest.data.tags
    assert {parent.info.status for parent in parents} == {FINISHED}
