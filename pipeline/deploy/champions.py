"""The record of promotions as it lives in MLflow, and the aliases that are made to follow it."""

from __future__ import annotations

import getpass
import os
import socket
import time
import uuid
from dataclasses import replace
from functools import partial
from typing import Any

from pipeline.core.errors import RegistryError
from pipeline.deploy.patience import Persistent, UnansweredError, code_of, state_said
from pipeline.deploy.promotions import (
    ALIAS_MARK,
    LATE_SECONDS,
    NOBODY,
    Kind,
    LostRaceError,
    Record,
    Standing,
    alias_is,
    as_tags,
    fold,
    from_tags,
    signed_content,
)
from pipeline.deploy.signing import sign_record, signing_key, was_signed_with
from pipeline.runtime.logs import warn

CHAMPION, PREVIOUS, CHALLENGER = "champion", "previous", "challenger"
ROLLED_BACK_TAG = "metaloom.rolled_back"
_RECORDS_IN_A_PAGE = 1000
_ROUNDS = 20
"""Others may be at it too; each round, one of us gets further."""
_VISIBLE_SECONDS = 10.0
"""A server may read from a copy of its database that lags behind."""


def who() -> str:
    """Who is doing this, for the records: person, machine and process."""
    return f"{getpass.getuser()}@{socket.gethostname()}/{os.getpid()}"


