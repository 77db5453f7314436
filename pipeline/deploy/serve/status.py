"""`metaloom release status`: what the registry wants, what every replica does."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.deploy.serve.messages import ModelRef, ReplicaTold, Tally
from pipeline.deploy.serve.replicas import Seen
from pipeline.deploy.serve.settings import ServeSettings

if TYPE_CHECKING:
    from pipeline.deploy.drift import DriftTold
    from pipeline.deploy.registry import Registry

_LATE_LOOKS, _LATE_SECONDS = 3, 10.0
"""A replica that has missed so many looks, and has told nothing for so long, is silent."""
_ROLES = ("champion", "challenger")


def status_of(
    registry: Registry,
    seen: Sequence[Seen],
    settings: ServeSettings,
    drift: Callable[[str], DriftTold] | None = None,
) -> dict[str, Any]:
    """Everything that is known, for programs.

    Args:
        drift: what is known of a bundle's traffic.

    Raises:
        RegistryError: the registry does not answer.
    """
    aliases, history = registry.aliases(), registry.promotions()
    own = [one for one in seen if _is_of(registry.name, one.told)]
    late = max(_LATE_LOOKS * settings.poll_seconds, _LATE_SECONDS)
    return {
        "model": registry.name,
        "wanted": {role: aliases.get(role) for role in _ROLES},
        "latest": _latest(history[-1]) if history else None,
        "replicas": [
            {
                "name": one.name,
                "seconds_ago": round(one.seconds_ago, 1),
                "silent": one.seconds_ago > late,
                **{role: _number(getattr(one.told, role)) for role in _ROLES},
                "refused": [refused.model_dump() for refused in one.told.refused],
            }
            for one in own
        ],
        "totals": {role: _total(own, role, aliases.get(role)) for role in _ROLES},
        "share": max((one.told.share for one in own), default=0.0),
        "drift": _drift(registry, aliases.get("champion"), drift),
    }


def _drift(
    registry: Registry, number: int | None, drift: Callable[[str], DriftTold] | None
) -> dict[str, Any] | None:
    """Of the champion's traffic; None where nothing is asked or nobody is champion."""
    if number is None or drift is None:
        return None
    return drift(registry.version(number).digest).as_json()


def _is_of(name: str, told: ReplicaTold) -> bool:
    return any(ref is not None and ref.name == name for ref in (told.champion, told.challenger))


def _number(ref: ModelRef | None) -> int | None:
    return ref.version if ref else None


def _latest(record: Any) -> dict[str, Any]:
    return {
        "kind": record.kind,
        "champion": record.champion,
        "by": record.by,
        "at": record.at,
        "reason": record.reason,
    }


def _total(seen: Sequence[Seen], role: str, number: int | None) -> dict[str, Any]:
    """Over the replicas in which the wanted version has this role."""
    tallies = [
        one.told.tallies.get(role, Tally())  # type: ignore[call-overload]
        for one in seen
        if number is not None and _number(getattr(one.told, role)) == number
    ]
    names = ("answered", "failed", "compared", "agreed")
    sums = {name: sum(getattr(tally, name) for tally in tallies) for name in names}
    agreement = sums["agreed"] / sums["compared"] if sums["compared"] else None
    return {**sums, "agreement": agreement, "replicas": len(tallies)}


def as_text(found: dict[str, Any]) -> str:
    """The same for people, at most 80 columns."""
    lines = [found["model"]]
    for role in _ROLES:
        number, total = found["wanted"][role], found["totals"][role]
        if number is None:
            lines.append(f"  {role:<11} none")
            continue
        told = f"{total['answered']:,} answers, {total['failed']:,} failed"
        if role == "challenger":
            if found["share"]:
                told += f", canary of {found['share']:.0%}"
            if total["compared"]:
                told += f", agrees in {total['agreement']:.1%} of {total['compared']:,}"
        serves = f"in {total['replicas']} of {len(found['replicas'])} replicas"
        lines.append(f"  {role:<11} version {number} {serves}: {told}")
    if told := found["drift"]:
        verdict = told["verdict"].replace("_", " ")
        lines += _wrapped(f"drift       {verdict}: {told['why']}", "  ", " " * 14)
    if latest := found["latest"]:
        lines.append(f"  latest      {latest['kind']} to version {latest['champion']}")
        who = f"{latest['at'][:19]} by {latest['by']}"
        lines += _wrapped(f"{who}: {latest['reason']}", " " * 14)
    for one in found["replicas"]:
        state = "SILENT" if one["silent"] else "seen"
        pair = f"champion {one['champion']}, challenger {one['challenger'] or 'none'}"
        lines.append(f"  {one['name'][:30]:<30} {pair}; {state} {one['seconds_ago']:.0f} s")
        for refused in one["refused"]:
            told = f"keeps version {refused['version']} out: {refused['why']}"
            lines += _wrapped(told, " " * 4)
    if not found["replicas"]:
        lines.append("  no service has told of itself in this database within the hour.")
    return "\n".join(lines)


def _wrapped(text: str, indent: str, further: str | None = None) -> list[str]:
    further = indent if further is None else further
    return textwrap.wrap(
        text, 80, initial_indent=indent, subsequent_indent=further, break_on_hyphens=False
    )
