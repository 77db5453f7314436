"""Meta-training as its stage calls it: what is kept between the last step and DVC's record."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest

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


def train(config: MetaTrainConfig, store: Store, tasks: Path) -> dict[str, Any]:
    return meta_train(
        config,
        ["mlp"],
        store=store.folder,
        tasks=tasks,
        pretrained=Path("pretrained"),
        target=Path("models/meta"),
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
