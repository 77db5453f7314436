"""A worker that stops while the others wait outside a collective is named; all start again (F8)."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.launch.base import Job, Launcher
from tests.distributed.broken import Hang

TIMEOUT_SECONDS = "3"
_CLUSTER, _SLOW = pytest.mark.cluster, pytest.mark.slow


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("name", "how", "rank"),
    [
        ("local", "all", 1),
        pytest.param("local", "main", 0, marks=_SLOW),
        pytest.param("torchrun", "all", 1, marks=[_CLUSTER, _SLOW]),
        pytest.param("torchrun", "main", 0, marks=_CLUSTER),
        pytest.param("ray_train", "all", 1, marks=[_CLUSTER, _SLOW]),
        pytest.param("ray_train", "main", 0, marks=[_CLUSTER, _SLOW]),
    ],
)
def test_a_worker_that_never_comes_is_named_and_all_start_again(
    launcher: Launcher,
    how: str,
    rank: int,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("METALOOM_TIMEOUT_SECONDS", TIMEOUT_SECONDS)
    plan = Hang(rank=rank, how=how, done=tmp_path / "done")
    job = Job("tests.distributed.broken:hung", plan, 2, max_restarts=1)
    assert launcher(job, tmp_path / "launch") == [0, 1]
    assert plan.done.exists()
    logs = [log.read_text() for log in tmp_path.rglob("drive.log")]  # Ray's driver has its own
    told = " ".join([capfd.readouterr().err, *logs])
    assert f"worker {rank} does not answer" in told
