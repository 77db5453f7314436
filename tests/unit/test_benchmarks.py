"""The benchmark suite: peers compute our gradient, the record, the check and the page are right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import contest
from benchmarks.cases import CASES, Case, Contestant, Problem, cases_of, make_network, make_problem
from benchmarks.check import TOLERANCE, compare
from benchmarks.entries import entrants
from benchmarks.measure import Effort, measure, relative_error
from benchmarks.networks import meta_gradients
from benchmarks.peers import PEERS, missing_library
from benchmarks.record import LeftOut, Machine, Record, Row, merged, read_record, write_record
from benchmarks.report import BEGIN, END, best_peer, between_markers, eager_row, render
from benchmarks.sections import draw_curves, render_accuracy, render_data_path
from pipeline.backbones.table import BackboneSpec
from pipeline.core.errors import ConfigError
from pipeline.core.types import Params
from pipeline.engine.meta_gradient import STRATEGIES, Engine, meta_gradient
from tests.conftest import REPOSITORY, shared_data

SMALL = Case(
    number=1,
    name="small",
    title="small",
    backbone=BackboneSpec(name="conv4", settings={"width": 6}, image_shape=(2, 16, 16)),
    ways=3,
    shots=2,
    queries=3,
    inner_steps=2,
    meta_batch=4,
    groups=2,
    error_tasks=3,
)
RESNET = BackboneSpec(name="resnet12", settings={"widths": [3, 4, 5, 6]}, image_shape=(2, 16, 16))
SINE = next(case for case in CASES if case.algorithm == "sine")
HERE = Machine(cpu="Some CPU", cores=2, gpu=None, torch="2.13.0", versions={}, tf32=False)
VARIANTS = {
    "second order": SMALL,
    "one step": SMALL.model_copy(update={"inner_steps": 1}),
    "first order": SMALL.model_copy(update={"second_order": False}),
    "resnet12": SMALL.model_copy(update={"backbone": RESNET, "inner_steps": 1}),
    "sine": SINE.model_copy(update={"meta_batch": 4, "inner_steps": 2}),
    "protonet": SMALL.model_copy(update={"algorithm": "protonet"}),
}


def peer_gradient(name: str, case: Case, problem: Problem) -> Params:
    network = make_network(case, problem.params)
    PEERS[name](network, problem.tasks, case.inner)
    return meta_gradients(network)


def our_gradient(problem: Problem, engine: Engine) -> Params:
    algorithm, model, params, tasks = problem
    return meta_gradient(algorithm, model, params, tasks, engine=engine).gradient


@pytest.mark.parametrize("variant", sorted(VARIANTS))
@pytest.mark.parametrize("name", sorted(PEERS))
def test_a_peer_computes_our_gradient(name: str, variant: str) -> None:
    """In float64: the same function, the same parameters, the same tasks; only the way differs."""
    if library := missing_library(name):
        pytest.skip(f"{library} is not installed (extra `bench`)")
    case = VARIANTS[variant]
    if (name == "plain") != (case.algorithm == "protonet"):
        pytest.skip("this peer is not for this algorithm")
    if name == "functorch" and variant == "second order":
        pytest.skip("PyTorch's vmap gets batch norm's second steps wrong; see `functorch`")
    problem = make_problem(case, torch.float64, "cpu")
    ours = our_gradient(problem, Engine(strategy="loop"))
    assert min(float(value.norm()) for value in ours.values()) > 0, "nothing would be compared"
    assert relative_error(peer_gradient(name, case, problem), ours) < 1e-10


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("variant", ["second order", "one step", "first order", "resnet12"])
def test_every_strategy_is_the_eager_loop_in_float32_too(variant: str, strategy: str) -> None:
    """Where no pooling is near a tie, which on large networks some is (docs/results.md)."""
    case = VARIANTS[variant]
    problem = make_problem(case, torch.float32, "cpu")
    found = our_gradient(problem, Engine(strategy=strategy))  # type: ignore[arg-type]
    assert relative_error(found, peer_gradient("eager", case, problem)) < 1e-5


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_sine_regressor_is_one_of_ours(strategy: str) -> None:
    problem = make_problem(VARIANTS["sine"], torch.float64, "cpu")
    exact = our_gradient(problem, Engine(strategy="loop"))
    found = our_gradient(problem, Engine(strategy=strategy))  # type: ignore[arg-type]
    assert relative_error(found, exact) < 1e-10


def test_tasks_follow_from_the_seed_and_differ() -> None:
    first, again = (make_problem(SMALL, torch.float32, "cpu") for _ in range(2))
    for a, b in zip(first.tasks, again.tasks, strict=True):
        assert torch.equal(a.support_x, b.support_x) and torch.equal(a.query_x, b.query_x)
    assert not torch.equal(first.tasks[0].query_x, first.tasks[1].query_x)
    double = make_problem(SMALL, torch.float64, "cpu")
    assert torch.equal(double.tasks[0].support_x, first.tasks[0].support_x.double())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("cores", [1, 2, 16])
def test_every_case_has_contestants_once_each(device: str, cores: int) -> None:
    for case in CASES:
        field = entrants(case, device, cores)  # type: ignore[arg-type]
        assert len(set(field)) == len(field)
        assert bool(field) or case.number == 8, case.name
        assert all(one.device == device for one in field)
        assert all(case.groups % one.workers == 0 or one.workers == 1 for one in field)
        assert case.meta_batch % case.groups == 0
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.slow
def test_a_contest_from_end_to_end(tmp_path: Path) -> None:
    """Real processes: a peer, ours in two workers and in bf16, and one that cannot run."""
    field = [
        Contestant(engine="eager"),
        Contestant(engine="loop", workers=2),
        Contestant(engine="split", precision="bf16"),
        Contestant(engine="no such strategy"),
    ]
    found = measure(SMALL, field, Effort(rounds=2, seconds=0.02), HERE, Record())
    assert [row.engine for row in found.rows] == ["eager", "loop", "split"]
    for row, contestant in zip(found.rows, field, strict=False):
        assert row.rounds == 2 and row.peak_memory_bytes is not None
        assert 0 < row.minimum <= row.tasks_per_second <= row.maximum  # type: ignore[operator]
        assert row.tasks_per_round % (SMALL.meta_batch if contestant.workers > 1 else 1) == 0
        assert row.gradient_error is not None
        assert row.gradient_error < (0.5 if row.dtype == "bf16" else 1e-4)
        assert row.dtype != "bf16" or row.gradient_error > 1e-4, "bf16 was not used"
    (missing,) = found.left_out
    assert missing.contestant == "no such strategy fp32 1x1"
    assert "no strategy 'no such strategy'" in missing.reason
    assert found.flops_per_task[SMALL.name] > 0
    write_record(tmp_path / "record.json", found)
    assert read_record(tmp_path / "record.json") == found


def test_a_whole_meta_training_run_is_timed() -> None:
    """Case 9, made small: store, episodes, validation and the outer loop of two real workers."""
    (case,) = cases_of({9})
    tiny = BackboneSpec(name="conv4", settings={"width": 4}, image_shape=(1, 16, 16))
    update = {"backbone": tiny, "meta_batch": 4, "groups": 4, "inner_steps": 1}
    small = case.model_copy(update=update)
    field = [Contestant(engine="meta_train", workers=2)]
    found = measure(small, field, Effort(rounds=1, seconds=0.01), HERE, Record())
    assert not found.left_out
    assert found.rows[0].tasks_per_second is not None and found.rows[0].tasks_per_round % 16 == 0


def test_memory_that_would_not_fit_is_continued_in_a_straight_line() -> None:
    """Two inner loops measured; the third would need more than any machine has."""
    cases = [case for case in CASES if case.kind == "memory"][-3:]
    steps = [case.inner_steps for case in cases]
    before = Record(
        rows=[
            make_row(
                case=case.name, tasks_per_second=None, peak_memory_bytes=10**17 * case.inner_steps
            )
            for case in cases[:2]
        ]
    )
    case = cases[2].model_copy(update={"error_tasks": 0})
    (row,) = measure(case, [Contestant(engine="eager")], Effort(), HERE, before).rows
    assert row.memory_extrapolated and row.tasks_per_second is None
    assert row.peak_memory_bytes == 10**17 * steps[2]


# --- record ------------------------------------------------------------------------------------


def make_row(**changes: object) -> Row:
    values: dict[str, object] = {
        "machine": "box",
        "case": "conv4-28-second-1",
        "engine": "eager",
        "peer": True,
        "device": "cpu",
        "dtype": "fp32",
        "threads": 1,
        "workers": 1,
        "meta_batch": 32,
        "tasks_per_second": 10.0,
        "minimum": 9.0,
        "maximum": 11.0,
        "rounds": 5,
        "tasks_per_round": 20,
        "peak_memory_bytes": 2**20,
        "gradient_error": 1e-6,
    }
    return Row.model_validate({**values, **changes})


def test_measuring_again_replaces_that_case_of_that_machine_alone() -> None:
    old = Record(
        rows=[make_row(), make_row(machine="other"), make_row(case="protonet-60")],
        left_out=[
            LeftOut(
                machine="box", case="conv4-28-second-1", contestant="higher fp32 1x1", reason="gone"
            )
        ],
    )
    new = Record(rows=[make_row(engine="split", peer=False)])
    both = merged(old, new)
    assert both.rows == [old.rows[1], old.rows[2], new.rows[0]]
    assert not both.left_out, "it was the old measurement's"


def test_a_file_that_is_no_record_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(json.dumps({"rows": [{"tasks_per_secnd": 1}]}))
    with pytest.raises(ConfigError, match="tasks_per_secnd: unknown key"):
        read_record(path)
    assert read_record(tmp_path / "none.json") == Record()


# --- check -------------------------------------------------------------------------------------

CHOSEN = [Contestant(engine="eager"), Contestant(engine="loop"), Contestant(engine="split")]


def two_rows(eager: float, loop: float, **changes: object) -> list[Row]:
    return [
        make_row(tasks_per_second=eager, **changes),
        make_row(engine="loop", peer=False, tasks_per_second=loop, **changes),
    ]


@given(
    eager=st.floats(0.1, 1e4),
    times=st.floats(0.1, 100),
    machine=st.floats(0.01, 100),
    change=st.floats(0.1, 3).filter(lambda c: abs(c - (1 - TOLERANCE)) > 1e-6),
)
def test_the_check_looks_at_ratios_and_not_at_speeds(
    eager: float, times: float, machine: float, change: float
) -> None:
    """Whatever the machine's speed, only the change of the ratio decides."""
    recorded = two_rows(eager, times * eager)
    fresh = two_rows(machine * eager, change * times * machine * eager)
    (found,) = compare(recorded, fresh, CHOSEN)
    assert found.fell == (change < 1 - TOLERANCE)


