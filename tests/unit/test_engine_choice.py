"""Memory is planned, the choice is remembered and the same on every worker, and a refusal is met."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.algorithms.maml import MAML
from pipeline.algorithms.protonet import ProtoNet
from pipeline.backbones.table import BackboneSpec, build_model, init_params
from pipeline.core.errors import ConfigError
from pipeline.core.functional import Model
from pipeline.core.types import Params, Task
from pipeline.engine import calibration, choice
from pipeline.engine.calibration import Work
from pipeline.engine.choice import (
    EngineConfig,
    Plan,
    choose_engine,
    example_group,
    plan,
)
from pipeline.engine.memory import bytes_for_a_worker, planned_bytes
from pipeline.engine.meta_gradient import Engine, GroupGradient, meta_gradient
from pipeline.engine.replay import Compute
from pipeline.runtime.context import SINGLE
from pipeline.tasks.spec import EpisodeSpec
from tests.conftest import REPOSITORY

SHAPE = (1, 16, 16)
SPEC = EpisodeSpec(ways=3, shots=2, queries=4)


def parts(algorithm: MAML | ProtoNet, num_tasks: int = 1) -> tuple[Model, Params, list[Task]]:
    backbone = BackboneSpec(name="conv4", settings={"width": 8}, image_shape=SHAPE)
    model = build_model(backbone, algorithm.batch_norm)
    own = algorithm.init(model.feature_dim, torch.Generator().manual_seed(0))
    params = {**init_params(backbone, 0), **own}
    return model, params, example_group(SPEC, SHAPE, num_tasks, torch.device("cpu"))


def choose(algorithm: MAML | ProtoNet, memory: Path, num_tasks: int = 1, **settings: Any) -> Engine:
    model, params, tasks = parts(algorithm, num_tasks)
    config = EngineConfig(**settings)
    return choose_engine(config, algorithm, model, params, tasks, SINGLE, memory=memory)


def said(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    (line,) = [line for line in lines if line["event"] == "engine"]
    return line


def test_the_choice_is_said_and_remembered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = tmp_path / "engine.json"
    first = choose(MAML(num_inner_steps=2), memory)
    line = said(capsys)
    assert {"loop_tasks_per_second", "split_tasks_per_second"} <= set(line)
    assert line["strategy"] == first.strategy
    (key,) = json.loads(memory.read_text())
    document = json.loads(memory.read_text())
    other = "split" if first.strategy == "loop" else "loop"
    document[key]["engine"]["strategy"] = other
    memory.write_text(json.dumps(document))
    assert choose(MAML(num_inner_steps=2), memory).strategy == other
    assert said(capsys)["why"].startswith("remembered")
    choose(MAML(num_inner_steps=3), memory)
    assert said(capsys)["why"].startswith("fastest"), "another algorithm is another choice"
    assert len(json.loads(memory.read_text())) == 2


def failing(broken: set[str]) -> Callable[[Engine], Compute]:
    """Strategies of which some are refused by an allocator."""

    def runs(engine: Engine) -> Compute:
        def refuse(*arguments: Any) -> GroupGradient:
            raise RuntimeError("can't allocate memory: you tried to allocate it all")

        return refuse if engine.strategy in broken else meta_gradient

    return runs


@pytest.mark.parametrize("broken", [{"loop", "split"}, {"split"}])
def test_a_choice_among_strategies_that_fail_is_said_and_not_remembered(
    broken: set[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    memory = tmp_path / "engine.json"
    monkeypatch.setattr(calibration, "computed_by", failing(broken))
    assert choose(MAML(num_inner_steps=2), memory).strategy == "loop"
    *left_out, line = map(json.loads, capsys.readouterr().err.splitlines())
    assert {one["strategy"] for one in left_out} == broken
    usual = "the usual one, for none could be tried; not measured: loop, split"
    fastest = "fastest in a calibration; not measured: split"
    assert line["why"].startswith(usual if "loop" in broken else fastest)
    assert not memory.exists()


def test_a_calibration_does_not_keep_other_workers_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = tmp_path / "engine.json"
    monkeypatch.setattr(calibration, "LONGEST_SECONDS", 0.0)
    assert choose(MAML(num_inner_steps=2), memory).strategy == "loop"
    assert "not measured: split" in said(capsys)["why"]
    assert memory.exists(), "the next run would have no more time"


def test_a_choice_holds_for_the_memory_that_it_was_planned_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = tmp_path / "engine.json"
    choose(MAML(num_inner_steps=2), memory)
    monkeypatch.setattr(choice, "bytes_for_a_worker", lambda context: 2**31)
    choose(MAML(num_inner_steps=2), memory)
    assert len(json.loads(memory.read_text())) == 2


def test_a_cpu_says_that_it_knows_no_tf32(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = choose(ProtoNet(), tmp_path / "engine.json", precision="tf32")
    assert engine.precision == "fp32"
    first = json.loads(capsys.readouterr().err.splitlines()[0])
    assert first["why"] == "a CPU knows no tf32"


def test_a_metric_learner_has_one_strategy_a_task_and_an_asked_for_one_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = tmp_path / "engine.json"
    assert choose(ProtoNet(), memory).strategy == "loop"
    assert "only one that applies" in said(capsys)["why"]
    assert choose(MAML(first_order=True), memory).strategy == "loop"
    capsys.readouterr()
    assert choose(ProtoNet(), memory, strategy="split").strategy == "loop"
    assert "no second order to split" in said(capsys)["why"]
    asked = choose(MAML(), memory, 4, strategy="vmap_split", chunk=3, precision="bf16")
    assert asked == Engine(strategy="vmap_split", chunk=3, precision="bf16")


def test_a_spoilt_memory_is_named(tmp_path: Path) -> None:
    memory = tmp_path / "engine.json"
    choose(MAML(num_inner_steps=2), memory)
    document = json.loads(memory.read_text())
    for entry in document.values():
        entry["engine"] = {"strategy": "magic"}
    memory.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=r"engine\.json holds.*Remove the file"):
        choose(MAML(num_inner_steps=2), memory)


@pytest.mark.parametrize("text", ["[]", "null", "3", '"x"', '{"a": 1}'])
def test_a_memory_that_holds_something_else_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "engine.json").write_text(text)
    with pytest.raises(ConfigError, match=r"engine\.json holds.*Remove the file"):
        choose(MAML(num_inner_steps=2), tmp_path / "engine.json")


@dataclass(frozen=True, kw_only=True)
class Curious(MAML):
    """Looks at a number, which neither tensors without data nor vmap allow."""

    def query_loss(
        self, model: Model, params: Params, fast: Params, task: Task
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss, metrics = MAML.query_loss(self, model, params, fast, task)
        assert loss.item() >= 0
        return loss, metrics


def test_an_algorithm_that_cannot_be_planned_or_batched_runs_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = choose(Curious(num_inner_steps=1), tmp_path / "engine.json", 2)
    assert engine.strategy in ("loop", "split")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert {x["strategy"] for x in lines if "left_out" in x} == {"vmap", "vmap_split"}
    assert {x["strategy"] for x in lines if "not_planned" in x} >= {"loop", "split"}


@pytest.mark.parametrize("strategy", ["vmap", "vmap_split"])
def test_the_chunk_is_as_many_tasks_as_fit(strategy: Any) -> None:
    algorithm = MAML(num_inner_steps=2)
    model, params, tasks = parts(algorithm, 8)

    work = Work(algorithm, model, params, tasks, SINGLE)

    def within(budget: int) -> Plan:
        return plan(strategy, EngineConfig(), work, budget)

    roomy, all_bytes = within(2**34)
    assert roomy.chunk == 8
    half, half_bytes = within(all_bytes // 2)
    assert half.chunk == 4
    assert half_bytes == all_bytes // 2
    assert within(0).engine.chunk == 1


def test_little_memory_keeps_fewer_copies_of_the_weights() -> None:
    algorithm = MAML(num_inner_steps=16)
    model, params, tasks = parts(algorithm)
    work = Work(algorithm, model, params, tasks, SINGLE)
    roomy, much = plan("split", EngineConfig(), work, 2**34)
    tight, less = plan("split", EngineConfig(), work, 1000)
    assert (roomy.stride, tight.stride) == (1, 4)
    assert less < much


def test_with_too_little_memory_for_any_strategy_the_least_hungry_one_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = choose(MAML(num_inner_steps=12), tmp_path / "e.json", memory_share=1e-9)
    assert engine.strategy == "split"
    assert "more than the" in said(capsys)["why"]


MEASURE = """
import sys
from pipeline.engine.memory import planned_bytes
from tests.unit.test_engine_choice import *
torch.set_num_threads(1)
algorithm = MAML(num_inner_steps=int(sys.argv[2]), batch_norm="transductive")
backbone = BackboneSpec(name="conv4", settings={"width": 64}, image_shape=(1, 28, 28))
model = build_model(backbone, algorithm.batch_norm)
own = algorithm.init(model.feature_dim, torch.Generator().manual_seed(0))
params = {**init_params(backbone, 0), **own}
big, small = EpisodeSpec(ways=5, shots=1, queries=15), EpisodeSpec(ways=2, shots=1, queries=1)
def gradient(model, params, task):
    return meta_gradient(algorithm, model, params, [task], Engine(strategy=sys.argv[1]))
