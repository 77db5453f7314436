"""The roofline: what kernels compute and move, what the machine could do, and what the page says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cases import Contestant, make_network, make_problem
from benchmarks.measure import Effort, measure
from benchmarks.networks import meta_gradients
from benchmarks.peers import PEERS
from benchmarks.record import Record, merged, read_record, write_record
from benchmarks.report import render
from benchmarks.roofline import (
    Operation,
    Operations,
    Peaks,
    Traffic,
    least_seconds,
    measure_peaks,
    total_bytes,
    total_flops,
)
from pipeline.core.types import Params
from tests.conftest import REPOSITORY
from tests.unit.test_benchmarks import HERE, SMALL, cells, made_up

PEAKS = Peaks(fp32=1e11, bf16=4e11, bytes_per_second=2e10)
FAST = HERE.model_copy(update={"peaks": PEAKS})


def operations_of(work: Callable[[], object]) -> Operations:
    with Traffic() as traffic:
        work()
    return traffic.operations


def eager_operations(dtype: torch.dtype, num_tasks: int) -> Operations:
    problem = make_problem(SMALL, dtype, "cpu")
    network = make_network(SMALL, problem.params)

    def gradient() -> Params:
        PEERS["eager"](network, problem.tasks[:num_tasks], SMALL.inner)
        return meta_gradients(network)

    return operations_of(gradient)


# --- kernels -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_product(dtype: torch.dtype) -> None:
    """[a, b] times [b, c]: 2abc operations, two matrices read and one written."""
    a, b, c = 3, 5, 7
    x, y = torch.ones(a, b, dtype=dtype), torch.ones(b, c, dtype=dtype)
    one = Operation(flops=2 * a * b * c, floats=a * b + b * c + a * c, other_bytes=0)
    assert operations_of(lambda: x @ y) == {one: 1}
    assert one.num_bytes(dtype.itemsize) == x.nbytes + y.nbytes + (x @ y).nbytes


def test_a_convolution_and_its_backward_pass() -> None:
    """Each of forward, gradient by input and gradient by weight takes 2 N O H W I k^2."""
    n, i, o, size, k = 2, 3, 4, 6, 3
    x = torch.randn(n, i, size, size, requires_grad=True)
    w = torch.randn(o, i, k, k, requires_grad=True)
    forward = operations_of(lambda: F.conv2d(x, w, padding=1))
    once, out = 2 * n * o * size**2 * i * k**2, n * o * size**2
    assert forward == {Operation(once, x.numel() + w.numel() + out, 0): 1}
    y = F.conv2d(x, w, padding=1)
    backward = operations_of(lambda: torch.autograd.grad(y, (x, w), torch.ones_like(y)))
    both = Operation(2 * once, out + 2 * (x.numel() + w.numel()), 0)
    assert backward[both] == 1 and total_flops(backward) == 2 * once


FREE: dict[str, Callable[[Tensor], object]] = {
    "view": lambda x: x.view(-1),
    "transpose": lambda x: x.t(),
    "transpose in place": lambda x: x.t_(),
    "slice": lambda x: x[1:],
    "expand": lambda x: x[:, None].expand(-1, 8, -1),
    "detach": lambda x: x.detach(),
    "a view that its schema does not tell": lambda x: torch.ops.aten._unsafe_view(x, [-1]),
    "memory alone": lambda x: torch.empty_like(x),
}


@pytest.mark.parametrize("name", sorted(FREE))
def test_what_moves_nothing_counts_nothing(name: str) -> None:
    x = torch.ones(4, 6)
    assert not operations_of(lambda: FREE[name](x))


MOVED: dict[str, tuple[Callable[[Tensor, Tensor], object], float, float]] = {
    "three tensors": (lambda x, y: x + y, 3, 0),
    "the same one twice": (lambda x, y: x + x, 2, 0),
    "and transposed": (lambda x, y: x @ x.t(), 2, 0),
    "in place: two read, one written": (lambda x, y: x.add_(y), 3, 0),
    "a copy does not read its target": (lambda x, y: x.copy_(y), 2, 0),
    "nor does filling": (lambda x, y: x.fill_(1.0), 1, 0),
    "a row that is spread over all": (lambda x, y: x + y[0].expand(8, 8), 2 + 1 / 8, 0),
    "half of one": (lambda x, y: x[:4] + y[:4], 3 / 2, 0),
    "two halves of one": (lambda x, y: x[:4] + x[4:], 3 / 2, 0),
    "a mask of bytes": (lambda x, y: x > y, 2, 1),
}


@pytest.mark.parametrize("name", sorted(MOVED))
def test_what_an_operation_moves(name: str) -> None:
    """In tensors of 8x8, read plus written: numbers, and bytes of a mask."""
    work, tensors, masks = MOVED[name]
    found = operations_of(lambda: work(torch.ones(8, 8), torch.ones(8, 8)))
    # Making the two is a kernel each, which writes one tensor.
    made = Operation(0, 64, 0)
    (moved,) = (one for one in (found | {made: found[made] - 2}).items() if one[1])
    assert (moved[0].floats, moved[0].other_bytes) == (64 * tensors, 64 * masks)


def test_operations_agree_with_pytorchs_own_counter() -> None:
    problem = make_problem(SMALL, torch.float32, "cpu")
    network = make_network(SMALL, problem.params)
    with FlopCounterMode(display=False) as counter:
        PEERS["eager"](network, problem.tasks[:2], SMALL.inner)
    assert total_flops(eager_operations(torch.float32, 2)) == counter.get_total_flops() > 0


def test_the_judge_in_float64_counts_what_runs_in_float32() -> None:
    assert eager_operations(torch.float64, 1) == eager_operations(torch.float32, 1)


# --- the roofline ------------------------------------------------------------------------------

positive = st.floats(1e-3, 1e15)


@given(flops=st.integers(0, 10**15), floats=st.integers(1, 10**12), peak=positive, speed=positive)
def test_one_operation_takes_the_longer_of_its_two_times(
    flops: int, floats: int, peak: float, speed: float
) -> None:
    computing, moving = flops / peak, 4 * floats / speed
    found = least_seconds({Operation(flops, floats, 0): 1}, peak, speed, 4)
    assert found == max(computing, moving)


def test_times_add_up_kernel_by_kernel() -> None:
    """One at the limit of products and three at that of bandwidth: 2 s + 3 * 5 s, not max(2, 15)."""
    operations = {Operation(200, 1, 0): 1, Operation(0, 10, 10): 3}
    assert least_seconds(operations, 100.0, 10.0, 4) == 2 + 3 * 5
    assert least_seconds(operations, 100.0, 10.0, 2) == 2 + 3 * 3
    assert total_flops(operations) == 200 and total_bytes(operations, 4) == 4 + 3 * 50


def test_speeds_are_measured() -> None:
    found = measure_peaks("cpu", sizes=(64,), copy_bytes=2**20)
    assert min(found.fp32, found.bf16, found.bytes_per_second) > 0
    assert found.tf32 is None


def test_convolutions_that_take_tf32_are_compared_with_its_speed() -> None:
    peaks = PEAKS.model_copy(update={"tf32": 3e11})
    for allowed, expected in ((False, peaks.fp32), (True, peaks.tf32)):
        machine = HERE.model_copy(update={"peaks": peaks, "tf32": allowed})
        assert machine.product_flops_per_second("fp32") == expected
        assert machine.product_flops_per_second("bf16") == peaks.bf16
        assert machine.product_flops_per_second("fp64") is None
    assert HERE.product_flops_per_second("fp32") is None


# --- record and page ---------------------------------------------------------------------------


@pytest.mark.slow
def test_a_contest_leaves_the_roofline_of_its_eager_loop(tmp_path: Path) -> None:
    """A real process counts what is counted here; bf16 moves half the bytes at its own speed."""
    found = measure(SMALL, [Contestant(engine="eager")], Effort(rounds=1), FAST, Record())
    n = SMALL.error_tasks
    expected = eager_operations(torch.float64, n)
    (roofline,) = found.rooflines
    assert (roofline.machine, roofline.case) == (FAST.name, SMALL.name)
    assert roofline.bytes_per_task == total_bytes(expected, 4) // n
    assert found.flops_per_task == {SMALL.name: total_flops(expected) // n}
    assert roofline.least_seconds_per_task == {
        "fp32": least_seconds(expected, PEAKS.fp32, PEAKS.bytes_per_second, 4) / n,
        "bf16": least_seconds(expected, PEAKS.bf16, PEAKS.bytes_per_second, 2) / n,
    }
    write_record(tmp_path / "record.json", found)
    assert read_record(tmp_path / "record.json") == found
    assert merged(found, found) == found, "measured again: in the old one's place"


def with_roofline() -> Record:
    """1 GFLOP a task; on this machine 100 tasks/s in fp32 and 400 in bf16 by products alone."""
    record = made_up().model_dump()
    (name,) = record["machines"]
    case = record["rows"][0]["case"]
    record["machines"][name]["peaks"] = PEAKS.model_dump()
    record["flops_per_task"] = {case: 10**9}
    limits = {"fp32": 1 / 40, "bf16": 1 / 120}
    record["rooflines"] = [
        {"machine": name, "case": case, "bytes_per_task": 1, "least_seconds_per_task": limits}
    ]
    return Record.model_validate(record)


def test_the_page_tells_shares_of_the_machines_speeds() -> None:
    page = render(with_roofline(), Path("record.json"), Path("picture.png"))
    column = cells(page, "| contestant |").index("of matmul")
    assert cells(page, "| **split fp32")[column] == "20 %"
    assert cells(page, "| **split bf16")[column] == "7.5 %"
    assert cells(page, "| eager bf16")[column] == "25 %"
    told = "would come to 40 tasks/s in fp32 and 120 tasks/s in bf16 (an estimate)"
    assert told in page and "reaches 50 % in fp32 and 25 % in bf16." in page
    assert "*Of matmul* is" in page
    assert "100 GFLOP/s in fp32, 400 GFLOP/s in bf16; large copies: 20 GB/s" in page


def test_an_old_record_is_read_and_its_page_says_nothing_of_it(tmp_path: Path) -> None:
    old = made_up().model_dump(mode="json")
    del old["rooflines"]
    for machine in old["machines"].values():
        del machine["peaks"]
    path = tmp_path / "record.json"
    path.write_text(json.dumps(old | {"flops_per_task": {"conv4-28-second-1": 10**9}}))
    page = render(read_record(path), path, Path("picture.png"))
    assert "to eager | memory | error" in page
    assert "matmul" not in page and "an estimate" not in page and "GFLOP/s" not in page


# --- the driver --------------------------------------------------------------------------------


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
def test_a_driver_that_is_told_to_end_leaves_nothing_behind(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.contest", "--cases", "9", "--device", "cpu"]
    command += ["--record", str(tmp_path / "record.json")]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    environment = os.environ | {"TMPDIR": str(scratch)}
    driver = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not list(scratch.glob("metaloom-bench-*/0/store")):  # made by its first contestant
            assert time.monotonic() < deadline and driver.poll() is None
            time.sleep(0.05)
        workers = children(driver.pid)
        assert workers, "its contestants run"
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(30) == 128 + signal.SIGTERM
    finally:
        driver.kill()
        driver.wait()
    assert not list(scratch.glob("metaloom-bench-*"))
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