def test_a_contestant_that_no_longer_runs_has_fallen_and_a_new_one_has_not() -> None:
    recorded, fresh = two_rows(10, 20), two_rows(10, 20)
    (gone,) = compare(recorded, fresh[:1], CHOSEN)
    assert gone.now is None and gone.fell
    extra = make_row(engine="split", peer=False, tasks_per_second=1.0)
    (kept,) = compare(recorded, [*fresh, extra], CHOSEN)
    assert kept.now == kept.recorded == 2.0 and not kept.fell
    assert compare(fresh[1:], recorded, CHOSEN) == [], "no ratio without the eager loop"


# --- page --------------------------------------------------------------------------------------


def made_up() -> Record:
    box = HERE.model_copy(update={"versions": {"higher": "0.2.1"}})
    ours = {"machine": box.name, "peer": False}
    rows = [
        make_row(machine=box.name, threads=2, tasks_per_second=8.0),
        make_row(machine=box.name, engine="higher", tasks_per_second=10.0),
        make_row(machine=box.name, dtype="bf16", tasks_per_second=100.0),
        make_row(**ours, engine="split", workers=2, tasks_per_second=20.0),
        make_row(**ours, engine="split", dtype="bf16", workers=2, tasks_per_second=30.0),
        make_row(**ours, engine="vmap", tasks_per_second=5.0),
    ]
    for steps, eager, split in ((1, 2**21, 2**20), (50, 2**27, 2**22)):
        none = {"case": f"memory-{steps}", "tasks_per_second": None, "gradient_error": None}
        far = steps == 50
        rows += [
            make_row(machine=box.name, peak_memory_bytes=eager, memory_extrapolated=far, **none),
            make_row(**ours, engine="split", peak_memory_bytes=split, **none),
        ]
    for case, workers, rate in (("strong", 1, 10.0), ("strong", 2, 19.0), ("weak", 2, 19.5)):
        scaling = {"case": f"scaling-{case}", "workers": workers, "tasks_per_second": rate}
        rows.append(make_row(**ours, engine="loop", **scaling))
    gone = LeftOut(
        machine=box.name, case=rows[0].case, contestant="torchopt fp32 1x2", reason="not installed"
    )
    return Record(machines={box.name: box}, rows=rows, left_out=[gone])


