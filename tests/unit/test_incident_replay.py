"""What a guard refused can be computed again, item by item, with the bits of the run."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from pipeline.algorithms.table import AlgorithmConfig
from pipeline.backbones.mlp import MLPConfig
from pipeline.core.errors import ArtefactError, DataError, TrainingError
from pipeline.core.files import new_folder, read_json, sha256_file, write_json
from pipeline.engine.choice import EngineConfig
from pipeline.launch.base import Job
from pipeline.launch.local import launch_local
from pipeline.runtime.context import SINGLE
from pipeline.store.reader import Store, open_store
from pipeline.training import pretrain
from pipeline.training.augment import AugmentConfig
from pipeline.training.incidents import RECORD, WEIGHTS, Incident, Incidents
from pipeline.training.loop import OuterConfig
from pipeline.training.meta_train import MetaTrainJob, program
from pipeline.training.pretrain import PretrainConfig, PretrainJob
from pipeline.training.replay import as_text, replay
from pipeline.training.state import flatten, unflatten
from tests.conftest import REPOSITORY, write_blob_store
from tests.distributed.small_run import make_job

_TOUCHY = {"spike_factor": 1.01, "max_gradient_norm": 1e-3, "on_spike": "stop"}
"""After the first 32 steps some group is sure to be a little longer than the median."""


@pytest.fixture(autouse=True)
def _workers_stay_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def stopped_run(job: Any, entry: str, workers: int, scratch: Path) -> Path:
    """Run until a guard stops it; where it says that the incident is."""
    with pytest.raises(TrainingError) as caught:
        launch_local(Job(entry, job, workers), scratch)
    return Path(str(caught.value).rpartition("metaloom replay ")[2])


@pytest.fixture(scope="module")
def spiked(tmp_path_factory: pytest.TempPathFactory) -> tuple[MetaTrainJob, Path]:
    """A run of two workers with three tasks a group, moved pictures and steps in the inner loop."""
    folder = tmp_path_factory.mktemp("spiked")
    store = write_blob_store(folder / "store")
    from pipeline.tasks.plan import SampleTasksConfig, sample_tasks
    from pipeline.tasks.spec import EpisodeSpec, FrozenSpec

    frozen = FrozenSpec(ways=[4], shots=[1], queries=4, episodes=20)
    spec = EpisodeSpec(ways=[3, 6], shots=[1, 2], queries=3)
    sample_tasks(SampleTasksConfig(train=spec, val=frozen, test=frozen), store, folder / "tasks")
    job = make_job(
        folder / "run",
        store,
        folder / "tasks",
        algorithm=AlgorithmConfig(name="maml"),
        tasks_per_group=3,
        augment=AugmentConfig(max_shift=2),
        **_TOUCHY,
    )
    return job, stopped_run(job, "pipeline.training.meta_train:run", 2, folder / "launch")


def test_a_replay_has_the_bits_of_the_run(spiked: tuple[MetaTrainJob, Path]) -> None:
    job, kept = spiked
    told = replay(kept)
    assert (told["bit_equal"], told["same_code"], told["same_machine"]) == (True, True, True)
    assert told["groups"], "a spike has groups"
    found = read_json(kept / RECORD)["incident"]
    assert [g["recorded_losses"] for g in told["groups"]] == found["losses"]
    assert [i["index"] for g in told["groups"] for i in g["items"]] == found["items"]
    assert told["step"] >= 32
    training, start = program(job, SINGLE)
    vector = safetensors.torch.load_file(kept / WEIGHTS)["vector"]
    params = unflatten(vector, start)
    for group in told["groups"]:
        cell = (told["position"], group["group"])
        ways, shots = training.stream.shape(*cell)
        episodes = training.stream.group(*cell)
        with training.feed([group["group"]]) as feed:
            batch = feed.take(*cell)
        total = torch.zeros_like(vector)
        for item, task, rows in zip(group["items"], batch, episodes.support_rows, strict=True):
            labels = open_store(job.store).labels()[rows]
            names = {open_store(job.store).classes[c].name for c in labels}
            assert (item["ways"], item["shots"]) == (ways, shots)
            assert set(item["classes"]) == names and len(item["classes"]) == ways
            assert item["finite"] and item["seed"] == training.stream.seed
            one = training.gradient(params, [task])
            assert item["gradient_norm"] == float(flatten(one.gradient).norm())
            torch.testing.assert_close(item["loss"], float(one.metrics["loss"]), rtol=1e-5, atol=0)
            total += flatten(one.gradient)
        # The mean of the items' gradients is the group's: what is shown for each is a part of it.
        torch.testing.assert_close(
            float((total / 3).norm()), group["gradient_norm"], rtol=1e-4, atol=0
        )


def test_the_engine_of_the_run_replays_whatever_would_be_chosen_now(
    spiked: tuple[MetaTrainJob, Path], tmp_path: Path
) -> None:
    """Another engine has other last digits, so that a replay by it would not be bit-equal."""
    _, kept = spiked
    record = read_json(kept / RECORD)
    assert record["engine"] is not None
    used = record["engine"]["strategy"]
    other = {"loop": "vmap_split", "split": "vmap", "vmap": "split", "vmap_split": "loop"}[used]
    assert not replay(rewritten(kept, tmp_path / "other", {"engine": {"strategy": other}}))[
        "bit_equal"
    ]
    forced = record["job"] | {
        "config": record["job"]["config"] | {"engine": EngineConfig(strategy=other).model_dump()}
    }
    told = replay(rewritten(kept, tmp_path / "forced", {"job": forced}))
    assert told["bit_equal"], "the job's own wish must not matter: its engine is kept"


def rewritten(kept: Path, target: Path, changes: dict[str, Any]) -> Path:
    """A copy of an incident whose record says something else, and is sealed as such."""
    with new_folder(target, kind="incident") as folder:
        shutil.copy(kept / WEIGHTS, folder / WEIGHTS)
        write_json(folder / RECORD, read_json(kept / RECORD) | changes)
    return target


def test_other_code_or_another_machine_is_said(
    spiked: tuple[MetaTrainJob, Path], tmp_path: Path
) -> None:
    _, kept = spiked
    incident = read_json(kept / RECORD)["incident"]
    wrong = incident | {"norms": [n * 1.5 for n in incident["norms"]]}
    elsewhere = {"code": "0" * 64, "machine": "other", "incident": wrong}
    told = replay(rewritten(kept, tmp_path / "elsewhere", elsewhere))
    assert not told["bit_equal"]
    text = as_text(told)
    assert "NOT EQUAL" in text
    assert "the code has changed since and this machine computes" in " ".join(text.split())
    told = replay(rewritten(kept, tmp_path / "erred", {"incident": wrong}))
    assert "one of them erred" in " ".join(as_text(told).split())


def test_the_command_prints_a_table_that_fits_and_the_same_as_json(
    spiked: tuple[MetaTrainJob, Path], tmp_path: Path
) -> None:
    _, kept = spiked
    command = [sys.executable, "-m", "pipeline.cli", "replay", str(kept)]
    text = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    found = subprocess.run(
        [*command, "--json"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    told = json.loads(found.stdout)
    assert told == json.loads(json.dumps(replay(kept)))
    assert all(len(line) <= 80 for line in text.stdout.splitlines()), text.stdout
    assert "bit for bit" in text.stdout
    for group in told["groups"]:
        for item in group["items"]:
            assert f"{item['index']:>12} " in text.stdout
            assert all(name in text.stdout for name in item["classes"])


def test_a_replay_refuses_what_it_cannot_vouch_for(
    spiked: tuple[MetaTrainJob, Path], tmp_path: Path
) -> None:
    job, kept = spiked
    with pytest.raises(ArtefactError, match="there is no folder.*metaloom/incidents"):
        replay(tmp_path / "none")
    with pytest.raises(ArtefactError, match="holds no incident"):
        replay(job.store)
    altered = tmp_path / "altered"
    shutil.copytree(kept, altered)
    content = bytearray((altered / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (altered / WEIGHTS).write_bytes(content)
    with pytest.raises(ArtefactError, match="was altered"):
        replay(altered)
    for place, changes in enumerate(
        ({"entry": "os"}, {"job_type": "os:environ"}, {"job_type": "tests.conftest:Store"})
    ):
        with pytest.raises(ArtefactError, match="outside this package"):
            replay(rewritten(kept, tmp_path / f"outside-{place}", changes))
    for place, changes in enumerate(
        (
            {"entry": "pipeline.training.gone"},
            {"entry": "pipeline.training.feed"},
            {"job_type": "pipeline.training.feed:Feed"},
        )
    ):
        with pytest.raises(ArtefactError, match="does not have"):
            replay(rewritten(kept, tmp_path / f"unknown-{place}", changes))


@pytest.mark.parametrize(
    ("name", "what"), [("store", "changed"), ("tasks", "changed"), ("pretrained", "gone")]
)
def test_changed_data_is_a_clear_error(
    name: str, what: str, spiked: tuple[MetaTrainJob, Path], tmp_path: Path
) -> None:
    job, kept = spiked
    other = {**read_json(kept / RECORD)["job"], name: str(tmp_path / "other")}
    folder = rewritten(kept, tmp_path / "kept", {"job": other})
    if what == "gone":
        with pytest.raises(DataError, match=f"other \\({name} of the run\\) is not here"):
            replay(folder)
        return
    shutil.copytree(getattr(job, name), tmp_path / "other")
    assert replay(folder)["bit_equal"], "the same content at another place is the same"
    manifest = tmp_path / "other" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes() + b"\n")
    with pytest.raises(DataError, match=f"other \\({name} of the run\\) has changed since"):
        replay(folder)


def test_numbers_that_are_not_finite_are_replayed_as_such(
    blob_store: Store, blob_tasks: Path, tmp_path: Path
) -> None:
    """A learning rate that throws the weights out of the range of numbers, in one update."""
    job = make_job(tmp_path / "run", blob_store, blob_tasks, lr=1e30, max_gradient_norm=1e30)
    kept = stopped_run(job, "pipeline.training.meta_train:run", 1, tmp_path / "launch")
    told = replay(kept)
    assert (told["kind"], told["bit_equal"]) == ("non-finite numbers", True)
    items = [item for group in told["groups"] for item in group["items"]]
    assert len(items) == 8
    assert not any(item["finite"] for item in items)
    assert {type(item["loss"]) for item in items} == {str}
    assert "  NO\n" in as_text(told)


def test_a_pretraining_run_is_replayed_too(
    blob_store: Store, blob_tasks: Path, tmp_path: Path
) -> None:
    outer = OuterConfig(num_steps=60, checkpoint_every=20, validate_every=60, **_TOUCHY)
    config = PretrainConfig(
        candidates=["mlp"], mlp=MLPConfig(hidden=(24, 16)), examples_per_group=6, outer=outer
    )
    job = PretrainJob(
        config=config,
        candidate="mlp",
        store=blob_store.folder,
        tasks=blob_tasks,
        target=tmp_path / "target",
        checkpoints=tmp_path / "checkpoints",
        journal=tmp_path / "journal.jsonl",
        incidents=tmp_path / "incidents",
    )
    kept = stopped_run(job, "pipeline.training.pretrain:run", 1, tmp_path / "launch")
    told = replay(kept)
    assert told["bit_equal"]
    training, start = pretrain.program(job, SINGLE)
    params = unflatten(safetensors.torch.load_file(kept / WEIGHTS)["vector"], start)
    group = told["groups"][0]
    with training.feed([group["group"]]) as feed:
        batch = feed.take(told["position"], group["group"])
    names = {f"example {i}": i for i in range(blob_store.num_rows)}
    ids = blob_store.labels()[[names[item["example"]] for item in group["items"]]]
    assert [item["classes"] for item in group["items"]] == [
        [blob_store.classes[i].name] for i in ids
    ]
    assert np.array_equal(batch.labels.numpy(), ids)  # the training classes are the first
    total = sum(flatten(one) for one in training.alone(params, batch))
    torch.testing.assert_close(
        total, flatten(training.gradient(params, batch).gradient), rtol=1e-4, atol=1e-5
    )
    assert "ways" not in group["items"][0]
    assert "example 1" in as_text(told)


def an_incident(**changes: Any) -> Incident:
    values: dict[str, Any] = {
        "kind": "a spike",
        "step": 3,
        "position": 4,
        "groups": [1],
        "items": [9],
        "losses": [[math.e]],
        "norms": [7.0],
        "norm": 2.0,
        "unit": "tasks",
    }
    return Incident(**{**values, **changes})


def test_a_disk_that_refuses_does_not_stop_the_run(
    tmp_path: Path, blob_store: Store, blob_tasks: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    job = make_job(tmp_path / "run", blob_store, blob_tasks)
    (tmp_path / "file").write_text("in the way")
    refused = Incidents(tmp_path / "file", "pipeline.training.meta_train", job)
    found = refused.keep(an_incident(), torch.zeros(3), SINGLE)
    assert found.kept is None and found.replay() == ""
    assert "incident not kept" in capfd.readouterr().err
    kept = Incidents(tmp_path / "fine", "pipeline.training.meta_train", job).keep(
        an_incident(), torch.zeros(3), SINGLE
    )
    assert kept.kept is not None and (kept.kept / RECORD).is_file()
    first = sha256_file(kept.kept / WEIGHTS)
    again = Incidents(tmp_path / "fine", "pipeline.training.meta_train", job).keep(
        an_incident(), torch.ones(3), SINGLE
    )
    assert again.kept == kept.kept and sha256_file(kept.kept / WEIGHTS) != first
