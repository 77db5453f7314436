"""MLflow gone for a while, or for good, and recorders killed: the stage goes on, no point is lost."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.local.processes import (
    Running,
    free_ports,
    http_status,
    kill,
    launch,
    private_folder,
)
from pipeline.launch.base import Job
from pipeline.runtime.journal import read_points
from pipeline.runtime.kept import journal_folder, kept_journals
from pipeline.runtime.tracking import FAILED, FINISHED, KILLED
from pipeline.store.reader import Store
from tests.chaos.campaign import Campaign, Try, is_full, tries
from tests.chaos.disturbed import ENTRY, long_job, undisturbed
from tests.chaos.hostile import FAULTS, Hostile, wait_until
from tests.contract.drive import outcome, start
from tests.distributed.small_run import digest

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1800 if is_full() else 300)]

REPOSITORY = Path(__file__).resolve().parents[2]
OUTAGE_SECONDS = 120.0 if is_full() else 12.0
"""Longer than the client waits for one answer."""
BATCH = "POST /api/2.0/mlflow/runs/log-batch"
STAGE = """
import itertools, time
from pathlib import Path
from pipeline.core.config import Section
from pipeline.runtime.journal import Journal
from pipeline.runtime.tracking import stage_run

class Config(Section):
    rate: float = 0.5

with stage_run("meta_train", Config()) as run:
    journal = Journal(run.journal)
    for step in itertools.count():
        journal.write(step, {"loss": 1 / (step + 1), "accuracy": step / 7})
        if Path("enough").exists() or Path("fail").exists():
            break
        time.sleep(0.01)
    Path("steps").write_text(str(step + 1))
    if Path("fail").exists():
        raise ValueError("no more")
"""


class Server:
    """A real MLflow server on sqlite that can be killed and started again on the same port."""

    def __init__(self, folder: Path) -> None:
        self.folder = private_folder(folder)
        self.port = free_ports(1)[0]
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
        quiet |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "PATH": os.environ["PATH"]}
        launch(
            Running(
                name="mlflow",
                folder=str(self.folder),
                ports={"server": self.port},
                url=self.url,
                environment={},
            ),
            command,
            environment=quiet,
            answers=lambda: http_status(f"{self.url}/health") == 200,
        )

    def kill(self) -> None:
        kill(self.folder)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    one = Server(tmp_path_factory.mktemp("mlflow"))
    one.start()
    yield one
    one.kill()


@pytest.fixture
def proxy(server: Server) -> Iterator[Hostile]:
    server.start()  # a test before may have killed it
    with Hostile(server.url).serving() as one:
        yield one


@pytest.fixture
def client(server: Server) -> Any:
    import mlflow

    return mlflow.MlflowClient(server.url, server.url)


class Stage:
    """A stage in a process of its own, that writes points until it is told to end."""

    _numbers = itertools.count()

    def __init__(self, folder: Path, uri: str) -> None:
        self.root = folder / f"stage{next(self._numbers)}"
        self.root.mkdir()
        self.pipeline = f"{self.root}"
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "MLFLOW_TRACKING_URI": uri,
            "METALOOM_PIPELINE_RUN": self.pipeline,
            "METALOOM_TRACKING": "on",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", STAGE],
            cwd=self.root,
            env=self.environment,
            stderr=subprocess.PIPE,
            text=True,
        )

    def num_written(self) -> int:
        found = list(journal_folder(self.root).glob("*.jsonl"))
        return sum(1 for path in found for _ in read_points(path))

    def end(self, how: str = "enough") -> tuple[int, str]:
        """Tell it to end; returns its exit status and what it said."""
        (self.root / how).touch()
        _, said = self.process.communicate(timeout=200)
        return self.process.returncode, said

    @property
    def num_steps(self) -> int:
        return int((self.root / "steps").read_text())

    def recorder(self) -> int:
        """The pid of the recorder beside it."""
        import psutil

        (found,) = [
            child.pid
            for child in psutil.Process(self.process.pid).children()
            if "pipeline.runtime.recorder" in child.cmdline()
        ]
        return int(found)

    def runs(self, client: Any) -> list[Any]:
        """Its runs in MLflow, the pipeline's run left out."""
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        mine = f"tags.`metaloom.pipeline` = '{self.pipeline}' and tags.`metaloom.role` = 'stage'"
        return list(client.search_runs(experiments, mine))

    def num_arrived(self, client: Any) -> int:
        found = self.runs(client)
        return len(client.get_metric_history(found[0].info.run_id, "loss")) if found else 0

    def upload(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "pipeline.cli", "upload"],
            cwd=self.root,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def is_complete(stage: Stage, client: Any, num_steps: int, status: str) -> bool:
    """One closed run that holds every point once, in order."""
    (run,) = stage.runs(client)
    parent = client.get_run(run.data.tags["mlflow.parentRunId"])
    for name, value in (("loss", lambda i: 1 / (i + 1)), ("accuracy", lambda i: i / 7)):
        history = client.get_metric_history(run.info.run_id, name)
        found = [(metric.step, metric.value) for metric in history]
        in_time = [m.step for m in sorted(history, key=lambda m: (m.timestamp, m.step))]
        expected = [(i, value(i)) for i in range(num_steps)]
        if found != expected or in_time != list(range(num_steps)):
            return False
    said = {run.info.status, parent.info.status}
    return said == {status} and run.data.params == {"rate": "0.5"}


