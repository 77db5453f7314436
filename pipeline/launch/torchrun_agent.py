"""torchrun's agent, its log in a file so that the terminal is left to the main worker.

`python -m pipeline.launch.torchrun_agent LOG <torchrun's own arguments>`
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

from pipeline.launch.fault_notes import FAULT, LOST, read_notes
from pipeline.launch.processes import is_stopped, kill, workers_of
from pipeline.launch.worker import PARENT

_PREFIX = "torch.distributed"
_POLL_SECONDS = 0.2
_GRACE_SECONDS = 5.0


def main() -> None:
    """Run the agent to its end; status 1 when its workers failed for good."""
    log, *arguments = sys.argv[1:]
    driver = int(os.environ[PARENT])
    os.environ[PARENT] = str(os.getpid())  # the workers' parent
    threading.Thread(target=_end_with_parent, args=(driver,), daemon=True).start()
    threading.Thread(target=_end_hung_workers, args=(Path(log).parent,), daemon=True).start()
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    _log_to(log)
    try:
        run.main(arguments)
    except ChildFailedError:
        sys.exit(1)
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)
    except Exception as error:  # a lost rendezvous, mostly; the driver reads the log
        words = ": ".join(f"{e}".partition("\n")[0] for e in (error, error.__cause__) if e)
        logging.getLogger(_PREFIX).error("the agent ended: %s", words)
        sys.exit(2)


def _log_to(path: str) -> None:
    """Send everything that torch.distributed logs to a file, and nothing to the terminal."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(message)s"))
    for name in [_PREFIX, *logging.root.manager.loggerDict]:
        if name.startswith(_PREFIX):
            logger = logging.getLogger(name)
            logger.handlers.clear()
            logger.propagate = name != _PREFIX
            logger.setLevel(logging.INFO)
    logging.getLogger(_PREFIX).addHandler(handler)


def _end_with_parent(parent: int) -> None:
    """An agent whose driver was killed ends, and its workers with it."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)


def _end_hung_workers(folder: Path) -> None:
    """Once a worker has left a note of a fault, the others of this host have nothing more to do.

    torch's agent asks them by SIGTERM and waits for half a minute before it kills those that do
    not hear, since they are stopped or hang; and nobody starts again before.
    """
    while True:
        known = _have_left_notes(folder)
        workers = set(workers_of(os.getpid()))  # read last: of no later start than the next note
        time.sleep(_POLL_SECONDS)
        if _have_left_notes(folder) - known:
            _end(workers)


def _have_left_notes(folder: Path) -> set[int]:
    return {note.process for kind in (FAULT, LOST) for note in read_notes(folder, kind)}


def _end(workers: set[int]) -> None:
    """Return when none of them lives; until then no other start can have begun."""
    deadline = time.monotonic() + _GRACE_SECONDS
    while workers:
        for process in workers:
            if is_stopped(process) or time.monotonic() > deadline:
                kill(process)
        time.sleep(_POLL_SECONDS)
        workers &= set(workers_of(os.getpid()))


if __name__ == "__main__":
    main()
