"""What a reproduction concludes from hashes, and which records it refuses."""

from __future__ import annotations

import pytest

from pipeline.core.errors import RegistryError
from pipeline.deploy.reproduce import judge, needed
from pipeline.deploy.versions import Version

SAME, OTHER = {"recorded": "aa", "here": "aa"}, {"recorded": "aa", "here": "bb"}
WHOLE = {"metaloom.weights": "aa", "store.digest": "bb", "git.commit": "c" * 40}


@pytest.mark.parametrize(
    ("weights", "store", "machine_differs", "verdict"),
    [
        (SAME, SAME, False, "identical"),
        (SAME, SAME, True, "identical"),
        (OTHER, SAME, False, "differs"),
        (OTHER, SAME, True, "fingerprint differs"),
        (OTHER, OTHER, False, "differs"),
        (OTHER, OTHER, True, "differs"),
        (SAME, OTHER, False, "differs"),
    ],
)
def test_verdicts(
    weights: dict[str, str | None],
    store: dict[str, str | None],
    machine_differs: bool,
    verdict: str,
) -> None:
    assert judge(weights, store, machine_differs=machine_differs)[0] == verdict


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"git.dirty": "true"}, "differed from its commit cccccccccccc"),
        ({"git.commit": "none"}, "does not name git.commit"),
        ({"metaloom.weights": ""}, "does not name metaloom.weights"),
        ({"store.digest": "unknown"}, "does not name store.digest"),
    ],
)
def test_a_record_that_cannot_be_followed_is_refused(changed: dict[str, str], said: str) -> None:
    with pytest.raises(RegistryError, match=said):
        needed(Version("letters", 1, {**WHOLE, **changed}, "", None))
    assert needed(Version("letters", 1, WHOLE, "", None)) == WHOLE
