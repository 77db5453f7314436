"""Readers of the checker that have a closed form: schedules, amounts, selectors, paths."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.manifests.documents import find
from infra.manifests.pods import matches
from infra.manifests.rules.quantities import amount
from infra.manifests.rules.schedule import cron_error


@pytest.mark.parametrize(
    "schedule",
    [
        *("30 2 * * *", "*/15 0-5,22 1,15 jan-mar mon-fri", "0 0 ? * SUN", "@daily"),
        *("@every 1h30m", "59 23 31 12 6", "10-50/20 * * * *", "  0 3 * * 1  "),
    ],
)
def test_schedules_that_the_controller_reads(schedule: str) -> None:
    assert cron_error(schedule) is None


@pytest.mark.parametrize(
    "schedule",
    [
        *("", "* * * *", "* * * * * *", "60 * * * *", "* 24 * * *", "* * 0 * *", "* * 32 * *"),
        *("* * * 13 *", "* * * * 7", "5-1 * * * *", "*/0 * * * *", "a * * * *", "*-5 * * * *"),
        *("@nightly", "@every day", "CRON_TZ=UTC 0 0 * * *", "1, * * * *", "-1 * * * *"),
    ],
)
def test_schedules_that_it_does_not(schedule: str) -> None:
    assert cron_error(schedule)


@given(minute=st.integers(0, 99), hour=st.integers(0, 99), day=st.integers(0, 99))
def test_a_number_is_good_within_its_bounds_alone(minute: int, hour: int, day: int) -> None:
    good = minute <= 59 and hour <= 23 and 1 <= day <= 31
    assert (cron_error(f"{minute} {hour} {day} * *") is None) == good


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("500m", Decimal("0.5")), ("2", Decimal(2)), (4, Decimal(4)), ("1.5", Decimal("1.5"))],
        *[("4Gi", Decimal(4 * 2**30)), ("1k", Decimal(1000)), ("1e3", Decimal(1000))],
        *[("2GB", None), ("", None), ("lots", None), (True, None), ("4 Gi", None), ("1K", None)],
    ],
)
def test_amounts(text: object, value: Decimal | None) -> None:
    assert amount(text) == value


def test_selectors_are_conjunctions() -> None:
    labels = {"app": "a", "tier": "front"}

    def expression(operator: str, *values: str) -> dict[str, object]:
        one = {"key": "tier", "operator": operator, "values": list(values)}
        return {"matchLabels": {"app": "a"}, "matchExpressions": [one]}

    assert matches({}, labels) and matches({"matchLabels": {"app": "a"}}, labels)
    assert not matches({"matchLabels": {"app": "a", "tier": "back"}}, labels)
    assert matches(expression("In", "front", "back"), labels)
    assert not matches(expression("NotIn", "front"), labels)
    assert matches(expression("Exists"), labels) and not matches(expression("DoesNotExist"), labels)
    assert not matches(expression("Within", "front"), labels)


def test_a_path_leads_to_every_item_and_names_it() -> None:
    document = {"a": {"b": [{"name": "x", "c": 1}, {"c": 2}, {"d": 3}]}}
    assert [tuple(p) for p in find(document, "a.b[].c")] == [("a.b[x].c", 1), ("a.b[1].c", 2)]
    assert find(document, "a.z.c") == []
