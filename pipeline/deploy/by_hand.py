"""A person's promotion: as it is where the gate passed, forced with a reason elsewhere."""

from __future__ import annotations

from pipeline.core.errors import PipelineError, RegistryError
from pipeline.deploy.registry import Registry
from pipeline.deploy.versions import Version

VERDICT_TAG, VERDICT_REASON_TAG = "gate.verdict", "gate.reason"
FORCED_TAG = "metaloom.forced"
"""The reason that a person gave for a version that the gate did not pass."""


def promote_by_hand(
    registry: Registry, version: Version, *, force: bool = False, reason: str | None = None
) -> Version | None:
    """Make a version the champion on a person's word; returns the old champion.

    The reason goes into the record of promotions, and on to the version if it was forced: first
    there, for services follow the champion as soon as it is one, and refuse what is neither passed
    nor forced. A promotion that is refused takes the mark away again.

    Raises:
        RegistryError: the gate did not pass this version, and it is not forced, or no reason is
            given; or `Registry.promote` refuses.
    """
    forced = overruling(version, force=force, reason=reason)
    if forced is None:
        return registry.promote(version, reason=(reason or "").strip() or "a person's choice")
    marked = registry.tag(version, {FORCED_TAG: forced})
    try:
        return registry.promote(marked, reason=f"forced: {forced}")
    except PipelineError:
        if FORCED_TAG not in version.tags and registry.standing().champion != version.number:
            registry.untag(marked, FORCED_TAG)
        raise


def overruling(
    version: Version, *, force: bool, reason: str | None, to: str | None = None
) -> str | None:
    """The reason that overrules the gate; None where the gate passed the version.

    Args:
        to: the other registered model that it is to go to, for the message.

    Raises:
        RegistryError: the gate did not pass it, and it is not forced, or no reason is given.
    """
    if version.tags.get(VERDICT_TAG) == "champion":
        return None
    why = (reason or "").strip()
    if not (force and why):
        raise RegistryError(_refusal(version, force, f" --to {to}" if to else ""))
    return why


def _refusal(version: Version, force: bool, more: str) -> str:
    verdict = version.tags.get(VERDICT_TAG)
    found = "the gate has not judged it."
    if verdict is not None:
        found = f"the gate says {verdict!r}: {version.tags.get(VERDICT_REASON_TAG, 'no reason')}"
    lacks = "A forced promotion needs a reason, which is recorded" if force else "If it must serve"
    return (
        f"version {version.number} of {version.name} was not promoted, for {found} {lacks}: "
        f'`metaloom promote {version.number}{more} --force --reason "..."`.'
    )
