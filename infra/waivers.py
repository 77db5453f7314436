"""Vulnerabilities that are let pass, each for a reason and until a day."""

from __future__ import annotations

import tomllib
from datetime import date, timedelta
from pathlib import Path

from packaging.utils import canonicalize_name
from pydantic import Field, ValidationError

from pipeline.core.config import Section
from pipeline.core.errors import ConfigError

MAX_DAYS = 90


class Waiver(Section):
    """One vulnerability of one package."""

    id: str = Field(min_length=5)
    """As the advisory names it, or an alias."""
    package: str = Field(min_length=1)
    """Its name."""
    reason: str = Field(min_length=20)
    """Why it does no harm here, and what is waited for."""
    expires: date
    """The last day."""

    def covers(self, package: str, ids: frozenset[str]) -> bool:
        """Whether a finding is the one that was waived."""
        return self.id in ids and canonicalize_name(self.package) == canonicalize_name(package)


def read_waivers(path: Path, today: date) -> list[Waiver]:
    """All of a file, expired ones too.

    Raises:
        ConfigError: one lacks something, or lasts too long.
    """
    try:
        tables = tomllib.loads(path.read_text())
        waivers = [
            Waiver(id=name, **entry)
            for name, entries in tables.items()
            for entry in (entries if isinstance(entries, list) else [entries])
        ]
    except (tomllib.TOMLDecodeError, ValidationError, TypeError) as error:
        raise ConfigError(
            f'{path} cannot be used: {error}\nEach waiver is a table [["CVE-..."]] with package, '
            "reason (20 letters or more) and expires (a date)."
        ) from None
    for waiver in waivers:
        if waiver.expires > today + timedelta(days=MAX_DAYS):
            raise ConfigError(
                f"{path}: the waiver of {waiver.id} ends on {waiver.expires}, which is more than "
                f"{MAX_DAYS} days away. Choose an earlier day, and look again then."
            )
    return waivers