def bytes_of_line(name):
    (line,) = [x for x in open("/proc/self/status") if x.startswith(name)]
    return int(line.split()[1]) * 1024
(task,) = example_group(big, (1, 28, 28), 1, torch.device("cpu"))
plan = planned_bytes(gradient, model, params, task)
gradient(model, params, *example_group(small, (1, 28, 28), 1, torch.device("cpu")))
open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
before = bytes_of_line("VmRSS")
gradient(model, params, task)
print(plan, bytes_of_line("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("strategy", "steps"),
    [("loop", 1), pytest.param("loop", 8, marks=pytest.mark.slow), ("split", 8)],
)
def test_the_plan_covers_what_the_process_really_takes(strategy: str, steps: int) -> None:
    """Peak resident memory of a process of its own; a plan of many times that would waste memory."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, strategy, str(steps)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    planned, real = map(int, done.stdout.split())
    assert real <= planned <= 2.5 * real


REFUSED = """
import resource
from pipeline.engine.runner import Runner
from tests.unit.test_engine_choice import *
torch.set_num_threads(1)
algorithm = MAML(num_inner_steps=1, batch_norm="transductive")
backbone = BackboneSpec(name="conv4", settings={"width": 64}, image_shape=(1, 28, 28))
model = build_model(backbone, algorithm.batch_norm)
own = algorithm.init(model.feature_dim, torch.Generator().manual_seed(0))
params = {**init_params(backbone, 0), **own}
spec = EpisodeSpec(ways=5, shots=1, queries=15)
tasks = example_group(spec, (1, 28, 28), 8, torch.device("cpu"))
runner = Runner(Engine(strategy="vmap"))
one = Runner(Engine(strategy="vmap", chunk=1))(algorithm, model, params, tasks)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + MIB * 2**20, resource.RLIM_INFINITY))
found = runner(algorithm, model, params, tasks)
for name, value in one.gradient.items():
    torch.testing.assert_close(found.gradient[name], value, rtol=1e-3, atol=1e-4)
