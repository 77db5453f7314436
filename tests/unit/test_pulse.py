"""Roll calls: who does not answer, who is behind, and what if the store's own host is stopped."""

from __future__ import annotations

import fcntl
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import FileStore, HashStore, TCPStore

from pipeline.runtime.faults import HungPeerError
from pipeline.runtime.pulse import Pulse, _Seen

_HOST = """
import sys, time
from datetime import timedelta
from torch.distributed import TCPStore
from pipeline.runtime.pulse import Pulse
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
pulse = Pulse(store, 0, 2, 2.0)
pulse.step = 7
print(store.port, flush=True)
time.sleep(60)
"""


@pytest.fixture
def first() -> Iterator[tuple[subprocess.Popen[str], TCPStore]]:
    """Worker 0 at step 7, in whose process the store is, and the way to that store."""
    worker = subprocess.Popen([sys.executable, "-c", _HOST], stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    port = int(worker.stdout.readline())
    yield worker, TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=20))
    worker.kill()
    worker.wait()


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("step", "said"),
    [(9, "worker 0 does not get on, at step 7"), (7, "all 2 workers answer, from step 7")],
)
def test_living_workers_answer_with_their_step(
    first: tuple[subprocess.Popen[str], TCPStore], step: int, said: str
) -> None:
    pulse = Pulse(first[1], 1, 2)
    pulse.step = step
    assert pulse.roll_call().startswith(said)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_the_store_may_be_gone_with_the_worker_that_holds_it(
    first: tuple[subprocess.Popen[str], TCPStore],
    number: signal.Signals,
    capfd: pytest.CaptureFixture[str],
) -> None:
    worker, store = first
    pulse = Pulse(store, 1, 2)
    os.kill(worker.pid, number)
    assert pulse.roll_call().startswith("worker 0 does not answer")
    assert "Thread 0x" in capfd.readouterr().err, "its own stacks are written all the same"
    worker.send_signal(signal.SIGCONT)


class Late:
    """A store that begins to answer after some seconds; never, with infinity."""

    def __init__(self, seconds: float) -> None:
        self._store, self._begins = HashStore(), threading.Event()
        self._timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), self._begins.set)
        self._timer.daemon = True
        self._timer.start()

    def __getattr__(self, name: str) -> Any:
        def do(*arguments: Any) -> Any:
            self._begins.wait()
            return getattr(self._store, name)(*arguments)

        return do


@pytest.mark.timeout(60)
def test_a_store_that_has_been_silent_for_long_is_not_waited_for_as_long_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pipeline.runtime.pulse._STORE_PATIENCE_SECONDS", 1e5)
    silent: Any = Late(math.inf)
    pulse = Pulse(silent, 1, 2)
    pulse._heard = -math.inf
    assert pulse.roll_call().startswith("worker 0 does not answer")


@pytest.mark.timeout(60)
def test_a_slow_store_that_answered_a_moment_ago_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pipeline.runtime.pulse._STORE_PATIENCE_SECONDS", 30.0)
    slow: Any = Late(1.5)
    pulses = [Pulse(slow, rank, 2) for rank in range(2)]
    assert pulses[1].roll_call().startswith("all 2 workers answer")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_wait_ends_when_the_worker_that_holds_the_store_is_gone(
    first: tuple[subprocess.Popen[str], TCPStore], number: signal.Signals
) -> None:
    worker, store = first
    pulse = Pulse(store, 1, 2, 2.0)
    os.kill(worker.pid, number)
    with pytest.raises((HungPeerError, RuntimeError)) as raised:
        pulse.wait(lambda: store.check(["nothing"]), "waiting", 40.0)
    if number == signal.SIGSTOP:
        assert "waiting, at step 0: no sign of life" in str(raised.value)
        assert "worker 0 does not answer" in str(raised.value)
    worker.send_signal(signal.SIGCONT)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("guarded", [True, False])
def test_a_wait_lasts_as_long_as_all_live_and_has_an_end(
    guarded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three timeouts with every heartbeat; with one worker silent, one, where silence counts."""
    store = HashStore()
    ours = Pulse(store, 0, 2, 1.0)
    theirs = Pulse(store, 1, 2, 1.0)
    with pytest.raises(HungPeerError, match=r"not done within 3 s: all 2 workers answer"):
        ours.wait(lambda: False, "waiting", 3.0)
    theirs.close()
    if not guarded:
        monkeypatch.setattr(_Seen, "seconds_of_silence", lambda self: 0.0)
    store = HashStore()
    ours = Pulse(store, 0, 2, 1.0)
    said = r"no sign of life" if guarded else r"not done within 6 s"
    with pytest.raises(HungPeerError, match=f"{said}.*worker 1 does not answer"):
        ours.wait(lambda: False, "waiting", 6.0)


@pytest.mark.timeout(60)
def test_nobody_is_named_for_a_store_that_is_nobodys(tmp_path: Path) -> None:
    """A file whose lock somebody else holds: each worker would name the first, who lives."""
    store = FileStore(str(tmp_path / "store"), 2)
    pulse = Pulse(store, 0, 2, 1.0, store_is_with=None)
    with (tmp_path / "store").open("rb+") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        said = pulse.roll_call()
        fcntl.flock(other, fcntl.LOCK_UN)
    assert said == "the store by which the workers meet does not answer"


@pytest.mark.timeout(60)
def test_hearts_beat_on_after_an_error_of_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """As from a disk that is full for a while."""
    store = HashStore()
    failing = threading.Event()

    class Shaky:
        def set(self, key: str, value: str) -> None:
            if failing.is_set():
                raise RuntimeError("no space left on device")
            store.set(key, value)

        def check(self, keys: list[str]) -> bool:
            return bool(store.check(keys))

    shaky: Any = Shaky()
    failing.set()
    Pulse(shaky, 1, 2, 1.0)
    ours = Pulse(store, 0, 2, 1.0)
    time.sleep(0.5)
    failing.clear()
    with pytest.raises(HungPeerError, match="not done within 3 s"):
        ours.wait(lambda: False, "waiting", 3.0)


@pytest.mark.timeout(60)
def test_what_has_arrived_ends_a_wait(tmp_path: Path) -> None:
    store = FileStore(str(tmp_path / "store"), 2)
    pulse = Pulse(store, 0, 2, 1.0)
    store.set("here", "1")
    pulse.wait(lambda: store.check(["here"]), "waiting", 0.0)
