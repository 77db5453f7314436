"""What every replica serves and has counted, in the database that they share."""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

import sqlalchemy as sa
from pydantic import ValidationError

from pipeline.deploy.serve.learners import REPLICAS
from pipeline.deploy.serve.messages import ReplicaTold

_FORGOTTEN_SECONDS = 3600.0


def _own_name() -> str:
    return f"{socket.gethostname()[:40]}:{os.getpid()}:{uuid.uuid4().hex[:6]}"


@dataclass(frozen=True)
class Seen:
    """A replica's own report."""

    name: str
    seconds_ago: float
    """By the clock of whoever asks"""
    told: ReplicaTold


@dataclass
class Replicas:
    """Each replica keeps one row, and writes it anew at every look at the registry."""

    engine: sa.Engine
    name: str = field(default_factory=_own_name)

    def report(self, told: ReplicaTold) -> None:
        """Write this replica's row.

        Raises:
            MachineError: the database does not answer.
        """
        row = {"at": time.time(), "told": told.model_dump_json()}
        here = REPLICAS.c.name == self.name
        with self.engine.begin() as connection:
            if not connection.execute(sa.update(REPLICAS).where(here).values(row)).rowcount:
                connection.execute(sa.insert(REPLICAS).values(name=self.name, **row))
            old = REPLICAS.c.at < time.time() - _FORGOTTEN_SECONDS
            connection.execute(sa.delete(REPLICAS).where(old))

    def leave(self) -> None:
        """Remove this replica's row: it ends.

        Raises:
            MachineError: the database does not answer.
        """
        with self.engine.begin() as connection:
            connection.execute(sa.delete(REPLICAS).where(REPLICAS.c.name == self.name))

    def all(self) -> Sequence[Seen]:
        """The replicas that have told of themselves within the hour, by name.

        Raises:
            MachineError: the database does not answer.
        """
        with self.engine.connect() as connection:
            rows = connection.execute(sa.select(REPLICAS).order_by(REPLICAS.c.name)).all()
        found = []
        for name, at, told in rows:
            try:
                seen = ReplicaTold.model_validate_json(told)
            except ValidationError:  # of another version of this program
                continue
            found.append(Seen(name, max(0.0, time.time() - at), seen))
        return found
