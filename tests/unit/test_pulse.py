"""Roll calls: who does not answer, who is behind, and what if the store's own host is stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from pipeline.runtime.pulse import Pulse

_HOST = """
import sys, time
from datetime import timedelta
from torch.distributed import TCPStore
from pipeline.runtime.pulse import Pulse
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
pulse = Pulse(store, 0, 2)
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
