"""Cron schedules as Kubernetes reads them: checked here, so that a mistake is seen at once."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import NamedTuple
from zoneinfo import ZoneInfo, available_timezones

from pipeline.core.errors import ConfigError


class _Field(NamedTuple):
    name: str
    low: int
    high: int
    words: tuple[str, ...] = ()


_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_FIELDS = (
    _Field("minute", 0, 59),
    _Field("hour", 0, 23),
    _Field("day of month", 1, 31),
    _Field("month", 1, 12, _MONTHS),
    _Field("day of week", 0, 6, _DAYS),
)
_SHORT = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}


class Schedule(NamedTuple):
    """The minutes, hours, days of the month, months and days of the week (0: Sunday) of a cron."""

    minutes: frozenset[int]
    hours: frozenset[int]
    days: frozenset[int]
    months: frozenset[int]
    weekdays: frozenset[int]
    any_day: bool
    """One of the two fields for days is open (`*`): then both have to match, else either."""

    def is_day(self, day: datetime) -> bool:
        """Whether it runs at all on this day."""
        if day.month not in self.months:
            return False
        by_month, by_week = day.day in self.days, (day.weekday() + 1) % 7 in self.weekdays
        return by_month and by_week if self.any_day else by_month or by_week


def parse_cron(text: str) -> Schedule:
    """Five fields, or a name such as @daily.

    Raises:
        ConfigError: Kubernetes would not take it.
    """
    if "TZ=" in text:
        raise ConfigError(f"{text!r} names a time zone. Give it by --time-zone.")
    fields = _SHORT.get(text.strip(), text).split()
    if len(fields) != 5:
        raise ConfigError(
            f"{text!r} is no cron schedule: it has {len(fields)} fields, and 5 are needed (minute, "
            "hour, day of month, month, day of week), such as '30 2 * * *' for every night at half "
            f"past two; or one of {', '.join(_SHORT)}."
        )
    minutes, hours, days, months, weekdays = (
        _parse(field, kind, text) for field, kind in zip(fields, _FIELDS, strict=True)
    )
    any_day = any(_is_open(fields[index]) for index in (2, 4))
    return Schedule(minutes, hours, days, months, weekdays, any_day)


def _is_open(field: str) -> bool:
    """Whether it leaves all open, as the CronJob controller's library (robfig/cron 3) sees it: `*`
    does, and `*/2` does not, though other crons say so."""
    return any(re.fullmatch(r"[*?](/0*1)?", part) for part in field.split(","))


def _parse(field: str, kind: _Field, whole: str) -> frozenset[int]:
    return frozenset(n for part in field.split(",") for n in _part(part, kind, whole))


def _part(part: str, kind: _Field, whole: str) -> range:
    found = re.fullmatch(r"(?:([*?])|(\w+)(?:-(\w+))?)(?:/(\d+))?", part)
    wrong = ConfigError(
        f"{whole!r} is no cron schedule: {part!r} cannot be a {kind.name} ({kind.low}-{kind.high}"
        f"{', or ' + kind.words[0] + '-' + kind.words[-1] if kind.words else ''}, *, lists with "
        "commas, ranges with -, steps with /)."
    )
    if not found:
        raise wrong
    step = int(found[4] or 1)
    if found[1]:
        low, high = kind.low, kind.high
    else:
        low = _number(found[2], kind)
        high = _number(found[3], kind) if found[3] else (kind.high if found[4] else low)
    if not kind.low <= low <= high <= kind.high or step < 1:
        raise wrong
    return range(low, high + 1, step)


def _number(text: str, kind: _Field) -> int:
    if text.lower() in kind.words:
        return kind.words.index(text.lower()) + kind.low
    return int(text) if text.isdecimal() and len(text) < 5 else -1


def check_zone(name: str) -> ZoneInfo:
    """A time zone of the IANA list.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in available_timezones():
        likely = [zone for zone in sorted(available_timezones()) if name.lower() in zone.lower()]
        hint = f" Did you mean {likely[0]}?" if name and likely else ""
        raise ConfigError(f"{name!r} is no time zone, such as Europe/Berlin or UTC.{hint}")
    return ZoneInfo(name)


def next_runs(schedule: Schedule, zone: ZoneInfo, after: datetime, count: int) -> list[datetime]:
    """The next times in that zone, for a look at what a schedule means; at most 5 years ahead."""
    found = []
    for moment in _moments(schedule, zone, after):
        found.append(moment)
        if len(found) == count:
            break
    return found


def _moments(schedule: Schedule, zone: ZoneInfo, after: datetime) -> Iterator[datetime]:
    start = after.astimezone(zone)
    day = start.replace(hour=0, minute=0, second=0, microsecond=0, tzinfo=None)
    for _ in range(366 * 5):
        if schedule.is_day(day):
            for hour in sorted(schedule.hours):
                for minute in sorted(schedule.minutes):
                    moment = (day + timedelta(hours=hour, minutes=minute)).replace(tzinfo=zone)
                    # Clocks that are put forward leave an hour out.
                    real = moment.astimezone(ZoneInfo("UTC")).astimezone(zone)
                    if moment > start and real.hour == hour:
                        yield moment
        day += timedelta(days=1)
