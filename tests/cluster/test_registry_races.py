"""Promotions through a real MLflow server on PostgreSQL: one winner, and the loser is told."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from infra.local.servers import Server
from tests.unit.test_promotions import is_fair, is_settled, new_model, promote, run_races

NUM_RACES = 5
"""The campaign of 200 is in tests/chaos."""


@pytest.fixture(scope="module")
def client(mlflow_server: Server) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in mlflow_server.environment.items():
            patch.setenv(name, value)
        import mlflow

        uri = mlflow_server.environment["MLFLOW_TRACKING_URI"]
        yield mlflow.MlflowClient(uri, uri)


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_races_of_two_processes_have_one_winner(client: Any) -> None:
    told = run_races(client, os.environ["MLFLOW_TRACKING_URI"], NUM_RACES)
    assert len(told) == NUM_RACES and all(is_fair(one) for one in told)


def test_promotions_by_us_and_by_hand_follow_each_other(client: Any) -> None:
    name = new_model(client)
    promote(client, name, 1)
    client.set_registered_model_alias(name, "champion", "3")
    assert is_settled(client, name) == (3, 1)
    promote(client, name, 2)
    assert is_settled(client, name) == (2, 3)
