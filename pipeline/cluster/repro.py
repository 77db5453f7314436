"""`dvc repro` in a clone, as a process group that a signal reaches whole."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import psutil

from pipeline.cluster.clone import CLONE_VARIABLE, Clone, workers
from pipeline.cluster.commands import clean_environment, dvc_command
from pipeline.core.errors import MachineError, StoppedError

GRACE_SECONDS = 60.0
"""How long a stage that was asked to stop may take for its checkpoint."""
_LAST_WORDS_SECONDS = 5.0
"""A recorder that outlives its stage holds the pipe open."""


def repro(
    clone: Clone,
    environment: Mapping[str, str],
    *,
    pull: bool,
    listen: Callable[[str], None] | None = None,
) -> None:
    """Bring a clone up to date, with what its cache and its remote hold.

    With `--pull`, DVC leaves a stage alone whose output is kept nowhere and whose inputs have not
    changed: deploy, on a machine that has not asked its registry yet. A second pass runs that.

    Args:
        pull: whether there is a remote; without one `--pull` fails even where the cache has all.
        listen: hears each line that is printed.

    Raises:
        MachineError: a stage failed.
        StoppedError: this process was asked to stop; stages had time for a checkpoint.
    """
    if pull:
        _run(clone, ["repro", "--pull", *clone.arguments], environment, listen)
    if not pull or not any(argument.startswith("-") for argument in clone.arguments):
        _run(clone, ["repro", *clone.arguments], environment, listen)


def _run(
    clone: Clone,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    listen: Callable[[str], None] | None,
) -> None:
    process = subprocess.Popen(
        dvc_command(*arguments),
        cwd=clone.folder,
        env=_environment(clone, environment),
        stdin=subprocess.DEVNULL,
        # Standard output is for the result.
        stdout=sys.stderr.fileno() if listen is None else subprocess.PIPE,
        stderr=None if listen is None else subprocess.STDOUT,
        process_group=0,
    )
    hearing = _heard(process, listen) if listen is not None else None
    with _passed_on(process.pid) as received:
        status = process.wait()
        if received:
            _wait_for_workers(clone.folder)
    if hearing is not None:
        hearing.join(_LAST_WORDS_SECONDS)
    if signal.SIGINT in received:
        raise KeyboardInterrupt
    if received:
        raise StoppedError(
            f"stopped by {received[0].name}; run the same command again: it goes on in "
            f"{clone.folder}."
        )
    if status != 0:
        raise MachineError(
            f"`dvc {' '.join(arguments)}` ended with status {status} in {clone.folder}; what it "
            "printed says why. If the machine was at fault, run the same command again: it goes "
            "on there. If the commit is, mend it in a new commit."
        )


def _heard(process: subprocess.Popen[bytes], listen: Callable[[str], None]) -> threading.Thread:
    """Pass on what a process prints, line by line."""
    pipe = process.stdout
    assert pipe is not None

    def hear() -> None:
        for line in pipe:
            sys.stderr.buffer.write(line)
            sys.stderr.buffer.flush()
            listen(line.decode(errors="replace").rstrip("\n"))

    thread = threading.Thread(target=hear, daemon=True, name="heard")
    thread.start()
    return thread


def _environment(clone: Clone, extra: Mapping[str, str]) -> dict[str, str]:
    """This Python's programs and the clone's code come first; both passes are one pipeline run."""
    own = clean_environment()
    name = f"{socket.gethostname()}/{clone.folder.name}"
    code = [str(clone.folder), own.get("PYTHONPATH", "")]
    return {
        **own,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), own.get("PATH", os.defpath)]),
        "PYTHONPATH": os.pathsep.join(filter(None, code)),
        "METALOOM_PIPELINE_RUN": own.get("METALOOM_PIPELINE_RUN", name),
        "DVC_NO_ANALYTICS": "1",
        CLONE_VARIABLE: str(clone.folder),
        **extra,
    }


@contextmanager
def _passed_on(group: int) -> Iterator[list[signal.Signals]]:
    """Send a request to stop on to the group; DVC itself would die and leave its stage behind."""
    received: list[signal.Signals] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        try:
            os.killpg(group, number)
        except ProcessLookupError:
            return  # it ended meanwhile

    before = {n: signal.signal(n, pass_on) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait_for_workers(folder: Path) -> None:
    """Until the last process of a stage has ended; those whose time is over are killed."""
    end = time.monotonic() + GRACE_SECONDS
    while alive := workers(folder):
        if time.monotonic() > end:
            for process in alive:
                with suppress(psutil.Error):
                    process.kill()
        time.sleep(0.2)
