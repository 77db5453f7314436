"""What torchrun's agents do not mend by themselves: hung workers, their own end, a taken port."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from pipeline.core.errors import ConfigError, MachineError, StoppedError, TrainingError
from pipeline.launch.base import Job
from pipeline.launch.fault_notes import Note, leave_note, read_notes
from pipeline.launch.network import Endpoint, free_endpoint, parse_endpoint, require_free
from pipeline.launch.torchrun import _serve, join_runs, launch_torchrun
from pipeline.launch.torchrun_board import Announcement, description
from pipeline.launch.torchrun_hosts import Hosts
from pipeline.launch.torchrun_story import Story
from pipeline.launch.worker import STARTS
from pipeline.store.reader import Store
from tests.chaos.disturbed import NUM_STEPS, Disturbed, long_job, told_of, undisturbed
from tests.distributed.entries import Plan
from tests.distributed.small_run import digest

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]
_PATIENCE_SECONDS = 120.0


@contextlib.contextmanager
def begun(run: Disturbed, num_workers: int) -> Iterator[None]:
    """Whatever happens, nothing of it goes on."""
    run.start(num_workers)
    try:
        yield
    finally:
        if run.is_running():
            run.kill(run.tree())
        assert run.driver is not None
        run.driver.wait()


def wait_for(what: Callable[[], object], run: Disturbed) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not what():
        assert run.is_running() and time.monotonic() < deadline, run.log()
        time.sleep(0.02)


def agent_of(run: Disturbed) -> int:
    """The process id of the driver's agent."""
    assert run.driver is not None
    (agent,) = psutil.Process(run.driver.pid).children()
    return int(agent.pid)


def said(run: Disturbed, event: str) -> list[str]:
    return [str(line["why"]) for line in told_of(event, run.log())]


def test_notes_may_go_away_while_they_are_read(tmp_path: Path) -> None:
    ended = threading.Event()

    def write_and_remove() -> None:
        while not ended.is_set():
            (tmp_path / "fault-0-1.json").write_text('{"message": "it broke"}')
            (tmp_path / "fault-0-1.json").unlink()

    writer = threading.Thread(target=write_and_remove)
    writer.start()
    try:
        found = [note for _ in range(5000) for note in read_notes(tmp_path)]
    finally:
        ended.set()
        writer.join()
    assert set(found) == {Note(0, 1, "it broke")}


def test_a_restart_is_explained_by_the_note_of_the_process_that_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An older note of the same rank, and a note of another rank, are not taken for it."""
    (tmp_path / "fault-1-1.json").write_text('{"message": "of an earlier start"}')
    leave_note(tmp_path, "0", "of another worker")
    own = f"{_LEAVE}(Path({str(tmp_path)!r}), '1', 'it diverged')"
    subprocess.run([sys.executable, "-c", own], check=True)
    (note,) = (note for note in read_notes(tmp_path) if note.message == "it diverged")
    ended = f"failed (exitcode: 6) local_rank: 1 (pid: {note.process}) of binary: python\n"
    (tmp_path / "agent.log").write_text(ended)
    (tmp_path / STARTS).write_text("0 2\n0 2\n")
    Story(tmp_path, max_restarts=3).tell()
    assert "worker 1 ended with status 6: it diverged." in capsys.readouterr().err


def test_a_killed_worker_is_told_of_at_once_and_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the agent's log alone: who was killed leaves no note, and the next start is to come."""
    story, log = Story(tmp_path, max_restarts=3), tmp_path / "agent.log"

    def told() -> list[str]:
        story.tell()
        lines = capsys.readouterr().err.splitlines()
        return [json.loads(line)["event"] for line in lines]

    (tmp_path / STARTS).write_text("0 2\n")
    assert told() == []
    end = "failed (exitcode: -9) local_rank: 1 (pid: 7) of binary: python\n"
    log.write_text(end)
    assert (told(), told()) == (["fault"], [])
    (tmp_path / STARTS).write_text("0 2\n0 2\n")
    assert (told(), told()) == (["restart"], []), "the old end is no fault of the new start"
    log.write_text(2 * end)
    assert (told(), told()) == (["fault"], [])


_LEAVE = (
    "from pathlib import Path; import pipeline.launch.fault_notes; "
    "pipeline.launch.fault_notes.leave_note"
)


