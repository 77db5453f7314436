"""The evaluate stage for real: worker processes, real folders, every file that it leaves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml

from pipeline.algorithms.nearest_centroid import NearestCentroid
from pipeline.algorithms.protonet import ProtoNet
from pipeline.backbones.table import BackboneSpec, build_model, init_params
from pipeline.core.errors import ArtefactError
from pipeline.core.files import new_folder, write_json
from pipeline.engine.learner import Learner, Preprocessing, load_learner, save_learner
from pipeline.evaluation.evaluate import EvaluateConfig, EvaluateJob, run
from pipeline.evaluation.scoring import score
from pipeline.evaluation.statistics import mean_interval
from pipeline.runtime.context import SINGLE
from pipeline.store.reader import Store, StoredClass, open_store
from pipeline.store.writer import StoreContent, write_store
from pipeline.tasks.frozen import read_episodes
from pipeline.tasks.plan import SampleTasksConfig, sample_tasks
from pipeline.tasks.spec import EpisodeSpec, FrozenSpec
from stages.evaluate import main

STORE, TASKS = Path("data/store/made"), Path("data/tasks")
META, PRETRAINED, TARGET = (
    Path("models/meta"),
    Path("models/pretrained/mlp"),
    Path("results/evaluate"),
)


def make_store(folder: Path, seed: int = 0) -> Store:
    """Each class a pattern of its own, each example the pattern under noise."""
    rng = np.random.default_rng(seed)
    splits = [("train", 8), ("val", 6), ("test", 12)]
    names = [
        (split, f"group {i * 2 // n}", f"{split} {i:02d}") for split, n in splits for i in range(n)
    ]
    classes = tuple(StoredClass(n, g, s, 10 * i, 10) for i, (s, g, n) in enumerate(names))
    patterns = rng.uniform(0, 255, (len(classes), 1, 1, 8, 8))
    noisy = patterns + rng.normal(0, 90, (len(classes), 10, 1, 8, 8))
    pixels = noisy.clip(0, 255).astype(np.uint8).reshape(-1, 1, 8, 8)
    order = np.arange(len(pixels))
    write_store(
        folder,
        StoreContent("made", classes, pixels, order, [f"drawing {i}" for i in order]),
        rows_per_shard=1000,
        report={"dropped_pictures": {}},
    )
    return open_store(folder)


def save(folder: Path, store: Store, algorithm: ProtoNet | NearestCentroid, seed: int) -> None:
    spec = BackboneSpec(name="mlp", settings={"hidden": [32]}, image_shape=store.image_shape)
    model, params = build_model(spec, algorithm.batch_norm), init_params(spec, seed)
    preprocessing = Preprocessing(image_shape=store.image_shape, mean=store.mean, std=store.std)
    training = preprocessing(torch.as_tensor(store.gather(np.arange(80))))
    model = model.with_statistics(model.features(params, training)[1])
    own = algorithm.init(model.feature_dim, torch.Generator().manual_seed(seed))
    origin = {"stage": "test", "pretrained": "mlp"}
    learner = Learner(algorithm, model, {**params, **own}, preprocessing, spec, origin)
    with new_folder(folder, kind="learner") as building:
        save_learner(building, learner)
        history = [{"step": s, "loss": 1 / s, "val_accuracy": 0.5} for s in range(1, 5)]
        write_json(building / "history.json", history)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("METALOOM_TRACKING", "off")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    store = make_store(STORE)
    frozen = FrozenSpec(ways=[3, 6], shots=[1], queries=4, episodes=50)
    train = EpisodeSpec(ways=5, shots=1, queries=3)
    sample_tasks(SampleTasksConfig(train=train, val=frozen, test=frozen), store, TASKS)
    save(META, store, ProtoNet(), seed=1)
    save(PRETRAINED, store, NearestCentroid(), seed=2)
    params = {"preprocess": {"domain": "made"}, "evaluate": {"example_episodes": 2}}
    Path("params.yaml").write_text(yaml.safe_dump(params))
    return tmp_path


def files() -> dict[str, bytes]:
    return {
        p.relative_to(TARGET).as_posix(): p.read_bytes() for p in TARGET.rglob("*") if p.is_file()
    }


def test_the_stage_leaves_the_same_files_whatever_the_number_of_workers(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left = []
    for workers in (1, 2):
        monkeypatch.setenv("METALOOM_NUM_WORKERS", str(workers))
        main()
        left.append(files())
    assert left[0] == left[1]
    assert {"metrics.json", "episodes.arrow", "report.html", "plots/accuracy.json"} <= set(left[0])
    printed = capsys.readouterr().out
    found = json.loads(left[0]["metrics.json"])["made"]
    for setting in ("3w1s", "6w1s"):
        assert setting in printed
        assert (
            f"{found[setting]['accuracy'] * 100:.2f} ± {found[setting]['ci95'] * 100:.2f}"
            in printed
        )
    assert "report: results/evaluate/report.html" in printed


def test_the_numbers_are_those_of_the_learner_scored_picture_by_picture(repository: Path) -> None:
    """No feature cache, no launcher, no worker: adapt to each episode's pictures, and average."""
    job = EvaluateJob(
        config=EvaluateConfig(baselines=("pretrained",)),
        learner=META,
        pretrained=PRETRAINED,
        tasks=TASKS,
        store=STORE,
        target=TARGET,
    )
    found = run(job, SINGLE)["made"]
    store = open_store(STORE)
    learners = {"model": load_learner(META), "pretrained": load_learner(PRETRAINED)}
    with pa.memory_map(str(TARGET / "episodes.arrow")) as source:
        table = pa.ipc.open_file(source).read_all().to_pylist()
    for setting, episodes in read_episodes(TASKS, "test").items():
        slow = {n: score(one, store, episodes, cache_features=False) for n, one in learners.items()}
        kept = {
            n: [r["accuracy"] for r in table if (r["setting"], r["learner"]) == (setting, n)]
            for n in slow
        }
        for name, scores in slow.items():
            assert kept[name] == pytest.approx(scores.accuracy.tolist(), abs=1e-6)
        ours, theirs = (mean_interval(slow[n].accuracy) for n in ("model", "pretrained"))
        baseline = found[setting]["baselines"]["pretrained"]
        assert found[setting]["accuracy"] == pytest.approx(ours.mean, abs=1e-5)
        assert found[setting]["ci95"] == pytest.approx(ours.half_width, abs=1e-5)
        assert baseline["accuracy"] == pytest.approx(theirs.mean, abs=1e-5)
        assert baseline["difference"] == pytest.approx(ours.mean - theirs.mean, abs=2e-5)
        assert ours.lower > found[setting]["chance"]


def test_episodes_of_another_store_are_refused(repository: Path) -> None:
    make_store(STORE, seed=1)
    job = EvaluateJob(
        config=EvaluateConfig(),
        learner=META,
        pretrained=PRETRAINED,
        tasks=TASKS,
        store=STORE,
        target=TARGET,
    )
    with pytest.raises(ArtefactError, match="drawn from another store"):
        run(job, SINGLE)
    assert not TARGET.exists()
