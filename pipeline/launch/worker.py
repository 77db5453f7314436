"""The process that a launcher starts: join the group, run the entry, leave its result."""

from __future__ import annotations

import importlib
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from pipeline.core.config import Section
from pipeline.core.errors import PipelineError
from pipeline.core.files import write_json
from pipeline.launch.base import LOST_PEER
from pipeline.runtime.context import worker_context

_PEER_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")


def main() -> None:
    """Arguments: entry, configuration class, configuration file, folder for the result."""
    entry, kind, config_file, folder = sys.argv[1:]
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    rank = os.environ.get("RANK", "0")
    try:
        config_type = _resolve(kind)
        assert issubclass(config_type, Section)
        config = config_type.model_validate_json(Path(config_file).read_text())
        with worker_context() as context:
            result = _resolve(entry)(config, context)
            if context.is_main:
                write_json(Path(folder) / "result.json", result)
    except PipelineError as error:
        report = {"kind": type(error).__name__, "message": str(error)}
        write_json(Path(folder) / f"error-{rank}.json", report)
        os._exit(1)  # peers may be waiting in a collective: leave without the usual goodbye
    except Exception as error:
        if any(sign in str(error) for sign in _PEER_GONE):
            os._exit(LOST_PEER)
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(3)


def _resolve(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _end_with_parent(parent: int) -> None:
    """A worker whose driver was killed has nobody to work for."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(4)


if __name__ == "__main__":
    main()
