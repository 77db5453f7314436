"""Short notes between the hosts of a run, on the store by which their agents meet."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import PrefixStore, Store

_CONNECT_SECONDS = 60.0


class Noticeboard:
    """JSON values by name, which every host can read and write."""

    def __init__(self, store: Store) -> None:
        self._store = PrefixStore("noticeboard", store)

    @classmethod
    def connect(cls, host: str, port: int) -> Noticeboard:
        """Of the agent that listens there; waits a while for it to begin.

        Raises:
            RuntimeError: nobody listens.
        """
        timeout = timedelta(seconds=_CONNECT_SECONDS)
        return cls(TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout))

    def put(self, name: str, value: Any) -> None:
        """Leave a note."""
        self._store.set(name, json.dumps(value))

    def get(self, name: str) -> Any:
        """A note, or None while there is none."""
        return json.loads(self._store.get(name)) if self._store.check([name]) else None
