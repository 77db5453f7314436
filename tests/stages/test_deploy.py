"""The deploy stage on a small real project: MLflow on sqlite, the model served over HTTP."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from pipeline.algorithms.nearest_centroid import NearestCentroid
from pipeline.algorithms.protonet import ProtoNet
from pipeline.backbones.table import BackboneSpec, build_model, init_params
from pipeline.cli import app
from pipeline.core.config import load_section
from pipeline.core.errors import ArtefactError, RegistryError
from pipeline.core.files import new_folder, read_json, sha256_file
from pipeline.deploy.bundle import WEIGHTS
from pipeline.deploy.by_hand import FORCED_TAG
from pipeline.deploy.champions import CHALLENGER, CHAMPION, PREVIOUS, ROLLED_BACK_TAG
from pipeline.deploy.registry import PASSED, SMOKE_TAG, Registry
from pipeline.deploy.release import DeployConfig, Sources, deploy, prepare, refuse_failed_smoke
from pipeline.engine.learner import Learner, Preprocessing, save_learner
from pipeline.evaluation.evaluate import EvaluateConfig, EvaluateJob, run
from pipeline.evaluation.robustness import RobustnessConfig
from pipeline.evaluation.scoring import score
from pipeline.evaluation.temperature import fit_calibration
from pipeline.runtime.context import SINGLE
from pipeline.runtime.lineage import content_hash
from pipeline.store.reader import Store, open_store
from pipeline.tasks.frozen import FrozenEpisodes, read_episodes

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL = "tiny-blobs"
FLOORS = {"blobs": {"5w1s": 0.3}}


def build_learner(store: Store, units: int) -> Learner:
    """An untrained network; the more units, the more of the picture it keeps."""
    spec = BackboneSpec(name="mlp", settings={"hidden": [units]}, image_shape=store.image_shape)
    algorithm = ProtoNet()
    model = build_model(spec, algorithm.batch_norm)
    own = algorithm.init(model.feature_dim, torch.Generator().manual_seed(0))
    params = {**init_params(spec, 0), **own}
    shape = Preprocessing(image_shape=store.image_shape, mean=store.mean, std=store.std)
    rows = torch.arange(0, store.num_rows, 7).numpy()
    _, statistics = model.features(params, shape(store.gather(rows)))
    model = model.with_statistics(statistics)
    return Learner(algorithm, model, params, shape, spec, {"pretrained": "mlp", "step": units})


def put(folder: Path, learner: Learner) -> None:
    with new_folder(folder, kind="learner") as building:
        save_learner(building, learner)


def train_and_evaluate(root: Path, units: int) -> None:
    """What the stages before deploy leave: learner, pre-trained candidate, evaluation."""
    store = open_store(root / "data/store/blobs")
    learner = build_learner(store, units)
    put(root / "models/meta", learner)
    features = replace(learner, origin={})
    put(root / "models/pretrained/mlp", features.with_algorithm(NearestCentroid()))
    evaluate(root, root / "models/meta", root / "results/evaluate")


def evaluate(root: Path, learner: Path, target: Path) -> None:
    """As the evaluate stage does, in this process."""
    job = EvaluateJob(
        config=EvaluateConfig(baselines=("pixels",)),
        learner=learner,
        pretrained=root / "models/pretrained/mlp",
        tasks=root / "data/tasks",
        store=root / "data/store/blobs",
        target=target,
    )
    run(job, SINGLE)


@pytest.fixture(scope="module")
def project(
    blob_store: Store, blob_tasks: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("project")
    shutil.copytree(blob_store.folder, root / "data/store/blobs")
    shutil.copytree(blob_tasks, root / "data/tasks")
    gate = {
        "floors": FLOORS,
        "num_bootstrap": 1000,
        "max_calibration_error": 0.3,
        "max_drops": [0.5, 0.5, 0.5],
    }
    deploy_section = {"model_name": "tiny", "gate": gate}
    params = {"preprocess": {"domain": "blobs"}, "deploy": deploy_section}
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    train_and_evaluate(root, units=8)
    lock = {"stages": {"meta_train": {"outs": [{"path": "models/meta"}]}}}
    (root / "dvc.lock").write_text(yaml.safe_dump(lock))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.chdir(root)
        yield root


@pytest.fixture(scope="module")
def first(project: Path) -> dict[str, Any]:
    """The stage as DVC runs it, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "stages.deploy"],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "METALOOM_PIPELINE_RUN": "first"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    record: dict[str, Any] = read_json(project / "results/deploy/release.json")
    return record


