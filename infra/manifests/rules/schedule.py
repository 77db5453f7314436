"""When things begin and when they are given up."""

from __future__ import annotations

import re
import zoneinfo
from collections.abc import Sequence

from infra.manifests.documents import Documents, Finding, find, look, of_kind, title

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_FIELDS: Sequence[tuple[str, int, int, Sequence[str]]] = (
    ("minute", 0, 59, ()),
    ("hour", 0, 23, ()),
    ("day of month", 1, 31, ()),
    ("month", 1, 12, _MONTHS),
    ("day of week", 0, 6, _DAYS),
)
_SHORTHANDS = ("@yearly", "@annually", "@monthly", "@weekly", "@daily", "@midnight", "@hourly")
_PART = re.compile(r"(\*|\?|[a-z0-9]+)(?:-([a-z0-9]+))?(?:/(\d+))?")


def cron_error(schedule: str) -> str | None:
    """What is wrong with a schedule, as the CronJob controller reads it; None if nothing is."""
    text = schedule.strip().lower()
    if "tz=" in text:
        return "it names a time zone itself, which Kubernetes refuses"
    if text in _SHORTHANDS or re.fullmatch(r"@every (\d+(\.\d+)?(h|m|s))+", text):
        return None
    parts = text.split()
    if len(parts) != len(_FIELDS):
        return f"it has {len(parts)} fields; five are needed"
    for part, (name, low, high, words) in zip(parts, _FIELDS, strict=True):
        for piece in part.split(","):
            if not _is_piece(piece, low, high, list(words)):
                return f"{piece!r} is no {name} ({low} to {high})"
    return None


def _is_piece(piece: str, low: int, high: int, words: list[str]) -> bool:
    """`*`, `7`, `mon`, `1-5`, `*/10`, `10-50/10`."""
    matched = _PART.fullmatch(piece)
    if matched is None:
        return False
    begin, end, step = matched.groups()
    if step is not None and int(step) < 1:
        return False
    if begin in "*?":
        return end is None
    numbers = [_number(one, low, words) for one in (begin, end) if one is not None]
    if any(one is None or not low <= one <= high for one in numbers):
        return False
    known = [one for one in numbers if one is not None]
    return known == sorted(known)


def _number(text: str, low: int, words: list[str]) -> int | None:
    if text in words:
        return words.index(text) + low
    return int(text) if text.isdecimal() else None


def cron(documents: Documents) -> list[Finding]:
    """Schedules can be read."""
    return [
        Finding(
            f"{title(one)}: spec.schedule",
            f"{schedule!r} is no schedule: {why}",
            "Write minute, hour, day of month, month, day of week, such as `30 2 * * *`.",
        )
        for one in of_kind(documents, "CronJob")
        if (why := cron_error(schedule := str(look(one, "spec.schedule", ""))))
    ]


def time_zones(documents: Documents) -> list[Finding]:
    """Schedules say in which time zone, and there is such a one."""
    found = []
    for one in of_kind(documents, "CronJob"):
        zone = look(one, "spec.timeZone")
        if zone not in zoneinfo.available_timezones():
            what = (
                "it names no time zone, so the controller's own decides"
                if zone is None
                else f"there is no time zone {zone!r}"
            )
            found.append(
                Finding(
                    f"{title(one)}: spec.timeZone",
                    what,
                    "Set one, such as Etc/UTC or Europe/Berlin.",
                )
            )
    return found


def deadlines(documents: Documents) -> list[Finding]:
    """Nothing overlaps, waits or runs without an end, or is kept for ever."""
    found = []
    for one in of_kind(documents, "CronJob"):
        found += _of_schedule(title(one), one)
    for kind, path in (("CronJob", "spec.jobTemplate.spec"), ("Job", "spec"), ("RayJob", "spec")):
        for one in of_kind(documents, kind):
            for field in ("activeDeadlineSeconds", "backoffLimit"):
                value = look(one, f"{path}.{field}")
                if not isinstance(value, int) or value < (field == "activeDeadlineSeconds"):
                    found.append(
                        Finding(
                            f"{title(one)}: {path}.{field}",
                            f"it is {value}, so a run that hangs or fails has no end",
                            "Set a number.",
                        )
                    )
    return found + _outlived(documents)


def _of_schedule(where: str, one: object) -> list[Finding]:
    found = []
    policy = look(one, "spec.concurrencyPolicy")
    if policy != "Forbid":
        what = (
            "a run may be ended by the next one" if policy == "Replace" else "two runs may overlap"
        )
        mend = "Set Forbid: a run that is late is left out."
        found.append(Finding(f"{where}: spec.concurrencyPolicy", what, mend))
    late = look(one, "spec.startingDeadlineSeconds")
    if not isinstance(late, int) or late < 10:
        found.append(
            Finding(
                f"{where}: spec.startingDeadlineSeconds",
                f"it is {late}; the controller looks every 10 s, and without a deadline 100 missed "
                "starts stop a schedule for good",
                "Set 10 or more.",
            )
        )
    for field in ("successfulJobsHistoryLimit", "failedJobsHistoryLimit"):
        kept = look(one, f"spec.{field}")
        if not isinstance(kept, int) or not 1 <= kept <= 10:
            found.append(
                Finding(
                    f"{where}: spec.{field}", f"it is {kept}", "Keep 1 to 10, for a look at logs."
                )
            )
    return found


def _outlived(documents: Documents) -> list[Finding]:
    """A training job that outlives its driver ends with nobody to fetch its result."""
    drivers = [
        p.value
        for one in of_kind(documents, "CronJob")
        for p in find(one, "spec.jobTemplate.spec.activeDeadlineSeconds")
    ]
    return [
        Finding(
            f"{title(one)}: spec.activeDeadlineSeconds",
            f"{limit} s is no less than the {min(drivers)} s of the driver that waits for it",
            "Lower it, or raise the driver's.",
        )
        for one in of_kind(documents, "RayJob")
        if isinstance(limit := look(one, "spec.activeDeadlineSeconds"), int)
        and drivers
        and limit >= min(drivers)
    ]