def missing(stage: Stage, client: Any) -> str:
    """What differs, for the log of a try that failed."""
    found = stage.runs(client)
    lines = [f"{stage.num_written()} points still here"]
    for run in found:
        steps = [m.step for m in client.get_metric_history(run.info.run_id, "loss")]
        lines.append(
            f"{run.info.run_id} {run.info.status}: {len(steps)} points, "
            f"{len(set(steps))} steps up to {max(steps, default=-1)}, {run.data.params}"
        )
    return "\n".join(lines)


@pytest.fixture
def stages(tmp_path: Path) -> Iterator[Callable[[str], Stage]]:
    begun: list[Stage] = []

    def begin(uri: str) -> Stage:
        begun.append(Stage(tmp_path, uri))
        return begun[-1]

    yield begin
    for stage in begun:
        if stage.process.poll() is None:
            stage.process.kill()
            stage.process.wait()


def break_and_mend(
    stage: Stage, client: Any, begin: Callable[[], None], end: Callable[[], None]
) -> Try:
    """One outage in the middle of a stage; it must go on in it, and all must arrive after it."""
    wait_until(lambda: stage.num_arrived(client) > 0, 60, "a first point in MLflow")
    arrived = stage.num_arrived(client)
    begin()
    before = stage.num_written()
    time.sleep(OUTAGE_SECONDS)
    during = stage.num_written() - before
    end()
    mended = time.monotonic()
    status, said = stage.end()
    seconds = time.monotonic() - mended
    whole = status == 0 and is_complete(stage, client, stage.num_steps, FINISHED)
    told = said.count("the stage goes on") <= 1 and "kept in" not in said
    lost = 0 if whole else stage.num_steps
    if not (whole and told):
        print(said, status, missing(stage, client), flush=True)
    return Try(min(arrived, during), whole and told, None, lost, seconds)


def test_mlflow_gone_for_a_while(
    campaign: Callable[[str], Campaign],
    server: Server,
    proxy: Hostile,
    client: Any,
    stages: Callable[[str], Stage],
) -> None:
    """Killed and restarted, stopped (SIGSTOP is a hang of the real one), and every made-up fault."""
    record = campaign("MLflow gone for a while")
    record.notes["outage_seconds"] = OUTAGE_SECONDS

    def stop_all(number: int) -> Callable[[], None]:
        import psutil

        def act() -> None:
            leader = int(
                (server.folder / "running.json").read_text().split('"pid": ')[1].split(",")[0]
            )
            for process in [psutil.Process(leader), *psutil.Process(leader).children(True)]:
                process.send_signal(number)

        return act

    stage = stages(server.url)
    record.add(break_and_mend(stage, client, server.kill, server.start))
    if not is_full():
        return
    stage = stages(server.url)
    freeze, thaw = stop_all(signal.SIGSTOP), stop_all(signal.SIGCONT)
    record.add(break_and_mend(stage, client, freeze, thaw))
    for fault in FAULTS:
        stage = stages(proxy.url)
        record.add(
            break_and_mend(
                stage, client, lambda mode=fault: setattr(proxy, "mode", mode), proxy.recover
            )
        )


