"""Meta-training as its stage calls it: what is kept between the last step and DVC's record."""

from __future__ import annotations

import dataclasses
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.algorithms.table import AlgorithmConfig
from pipeline.core.errors import ConfigError
from pipeline.core.files import new_folder
from pipeline.engine.learner import load_learner, save_learner
from pipeline.runtime.checkpoint import newest_step
from pipeline.runtime.journal import read_points
from pipeline.runtime.mirror import upload_checkpoints
from pipeline.store.reader import Store
from pipeline.training.meta_train import MetaTrainConfig, meta_train
from tests.conftest import REPOSITORY
from tests.distributed.small_run import make_job

CHECKPOINTS = Path(".metaloom/checkpoints")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("METALOOM_NUM_WORKERS", "1")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))


def train(
    config: MetaTrainConfig,
    store: Store,
    tasks: Path,
    start: Path = Path("pretrained/mlp"),
    target: Path = Path("models/meta"),
) -> dict[str, Any]:
    return meta_train(
        config,
        store=store.folder,
        tasks=tasks,
        pretrained=start,
        target=target,
        journal=Path("journal.jsonl"),
    )


def test_a_finished_run_that_was_not_recorded_is_not_done_again(
    blob_store: Store,
    blob_tasks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Killed while DVC hashes the result, which it removes before the stage runs again."""
    config = make_job(tmp_path, blob_store, blob_tasks).config
    metrics = train(config, blob_store, blob_tasks)
    result = (tmp_path / "models/meta/manifest.json").read_bytes()
    shutil.rmtree("models")
    again = time.time()
    assert train(config, blob_store, blob_tasks) == metrics
    assert (tmp_path / "models/meta/manifest.json").read_bytes() == result
    assert all(point.time < again for point, _ in read_points(Path("journal.jsonl")))
    assert "finished before" in capfd.readouterr().err
    monkeypatch.setenv("METALOOM_STORAGE", (tmp_path / "elsewhere").as_uri())
    assert upload_checkpoints(CHECKPOINTS) == [], "there is nothing to go on with elsewhere"


def same(one: Tensor, other: Tensor) -> bool:
    """Apart from a step of 1e-30, which shows where there was a zero."""
    return torch.allclose(one, other, rtol=0, atol=1e-25)


@pytest.mark.parametrize("name", [pytest.param("protonet", marks=pytest.mark.slow), "maml"])
def test_a_run_begins_at_the_learner_of_an_earlier_one(
    name: str, blob_store: Store, blob_tasks: Path, tmp_path: Path
) -> None:
    """With all of its parameters, the algorithm's own too; shown by a step too small to move any."""
    algorithm = AlgorithmConfig(name=name)  # type: ignore[arg-type]
    config = make_job(tmp_path, blob_store, blob_tasks, algorithm=algorithm, num_steps=20).config
    train(config, blob_store, blob_tasks)
    still = config.outer.model_copy(update={"num_steps": 1, "lr": 1e-30})
    config = config.model_copy(update={"outer": still})
    first, again, anew = Path("models/meta"), Path("models/again"), Path("models/anew")
    train(config, blob_store, blob_tasks, start=first, target=again)
    train(config, blob_store, blob_tasks, target=anew)
    params = {folder: load_learner(folder).params for folder in (first, again, anew)}
    assert load_learner(again).origin["pretrained"] == "meta"
    assert params[again].keys() == params[first].keys()
    for key, value in params[first].items():
        assert same(params[again][key], value), key
    assert not all(same(params[anew][key], value) for key, value in params[first].items())


def test_another_algorithm_takes_the_features_alone(
    blob_store: Store, blob_tasks: Path, tmp_path: Path
) -> None:
    train(make_job(tmp_path, blob_store, blob_tasks, num_steps=20).config, blob_store, blob_tasks)
    maml = AlgorithmConfig(name="maml")
    other = make_job(tmp_path / "other", blob_store, blob_tasks, algorithm=maml, num_steps=1)
    outer = other.config.outer.model_copy(update={"lr": 1e-30})
    config = other.config.model_copy(update={"outer": outer})
    start = Path("models/meta")
    train(config, blob_store, blob_tasks, start=start, target=Path("models/other"))
    features, found = load_learner(start).params, load_learner(Path("models/other")).params
    assert features.keys() < found.keys()
    assert all(same(found[key], value) for key, value in features.items())


def test_a_learner_of_other_pictures_is_no_start(
    blob_store: Store, blob_tasks: Path, tmp_path: Path
) -> None:
    config = make_job(tmp_path, blob_store, blob_tasks).config
    learner = load_learner(Path("pretrained/mlp"))
    scaling = learner.preprocessing.model_copy(update={"image_shape": (1, 9, 9)})
    with new_folder(Path("start"), kind="learner") as building:
        save_learner(building, dataclasses.replace(learner, preprocessing=scaling))
    with pytest.raises(ConfigError, match="takes pictures of 1 x 9 x 9, and .* holds 1 x"):
        train(config, blob_store, blob_tasks, start=Path("start"))


def test_another_run_of_the_stage_removes_what_a_finished_one_kept(
    blob_store: Store, blob_tasks: Path, tmp_path: Path
) -> None:
    config = make_job(tmp_path, blob_store, blob_tasks, num_steps=20).config
    train(config, blob_store, blob_tasks)
    (first,) = CHECKPOINTS.iterdir()
    unfinished = CHECKPOINTS / f"meta_train-{'0' * 16}"
    shutil.copytree(first, unfinished)
    (unfinished / ".finished").unlink()
    outer = config.outer.model_copy(update={"num_steps": 25})
    train(config.model_copy(update={"outer": outer}), blob_store, blob_tasks)
    left = {folder.name: newest_step(folder) for folder in CHECKPOINTS.iterdir()}
    assert first.name not in left and left[unfinished.name] == 20
    assert sorted(left.values()) == [20, 25]
