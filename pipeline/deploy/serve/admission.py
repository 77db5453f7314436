"""Whether a registered version may serve: with its lineage, through the gate and its trial."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.deploy.by_hand import FORCED_TAG, VERDICT_REASON_TAG, VERDICT_TAG
from pipeline.deploy.promotions import Record, signed_content
from pipeline.deploy.signing import KEY_VARIABLE, is_signed_record
from pipeline.deploy.versions import (
    BUNDLE_TAG,
    DAMAGED_TAG,
    PASSED,
    SMOKE_TAG,
    WEIGHTS_TAG,
    Version,
)

REFUSED_TAG = "metaloom.refused"
LINEAGE: Mapping[str, str] = {
    "git.commit": "the git commit",
    "code.hash": "the code's hash",
    "dvc.lock": "dvc.lock's hash",
    "params.hash": "the parameters' hash",
    "config": "the configuration",
    "seeds": "the seeds",
    "store.digest": "the data's hash",
    "episodes": "the test episodes",
    WEIGHTS_TAG: "the weights' hash",
}
"""What must be known of a version, by its tag."""
_ABSENT = {"", "none", "absent", "unknown"}


def refusal(tags: Mapping[str, str]) -> str | None:
    """Why a version with these tags may not serve; None if it may, as far as tags tell."""
    if not tags.get(BUNDLE_TAG):
        return "it was not registered by metaloom; nothing vouches for it"
    if DAMAGED_TAG in tags:
        return f"its files are damaged: {tags[DAMAGED_TAG]}"
    lost = [name for tag, name in LINEAGE.items() if tags.get(tag, "").lower() in _ABSENT]
    if lost:
        return f"its lineage lacks {', '.join(lost)}; register it by `dvc repro deploy`"
    if tags.get(SMOKE_TAG) != PASSED:
        return f"it has not passed the smoke test ({tags.get(SMOKE_TAG, 'it never ran')})"
    if tags.get(VERDICT_TAG) != "champion" and not tags.get(FORCED_TAG):
        return (
            f"it has not passed the gate ({tags.get(VERDICT_REASON_TAG, 'it was not judged')}); "
            "to serve it all the same: `metaloom promote VERSION --force --reason ...`"
        )
    return None


def unsigned_promotion(changes: Sequence[Record], version: Version, public_key: Path) -> str | None:
    """Why a champion may not serve where promotions must be signed; None if its own is.

    Args:
        changes: of the champion, in order.
    """
    mend = f"`{KEY_VARIABLE}=KEY.pem metaloom promote {version.number}`"
    if not changes or changes[-1].champion != version.number:
        return f"there is no record of its promotion; promote it with a signature: {mend}"
    last = changes[-1]
    if not last.signature:
        how = "it was moved by hand" if last.kind == "adopt" else f"{last.kind} by {last.by}"
        return (
            f"its promotion is not signed (record {last.number}: {how}) and this service is "
            f"strict; promote it with a signature: {mend}"
        )
    if not is_signed_record(signed_content(last, version.name), last.signature, public_key):
        return (
            f"the signature of its promotion (record {last.number}) is not by the key of this "
            f"service, or the record was altered; promote it with that key: {mend}"
        )
    if last.bundle != version.digest:
        return (
            f"its promotion (record {last.number}) was signed for another bundle, "
            f"{last.bundle[:12]}…; look who altered version {version.number}"
        )
    return None