def test_hosts_that_come_are_no_failed_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = "Detected 1 new nodes from group_rank=0; will restart worker group\n"
    (tmp_path / "agent.log").write_text(log)
    (tmp_path / STARTS).write_text("0 1\n0 2\n0 3\n0 4\n0 5\n0 6\n")
    Story(tmp_path, max_restarts=3).tell()
    assert capsys.readouterr().err.count("1 more host has come.") == 5


def test_a_host_whose_workers_always_fail_is_no_new_one(tmp_path: Path) -> None:
    """To the driver's agent it looks like one: it asks to be let in again."""
    log = "Detected 1 new nodes from group_rank=0; will restart worker group\n"
    (tmp_path / "agent.log").write_text(log)
    (tmp_path / STARTS).write_text("0 2\n" * 5)
    with pytest.raises(TrainingError, match="another host starts its workers again"):
        Story(tmp_path, max_restarts=3).tell()


def test_a_hung_worker_is_named_at_once_and_does_not_hold_up_the_next_start(
    blob_store: Store, blob_tasks: Path, tmp_path: Path
) -> None:
    """It is killed before torch's agent would do it, after half a minute of waiting."""
    expected = undisturbed(tmp_path / "undisturbed", blob_store, blob_tasks)
    environment = {"METALOOM_TIMEOUT_SECONDS": "4"}
    job = long_job(tmp_path / "run", blob_store, blob_tasks)
    run = Disturbed(job, "torchrun", environment=environment)
    with begun(run, 3):
        assert run.wait_for_steps(5), run.log()
        os.kill(run.workers()[1], signal.SIGSTOP)
        wait_for(lambda: said(run, "fault"), run)
        assert "worker 1 does not answer" in said(run, "fault")[0]
        wait_for(run.restarts_told, run)
        assert "worker 1 does not answer" in run.restarts_told()[0]
        assert (run.end(), digest(job)) == expected
    log = (run.folder / "launch" / "agent.log").read_text()
    assert "forcefully exiting" not in log, "torch's agent has not had to kill it"
    assert len(run.restarts_told()) == 1


def test_a_killed_agent_is_started_again_when_its_workers_are_gone(
    blob_store: Store, blob_tasks: Path, tmp_path: Path
) -> None:
    """One of them is stopped, and cannot notice that its agent is gone."""
    expected = undisturbed(tmp_path / "undisturbed", blob_store, blob_tasks)
    job = long_job(tmp_path / "run", blob_store, blob_tasks)
    run = Disturbed(job, "torchrun")
    with begun(run, 2):
        assert run.wait_for_steps(20), run.log()
        before, workers = agent_of(run), run.workers()
        os.kill(workers[1], signal.SIGSTOP)
        os.kill(before, signal.SIGKILL)
        wait_for(run.restarts_told, run)
        assert run.restarts_told() == ["torchrun's agent was killed by SIGKILL."]
        assert not set(workers.values()) & set(run.workers().values())
        assert not any(map(psutil.pid_exists, workers.values()))
        assert (run.end(), digest(job)) == expected


def test_a_late_note_of_an_earlier_start_does_not_kill_the_next_one(tmp_path: Path) -> None:
    """A stopped worker is killed; then its peer, which was slower to end, leaves a note too."""
    watch = "import sys; from pathlib import Path; import pipeline.launch.torchrun_agent as agent; "
    watch += "agent._GRACE_SECONDS = 1.0; print('ready', flush=True); "
    watch += "agent._end_hung_workers(Path(sys.argv[1]))"
    with contextlib.ExitStack() as started:

        def process(code: str, argument: str, **environment: str) -> subprocess.Popen[bytes]:
            command = [sys.executable, "-c", f"print('here', flush=True); {code}", argument]
            one = started.enter_context(
                subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE)
            )
            started.callback(one.kill)
            assert one.stdout is not None and one.stdout.readline() == b"here\n"
            return one

        watcher = process(watch, str(tmp_path))
        sleep = "import time; time.sleep(60)"

        def worker() -> subprocess.Popen[bytes]:
            return process(sleep, "pipeline.launch.worker", METALOOM_PARENT=str(watcher.pid))

        hung, slow = worker(), worker()
        os.kill(hung.pid, signal.SIGSTOP)
        assert watcher.stdout is not None and watcher.stdout.readline() == b"ready\n"
        time.sleep(2.0)  # for the watcher to have seen both
        leave_note(tmp_path, "2", "worker 0 does not answer")
        assert hung.wait(10) == -signal.SIGKILL
        (tmp_path / f"fault-1-{slow.pid}.json").write_text('{"message": "nor to me"}')
        slow.kill()
        slow.wait()
        later = worker()
        with pytest.raises(subprocess.TimeoutExpired):
            later.wait(4)