@pytest.mark.slow
def test_mlflow_gone_for_good(
    campaign: Callable[[str], Campaign],
    server: Server,
    proxy: Hostile,
    client: Any,
    stages: Callable[[str], Stage],
) -> None:
    """Before the stage began, or in its middle: it ends as it would have, and says once what to do.

    Then `metaloom upload`, killed -9 when it had sent a part, and again.
    """
    record = campaign("MLflow gone for good")
    cases = [("enough", FINISHED, False), ("fail", FAILED, True), ("enough", FINISHED, True)]
    for how, status, begun in cases * tries(ci=1, full=4):
        stage = stages(proxy.url)
        if begun:
            wait_until(lambda s=stage: s.num_arrived(client) > 0, 60, "a first point in MLflow")
        server.kill()
        known = stage.num_written()
        wait_until(lambda s=stage, n=known: s.num_written() > n + 500, 60, "more steps")
        done, said = stage.end(how)
        ended_well = done == (0 if how == "enough" else 1)
        told = (
            said.count("`metaloom upload` sends them") == 1
            and f"{stage.num_steps:,} points" in said
        )
        (kept,) = kept_journals(stage.root)
        server.start()
        had = [run.info.run_id for run in stage.runs(client)]
        arrived = stage.num_arrived(client)
        # Params, tags, what had arrived before (sent again), and one batch of 200 more.
        proxy.pass_first, proxy.mode = ("log-batch", 3 + arrived // 200), "hang"
        first = stage.upload()
        wait_until(lambda s=stage, n=arrived: s.num_arrived(client) > n, 60, "a part of the upload")
        first.kill()
        first.wait()
        proxy.recover()
        part = stage.num_arrived(client)
        again = stage.upload()
        printed, errors = again.communicate(timeout=120)
        same = [run.info.run_id for run in stage.runs(client)] == had if had else True
        whole = is_complete(stage, client, stage.num_steps, status)
        sent = f"sent    meta_train: {stage.num_steps:,} points, {status}" in printed
        gone = not kept.exists() and not kept_journals(stage.root)
        good = all([ended_well, told, again.returncode == 0, same, whole, sent, gone])
        assert good or print(said, printed, errors, same, whole) is None
        record.add(Try(part if part < stage.num_steps else 0, good, None, 0 if whole else 1))


def test_killed_recorders(
    campaign: Callable[[str], Campaign],
    server: Server,
    client: Any,
    stages: Callable[[str], Stage],
) -> None:
    """The recorder alone: the stage's end makes up for it. With its stage: an upload does."""
    server.start()
    record = campaign("the recorder of a run killed")
    for with_stage in [False, True] * 10 if is_full() else [True]:
        stage = stages(server.url)
        wait_until(lambda s=stage: s.num_arrived(client) > 0, 60, "a first point in MLflow")
        arrived = stage.num_arrived(client)
        os.kill(stage.recorder(), signal.SIGKILL)
        known = stage.num_written()
        wait_until(lambda s=stage, n=known: s.num_written() > n + 50, 60, "more steps")
        busy = stage.upload()  # must leave the run of a living stage alone
        printed, errors = busy.communicate(timeout=60)
        good = "left    meta_train" in printed and busy.returncode == 0
        if with_stage:
            stage.process.kill()
            stage.process.communicate()
            total = stage.num_written()
            printed, errors = stage.upload().communicate(timeout=60)
            good = good and is_complete(stage, client, total, KILLED)
        else:
            done, errors = stage.end()
            good = good and done == 0 and is_complete(stage, client, stage.num_steps, FINISHED)
        good = good and not kept_journals(stage.root)
        assert good or print(printed, errors) is None
        record.add(Try(arrived, good))


@pytest.mark.slow
def test_a_real_run_trains_on_while_mlflow_is_gone(
    server: Server, client: Any, blob_store: Store, blob_tasks: Path, tmp_path: Path
) -> None:
    """Two workers; its steps go on in the outage, arrive once each, and the bits are the usual."""
    server.start()
    num_steps = 12_000 if is_full() else 3000
    # Long enough for the outage: a run that learns nothing more must not end before it does.
    length = {"num_steps": num_steps, "patience": num_steps}
    job = long_job(tmp_path / "run", blob_store, blob_tasks, **length)
    expected = undisturbed(tmp_path / "plain", blob_store, blob_tasks, **length)
    root, folder = tmp_path / "recorded", tmp_path / "drive"
    root.mkdir()
    environment = {"METALOOM_TRACKING": "on", "MLFLOW_TRACKING_URI": server.url}
    driver = start("local", Job(ENTRY, job, 2), folder, environment, record=root)

    def logged() -> int:
        found = journal_folder(root).glob("*.jsonl")
        return max((point.step for path in found for point, _ in read_points(path)), default=0)

    wait_until(lambda: logged() > 50, 120, "the first steps")
    server.kill()
    before = logged()
    time.sleep(OUTAGE_SECONDS)
    during = logged() - before
    assert driver.poll() is None, "the run has ended in the outage"
    server.start()
    assert outcome(driver, folder) == expected[0] and digest(job) == expected[1]
    assert during > 0 and before < num_steps
    (experiment,) = client.search_experiments(filter_string="name = 'metaloom'")
    runs = client.search_runs([experiment.experiment_id], "tags.`metaloom.role` = 'stage'")
    histories = [client.get_metric_history(run.info.run_id, "gradient_norm") for run in runs]
    (steps,) = [[metric.step for metric in history] for history in histories if history]
    assert steps == list(range(1, num_steps + 1))
