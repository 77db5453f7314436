"""Short notes between the hosts of a run, on the store by which their agents meet."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import PrefixStore, Store

from pipeline.core.errors import MachineError


class SilentError(MachineError):
    """Something takes the connection and says nothing: no agent, most likely."""


class Noticeboard:
    """JSON values by name, which every host can read and write."""

    def __init__(self, store: Store, place: str, patience: float) -> None:
        self._store = PrefixStore("noticeboard", store)
        self._place, self._patience = place, patience

    @classmethod
    def connect(cls, host: str, port: int, *, patience: float) -> Noticeboard:
        """Of the agent that listens there.

        Args:
            patience: seconds that this, and each call afterwards, may take.

        Raises:
            MachineError: nobody answers, or something else than an agent.
        """
        place, timeout = f"{host}:{port}", timedelta(seconds=patience)

        def connect() -> Store:
            return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)

        return cls(_ask(connect, place, patience), place, patience)

    def put(self, name: str, value: Any) -> None:
        """Leave a note.

        Raises:
            MachineError: the agent that holds the board is gone.
        """
        _ask(lambda: self._store.set(name, json.dumps(value)), self._place, self._patience)

    def get(self, name: str) -> Any:
        """A note, or None while there is none.

        Raises:
            MachineError: the agent that holds the board is gone.
        """

        def get() -> Any:
            return json.loads(self._store.get(name)) if self._store.check([name]) else None

        return _ask(get, self._place, self._patience)


def _ask(what: Callable[[], Any], place: str, patience: float) -> Any:
    """In a thread, for torch waits without end for whoever is silent; and its errors in one line.

    What torch says goes on with pages of C++.
    """
    answers: list[Any] = []
    failures: list[str] = []

    def ask() -> None:
        try:
            answers.append(what())
        except RuntimeError as error:
            failures.append(str(error).partition("\n")[0])

    thread = threading.Thread(target=ask, daemon=True, name="noticeboard")
    thread.start()
    thread.join(patience)
    if answers:
        return answers[0]
    why = failures[0] if failures else f"nothing came within {patience:g} s"
    raise (MachineError if failures else SilentError)(
        f"the rendezvous at {place} does not answer: {why}. See that its host is up and that "
        "nothing else uses the port, then run the same command again."
    )
