"""Who is champion: an append-only record decides, and MLflow's alias follows it.

MLflow moves an alias without looking at where it was: of two promoters both succeed and the last
one wins unseen. It does number the versions of a model atomically, though (a primary key, in every
database that it supports). So promotions are records: the versions of one more registered model,
`<name>-promotions`, each naming the record that its writer saw as the last one. In the order of
their numbers, a record that names the last winner wins; any other has lost.

The alias is what services read, and a person may move it in MLflow: that is a promotion too, and
is taken into the record when it is found. An alias that a killed promoter left behind is mended.
They are told apart by a mark on the records: `seen` (the alias has been where this record puts it)
and then `done` (its writer will not move the alias any more).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from pipeline.core.errors import RegistryError
from pipeline.core.files import canonical_json


class LostRaceError(RegistryError):
    """Somebody else changed the champion between the decision and the promotion."""


Kind = Literal["promote", "rollback", "adopt", "mend"]
ALIAS_MARK = "alias"
"""Tag of a record: `seen`, or `done`, which is more."""
SIGNATURE_TAG = "signature"
NOBODY = 0
"""Stands for no champion, and for no record."""
LATE_SECONDS = 600.0
"""A promoter that has not said that it is done may still be about to move the alias for so long."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One wish to change the champion, as it was written."""

    number: int
    """Of the record: the registry's own order."""
    kind: Kind
    """`adopt` is a move by hand, `mend` moves the alias alone."""
    champion: int
    """The version that is to serve."""
    before: int = NOBODY
    """The champion that its writer saw."""
    after: int = NOBODY
    """The last winning record that its writer saw."""
    token: str = ""
    by: str = ""
    at: str = ""
    reason: str = ""
    bundle: str = ""
    """Digest of the champion's bundle, where the record is signed."""
    signature: str = ""
    """Over `signed_content`; empty where nobody signed."""
    created: float = 0.0
    """By the server's clock, in seconds since the epoch."""
    seen: bool = False
    done: bool = False


@dataclass(frozen=True)
class Standing:
    """What the records come to."""

    champion: int = NOBODY
    last: int = NOBODY
    """The last record that changed the champion: what the next one must name."""
    history: tuple[int, ...] = ()
    """Champions in order, each once, the present one last."""
    winners: tuple[Record, ...] = field(default=(), repr=False)

    @property
    def changes(self) -> tuple[Record, ...]:
        """The records that changed the champion: a mend only moves an alias after one of them."""
        return tuple(record for record in self.winners if record.kind != "mend")

    @property
    def winner(self) -> Record | None:
        """The last record that changed the champion."""
        return self.changes[-1] if self.changes else None


def fold(records: Iterable[Record]) -> Standing:
    """What the records come to, whatever order they are given in."""
    ordered = sorted(records, key=lambda record: record.number)
    numbers = {record.number for record in ordered}
    standing = Standing()
    for record in ordered:
        if _follows(record, standing, numbers):
            standing = _after(standing, record)
    return standing


def alias_is(standing: Standing, alias: int, *, now: float) -> Literal["right", "behind", "moved"]:
    """Whether the alias is where the records put it, was left behind, or was moved by hand.

    It was left behind if it is where it stood before a record that it has not been seen to follow,
    or where a promoter that may still be on its way puts it.
    """
    if alias == standing.champion:
        return "right"
    behind = {r.champion for r in standing.winners if not r.done and now - r.created < LATE_SECONDS}
    for record in reversed(standing.winners):
        behind.add(record.champion)
        if record.seen:
            break
    else:
        behind.add(NOBODY)
    return "behind" if alias in behind else "moved"


def _follows(record: Record, standing: Standing, numbers: Collection[int]) -> bool:
    """Whether a record names the last winner, or one that was there and has been deleted since."""
    if record.kind == "mend" and record.champion != standing.champion:
        return False
    deleted = record.after > standing.last and record.after not in numbers
    return record.after == standing.last or deleted


def _after(standing: Standing, record: Record) -> Standing:
    winners = (*standing.winners, record)
    if record.kind == "mend":
        return Standing(standing.champion, standing.last, standing.history, winners)
    earlier = standing.history
    if record.kind == "rollback":
        earlier = tuple(number for number in earlier if number != record.before)
    if record.champion != NOBODY:
        earlier = (*(n for n in earlier if n != record.champion), record.champion)
    return Standing(record.champion, record.number, earlier, winners)


def as_tags(record: Record) -> dict[str, str]:
    """A record as the tags of a model version."""
    return {
        "kind": record.kind,
        "champion": str(record.champion),
        "before": str(record.before),
        "after": str(record.after),
        "token": record.token,
        "by": record.by,
        "at": record.at,
        "reason": record.reason[:1000] or "none given",
        **({"bundle": record.bundle} if record.bundle else {}),
        **({SIGNATURE_TAG: record.signature} if record.signature else {}),
        **({ALIAS_MARK: "done"} if record.done else {ALIAS_MARK: "seen"} if record.seen else {}),
    }


def signed_content(record: Record, model: str) -> bytes:
    """What a signature of a record covers: all that its writer says, and of which model.

    The marks of the alias come later and say nothing about who was chosen.
    """
    told = {k: v for k, v in as_tags(record).items() if k not in (ALIAS_MARK, SIGNATURE_TAG)}
    return canonical_json({"model": model, **told}).encode()


def from_tags(number: int, tags: Mapping[str, str], created: float) -> Record | None:
    """A record from a model version's tags; None for a version that is none of ours."""
    kinds: Mapping[str, Kind] = {k: k for k in ("promote", "rollback", "adopt", "mend")}
    try:
        return Record(
            number=number,
            kind=kinds[tags["kind"]],
            champion=int(tags["champion"]),
            before=int(tags["before"]),
            after=int(tags["after"]),
            token=tags["token"],
            by=tags.get("by", "unknown"),
            at=tags.get("at", "unknown"),
            reason=tags.get("reason", ""),
            bundle=tags.get("bundle", ""),
            signature=tags.get(SIGNATURE_TAG, ""),
            created=created,
            seen=ALIAS_MARK in tags,
            done=tags.get(ALIAS_MARK) == "done",
        )
    except (KeyError, ValueError):
        return None
