"""Checkpoints of hosts with disks of their own: the newest good one of any, on all of them (F5)."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline.core.files import sha256_file, verify
from pipeline.launch.base import Job
from pipeline.launch.local import launch_local
from pipeline.runtime.checkpoint import save_checkpoint
from tests.distributed.hosts import RUN, Hosts, tensors, values


def put(case: Path, host: int, *steps: int) -> None:
    for step in steps:
        save_checkpoint(case / str(host) / RUN, step, tensors(step), values(step))


def steps_of(case: Path, host: int) -> list[int]:
    found = (case / str(host) / RUN).glob("step-*")
    for path in found:
        verify(path)
    return sorted(
        int(p.name.removeprefix("step-")) for p in (case / str(host) / RUN).glob("step-*")
    )


def test_whatever_one_host_lost_another_has(tmp_path: Path) -> None:
    """Three workers: two on the first host, one on the second."""
    cases = {name: tmp_path / name for name in ("new", "lost", "main lost", "older", "damaged")}
    put(cases["lost"], 0, 10, 20)
    put(cases["main lost"], 1, 10, 20)
    put(cases["older"], 0, 10)
    put(cases["older"], 1, 20, 30)
    put(cases["damaged"], 0, 10)
    put(cases["damaged"], 1, 10, 20)
    victim = cases["damaged"] / "1" / RUN / "step-00000020" / "state.json"
    victim.write_bytes(victim.read_bytes()[:-2] + b" }")
    plan = Hosts(cases=list(cases.values()), hosts=[0, 0, 1], local_ranks=[0, 1, 0])
    found = launch_local(Job("tests.distributed.hosts:keep", plan, 3), tmp_path / "launch")
    resumed = {"new": 0, "lost": 20, "main lost": 20, "older": 30, "damaged": 10}
    for (name, case), rows in zip(cases.items(), found, strict=True):
        assert [row[0] for row in rows] == [resumed[name]] * 3, name
        assert len({row[1] for row in rows}) == 1, name
        assert [row[3] for row in rows] == [1, 0, 1], f"{name}: one writer for each host"
        after = resumed[name] + 10
        for host in (0, 1):
            # The one resumed from, and the new one; the host that lost it got it from the other.
            assert steps_of(case, host) == [s for s in (resumed[name], after) if s], name
        for file in ("manifest.json", "state.json", "tensors.safetensors"):
            own = [sha256_file(case / h / RUN / f"step-{after:08d}" / file) for h in "01"]
            assert own[0] == own[1], name
    fetched = {name: [row[2] for row in rows] for name, rows in zip(cases, found, strict=True)}
    assert fetched["lost"] == [0, 0, 1]
    assert fetched["damaged"] == [0, 0, 0]
    assert len(list((cases["damaged"] / "1" / RUN).glob("damaged-*"))) == 1
    assert "step-00000020" in (tmp_path / "launch" / "worker-2.log").read_text()


def test_of_the_same_step_with_other_bits_one_is_taken_by_all(tmp_path: Path) -> None:
    """As when a host comes back that went on alone for a while, on other hardware."""
    case = tmp_path / "case"
    put(case, 0, 10)
    other = {name: tensor + 1 for name, tensor in tensors(10).items()}
    save_checkpoint(case / "1" / RUN, 10, other, values(10))
    plan = Hosts(cases=[case], hosts=[0, 1], local_ranks=[0, 0])
    (rows,) = launch_local(Job("tests.distributed.hosts:keep", plan, 2), tmp_path / "launch")
    assert rows[0][:2] == rows[1][:2], "both go on from the same bits"
    kept = [case / host / RUN / "step-00000010" / "tensors.safetensors" for host in "01"]
    assert sha256_file(kept[0]) == sha256_file(kept[1])


def test_hosts_that_share_a_folder_have_one_writer(tmp_path: Path) -> None:
    """By whatever path they see it."""
    case = tmp_path / "case"
    put(case, 0, 10)
    (case / "1").symlink_to(case / "0", target_is_directory=True)
    plan = Hosts(cases=[case, case], hosts=[0, 1], local_ranks=[0, 0])
    found = launch_local(Job("tests.distributed.hosts:keep", plan, 2), tmp_path / "launch")
    assert [[row[0] for row in rows] for rows in found] == [[10, 10], [20, 20]]
    assert [[row[3] for row in rows] for rows in found] == [[1, 0], [1, 0]]
    assert steps_of(case, 0) == [20, 30]
    assert len(list((case / "0" / RUN).glob(".main-*"))) == 1


def test_one_host_has_one_writer_and_leaves_nothing_else(tmp_path: Path) -> None:
    plan = Hosts(cases=[tmp_path / "case"], hosts=[0, 0], local_ranks=[0, 1])
    found = launch_local(Job("tests.distributed.hosts:keep", plan, 2), tmp_path / "launch")
    assert [row[3] for row in found[0]] == [1, 0]
    folder = tmp_path / "case" / "0" / RUN
    assert [p.name for p in folder.iterdir()] == ["step-00000010"]


@pytest.mark.parametrize("gone", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_host_whose_disk_was_replaced_gets_the_run_back(gone: int, tmp_path: Path) -> None:
    case = tmp_path / "case"
    plan = Hosts(cases=[case], hosts=[0, 1], local_ranks=[0, 0])
    job = Job("tests.distributed.hosts:keep", plan, 2)
    launch_local(job, tmp_path / "launch")
    shutil.rmtree(case / str(gone))
    found = launch_local(job, tmp_path / "launch")
    assert [[row[0] for row in rows] for rows in found] == [[10, 10]]
    assert steps_of(case, 0) == steps_of(case, 1) == [10, 20]
