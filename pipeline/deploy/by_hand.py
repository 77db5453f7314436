"""A person's promotion: as it is where the gate passed, forced with a reason elsewhere."""

from __future__ import annotations

from pipeline.core.errors import RegistryError
from pipeline.deploy.registry import Registry
from pipeline.deploy.versions import Version

VERDICT_TAG, VERDICT_REASON_TAG = "gate.verdict", "gate.reason"
FORCED_TAG = "metaloom.forced"
"""The reason that a person gave for a version that the gate did not pass."""


def promote_by_hand(
    registry: Registry, version: Version, *, force: bool = False, reason: str | None = None
) -> Version | None:
    """Make a version the champion on a person's word; returns the old champion.

    The reason goes into the record of promotions, and on to the version if it was forced. The
    record is written first: whoever is stopped in between has promoted, and the record says why.

    Raises:
        RegistryError: the gate did not pass this version, and it is not forced, or no reason is
            given; or `Registry.promote` refuses.
    """
    why = (reason or "").strip()
    if version.tags.get(VERDICT_TAG) == "champion":
        return registry.promote(version, reason=why or "a person's choice")
    if not (force and why):
        raise RegistryError(_refusal(version, force))
    old = registry.promote(version, reason=f"forced: {why}")
    registry.tag(version, {FORCED_TAG: why})
    return old


def _refusal(version: Version, force: bool) -> str:
    verdict = version.tags.get(VERDICT_TAG)
    found = "the gate has not judged it."
    if verdict is not None:
        found = f"the gate says {verdict!r}: {version.tags.get(VERDICT_REASON_TAG, 'no reason')}"
    lacks = "A forced promotion needs a reason, which is recorded" if force else "If it must serve"
    return (
        f"version {version.number} of {version.name} was not promoted, for {found} {lacks}: "
        f'`metaloom promote {version.number} --force --reason "..."`.'
    )
