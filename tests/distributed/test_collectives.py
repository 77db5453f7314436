"""Sums whose bits do not depend on the number of workers, by real processes over gloo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.errors import ConfigError
from pipeline.launch.base import Job
from pipeline.launch.local import launch_local
from pipeline.runtime.collectives import owned_groups, share, tree_sum
from pipeline.runtime.context import Context
from tests.distributed.entries import Sums, group_vector


def run(config: Sums, num_workers: int, folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = launch_local(
        Job("tests.distributed.entries:sums", config, num_workers), folder
    )
    return result


@pytest.mark.parametrize(
    ("num_groups", "worlds"),
    [
        (6, (1, 3)),  # test_exactness.py has whole runs of 1 to 4 each time
        pytest.param(6, (1, 2, 3, 4), marks=pytest.mark.slow),
        pytest.param(8, (1, 2, 3, 4), marks=pytest.mark.slow),
    ],
)
def test_any_number_of_workers_sums_to_the_same_bits(
    num_groups: int, worlds: tuple[int, ...], tmp_path: Path
) -> None:
    config = Sums(num_groups=num_groups)
    results = [run(config, n, tmp_path / str(n)) for n in worlds]
    assert len({r["exact"] for r in results}) == 1
    assert len({r["gathered"] for r in results}) == 1
    assert all(r["odd"] == [0, 1, 2, 3, 4] for r in results)
    vectors = [group_vector(config, g) for g in range(num_groups)]
    exact = np.frombuffer(bytes.fromhex(results[0]["exact"]), np.float32)
    plain = torch.stack(vectors).double().sum(0).numpy()
    np.testing.assert_allclose(exact, plain, rtol=1e-4, atol=1e-2)
    for result in results:
        np.testing.assert_allclose(result["fast"], plain, rtol=1e-4, atol=1e-2)


def by_levels(parts: list[torch.Tensor]) -> torch.Tensor:
    """The perfect binary tree, level by level: a second implementation for powers of two."""
    while len(parts) > 1:
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


@given(levels=st.integers(0, 5), world_levels=st.integers(0, 5), seed=st.integers(0, 99))
def test_an_aligned_share_is_a_subtree(levels: int, world_levels: int, seed: int) -> None:
    """Summing shares first and their sums afterwards is the same tree, bit for bit."""
    world_levels = min(levels, world_levels)
    generator = torch.Generator().manual_seed(seed)
    parts = list(torch.randn(2**levels, 7, generator=generator) * 1e3)
    world = 2**world_levels
    shares = [share(len(parts), rank, world) for rank in range(world)]
    locals_ = [tree_sum([parts[g] for g in own]) for own in shares]
    assert torch.equal(tree_sum(parts), by_levels(parts))
    assert torch.equal(tree_sum(locals_), tree_sum(parts))


def test_the_order_of_a_plain_sum_does_change_bits() -> None:
    """Why the tree is needed: left to right gives other bits on the same vectors."""
    parts = [group_vector(Sums(num_groups=8), g) for g in range(8)]
    running = parts[0]
    for part in parts[1:]:
        running = running + part
    assert not torch.equal(running, tree_sum(parts))


@given(count=st.integers(1, 64), world=st.integers(1, 16))
def test_shares_cover_everything_once_and_evenly(count: int, world: int) -> None:
    shares = [share(count, rank, world) for rank in range(world)]
    assert [i for own in shares for i in own] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_more_workers_than_groups_is_refused() -> None:
    with pytest.raises(ConfigError, match="4 workers share 3 groups"):
        owned_groups(3, Context(rank=0, world_size=4, device=torch.device("cpu")))
