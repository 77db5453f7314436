"""API keys: shown once, kept as hashes, with scopes, an end and a way to take them back."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal, get_args

import sqlalchemy as sa

from pipeline.core.errors import ConfigError
from pipeline.deploy.serve.learners import KEYS, now

Scope = Literal["read", "write", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
_PREFIX = "ml"
_REMEMBERED_SECONDS = 5.0
_MOST_REMEMBERED = 10_000


@dataclass(frozen=True)
class Caller:
    """Who asks: the key's id, whose learners are seen, what is allowed."""

    key: str
    owner: str
    scopes: frozenset[str]


@dataclass(frozen=True)
class KeyTold:
    """A key without its secret."""

    id: str
    owner: str
    scopes: str
    created: str
    expires: str | None
    revoked: str | None


class Keys:
    """The keys of one database. Checked ones are remembered for a moment, and then asked for again.

    So a key that is revoked in one replica is refused in all of them after that moment.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._remembered: dict[bytes, tuple[float, Caller | None]] = {}

    def make(self, owner: str, scopes: Iterable[str], days: float | None = None) -> str:
        """A new key; this is the only time that it can be read.

        Raises:
            ConfigError: an unknown scope, or no owner.
        """
        wanted = sorted(set(scopes))
        if not wanted or set(wanted) - set(SCOPES):
            raise ConfigError(f"scopes are among {', '.join(SCOPES)}, not {', '.join(wanted)!r}.")
        if not 0 < len(owner) <= 64:
            raise ConfigError("an owner's name has 1 to 64 characters.")
        name, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
        expires = datetime.now(UTC) + timedelta(days=days) if days is not None else None
        row = {
            "id": name,
            "owner": owner,
            "hash": _hash(secret),
            "scopes": " ".join(wanted),
            "created": now(),
            "expires": expires and expires.isoformat(timespec="microseconds"),
        }
        with self._engine.begin() as connection:
            connection.execute(sa.insert(KEYS).values(row))
        return f"{_PREFIX}_{name}_{secret}"

    def all(self) -> list[KeyTold]:
        """Every key, the oldest first."""
        columns = [c for c in KEYS.c if c.name != "hash"]
        with self._engine.connect() as connection:
            rows = connection.execute(sa.select(*columns).order_by(KEYS.c.created))
            return [KeyTold(**row._mapping) for row in rows]

    def revoke(self, name: str) -> None:
        """Take a key back.

        Raises:
            ConfigError: there is none of this id.
        """
        with self._engine.begin() as connection:
            found = connection.execute(
                sa.update(KEYS).where(KEYS.c.id == name).values(revoked=now())
            )
        if not found.rowcount:
            raise ConfigError(f"there is no key {name!r}; `metaloom keys list` shows them.")

    def remembered(self, key: str) -> Caller | Literal["not"] | None:
        """What was found a moment ago, without asking the database."""
        known = self._remembered.get(_fingerprint(key))
        return known[1] if known and known[0] > time.monotonic() else "not"

    def check(self, key: str) -> Caller | None:
        """Whose key this is; None if it is no key, revoked or at its end."""
        caller = self._look_up(key)
        if len(self._remembered) >= _MOST_REMEMBERED:
            self._remembered.clear()
        until = time.monotonic() + _REMEMBERED_SECONDS
        self._remembered[_fingerprint(key)] = until, caller
        return caller

    def _look_up(self, key: str) -> Caller | None:
        prefix, _, rest = key.partition("_")
        name, _, secret = rest.partition("_")
        if prefix != _PREFIX or not secret:
            return None
        with self._engine.connect() as connection:
            row = connection.execute(sa.select(KEYS).where(KEYS.c.id == name)).one_or_none()
        # Compared even where there is no such key, so that the time taken does not tell.
        right = hmac.compare_digest(_hash(secret), row.hash if row else _hash(""))
        if row is None or not right or row.revoked or (row.expires and row.expires < now()):
            return None
        return Caller(row.id, row.owner, frozenset(row.scopes.split()))


def _hash(secret: str) -> str:
    """Of 256 random bits: there is nothing to guess that a slow hash would protect."""
    return hashlib.sha256(secret.encode()).hexdigest()


def _fingerprint(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="replace")).digest()