print(runner.engine.chunk)
"""


def refused(limit_mib: int) -> subprocess.CompletedProcess[str]:
    """8 tasks at once need some 900 MiB, 4 need half of it: the kernel refuses what is above."""
    return subprocess.run(
        [sys.executable, "-c", REFUSED.replace("MIB", str(limit_mib))],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )


def test_out_of_memory_halves_the_chunk_once_and_says_so() -> None:
    done = refused(600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["4"]
    line = json.loads(done.stderr.splitlines()[-1])
    assert line["chunk"] == 4
    assert "can't allocate memory" in line["out_of_memory"]


def test_out_of_memory_twice_is_an_error_that_says_how_to_mend_it() -> None:
    done = refused(150)
    assert done.returncode != 0
    assert "TrainingError: out of memory with 4 task(s) at once by strategy 'vmap'" in done.stderr
    assert "set meta_train.engine.strategy to split" in done.stderr


def test_a_plan_depends_on_the_machine_alone() -> None:
    """Not on what is free at the moment, which would change the bits of a run from hour to hour."""
    before = bytes_for_a_worker(SINGLE)
    ballast = torch.ones(2**26)
    assert bytes_for_a_worker(SINGLE) == before > ballast.nbytes


def test_planning_computes_nothing() -> None:
    """Tensors without data go in, so that no number of theirs can have been looked at."""
    algorithm = MAML(num_inner_steps=2)
    model, params, (task,) = parts(algorithm)
    seen = []

    def gradient(model: Model, params: Params, task: Task) -> None:
        seen.extend([*params.values(), *task[:4]])
        meta_gradient(algorithm, model, params, [task])

    assert planned_bytes(gradient, model, params, task) > 0
    assert all(t.is_meta for t in seen)
