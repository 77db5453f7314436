from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.core.errors import ArtefactError, TaskError
from pipeline.core.files import sha256_file
from pipeline.store.reader import Store
from pipeline.tasks.frozen import draw_frozen, read_episodes
from pipeline.tasks.plan import SampleTasksConfig, read_training_stream, sample_tasks
from pipeline.tasks.spec import EpisodeSpec, FrozenSpec

SMALL = SampleTasksConfig(
    train=EpisodeSpec(ways=4, queries=2),
    val=FrozenSpec(ways=[3], shots=[1], queries=2, episodes=5),
    test=FrozenSpec(ways=[3, 5], shots=[1, 2], queries=2, episodes=6),
)


def test_what_is_kept_is_what_was_drawn(blob_store: Store, tmp_path: Path) -> None:
    sample_tasks(SMALL, blob_store, tmp_path / "tasks")
    sets = read_episodes(tmp_path / "tasks", "test")
    assert list(sets) == ["3w1s", "3w2s", "5w1s", "5w2s"]
    drawn, protocol = draw_frozen(blob_store, "test", SMALL.test, ways=5, shots=2, seed=SMALL.seed)
    for name, values in drawn._asdict().items():
        assert np.array_equal(getattr(sets["5w2s"], name), values)
    assert sets["5w2s"].protocol == protocol
    assert sets["5w2s"].digest == sha256_file(tmp_path / "tasks" / "test-5w2s.arrow")
    assert (protocol["split_hash"], protocol["queries"]) == (blob_store.split_hash("test"), 2)
    assert read_training_stream(tmp_path / "tasks").episodes == SMALL.train


def test_the_same_configuration_gives_the_same_bytes(blob_store: Store, tmp_path: Path) -> None:
    for name in ("a", "b"):
        sample_tasks(SMALL, blob_store, tmp_path / name)
    manifests = [(tmp_path / name / "manifest.json").read_bytes() for name in ("a", "b")]
    assert manifests[0] == manifests[1]


def test_settings_do_not_share_their_classes(blob_store: Store, tmp_path: Path) -> None:
    sample_tasks(SMALL, blob_store, tmp_path / "tasks")
    sets = read_episodes(tmp_path / "tasks", "test")
    assert not np.array_equal(sets["3w1s"].classes, sets["3w2s"].classes)


def test_an_impossible_set_is_left_out_and_said(blob_store: Store, tmp_path: Path) -> None:
    config = SMALL.model_copy(
        update={"test": FrozenSpec(ways=[3, 50], shots=[1], queries=2, episodes=5)}
    )
    result = sample_tasks(config, blob_store, tmp_path / "tasks")
    assert set(result["sets"]) == {"val-3w1s", "test-3w1s"}
    assert "needs 50 such classes, the split has 12" in result["left_out"]["test-50w1s"]
    assert list(read_episodes(tmp_path / "tasks", "test")) == ["3w1s"]


def test_a_split_without_any_set_is_an_error(blob_store: Store, tmp_path: Path) -> None:
    config = SMALL.model_copy(update={"test": FrozenSpec(ways=[50], shots=[1], episodes=5)})
    with pytest.raises(TaskError, match="no test episodes are possible"):
        sample_tasks(config, blob_store, tmp_path / "tasks")
    assert not (tmp_path / "tasks").exists()


def test_altered_episodes_are_refused(blob_store: Store, tmp_path: Path) -> None:
    sample_tasks(SMALL, blob_store, tmp_path / "tasks")
    path = tmp_path / "tasks" / "test-3w1s.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(ArtefactError, match=r"test-3w1s\.arrow was altered"):
        read_episodes(tmp_path / "tasks", "test")