@pytest.mark.slow
def test_without_restarts_a_killed_agent_ends_the_run(
    blob_store: Store, blob_tasks: Path, tmp_path: Path
) -> None:
    run = Disturbed(long_job(tmp_path, blob_store, blob_tasks), "torchrun", max_restarts=0)
    with begun(run, 1):
        assert run.wait_for_steps(1), run.log()
        os.kill(agent_of(run), signal.SIGKILL)
        with pytest.raises(TrainingError, match=r"agent was killed by SIGKILL\. Run the same"):
            run.end()


@pytest.mark.slow
def test_an_agent_that_is_always_killed_ends_the_run(tmp_path: Path) -> None:
    """Before any of its workers have begun."""
    story = Story(tmp_path, max_restarts=2)
    for _ in range(3):
        story.lost_agent("it was killed.")
    with pytest.raises(TrainingError, match=r"^it was killed\. .*3 starts from step 0"):
        story.lost_agent("it was killed.")


@pytest.fixture
def two_hosts(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def meet_at(rendezvous: str) -> None:
        monkeypatch.setenv("METALOOM_NODES", "2")
        monkeypatch.setenv("METALOOM_RENDEZVOUS", rendezvous)

    return meet_at


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.2", ""])
def test_a_port_in_use_is_refused_by_name(
    address: str, two_hosts: Callable[[str], None], tmp_path: Path
) -> None:
    """In use at this address, at another one, or at all of this host: torch listens at all."""
    with socket.create_server((address, 0)) as server:
        port = server.getsockname()[1]
        two_hosts(f"127.0.0.1:{port}")
        job = Job("tests.distributed.entries:identify", Plan(rank=0, what=""), 1)
        with pytest.raises(ConfigError, match=f"METALOOM_RENDEZVOUS is .*port {port} .* in use"):
            launch_torchrun(job, tmp_path)
    require_free(parse_endpoint(f"127.0.0.1:{port}"))


def test_a_port_that_is_taken_after_it_was_found_free_costs_another_agent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with contextlib.ExitStack() as taken:

        def take(endpoint: Endpoint) -> None:
            if not list(tmp_path.glob("launch/agent.log")):
                taken.enter_context(socket.create_server(endpoint))

        monkeypatch.setattr("pipeline.launch.torchrun.require_free", take)
        plan = Plan(rank=0, what="")
        job = Job("tests.distributed.entries:identify", plan, 1, max_restarts=1)
        assert len(launch_torchrun(job, tmp_path / "launch")) == 1


def test_who_has_other_code_is_refused_and_the_driver_is_told(
    two_hosts: Callable[[str], None],
    blob_store: Store,
    blob_tasks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = str(free_endpoint())
    environment = {"METALOOM_NODES": "2", "METALOOM_RENDEZVOUS": place}
    run = Disturbed(long_job(tmp_path, blob_store, blob_tasks), "torchrun", environment=environment)
    with begun(run, 1):
        monkeypatch.setattr("pipeline.launch.torchrun.code_hash", lambda root: "another")
        with pytest.raises(ConfigError, match=f"the driver at {place} runs other code"):
            join_runs(place, tmp_path / "joined", once=True)
        wait_for(
            lambda: "has other code than this host" in " ".join(said(run, "host refused")), run
        )


@pytest.mark.parametrize(
    "told",
    [{"entry": "os:system"}, {"config_type": "subprocess:Popen"}, {"run": "../../../../elsewhere"}],
)
def test_a_driver_may_have_nothing_run_but_our_own(
    told: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever answers at the address of the rendezvous chooses these words."""
    monkeypatch.setattr("pipeline.launch.torchrun.resolve", lambda name: pytest.fail(name))
    job = Job("pipeline.training.meta_train:run", Plan(rank=0, what=""), 1)
    announced = {
        **description(job, Hosts(2, 2, parse_endpoint("127.0.0.1:1")), "0123456789ab"),
        "config_type": "pipeline.training.meta_train:MetaTrainJob",
        **told,
    }
    with pytest.raises(ConfigError, match="which is no run of ours"):
        _serve(announced, parse_endpoint("127.0.0.1:1"), 1, tmp_path / "run", lambda: False)
    assert not list(tmp_path.iterdir())


def test_an_address_of_another_host_is_refused_by_name(
    two_hosts: Callable[[str], None], tmp_path: Path
) -> None:
    two_hosts("192.0.2.1:29400")
    job = Job("tests.distributed.entries:identify", Plan(rank=0, what=""), 1)
    with pytest.raises(ConfigError, match=r"METALOOM_RENDEZVOUS is .*192\.0\.2\.1 is not an addr"):
        launch_torchrun(job, tmp_path)


def test_a_driver_that_waits_for_hosts_can_be_stopped(
    blob_store: Store, blob_tasks: Path, tmp_path: Path
) -> None:
    environment = {"METALOOM_NODES": "2", "METALOOM_RENDEZVOUS": str(free_endpoint())}
    job = long_job(tmp_path, blob_store, blob_tasks)
    run = Disturbed(job, "torchrun", environment=environment)
    with begun(run, 1):
        log = run.folder / "launch" / "agent.log"
        wait_for(lambda: log.exists() and "hosts the TCP store" in log.read_text(), run)
        assert run.driver is not None
        run.driver.terminate()
        with pytest.raises(StoppedError, match="as asked"):
            run.end()


def test_something_else_at_the_rendezvous_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It takes connections and says nothing."""
    monkeypatch.setattr("pipeline.launch.torchrun_board._PATIENCE_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = parse_endpoint(f"127.0.0.1:{server.getsockname()[1]}")
        board = Announcement(endpoint, {}, lambda: True)
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not board.failure and time.monotonic() < deadline:
            time.sleep(0.05)
        board.close()
    assert f"the rendezvous at {endpoint} does not answer" in board.failure
    assert len(board.failure.splitlines()) == 1


def test_who_joins_something_else_is_told_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("pipeline.launch.torchrun._PATIENCE_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(MachineError, match=f"rendezvous at {place} does not answer: nothing"):
            join_runs(place, tmp_path)


@pytest.mark.slow
def test_a_host_joins_a_run_that_may_never_start_again(
    blob_store: Store, blob_tasks: Path, tmp_path: Path
) -> None:
    """Both hosts are this machine, and share a folder for checkpoints."""
    steps = 5 * NUM_STEPS  # the other one takes its time to come
    expected = undisturbed(tmp_path / "undisturbed", blob_store, blob_tasks, num_steps=steps)
    place = str(free_endpoint())
    environment = {"METALOOM_NODES": "1:2", "METALOOM_RENDEZVOUS": place}
    job = long_job(tmp_path / "run", blob_store, blob_tasks, num_steps=steps)
    run = Disturbed(job, "torchrun", environment=environment, max_restarts=0)
    with begun(run, 1):
        assert run.wait_for_steps(2), run.log()
        one = {**run.child_environment(), "METALOOM_NUM_WORKERS": "1"}
        other = tmp_path / "other"
        other.mkdir()
        with (other / "log").open("wb") as log:
            command = [sys.executable, "-m", "pipeline.cli", "join", place]
            joined = subprocess.Popen(command, cwd=other, env=one, stdout=log, stderr=log)
        try:
            assert (run.end(), digest(job)) == expected
        finally:
            joined.terminate()
            joined.wait()
    assert run.restarts_told() == ["1 more host has come."], run.log()


@pytest.mark.slow
def test_several_hosts_lose_their_rendezvous_with_the_agent(
    blob_store: Store, blob_tasks: Path, tmp_path: Path
) -> None:
    environment = {"METALOOM_NODES": "1:2", "METALOOM_RENDEZVOUS": str(free_endpoint())}
    job = long_job(tmp_path, blob_store, blob_tasks)
    run = Disturbed(job, "torchrun", environment=environment)
    with begun(run, 1):
        assert run.wait_for_steps(1), run.log()
        os.kill(agent_of(run), signal.SIGKILL)
        with pytest.raises(TrainingError, match="rendezvous of all hosts has ended with it"):
            run.end()