def cells(page: str, start: str) -> Sequence[str]:
    (line,) = (line for line in page.splitlines() if line.startswith(start))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_page_tells_ratios_memory_and_who_was_left_out() -> None:
    record = made_up()
    timed = [row for row in record.rows if row.case == "conv4-28-second-1"]
    assert best_peer(timed) == timed[1], "the fastest in fp32; bf16 is another precision"
    assert eager_row(timed) == timed[0], "as it is used: with all cores"
    page = render(record, Path("record.json"), Path("images/picture.png"))
    summary = cells(page, "| 1. Conv4-64")
    assert summary[1:] == [
        "10 (higher fp32, 1 thread)",
        "20 (split fp32, 2 × 1 thread)",
        "2.00x",
        "2.50x",
        "30 (split bf16, 2 × 1 thread)",
        "3.00x",
    ]
    assert cells(page, "| **vmap fp32, 1 thread**")[3:5] == ["0.50x", "0.62x"]
    assert cells(page, "| loop |") == ["loop", "10", "19", "1.90x", "19.5", "1.95x"]
    assert "Left out: torchopt fp32 1x2 (not installed)." in page
    assert cells(page, "| 50 |") == ["50", "≈ 128 MiB", "4 MiB", "32.00x"]
    assert "(images/picture.png)" in page


