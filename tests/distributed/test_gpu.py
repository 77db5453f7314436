"""On a GPU: the CPU's numbers, one worker over NCCL, two that share a card over gloo."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.algorithms.maml import MAML
from pipeline.algorithms.protonet import ProtoNet
from pipeline.algorithms.table import AlgorithmConfig
from pipeline.backbones.table import BackboneSpec, build_model, init_params
from pipeline.core.functional import Model
from pipeline.core.types import Params, Task
from pipeline.engine.choice import EngineConfig, example_group
from pipeline.engine.learner import load_learner
from pipeline.engine.meta_gradient import STRATEGIES, Engine, meta_gradient
from pipeline.engine.replay import computed_by
from pipeline.launch.base import Job
from pipeline.launch.local import launch_local
from pipeline.runtime.context import backend_for, make_deterministic
from pipeline.store.reader import Store
from pipeline.tasks.spec import EpisodeSpec
from tests.distributed.entries import Sums
from tests.distributed.small_run import digest, make_job, run

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CPU = torch.device("cpu")
SHAPE = (1, 28, 28)
ALGORITHMS: list[MAML | ProtoNet] = [
    MAML(num_inner_steps=2),
    MAML(num_inner_steps=2, batch_norm="transductive"),
    ProtoNet(),
]


def test_workers_that_share_a_card_do_not_ask_nccl() -> None:
    card = torch.device("cuda", 0)
    assert backend_for(card, 1) == "nccl"
    assert backend_for(card, 2) == "gloo"
    assert backend_for(CPU, 1) == "gloo"


def problem(
    algorithm: MAML | ProtoNet, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Model, Params, list[Task]]:
    backbone = BackboneSpec(name="conv4", settings={"width": 32}, image_shape=SHAPE)
    model = build_model(backbone, algorithm.batch_norm)
    own = algorithm.init(model.feature_dim, torch.Generator().manual_seed(0))
    params = {n: p.to(device, dtype) for n, p in {**init_params(backbone, 0), **own}.items()}
    spec = EpisodeSpec(ways=5, shots=1, queries=3)
    tasks = [
        t._replace(support_x=t.support_x.to(dtype), query_x=t.query_x.to(dtype))
        for t in example_group(spec, SHAPE, 4, device)
    ]
    return model, params, tasks


def vector(gradient: Params) -> Tensor:
    return torch.cat([gradient[n].double().flatten().cpu() for n in sorted(gradient)])


@needs_gpu
@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
def test_a_gpu_gives_the_gradient_of_the_cpu(
    algorithm: MAML | ProtoNet, strategy: Any, cuda_graphs: bool
) -> None:
    """In float64: in float32 a near-tie of a pooling that falls the other way is 1e-3."""
    make_deterministic()
    engine = Engine(strategy=strategy, cuda_graphs=cuda_graphs)
    model, params, tasks = problem(algorithm, torch.device("cuda"), torch.float64)
    wanted = meta_gradient(
        algorithm, *problem(algorithm, CPU, torch.float64), Engine(strategy="loop")
    )
    compute = computed_by(engine)
    for _ in range(2):  # recorded, then replayed
        found = compute(algorithm, model, params, tasks, engine)
        error = (vector(found.gradient) - vector(wanted.gradient)).norm()
        assert error < 1e-9 * vector(wanted.gradient).norm()


@needs_gpu
def test_a_recording_is_used_and_gives_the_bits_of_the_computation(
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_deterministic()
    algorithm = MAML(num_inner_steps=2)
    model, params, tasks = problem(algorithm, torch.device("cuda"))
    for precision in ("fp32", "tf32", "bf16"):
        engine = Engine(strategy="vmap", cuda_graphs=True, precision=precision)  # type: ignore[arg-type]
        compute = computed_by(engine)
        for scale in (1.0, 0.5):
            moved = {n: p * scale for n, p in params.items()}
            found = compute(algorithm, model, moved, tasks, engine)
            plain = replace(engine, cuda_graphs=False)
            wanted = meta_gradient(algorithm, model, moved, tasks, plain)
            for name, value in wanted.gradient.items():
                assert torch.equal(found.gradient[name], value), name
    assert "not used" not in capsys.readouterr().err


@needs_gpu
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_gradient_never_waits_for_the_gpu(strategy: Any) -> None:
    make_deterministic()
    algorithm = MAML(num_inner_steps=2)
    model, params, tasks = problem(algorithm, torch.device("cuda"))
    engine = Engine(strategy=strategy)
    meta_gradient(algorithm, model, params, tasks, engine)  # libraries start up
    torch.cuda.set_sync_debug_mode("error")
    try:
        meta_gradient(algorithm, model, params, tasks, engine)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_sums_on_one_card_have_the_bits_of_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One worker over NCCL, and two and three that share the card over gloo."""
    results = []
    for name, workers, cards in (("cpu", 1, ""), ("1", 1, "0"), ("2", 2, "0"), ("3", 3, "0")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", cards)
        job = Job("tests.distributed.entries:sums", Sums(num_groups=8), workers)
        results.append(launch_local(job, tmp_path / name))
    assert len({r["exact"] for r in results}) == 1
    assert len({r["gathered"] for r in results}) == 1
    for result in results:
        torch.testing.assert_close(
            torch.tensor(result["fast"]), torch.tensor(results[0]["fast"]), rtol=1e-4, atol=1e-2
        )


@needs_gpu
@pytest.mark.parametrize("strategy", ["loop", "vmap"])
def test_one_worker_and_two_on_one_card_train_as_the_cpu_does(
    strategy: Any,
    blob_store: Store,
    blob_tasks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same bits on the card whatever the number of workers, and the CPU's numbers."""
    found = {}
    for name, workers, cards in (("cpu", 1, ""), ("nccl", 1, "0"), ("gloo", 2, "0")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", cards)
        job = make_job(
            tmp_path / name,
            blob_store,
            blob_tasks,
            algorithm=AlgorithmConfig(name="maml", maml=MAML(num_inner_steps=2)),
            engine=EngineConfig(strategy=strategy),
            tasks_per_group=2,
            num_steps=4,
        )
        run(job, workers)
        found[name] = (digest(job), load_learner(job.target, device=CPU).params)
    assert found["nccl"][0] == found["gloo"][0]
    for name, value in found["cpu"][1].items():
        # What batch norm or the symmetry of classes cancels has no gradient but noise, and Adam
        # makes as much of noise as of anything.
        if not name.startswith("head.") and not name.endswith(".bias"):
            torch.testing.assert_close(found["nccl"][1][name], value, rtol=1e-3, atol=1e-4)
