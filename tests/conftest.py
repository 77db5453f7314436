"""Small real stores and task folders that tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

from pipeline.core.seeding import derive_seed
from pipeline.store.reader import Store, StoredClass, open_store
from pipeline.store.writer import StoreContent, write_store
from pipeline.tasks.plan import SampleTasksConfig, sample_tasks
from pipeline.tasks.spec import EpisodeSpec, FrozenSpec

settings.register_profile("whatever else runs here", deadline=None)
settings.load_profile("whatever else runs here")
torch.set_num_threads(1)  # as the workers do; the tests' own small tensors gain nothing from more

REPOSITORY = Path(__file__).resolve().parents[1]
_SPLITS = {"train": 24, "val": 8, "test": 12}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first: of two processes none is left with it at the end."""
    items.sort(key=lambda item: [kind not in item.path.parts for kind in ("e2e", "distributed")])


@contextmanager
def _kept_environment() -> Iterator[None]:
    """What a library exports for its children (MLflow does) must not reach the next test."""
    before = dict(os.environ)
    yield
    if dict(os.environ) != before:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(autouse=True)
def _environment_stays() -> Iterator[None]:
    with _kept_environment():
        yield


@pytest.fixture(autouse=True, scope="module")
def _environment_stays_between_modules() -> Iterator[None]:
    """Fixtures of a module are made before those of its first test."""
    with _kept_environment():
        yield


def shared_data(name: str) -> Path:
    """A folder of the shared data sets; the test is skipped, by name, where it is absent."""
    root = Path(os.environ.get("METALOOM_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (root / name).exists():
        pytest.skip(f"the data set {name!r} is not at {root} (set METALOOM_DATA)")
    return root / name


def write_blob_store(target: Path, *, examples: int = 24, size: int = 16, seed: int = 0) -> Store:
    """A store whose classes are noisy copies of a random picture each: easy, but not trivial."""
    rng = np.random.default_rng(derive_seed(seed, 7))
    classes, pixels = [], []
    for split, count in _SPLITS.items():
        for i in range(count):
            group = f"{split}-{'ab'[i * 2 // count]}"
            offset = len(classes) * examples
            classes.append(StoredClass(f"{split}{i:02d}", group, split, offset, examples))
            picture = rng.integers(0, 256, (1, size, size))
            noise = rng.normal(0, 90, (examples, 1, size, size))
            pixels.append(np.clip(picture + noise, 0, 255).astype(np.uint8))
    everything = np.concatenate(pixels)
    content = StoreContent(
        domain="blobs",
        classes=tuple(classes),
        pixels=everything,
        order=np.arange(len(everything)),
        names=[f"example {i}" for i in range(len(everything))],
    )
    write_store(target, content, rows_per_shard=400, report={})
    return open_store(target)


@pytest.fixture(scope="session")
def blob_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return write_blob_store(tmp_path_factory.mktemp("data") / "blobs")


@pytest.fixture(scope="session")
def blob_tasks(blob_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sealed folder of frozen episodes over the blob store."""
    folder = tmp_path_factory.mktemp("data") / "tasks"
    config = SampleTasksConfig(
        train=EpisodeSpec(ways=4, shots=1, queries=3),
        val=FrozenSpec(ways=[4], shots=[1], queries=4, episodes=20),
        test=FrozenSpec(ways=[3, 5], shots=[1, 2], queries=4, episodes=30),
    )
    sample_tasks(config, blob_store, folder)
    return folder
