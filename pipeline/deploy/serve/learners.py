"""Learners and keys in a database: written before they are acknowledged, found after a crash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from pipeline.core.errors import ConfigError, MachineError
from pipeline.core.files import canonical_json
from pipeline.deploy.serve.inputs import Item
from pipeline.deploy.serve.messages import ModelRef
from pipeline.deploy.serve.settings import Policy

_METADATA = sa.MetaData()
_LEARNERS = sa.Table(
    "learners",
    _METADATA,
    sa.Column("owner", sa.String(64), primary_key=True),
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("name", sa.Text),
    sa.Column("created", sa.String(40), nullable=False),
    sa.Column("parent", sa.String(40)),
    sa.Column("policy", sa.String(10), nullable=False),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("labels", sa.Text, nullable=False),
    sa.Column("unknown_below", sa.Float),
)
_EXAMPLES = sa.Table(
    "examples",
    _METADATA,
    sa.Column("owner", sa.String(64), primary_key=True),
    sa.Column("learner", sa.String(40), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("kind", sa.String(10), nullable=False),
    sa.Column("content", sa.LargeBinary, nullable=False),
)
KEYS = sa.Table(
    "keys",
    _METADATA,
    sa.Column("id", sa.String(20), primary_key=True),
    sa.Column("owner", sa.String(64), nullable=False),
    sa.Column("hash", sa.String(64), nullable=False),
    sa.Column("scopes", sa.Text, nullable=False),
    sa.Column("created", sa.String(40), nullable=False),
    sa.Column("expires", sa.String(40)),
    sa.Column("revoked", sa.String(40)),
)
REPLICAS = sa.Table(
    "replicas",
    _METADATA,
    sa.Column("name", sa.String(80), primary_key=True),
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("told", sa.Text, nullable=False),
)
TRAFFIC = sa.Table(
    "traffic",
    _METADATA,
    sa.Column("replica", sa.String(80), primary_key=True),
    sa.Column("bundle", sa.String(64), primary_key=True),
    sa.Column("day", sa.String(10), primary_key=True),
    sa.Column("told", sa.Text, nullable=False),
)
REFERENCES = sa.Table(
    "drift_references",
    _METADATA,
    sa.Column("bundle", sa.String(64), primary_key=True),
    sa.Column("told", sa.Text, nullable=False),
)


@dataclass(frozen=True)
class Kept:
    """A learner as it is kept; it never changes."""

    owner: str
    id: str
    name: str | None
    created: str
    parent: str | None
    policy: Policy
    model: ModelRef
    """The version that made it"""
    labels: tuple[Any, ...]
    """Of every example, in order"""
    unknown_below: float | None

    @property
    def classes(self) -> tuple[Any, ...]:
        """In order of first appearance."""
        return tuple(dict.fromkeys(self.labels))

    @property
    def targets(self) -> list[int]:
        """Each example's position among the classes."""
        position = {label: i for i, label in enumerate(self.classes)}
        return [position[label] for label in self.labels]


def learner_id(items: Sequence[Item], labels: Sequence[Any], policy: Policy, bundle: str) -> str:
    """A learner's name, from its content: the same examples make the same learner.

    A pinned one is another for every model version.
    """
    content = {
        "examples": [
            [item.kind, item.digest, type(label).__name__, label]
            for item, label in zip(items, labels, strict=True)
        ],
        "model": bundle if policy == "pin" else policy,
    }
    return "lrn_" + hashlib.sha256(canonical_json(content).encode()).hexdigest()[:32]


