"""Whether a registered version may serve: with its lineage, through the gate and its trial."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.deploy.by_hand import FORCED_TAG, VERDICT_REASON_TAG, VERDICT_TAG
from pipeline.deploy.registry import BUNDLE_TAG, DAMAGED_TAG, PASSED, SMOKE_TAG, WEIGHTS_TAG

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
