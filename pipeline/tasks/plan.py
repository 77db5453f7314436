"""The `sample_tasks` stage: the frozen episodes, and the specification of the training stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from pipeline.core.config import Section, parse_section
from pipeline.core.errors import TaskError
from pipeline.core.files import new_folder, read_json, verify, write_json
from pipeline.store.reader import Store
from pipeline.tasks.frozen import draw_frozen, setting_name, write_episodes
from pipeline.tasks.spec import EpisodeSpec, FrozenSpec
from pipeline.tasks.stream import train_stream

_STREAM_FILE = "train.json"


class SampleTasksConfig(Section):
    """Which episodes to train, validate and test on."""

    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of all three streams, which never share random numbers."""
    train: EpisodeSpec = EpisodeSpec(ways=40, shots=1, queries=2)
    """Shape of the training episodes."""
    val: FrozenSpec = FrozenSpec(ways=[5, 20], shots=[1], episodes=200)
    """Validation episodes, drawn once: every ways x shots combination."""
    test: FrozenSpec = FrozenSpec(ways=[5, 20], shots=[1, 5], episodes=2000)
    """Test episodes, drawn once; read by `evaluate` and the gate alone."""


class TrainingStream(Section):
    """What the training stream is, apart from its position."""

    seed: int
    episodes: EpisodeSpec


def sample_tasks(config: SampleTasksConfig, store: Store, target: Path) -> dict[str, Any]:
    """Draw and keep all frozen episodes; a set that a split cannot fill is left out, and said.

    Returns:
        {"sets": {"test-5w1s": classes, ...}, "left_out": {"test-20w5s": reason, ...}}

    Raises:
        TaskError: the training stream, or every set of a split, is impossible with this store.
    """
    train_stream(store, config.train, seed=config.seed, num_groups=1, tasks_per_group=1)
    sets: dict[str, int] = {}
    left_out: dict[str, str] = {}
    with new_folder(target, kind="tasks", left_out=left_out) as folder:
        for split, spec in (("val", config.val), ("test", config.test)):
            for ways in spec.ways:
                for shots in spec.shots:
                    name = f"{split}-{setting_name(ways, shots)}"
                    try:
                        episodes, protocol = draw_frozen(
                            store, split, spec, ways=ways, shots=shots, seed=config.seed
                        )
                    except TaskError as error:
                        left_out[name] = str(error)
                        continue
                    write_episodes(folder / f"{name}.arrow", episodes, protocol)
                    sets[name] = protocol["classes"]
            if not any(name.startswith(split) for name in sets):
                reasons = "\n  ".join(left_out.values())
                raise TaskError(f"no {split} episodes are possible:\n  {reasons}")
        stream = TrainingStream(seed=config.seed, episodes=config.train)
        write_json(folder / _STREAM_FILE, stream.model_dump(mode="json"))
    return {"sets": sets, "left_out": left_out}


def read_training_stream(folder: Path) -> TrainingStream:
    """The specification of the training stream in a sealed tasks folder.

    Raises:
        ArtefactError: the folder was altered.
    """
    verify(folder)
    return parse_section(read_json(folder / _STREAM_FILE), TrainingStream, where=str(folder))
