"""The scaling model: closed forms of its terms, and its limits."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks import scale
from benchmarks.scale_measure import Compute, Network

COST = Compute(
    group=0.05,
    read=0.001,
    update=0.002,
    add=1e-4,
    validation_episode=0.01,
    checkpoint=0.03,
    values=100_000,
    bytes_gathered=28,
)
SLOW = Network(name="slow", latency_seconds=1e-3, bytes_per_second=1e8, measured=False)
PLAN = scale.Plan(num_groups=64, validate_every=50, validation_episodes=400, checkpoint_every=20)


def test_one_worker_talks_to_nobody() -> None:
    """64 groups one after another, and a tree of 63 sums."""
    seconds = scale.step_seconds(COST, SLOW, PLAN, 1)
    assert seconds["compute"] == pytest.approx(64 * 0.05)
    assert seconds["reduction"] == pytest.approx(63e-4)
    assert seconds["metrics"] == 0
    assert seconds["validation"] == pytest.approx(400 * 0.01 / 50)
    assert seconds["checkpoint"] == pytest.approx(0.03 / 20)


@pytest.mark.parametrize("workers", [2, 8, 64])
def test_powers_of_two_exchange_in_a_tree(workers: int) -> None:
    """log2(W) messages of V floats behind the sums of the own groups."""
    seconds = scale.step_seconds(COST, SLOW, PLAN, workers)
    message = 1e-3 + 4 * 100_000 / 1e8
    expected = (64 // workers - 1) * 1e-4 + math.log2(workers) * (message + 1e-4)
    assert seconds["reduction"] == pytest.approx(expected)
    assert seconds["compute"] == pytest.approx(0.05 * 64 / workers)


def test_other_worlds_gather_all_parts() -> None:
    """3 workers of 64 groups: the largest share is 22, and everyone sums all 64."""
    seconds = scale.step_seconds(COST, SLOW, PLAN, 3)
    assert seconds["compute"] == pytest.approx(22 * 0.05)
    assert seconds["reduction"] == pytest.approx(2 * (1e-3 + 22 * 4e5 / 1e8) + 63e-4)
    assert seconds["validation"] == pytest.approx(134 * 0.01 / 50)


def test_no_more_workers_than_groups_and_who_takes_over() -> None:
    points = scale.curve(COST, SLOW, PLAN, [1, 2, 4, 32, 64, 128, 1024])
    assert [point.workers for point in points] == [1, 2, 4, 32, 64]
    assert scale.takes_over(points)["compute"] == 1
    totals = {point.workers: point.total for point in points}
    assert points[0].speedup == 1
    assert points[2].speedup == pytest.approx(totals[1] / totals[4])
    assert scale.takes_over(points)["metrics"] == 64, "63 messages beside one group of 50 ms"


def test_the_network_is_found_again() -> None:
    """Messages that took latency + bytes / bandwidth, and their addition."""
    add = 2e-11
    messages = [(b, 5e-5 + b / 2e9 + b * add) for b in (4, 40_000, 400_000, 4_000_000)]
    found = scale.fitted(messages, add)
    assert found.latency_seconds == pytest.approx(5e-5, rel=1e-3)
    assert found.bytes_per_second == pytest.approx(2e9, rel=1e-3)


@pytest.mark.slow
def test_a_run_measures_checks_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, picture = tmp_path / "scale.json", tmp_path / "scale.png"
    options = ["--checks", "1,2", "--num-groups", "8", "--out", str(out), "--picture", str(picture)]
    monkeypatch.setattr("sys.argv", ["scale", *options])
    scale.main()
    document = json.loads(out.read_text())
    assert [check["workers"] for check in document["checks"]] == [1, 2]
    assert all(-0.9 < check["error"] < 9 for check in document["checks"])
    assert document["networks"][0]["measured"] and picture.stat().st_size > 10_000
    points = document["curves"]["8 groups, loopback gloo"]["points"]
    assert [p["workers"] for p in points] == [1, 2, 3, 4, 6, 8]