def now() -> str:
    """In UTC, to the microsecond: learners are listed by it."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def open_database(url: str) -> sa.Engine:
    """Connect, and make the tables where there are none.

    Raises:
        ConfigError: that is no address of a database.
        MachineError: it does not answer, or its driver is not installed.
    """
    try:
        address = sa.make_url(url)
    except sa.exc.ArgumentError:
        raise ConfigError(f"{url!r} is no SQLAlchemy URL, such as sqlite:///learners.db.") from None
    if address.get_backend_name() == "sqlite" and address.database:
        Path(address.database).parent.mkdir(parents=True, exist_ok=True)
    try:
        # Errors that SQLAlchemy words would put pictures and hashes of keys into the log.
        engine = sa.create_engine(address, pool_pre_ping=True, hide_parameters=True)
        if engine.dialect.name == "sqlite":
            sa.event.listen(engine, "connect", _durable)
        _METADATA.create_all(engine)
        sa.event.listen(engine, "handle_error", _away)
        return engine
    except (sa.exc.SQLAlchemyError, ImportError) as error:
        reason = str(error).splitlines()[0][:200]
        raise MachineError(
            f"the database {address.render_as_string(hide_password=True)} cannot be used: {reason}"
        ) from None


def _away(context: sa.ExceptionContext) -> None:
    """What the database cannot do now is a fault of the machine; "it is there already" is none."""
    if context.is_pre_ping or isinstance(context.sqlalchemy_exception, sa.exc.IntegrityError):
        return  # what was found dead before its use is replaced
    kind = type(context.original_exception).__name__
    raise MachineError(f"the database of learners and keys does not answer ({kind}).") from None


def _durable(connection: Any, record: Any) -> None:
    """SQLite: readers beside a writer, and on the disk before a commit returns."""
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=10000"):
        connection.execute(f"PRAGMA {pragma}")


class Learners:
    """The learners of all owners; nobody sees another's."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    def add(self, learner: Kept, items: Sequence[Item]) -> bool:
        """Keep a learner; False if the very same is there already."""
        row = {
            "owner": learner.owner,
            "id": learner.id,
            "name": learner.name,
            "created": learner.created,
            "parent": learner.parent,
            "policy": learner.policy,
            "model": learner.model.model_dump_json(),
            "labels": json.dumps(learner.labels),
            "unknown_below": learner.unknown_below,
        }
        examples = [
            {
                "owner": learner.owner,
                "learner": learner.id,
                "number": i,
                "kind": item.kind,
                "content": item.content,
            }
            for i, item in enumerate(items)
        ]
        try:
            with self._engine.begin() as connection:
                connection.execute(sa.insert(_LEARNERS).values(row))
                connection.execute(sa.insert(_EXAMPLES), examples)
            return True
        except sa.exc.IntegrityError:
            return False

    def get(self, owner: str, name: str) -> Kept | None:
        """One learner."""
        query = sa.select(_LEARNERS).where(_LEARNERS.c.owner == owner, _LEARNERS.c.id == name)
        with self._engine.connect() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else _kept(row)

    def items(self, owner: str, name: str) -> list[Item]:
        """A learner's examples, in order."""
        query = (
            sa.select(_EXAMPLES.c.kind, _EXAMPLES.c.content)
            .where(_EXAMPLES.c.owner == owner, _EXAMPLES.c.learner == name)
            .order_by(_EXAMPLES.c.number)
        )
        with self._engine.connect() as connection:
            return [Item(row.kind, row.content) for row in connection.execute(query)]

    def item(self, owner: str, name: str, number: int) -> Item | None:
        """One example."""
        query = sa.select(_EXAMPLES.c.kind, _EXAMPLES.c.content).where(
            _EXAMPLES.c.owner == owner, _EXAMPLES.c.learner == name, _EXAMPLES.c.number == number
        )
        with self._engine.connect() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else Item(row.kind, row.content)

    def page(self, owner: str, limit: int, after: Kept | None) -> list[Kept]:
        """The newest first, behind one of them."""
        order = (_LEARNERS.c.created.desc(), _LEARNERS.c.id.desc())
        query = sa.select(_LEARNERS).where(_LEARNERS.c.owner == owner).order_by(*order).limit(limit)
        if after is not None:
            place = sa.tuple_(_LEARNERS.c.created, _LEARNERS.c.id)
            query = query.where(place < sa.tuple_(sa.literal(after.created), sa.literal(after.id)))
        with self._engine.connect() as connection:
            return [_kept(row) for row in connection.execute(query)]

    def count(self, owner: str) -> int:
        """How many learners an owner has."""
        query = sa.select(sa.func.count()).where(_LEARNERS.c.owner == owner)
        with self._engine.connect() as connection:
            return int(connection.execute(query).scalar_one())

    def delete(self, owner: str, name: str) -> bool:
        """Remove a learner and its examples; False if there is none."""
        with self._engine.begin() as connection:
            connection.execute(
                sa.delete(_EXAMPLES).where(_EXAMPLES.c.owner == owner, _EXAMPLES.c.learner == name)
            )
            done = connection.execute(
                sa.delete(_LEARNERS).where(_LEARNERS.c.owner == owner, _LEARNERS.c.id == name)
            )
        return bool(done.rowcount)


def _kept(row: Any) -> Kept:
    return Kept(
        owner=row.owner,
        id=row.id,
        name=row.name,
        created=row.created,
        parent=row.parent,
        policy=row.policy,
        model=ModelRef.model_validate_json(row.model),
        labels=tuple(json.loads(row.labels)),
        unknown_below=row.unknown_below,
    )