@pytest.fixture
def registry(first: dict[str, Any], project: Path) -> Registry:
    return Registry(project, MODEL)


def run_deploy(project: Path, **changes: Any) -> dict[str, Any]:
    config = load_section(project / "params.yaml", "deploy", DeployConfig)
    return deploy(config.model_copy(update=changes), Sources(), root=project)


def command(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Run `metaloom` in this process; returns what it printed."""
    app(list(arguments), standalone_mode=False)
    return capsys.readouterr().out


def test_the_first_model_that_meets_the_floors_is_served_and_becomes_champion(
    first: dict[str, Any], registry: Registry, project: Path
) -> None:
    assert (first["model"], first["version"], first["aliases"]) == (MODEL, 1, {CHAMPION: 1})
    assert first["decision"]["verdict"] == "champion"
    assert first["weights"] == sha256_file(project / "models/meta" / WEIGHTS)
    smoke = first["smoke"]
    assert smoke["passed"] and smoke["queries"] > 0
    assert smoke["largest_difference"] <= DeployConfig().smoke.tolerance
    tags = registry.version(1).tags
    assert (tags[SMOKE_TAG], tags["gate.verdict"]) == (PASSED, "champion")
    assert json.loads(tags["gate.rules"]) == first["decision"]["rules"]
    assert tags["dvc.lock"] == content_hash(project / "dvc.lock")


def test_the_stage_is_a_run_and_restored_stages_are_named(
    first: dict[str, Any], registry: Registry
) -> None:
    """meta_train did not run here, and no run is known to have made its output."""
    client = registry._client
    child, parent = (client.get_run(first["runs"][who]) for who in ("child", "parent"))
    assert (child.info.status, parent.info.status) == ("FINISHED", "FINISHED")
    assert child.data.tags["output.results/deploy/release.json"] == content_hash(
        Path("results/deploy/release.json")
    )
    assert parent.data.tags["restored.meta_train"] == "unknown"
    assert registry.version(1).run_id == first["runs"]["child"]


def test_lineage_goes_both_ways(
    first: dict[str, Any], registry: Registry, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From version 1 to all it came from, and from each of these, shortened, back to it."""
    told = json.loads(command("lineage", "1", "--json", capsys=capsys))
    assert told["store"] == open_store(project / "data/store/blobs").digest
    assert (told["bundle"], told["weights"]) == (first["bundle"], first["weights"])
    assert told["run"] == first["runs"]["child"]
    assert told["dvc.lock"] == content_hash(project / "dvc.lock")
    assert told["decision"] == first["decision"]["verdict"]
    assert told["promotions"][0]["kind"] == "promote"
    assert {"git commit", "raw data", "training run"} <= set(told["missing"])
    assert "git commit: not recorded" in command("lineage", "1", capsys=capsys)
    for field in ("store", "bundle", "weights", "run", "dvc.lock", "code"):
        back = json.loads(command("lineage", told[field][:9], "--json", capsys=capsys))
        assert 1 in {found["version"] for found in back["versions"]}, field
    with pytest.raises(RegistryError, match="no version of tiny-blobs came from 0000000"):
        command("lineage", "0000000", capsys=capsys)


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
def test_a_release_killed_behind_its_promotion_keeps_what_the_gate_said(
    cut: bool,
    first: dict[str, Any],
    project: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Released again, it is the champion and no rival of itself; a cut record is not made up."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    promote = Registry.promote

    def killed(*arguments: Any, **options: Any) -> None:
        promote(*arguments, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Registry, "promote", killed)
        run_deploy(project)
    registry = Registry(project, MODEL)
    assert registry.aliases() == {CHAMPION: 1}
    told = json.loads(registry.version(1).tags["gate.rules"])
    assert len(told) > 3  # with more settings there are many, and they take much room
    rules = json.dumps([{**rule, "reason": f"{rule['reason']:1000}"} for rule in told])
    registry.tag(registry.version(1), {"gate.rules": rules[:-1] if cut else rules})
    tags = registry.version(1).tags
    decision = run_deploy(project)["decision"]
    assert registry.version(1).tags == tags
    assert [record.champion for record in registry.promotions()] == [1]
    assert decision["rules"] == ([] if cut else json.loads(rules))
    assert (decision["verdict"], decision["reason"]) == (
        "champion",
        "This version is the champion already." if cut else tags["gate.reason"],
    )
    assert "first model" in tags["gate.reason"]


def test_a_worse_model_waits_as_challenger_and_a_person_decides(
    registry: Registry, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_and_evaluate(project, units=2)
    record = run_deploy(project)
    assert record["decision"]["verdict"] == "challenger"
    assert {r["rule"] for r in record["decision"]["rules"]} >= {"group_no_harm", "robustness"}
    assert record["aliases"] == {CHAMPION: 1, CHALLENGER: 2}
    with pytest.raises(RegistryError, match="the gate says 'challenger'.*promote 2 --force"):
        command("promote", capsys=capsys)
    forced = ("promote", "--force", "--reason", "a demonstration")
    assert "is @champion; version 1 is @previous" in command(*forced, capsys=capsys)
    assert registry.version(2).tags[FORCED_TAG] == "a demonstration"
    told = json.loads(command("lineage", "2", "--json", capsys=capsys))
    assert told["promotions"][-1]["reason"] == "forced: a demonstration"
    assert registry.aliases() == {CHAMPION: 2, PREVIOUS: 1}
    assert "version 1 is @champion again" in command("rollback", capsys=capsys)
    assert registry.aliases() == {CHAMPION: 1}
    assert ROLLED_BACK_TAG in registry.version(2).tags


def test_a_version_that_fails_its_trial_never_serves(registry: Registry, project: Path) -> None:
    """A better model, but its server is not ready in time."""
    train_and_evaluate(project, units=64)
    smoke = DeployConfig().smoke.model_copy(update={"timeout_seconds": 0.3})
    before = registry.aliases()
    record = run_deploy(project, smoke=smoke)
    assert record["decision"]["verdict"] == "champion"
    assert not record["smoke"]["passed"] and registry.aliases() == before
    with pytest.raises(RegistryError, match="failed the smoke test and does not"):
        refuse_failed_smoke(record)
    with pytest.raises(RegistryError, match="has not passed the smoke test"):
        registry.promote(registry.version(record["version"]))


def test_release_asks_the_registry(
    first: dict[str, Any],
    registry: Registry,
    project: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing to do where the release is registered; a registry without it gets it."""
    train_and_evaluate(project, units=8)
    versions = [v.version for v in registry._client.search_model_versions(f"name = '{MODEL}'")]
    text = command("release", capsys=capsys)
    assert f"{MODEL} version 1: @champion" in text
    assert all(f" {word} " in text for word in ("report", "ui", "serve"))
    assert max(len(line) for line in text.splitlines()) <= 80
    after = [v.version for v in registry._client.search_model_versions(f"name = '{MODEL}'")]
    assert after == versions
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project}/elsewhere/mlflow.db")
    record = json.loads(command("release", "--json", capsys=capsys))
    assert (record["version"], record["bundle"]) == (1, first["bundle"])
    assert Registry(project, MODEL).aliases() == {CHAMPION: 1}


def test_without_floors_the_best_baseline_must_be_beaten(project: Path, tmp_path: Path) -> None:
    """Raw pixels as the model: it cannot beat the pixel baseline, so it is no champion."""
    from pipeline.evaluation.baselines import pixel_learner

    learner = pixel_learner(build_learner(open_store(project / "data/store/blobs"), 8))
    put(tmp_path / "meta", replace(learner, origin={"pretrained": "mlp"}))
    target = tmp_path / "evaluate"
    evaluate(project, tmp_path / "meta", target)
    sources = replace(Sources(), learner=tmp_path / "meta", evaluation=target / "metrics.json")
    config = load_section(project / "params.yaml", "deploy", DeployConfig)
    gate = config.gate.model_copy(update={"floors": {}})
    smoke = config.smoke.model_copy(update={"timeout_seconds": 0.1})
    changed = config.model_copy(update={"gate": gate, "smoke": smoke, "model_name": "pixels"})
    record = deploy(changed, sources, root=project)
    assert record["decision"]["verdict"] == "challenger"
    assert {rule["rule"] for rule in record["decision"]["rules"]} >= {"beats_baseline"}


def test_numbers_of_other_episodes_are_refused(project: Path, tmp_path: Path) -> None:
    numbers = read_json(project / "results/evaluate/metrics.json")
    numbers["blobs"]["5w1s"]["protocol"]["episodes_digest"] = "0" * 64
    (tmp_path / "metrics.json").write_text(json.dumps(numbers))
    sources = replace(Sources(), evaluation=tmp_path / "metrics.json")
    with pytest.raises(ArtefactError, match="was not measured on the 5w1s test episodes"):
        prepare(DeployConfig(), sources, tmp_path / "bundle")


def test_the_card_states_the_measured_numbers(project: Path, tmp_path: Path) -> None:
    numbers = read_json(project / "results/evaluate/metrics.json")["blobs"]
    card = prepare(DeployConfig(), Sources(), tmp_path / "bundle").bundle.card
    for setting, found in numbers.items():
        assert f"| {setting} | {found['accuracy']:.2%} ± {found['ci95']:.2%} |" in card
    assert "Limits" in card and "invocations" in card


def test_temperature_and_spoilt_queries_are_part_of_the_sealed_evidence(
    project: Path, tmp_path: Path
) -> None:
    """From validation episodes; the same release has the same digest however often it is made."""
    made, again = (prepare(DeployConfig(), Sources(), tmp_path / name) for name in ("one", "two"))
    bundle = made.bundle
    assert bundle.digest == again.bundle.digest
    val = read_episodes(project / "data/tasks", "val")
    assert bundle.calibration is not None and bundle.robustness is not None
    assert bundle.calibration["split"] == "val"
    assert bundle.calibration["episodes"] == {name: one.digest for name, one in val.items()}
    fit = fit_calibration(bundle.learner, made.store, val)
    assert bundle.temperature == fit.temperature != 1.0
    assert made.answers.robustness is not None
    assert bundle.robustness == made.answers.robustness.as_json()
    assert f"Temperature {fit.temperature:.4f}, fitted on" in bundle.card
    for severity, found in bundle.robustness["severities"].items():
        assert f"| {severity} | {found['accuracy']:.1%} |" in bundle.card
    setting = bundle.robustness["setting"]
    scores = score(bundle.learner, made.store, made.episodes[setting], temperature=fit.temperature)
    np.testing.assert_array_equal(made.answers.scores[setting].confidence, scores.confidence)


def test_a_temperature_of_another_store_is_refused(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def foreign(folder: Path, split: str) -> dict[str, FrozenEpisodes]:
        found = read_episodes(folder, split)
        other = {"store_digest": "0" * 64} if split == "val" else {}
        return {
            name: replace(one, protocol={**one.protocol, **other}) for name, one in found.items()
        }

    monkeypatch.setattr("pipeline.deploy.release.read_episodes", foreign)
    with pytest.raises(ArtefactError, match="validation episodes were drawn from another store"):
        prepare(DeployConfig(), Sources(), tmp_path / "bundle")


def test_without_spoilt_queries_the_card_says_so(project: Path, tmp_path: Path) -> None:
    config = DeployConfig(robustness=RobustnessConfig(num_episodes=0))
    made = prepare(config, Sources(), tmp_path / "bundle")
    assert made.bundle.robustness is None and made.answers.robustness is None
    assert "## Spoilt queries\n\nNot measured." in made.bundle.card


def test_the_gate_reports_every_rule(first: dict[str, Any]) -> None:
    rules = first["decision"]["rules"]
    names = {rule["rule"] for rule in rules}
    assert names == {"finite", "floor", "calibration", "latency", "size", "robustness"}
    assert [r["setting"] for r in rules if r["rule"] == "robustness"] == [
        f"5w1s severity {severity}" for severity in (1, 2, 3)
    ]