def now() -> str:
    """The time of a record, by this machine's clock."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


class Champions:
    """Who was, is and becomes champion of one registered model."""

    def __init__(self, client: Any, model: str, ask: Persistent) -> None:
        self.record_name = f"{model}-promotions"
        self._client = client
        self._model = model
        self._ask = ask

    def standing(self) -> Standing:
        """What the records come to now, wherever the alias is."""
        return fold(self._records())

    def settle(self) -> Standing:
        """Bring record and alias together: mend one left behind, take over one moved by hand."""
        for _ in range(_ROUNDS):
            # The record first: an alias that is read later can only be newer, and then the write
            # below names a record that is no longer the last one, and loses.
            standing = self.standing()
            alias = self.aliases().get(CHAMPION, NOBODY)
            verdict = alias_is(standing, alias, now=time.time())
            if verdict == "right":
                last = standing.winners[-1] if standing.winners else None
                if last is not None and not last.seen:
                    self._dress(standing)
                    self._mark(last, "seen")
                return standing
            if verdict == "behind" and self._exists(standing.champion):
                warn(
                    f"@champion of {self._model} was left at version {alias or 'none'}; record "
                    f"{standing.last} says {standing.champion or 'none'}: mended."
                )
                self._write("mend", standing.champion, standing, "the alias was left behind")
            else:
                warn(
                    f"@champion of {self._model} was moved by hand to version {alias or 'none'}: "
                    "it is the champion from now on."
                )
                self._write("adopt", alias, standing, "the alias was moved in MLflow")
        raise RegistryError(
            f"the champion of {self._model} keeps changing; look who is at it: the versions of "
            f"{self.record_name} in `metaloom ui`."
        )

    def change(
        self, kind: Kind, champion: int, since: Standing, reason: str, *, bundle: str = ""
    ) -> Standing:
        """Make a version the champion, if nobody has changed it since.

        Args:
            bundle: digest of the version's bundle; recorded and signed with METALOOM_SIGNING_KEY.

        Raises:
            LostRaceError: somebody has; names them. Nothing was changed.
        """
        open_end = (
            f"Whether version {champion} became the champion is not known. Run the same command "
            f"again: it is done once. The record is the model {self.record_name} in `metaloom ui`."
        )
        with state_said(open_end):
            standing, won = self._write(kind, champion, since, reason, bundle)
        if not won:
            raise LostRaceError(self._lost(champion, since, standing))
        return standing

    def is_unsigned(self, standing: Standing) -> bool:
        """Whether the champion's record is to be signed by METALOOM_SIGNING_KEY and is not yet."""
        key, winner = signing_key(), standing.winner
        if key is None or winner is None:
            return key is not None
        content = signed_content(winner, self._model)
        return not was_signed_with(content, winner.signature, key)

    def aliases(self) -> dict[str, int]:
        """Version number by alias; empty when nothing is registered."""
        try:
            found = self._ask(lambda: self._client.get_registered_model(self._model))
        except Exception as error:
            if code_of(error) == "RESOURCE_DOES_NOT_EXIST":
                return {}
            raise
        return {alias: int(number) for alias, number in found.aliases.items()}

    def move(self, alias: str, number: int) -> None:
        """Set an alias."""
        self._ask(lambda: self._client.set_registered_model_alias(self._model, alias, str(number)))

    def drop(self, alias: str) -> None:
        """Delete an alias, if it is there."""
        if alias in self.aliases():
            self._ask(lambda: self._client.delete_registered_model_alias(self._model, alias))

    def _write(
        self, kind: Kind, champion: int, since: Standing, reason: str, bundle: str = ""
    ) -> tuple[Standing, bool]:
        """Append a record and, if it wins, bring the alias there."""
        begun = time.monotonic()
        record = Record(
            number=0,
            kind=kind,
            champion=champion,
            before=since.champion,
            after=since.last,
            token=uuid.uuid4().hex,
            by=who(),
            at=now(),
            reason=reason,
            # By hand the alias was moved before; nobody is on the way any more.
            seen=kind == "adopt",
            done=kind == "adopt",
            bundle=bundle,
        )
        # What was found, a move by hand or an alias left behind, is nobody's word to be signed.
        if kind in ("promote", "rollback") and (key := signing_key()) is not None:
            content = signed_content(record, self._model)
            record = replace(record, signature=sign_record(content, key))
        standing = self._append(record)
        mine = [r for r in standing.winners if r.token == record.token]
        if mine and kind == "adopt":
            self._dress(standing)
        elif mine:
            standing = self._bring(mine[0], begun)
        return standing, bool(mine)

    def _append(self, record: Record) -> Standing:
        """Write a record once, though an answer may be lost; returns what all come to with it."""
        tried = False

        def create() -> None:
            nonlocal tried
            if not (tried and _holds(self._records(), record)):
                tried = True
                self._create(record)

        self._ask(create)
        deadline = time.monotonic() + _VISIBLE_SECONDS
        while not _holds(records := self._records(), record):
            if time.monotonic() > deadline:
                raise UnansweredError(f"{self.record_name} took a record and does not show it.")
            time.sleep(0.2)
        return fold(records)

    def _create(self, record: Record) -> None:
        arguments: dict[str, Any] = {
            "name": self.record_name,
            "source": f"metaloom:/{self._model}/{record.champion}",  # nothing to be loaded
            "tags": as_tags(record),
            "description": f"{record.kind}: version {record.champion or 'none'} after "
            f"{record.before or 'none'}, by {record.by}: {record.reason}"[:1000],
            "await_creation_for": 0,
        }
        try:
            self._client.create_model_version(**arguments)
        except Exception as error:
            if code_of(error) != "RESOURCE_DOES_NOT_EXIST":
                raise
            self._create_model()
            self._client.create_model_version(**arguments)

    def _create_model(self) -> None:
        description = (
            f"Who became champion of {self._model}, one version a promotion. It decides who is; "
            "@champion follows it. Do not delete versions."
        )
        try:
            self._client.create_registered_model(self.record_name, description=description)
        except Exception as error:
            if code_of(error) != "RESOURCE_ALREADY_EXISTS":
                raise

    def _bring(self, mine: Record, begun: float) -> Standing:
        """Move the alias to where the records put it, until nothing has changed meanwhile."""
        behind = (
            f"Version {mine.champion} is recorded as champion (record {mine.number} of "
            f"{self.record_name}); @champion may still be at {mine.before or 'none'}. Any "
            "`metaloom` command that asks for the champion mends it when the registry is back."
        )
        with state_said(behind):
            for _ in range(_ROUNDS):
                standing = self.standing()
                if time.monotonic() - begun > LATE_SECONDS / 2:
                    # Past this nobody expects us any more, and would take us for a person.
                    raise UnansweredError(f"promoting took more than {LATE_SECONDS / 2:.0f} s.")
                self._put(standing.champion)
                if self.standing().last == standing.last:
                    break
            self._dress(standing)
            self._mark(mine, "done")
        return standing

    def _put(self, champion: int) -> None:
        if champion == NOBODY:
            self.drop(CHAMPION)
        elif self.aliases().get(CHAMPION) != champion:
            self.move(CHAMPION, champion)

    def _dress(self, standing: Standing) -> None:
        """What goes with a change of champion: @previous, @challenger, who was rolled back."""
        aliases = self.aliases()
        earlier = [number for number in standing.history if number != standing.champion]
        previous = next((n for n in reversed(earlier) if self._exists(n)), NOBODY)
        if previous == NOBODY:
            self.drop(PREVIOUS)
        elif aliases.get(PREVIOUS) != previous:
            self.move(PREVIOUS, previous)
        if standing.champion != NOBODY and aliases.get(CHALLENGER) == standing.champion:
            self.drop(CHALLENGER)
        winner = standing.winner
        if winner is not None and winner.kind == "rollback" and self._exists(winner.before):
            self._set_tag(self._model, winner.before, ROLLED_BACK_TAG, winner.at)
        elif winner is not None and winner.champion != NOBODY:
            self._clear_tag(winner.champion, ROLLED_BACK_TAG)

    def _records(self) -> list[Record]:
        found: list[Record] = []
        search = partial(
            self._client.search_model_versions,
            f"name = '{self.record_name}'",
            max_results=_RECORDS_IN_A_PAGE,
            order_by=["version_number ASC"],
        )
        token: str | None = None
        while token != "":
            page = self._ask(partial(search, page_token=token))
            for version in page:
                created = version.creation_timestamp / 1000
                if (record := from_tags(int(version.version), version.tags, created)) is not None:
                    found.append(record)
            token = page.token or ""
        return found

    def _exists(self, number: int) -> bool:
        if number == NOBODY:
            return True
        return self._version(number) is not None

    def _version(self, number: int) -> Any:
        try:
            return self._ask(lambda: self._client.get_model_version(self._model, str(number)))
        except Exception as error:
            if code_of(error) == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise

    def _mark(self, record: Record, mark: str) -> None:
        self._set_tag(self.record_name, record.number, ALIAS_MARK, mark)

    def _set_tag(self, model: str, number: int, key: str, value: str) -> None:
        self._ask(lambda: self._client.set_model_version_tag(model, str(number), key, value))

    def _clear_tag(self, number: int, key: str) -> None:
        version = self._version(number)
        if version is not None and key in version.tags:
            self._ask(lambda: self._client.delete_model_version_tag(self._model, str(number), key))

    def _lost(self, champion: int, since: Standing, standing: Standing) -> str:
        winner = standing.winner or replace(_NOT_KNOWN, champion=standing.champion)
        return (
            f"version {champion} of {self._model} was not promoted: while it was on its way, "
            f"{winner.champion or 'no version'} became the champion in place of "
            f"{since.champion or 'none'} ({winner.kind} by {winner.by} at {winner.at}: "
            f"{winner.reason}; record {winner.number} of {self.record_name}). Look at it: "
            f"`metaloom lineage {winner.champion}`. To have version {champion} judged against it: "
            f"`dvc repro deploy`; to choose it all the same: `metaloom promote {champion}`, with "
            "`--force --reason ...` where the gate did not pass it."
        )


_NOT_KNOWN = Record(number=NOBODY, kind="promote", champion=NOBODY, by="somebody", at="some time")


def _holds(records: list[Record], record: Record) -> bool:
    return any(found.token == record.token for found in records)
