"""Schedules, as the CronJob controller reads them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cluster.kube.cron import next_runs, parse_cron
from pipeline.core.errors import ConfigError

JANUARY = datetime(2026, 1, 1, tzinfo=UTC)  # a Thursday


def days(text: str) -> set[int]:
    """Of that January on which it runs."""
    runs = next_runs(parse_cron(text), ZoneInfo("UTC"), JANUARY - timedelta(minutes=1), 40)
    return {run.day for run in runs if (run.year, run.month) == (2026, 1)}


MONDAYS, ODD = {5, 12, 19, 26}, set(range(1, 32, 2))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0 0 * * 1", MONDAYS),
        ("0 0 ? * MON", MONDAYS),
        ("0 0 */1 * 1", MONDAYS),
        ("0 0 13 * 1", MONDAYS | {13}),
        ("0 0 */2 * *", ODD),
        ("0 0 */2 * 1", ODD | MONDAYS),
        ("0 0 */2,* * 1", MONDAYS),
        ("0 0 1-10 * */2", set(range(1, 11)) | {d for d in range(1, 32) if (d + 3) % 7 % 2 == 0}),
    ],
)
def test_days_of_the_month_and_of_the_week(text: str, expected: set[int]) -> None:
    assert days(text) == expected


@given(
    minute=st.integers(0, 59),
    hour=st.integers(0, 23),
    step=st.integers(1, 15),
    first=st.integers(1, 28),
    weekday=st.integers(0, 6),
)
def test_against_a_look_at_every_minute(
    minute: int, hour: int, step: int, first: int, weekday: int
) -> None:
    text = f"{minute} {hour} {first}-31/{step} * {weekday}"
    found = next_runs(parse_cron(text), ZoneInfo("UTC"), JANUARY - timedelta(minutes=1), 5)
    moments = (JANUARY + timedelta(days=n, hours=hour, minutes=minute) for n in range(200))
    by_hand = [
        m
        for m in moments
        if m.isoweekday() % 7 == weekday or (m.day >= first and (m.day - first) % step == 0)
    ]
    assert found == by_hand[:5]


@pytest.mark.parametrize("text", ["* * * *", "60 0 * * *", "0 0 31-1 * *", "0 0 * * */0", "@never"])
def test_what_kubernetes_refuses(text: str) -> None:
    with pytest.raises(ConfigError, match="no cron schedule"):
        parse_cron(text)
