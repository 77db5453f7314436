"""The desk: jobs share passes, passes run side by side, and each job gets what is its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.deploy.serve.desk import Desk, Job
from pipeline.deploy.serve.problems import Problem

ROWS = 4
PATIENCE_SECONDS = 30


def version(*, embeds_alone: bool = True) -> Any:
    """Features that are the pictures themselves."""
    return SimpleNamespace(
        embeds_alone=embeds_alone,
        rows_per_pass=ROWS,
        embed=lambda pictures: torch.from_numpy(pictures.astype(np.float32)),
    )


def job(of: Any, first: int, size: int, finish: Any = lambda features: features) -> Job:
    pictures = np.arange(first, first + size, dtype=np.uint8).reshape(size, 1)
    return Job(of, pictures, finish)


async def all_done(desk: Desk, jobs: Sequence[Job]) -> list[Any]:
    """Asked for before the desk begins, so that they wait together."""
    asked = [asyncio.ensure_future(desk.do(one)) for one in jobs]
    await asyncio.sleep(0)
    desk.start()
    found = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), PATIENCE_SECONDS)
    await asyncio.to_thread(desk.stop)
    return found


@settings(deadline=None, max_examples=50)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 12)), min_size=1, max_size=20),
    passes=st.integers(1, 3),
)
def test_each_job_gets_its_own_rows_in_whatever_company(
    sizes: list[tuple[int, int]], passes: int
) -> None:
    versions, told = [version(), version(), version(embeds_alone=False)], list[int]()
    jobs = [job(versions[of], 7 * i, size) for i, (of, size) in enumerate(sizes)]
    found = asyncio.run(all_done(Desk(99, 1, passes, on_pass=told.append), jobs))
    for one, features in zip(jobs, found, strict=True):
        if one.version.embeds_alone:
            assert np.array_equal(features.numpy(), one.pictures)
        else:
            assert features is None
    assert sum(told) == sum(size for _, size in sizes)
    assert all(rows <= max(4 * ROWS, 12) for rows in told)


def test_jobs_that_wait_together_share_passes() -> None:
    told, shared = list[int](), version()
    asyncio.run(all_done(Desk(99, 1, on_pass=told.append), [job(shared, 0, 5)] * 7))
    assert told == [15, 15, 5]


def test_a_slow_job_holds_nobody_up_where_passes_run_side_by_side() -> None:
    """The first one waits for the second, which a desk of one pass would never come to."""
    second_done, own = threading.Event(), version(embeds_alone=False)
    first = job(own, 0, 1, lambda _: second_done.wait(PATIENCE_SECONDS))
    second = job(own, 0, 1, lambda _: second_done.set())
    assert asyncio.run(all_done(Desk(99, 1, 2), [first, second])) == [True, None]


def test_what_fails_is_told_to_whom_it_concerns() -> None:
    own = version()
    jobs = [job(own, 0, 1), job(own, 1, 1, lambda _: 1 / 0), job(own, 2, 1)]
    good, bad, also = asyncio.run(all_done(Desk(99, 1), jobs))
    assert (good.item(), also.item()) == (0, 2) and isinstance(bad, ZeroDivisionError)
    broken = version()
    broken.embed = lambda pictures: 1 / 0
    desk, told = Desk(99, 1), [job(broken, 0, 1)] * 2
    assert all(isinstance(one, ZeroDivisionError) for one in asyncio.run(all_done(desk, told)))


def test_what_fails_beside_the_network_costs_no_thread_and_leaves_nobody_waiting() -> None:
    def broken(rows: int) -> None:
        raise ZeroDivisionError

    class Odd:
        rows_per_pass = ROWS

        @property
        def embeds_alone(self) -> bool:
            raise ArithmeticError

    async def run() -> None:
        desk = Desk(99, 1, on_pass=broken)
        desk.start()
        for one, kind in (
            (job(version(), 0, 1), ZeroDivisionError),
            (job(Odd(), 0, 1), ArithmeticError),
        ):
            with pytest.raises(kind):
                await asyncio.wait_for(desk.do(one), PATIENCE_SECONDS)
        assert desk.works and desk.trouble is None and desk.waiting == 0
        await asyncio.to_thread(desk.stop)
        assert desk.trouble == "a thread that runs the network has ended"

    asyncio.run(run())


def test_a_thread_that_is_at_work_for_too_long_is_told_of() -> None:
    begun, let_go, slow = threading.Event(), threading.Event(), version(embeds_alone=False)

    def hang(features: Any) -> None:
        begun.set()
        let_go.wait()

    async def run() -> None:
        desk = Desk(99, 1, 2, most_seconds=0.0)  # any time is too long
        desk.start()
        assert desk.trouble is None, "who waits for work does not hang"
        hung = asyncio.ensure_future(desk.do(job(slow, 0, 1, hang)))
        await asyncio.to_thread(begun.wait)
        told = desk.trouble
        assert told is not None and "at work on the same pictures" in told and desk.works
        desk.most_seconds = 1e9
        assert desk.trouble is None, "it may take that long"
        desk.most_seconds = 0.0
        let_go.set()
        await hung
        await asyncio.to_thread(desk.stop)
        assert not desk._begun

    asyncio.run(run())


def test_more_than_may_wait_are_turned_away_and_those_that_leave_cost_nothing() -> None:
    async def run() -> tuple[int, list[int]]:
        told = list[int]()
        desk, own = Desk(2, 1, on_pass=told.append), version()
        asked = [asyncio.ensure_future(desk.do(job(own, 0, 1))) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Problem) as refused:
            desk.check_room()
        asked[0].cancel()
        desk.start()
        await asyncio.wait(asked)
        await asyncio.to_thread(desk.stop)
        assert not desk.works and desk.waiting == 0
        return refused.value.status, told

    assert asyncio.run(run()) == (503, [1])
