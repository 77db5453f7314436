"""A version goes on to another registered model, as from staging to production, with its record."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.errors import ArtefactError, RegistryError
from pipeline.deploy.by_hand import FORCED_TAG, overruling
from pipeline.deploy.champions import ROLLED_BACK_TAG, now, who
from pipeline.deploy.registry import Registry
from pipeline.deploy.serve.admission import REFUSED_TAG, refusal
from pipeline.deploy.versions import DAMAGED_TAG, TOKEN_TAG, Version

FROM_TAG, BY_TAG, AT_TAG = "copied.from", "copied.by", "copied.at"
REASON_TAG, TRAIL_TAG = "copied.reason", "copied.trail"
_STAYS_BEHIND = {FORCED_TAG, ROLLED_BACK_TAG, REFUSED_TAG, TOKEN_TAG, REASON_TAG}
"""What was said of a version as one of its first model, and not of its bundle."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_RECORDS = "-promotions"
_LONGEST_REASON = 1000


@dataclass(frozen=True)
class Copied:
    """A version as one of the other model."""

    version: Version
    new: bool
    """False: its bundle was there before."""
    promoted: bool
    """Whether this made it the champion there."""
    before: Version | None
    """The champion that it took the place of."""


def copy_to(
    source: Registry,
    version: Version,
    target: Registry,
    *,
    force: bool = False,
    reason: str | None = None,
    only_copy: bool = False,
) -> Copied:
    """Make a version one of another registered model, and the champion there.

    The copy has the files, the run, the card and every tag of the lineage, the gate's and the smoke
    test's verdicts among them, and says where it comes from. It is judged by what it was judged by
    before: the gate is not asked again. Done twice, it is done once.

    Args:
        force: copy it though the gate did not pass it; needs a reason.
        only_copy: leave the other model's champion as it is.

    Raises:
        RegistryError: it may not serve, the models are the same, or somebody else changed the
            champion meanwhile.
        ArtefactError: its files are not those that were registered.
    """
    _check_names(source.name, target.name)
    forced = _checked(version, target.name, force, reason)
    since = target.standing()
    with tempfile.TemporaryDirectory() as scratch:
        source.fetch(version, Path(scratch) / "bundle")
    there, new = target.copy(version, _tags(version, forced, reason))
    if new:
        _check_arrived(target, there)
    if only_copy or since.champion == there.number:
        return Copied(there, new, promoted=False, before=None)
    if not new:
        # It may have been registered there by other means, and judged by another gate.
        forced = _checked(there, target.name, force, reason)
    old = target.promote(there, since=since, reason=_said(version, forced, reason))
    if forced and there.tags.get(FORCED_TAG) != forced:
        there = target.tag(there, {FORCED_TAG: forced})
    return Copied(there, new, promoted=True, before=old)


def trail(tags: Mapping[str, str]) -> list[dict[str, str]]:
    """Where a version has been before, oldest first; empty for one that was registered here.

    Each step holds `from` (an address like `models:/name/3`), `by`, `at` and `reason`.
    """
    try:
        steps = json.loads(tags.get(TRAIL_TAG, "[]"))
        return [{str(k): str(v) for k, v in step.items()} for step in steps]
    except (ValueError, TypeError, AttributeError):
        raise RegistryError(
            f"the tag {TRAIL_TAG} was changed by hand and is no list of steps any more: "
            f"{tags[TRAIL_TAG][:100]!r}. Mend it or remove it in `metaloom ui`."
        ) from None


def _check_names(source: str, target: str) -> None:
    if not _NAME.fullmatch(target) or target.endswith(_RECORDS):
        raise RegistryError(
            f"{target!r} cannot be the name of a model here: letters, digits, '_', '.' and '-', "
            f"and no {_RECORDS!r} at the end, where the records of promotions are kept."
        )
    if source == target:
        raise RegistryError(
            f"the version is one of {target} already: name another model after --to, or leave "
            "--to out to make the version the champion here."
        )


def _checked(version: Version, to: str, force: bool, reason: str | None) -> str | None:
    """The reason that overrules the gate, if it has to be.

    Raises:
        RegistryError: the version may not serve.
    """
    # Whether the gate is overruled is asked last, for it is the only thing that can be.
    if why := refusal({**version.tags, FORCED_TAG: "asked below"}):
        raise RegistryError(
            f"version {version.number} of {version.name} was not promoted to {to}: {why}."
        )
    return overruling(version, force=force, reason=reason, to=to)


def _tags(version: Version, forced: str | None, reason: str | None) -> dict[str, str]:
    step = {"from": version.uri, "by": who(), "at": now()}
    why = (reason or "").strip()[:_LONGEST_REASON]
    steps: list[dict[str, Any]] = [*trail(version.tags), {**step, "reason": why or "none given"}]
    kept = {name: value for name, value in version.tags.items() if name not in _STAYS_BEHIND}
    own = {FROM_TAG: step["from"], BY_TAG: step["by"], AT_TAG: step["at"]}
    own |= {TRAIL_TAG: json.dumps(steps)}
    return {
        **kept,
        **own,
        **({REASON_TAG: why} if why else {}),
        **({FORCED_TAG: forced} if forced else {}),
    }


def _check_arrived(target: Registry, there: Version) -> None:
    """What the copy leads to is the bundle; a copy of which that is not true is marked."""
    try:
        with tempfile.TemporaryDirectory() as scratch:
            target.fetch(there, Path(scratch) / "bundle")
    except ArtefactError as error:
        target.tag(there, {DAMAGED_TAG: str(error)})
        raise


def _said(version: Version, forced: str | None, reason: str | None) -> str:
    """For the record of promotions."""
    said = f"promoted from {version.name} version {version.number}"
    why = (reason or "").strip()
    return f"{said}, forced: {forced}" if forced else f"{said}: {why}" if why else said
