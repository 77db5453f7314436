"""NaN, inf or a spike in one group of one worker's data: caught before any update (F9)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.launch.base import Job
from pipeline.launch.local import launch_local
from tests.chaos.campaign import Campaign, Try, tries
from tests.distributed.poisoned import Injections

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1800)]


def test_every_injection_is_caught_and_all_worlds_end_alike(
    tmp_path: Path, campaign: Callable[[str], Campaign]
) -> None:
    """In random groups of random data; one worker and two leave out the same, with the same bits.

    A hundredfold loss in one of four groups makes the whole gradient 26 times as long: a spike by
    `spike_factor: 15`, which these runs have, and none by the default of 100.
    """
    record, found = campaign("NaN or spike in one group"), {}
    count = tries(ci=12, full=100)
    for workers in (1, 2):
        plan = Injections(folder=tmp_path / str(workers), count=count)
        job = Job("tests.distributed.poisoned:inject", plan, workers)
        found[workers] = launch_local(job, tmp_path / f"launch-{workers}")
    for one, two in zip(found[1], found[2], strict=True):
        caught = [row["skipped"] == [row["cell"]] for row in (one, two)]
        in_weights = one["poisoned_updates"] or two["poisoned_updates"]
        agree = one["agree"] and two["agree"]
        progress = one["cell"][0] + 1
        record.add(Try(progress, all(caught) and agree and not in_weights, one == two))
    kinds = Counter(row["kind"] for row in found[1])
    record.notes |= {"kinds": dict(kinds), "workers": [1, 2]}
    assert len(found[1]) == count and len(kinds) == 3
    assert len({tuple(row["cell"]) for row in found[1]}) > count / 2
