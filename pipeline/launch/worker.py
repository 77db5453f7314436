"""The process that a launcher starts: join the group, run the entry, leave its result."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.core.config import Section
from pipeline.core.errors import PipelineError, StoppedError, StorageError
from pipeline.core.files import write_json
from pipeline.launch.base import BUG, FAULT, FINAL, LOST_PEER, ORPHAN, REFUSED, STOPPED
from pipeline.launch.fault_notes import LOST, leave_note
from pipeline.runtime.context import worker_context
from pipeline.runtime.faults import FaultError, LostPeerError, peers_watched
from pipeline.runtime.logs import DISK_REFUSALS
from pipeline.runtime.metric_log import JournalLog

STARTS = "starts"
"""A line for each start of the workers: the step of the checkpoint, and how many they are."""

HEARD = "stopped"
"""Made by a worker that has stopped because it was asked to."""

PARENT = "METALOOM_PARENT"
"""Environment: the process id of whoever started this one."""
_LET_THE_OTHER_SPEAK_SECONDS = 0.5


def main() -> None:
    """Arguments: entry, configuration class, configuration file, folder for the result."""
    entry, kind, config_file, folder = sys.argv[1:]
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        status = _work(entry, kind, Path(config_file), Path(folder))
    except OSError as error:  # of this folder: not even a note can be left there
        print(f"{disk_refuses(folder, error)}", file=sys.stderr)
        status = REFUSED
    sys.stdout.flush()
    sys.stderr.flush()
    if status:
        os._exit(status)  # peers may be waiting in a collective: leave without the usual goodbye


def _work(entry: str, kind: str, config_file: Path, folder: Path) -> int:
    """Run the entry; what it returns, or how it failed, is left in the folder."""
    stopping = _stop_on_signals()  # before all that takes time: the wish may come at once
    rank = os.environ.get("RANK", "0")
    progress = None
    if os.environ.get("LOCAL_RANK", rank) == "0":
        progress = folder / "progress"
        with (folder / STARTS).open("a") as starts:
            found = progress.read_text() if progress.exists() else 0
            starts.write(f"{found} {os.environ.get('WORLD_SIZE', '1')}\n")
    open_log = partial(JournalLog, progress=progress)
    try:
        config = read_config(kind, config_file)
        with worker_context(stopping=stopping, open_log=open_log) as context:
            with peers_watched(context):
                result = resolve(entry)(config, context)
            if context.is_main:
                write_json(folder / "result.json", result)
    except StoppedError as error:
        print(str(error), file=sys.stderr)
        (folder / HEARD).touch()
        return STOPPED
    except PipelineError as error:
        _leave_error(folder, rank, error)
        return FINAL
    except LostPeerError as error:
        time.sleep(_LET_THE_OTHER_SPEAK_SECONDS)
        print(f"lost a peer: {error}", file=sys.stderr)
        leave_note(folder, rank, str(error), kind=LOST)
        return LOST_PEER
    except FaultError as error:
        leave_note(folder, rank, str(error))
        return FAULT
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_REFUSALS:
            _leave_error(folder, rank, disk_refuses(error.filename or folder, error))
            return FINAL
        traceback.print_exc()
        words = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        leave_note(folder, rank, words)
        return BUG
    return 0


def _leave_error(folder: Path, rank: str, error: PipelineError) -> None:
    report = {"kind": type(error).__name__, "message": str(error)}
    write_json(folder / f"error-{rank}.json", report)


def disk_refuses(place: object, error: OSError | None = None) -> StorageError:
    """The error of a disk that is full or takes no writing."""
    why = "the disk refuses" if error is None else error.strerror
    return StorageError(
        f"cannot write into {place}: {why}. Free some space or mend the disk, then run the same "
        "command again: it resumes from the last checkpoint."
    )


def read_config(kind: str, config_file: Path) -> Section:
    """The configuration that a launcher wrote, of the class that it names."""
    config_type = resolve(kind)
    assert issubclass(config_type, Section)
    config: Section = config_type.model_validate_json(config_file.read_text())
    return config


def resolve(name: str) -> Any:
    """What `module:attribute` names."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _stop_on_signals() -> Any:
    """Take SIGTERM and Ctrl-C as a wish, which is granted behind the next step."""
    asked = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked.set())
    return asked.is_set


def end_with_parent() -> None:
    """A process whose launcher was killed has nobody to work for.

    The launcher says who it is, for it may be gone before we are here to look.
    """
    parent = int(os.environ.get(PARENT) or os.getppid())
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(ORPHAN)


if __name__ == "__main__":
    main()