def test_only_what_is_between_the_markers_is_replaced() -> None:
    page = f"# Title\n\nbefore\n\n{BEGIN}\n\nold\n\n{END}\n\nafter\n"
    once = between_markers(page, "new")
    assert once == page.replace("old", "new")
    assert between_markers(once, "new") == once
    added = between_markers("# Title\n", "new")
    assert added.startswith("# Title\n") and added.count("new") == 1
    assert between_markers(added, "newer").count("new") == 1


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.picture import draw

    draw(made_up(), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    draw(Record(), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_the_driver_names_the_cases_that_there_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["contest", "--cases", "1,77"])
    with pytest.raises(SystemExit):
        contest.main()
    assert "no case 77; there are [1, 2, 3, 4, 5, 6, 7, 8, 9]" in capsys.readouterr().err


RUNS = [
    {
        "run": "maml",
        "precision": "bf16",
        "pretrained": False,
        "tasks": 9600,
        "tasks_per_step": 16,
        "test": {"5w1s": {"accuracy": 0.98761, "ci95": 0.00123, "episodes": 10_000}},
        "curve": [[100, 0.9], [200, 0.95]],
    }
]


def test_the_page_tells_accuracy_with_its_interval_and_the_data_path(tmp_path: Path) -> None:
    classes = {"train": 4108, "val": 172, "test": 423}
    document = {"classes": classes, "split_hash": "0123456789abcdef", "rows": RUNS}
    text = render_accuracy(document, Path("a.json"), Path("a.png"))
    assert "| maml | bf16 | fresh weights | 9,600 | 5w1s | 98.76 ± 0.12 % |" in text
    assert "Vinyals split (`01234567`):\n4,108 classes to train on" in text
    assert "10,000 test episodes" in text
    row = {"case": "gathering", "engine": "memcpy", "tasks_per_second": 1234.4}
    row |= {"minimum": 1000.0, "maximum": 2000.0, "bytes_per_second": 1.25e10}
    text = render_data_path({"machine": "a box", "rows": [row]}, Path("d.json"))
    assert "| gathering | memcpy | 1,234 | 1,000 to 2,000 | 12.5 |" in text
    draw_curves(RUNS, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_accuracy_runs_go_from_pictures_to_a_row(tmp_path: Path) -> None:
    """The real program on the real data, with a few steps: a page can be made of what it writes."""
    command = [sys.executable, "-m", "benchmarks.omniglot", "--quick"]
    command += ["--data", str(shared_data("omniglot"))]
    subprocess.run(
        [*command, "protonet", "maml_bf16"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        check=True,
    )
    record = tmp_path / ".metaloom" / "omniglot-quick" / "omniglot.json"
    document = json.loads(record.read_text())
    rows = document["rows"]
    assert [(row["run"], list(row["test"])) for row in rows] == [
        ("protonet", ["20w1s", "20w5s", "5w1s", "5w5s"]),
        ("maml_bf16", ["5w1s"]),
    ]
    assert [path.name for path in tmp_path.iterdir()] == [".metaloom"]
    assert "| maml_bf16 | bf16 |" in render_accuracy(document, record, tmp_path / "curves.png")
