"""From a trained learner to a model version that serves, or to the reasons why it does not."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from pipeline.core.config import Section
from pipeline.core.errors import ArtefactError, PipelineError, RegistryError
from pipeline.core.files import read_json
from pipeline.deploy.bundle import Bundle, make_bundle
from pipeline.deploy.card import model_card
from pipeline.deploy.gate import Decision, GateConfig, Scores, decide
from pipeline.deploy.registry import PASSED, ROLLED_BACK_TAG, SMOKE_TAG, Registry, Version
from pipeline.deploy.smoke import SmokeConfig, SmokeResult, Trial, make_trial, smoke_test
from pipeline.engine.learner import Learner, load_learner
from pipeline.evaluation.baselines import pixel_learner, untrained
from pipeline.evaluation.scoring import score_sets
from pipeline.runtime.lineage import content_hash, git_state
from pipeline.runtime.logs import progress
from pipeline.runtime.mlflow_tracker import quiet_environment
from pipeline.runtime.tracking import RunIds
from pipeline.store.reader import Store, open_store
from pipeline.tasks.frozen import FrozenEpisodes, read_episodes

EXAMPLE_QUERIES = 5
_ALIAS_TAG, _REASON_TAG, _RULES_TAG = "gate.verdict", "gate.reason", "gate.rules"


class DeployConfig(Section):
    """What is registered, and what it must show before it serves."""

    model_name: str = Field(default="metaloom", pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    """Registered as <model_name>-<domain>."""
    gate: GateConfig = GateConfig()
    """When a version becomes the champion."""
    smoke: SmokeConfig = SmokeConfig()
    """The trial run of the registered version."""


@dataclass(frozen=True)
class Sources:
    """The outputs of the earlier stages."""

    learner: Path = Path("models/meta")
    evaluation: Path = Path("results/evaluate/metrics.json")
    tasks: Path = Path("data/tasks")
    stores: Path = Path("data/store")


@dataclass(frozen=True)
class Candidate:
    """A new bundle, with what it is judged on."""

    bundle: Bundle
    store: Store
    episodes: Mapping[str, FrozenEpisodes]
    name: str
    """Of the registered model."""


def prepare(config: DeployConfig, sources: Sources, target: Path) -> Candidate:
    """Make the bundle of the trained learner in `target`.

    Raises:
        ArtefactError: the stages' outputs do not belong together.
    """
    episodes = read_episodes(sources.tasks, "test")
    domain = str(next(iter(episodes.values())).protocol["domain"])
    store = open_store(sources.stores / domain)
    learner = load_learner(sources.learner)
    numbers = read_json(sources.evaluation)
    _check_belongs(numbers.get(domain, {}), episodes, store, sources.evaluation)
    name = f"{config.model_name}-{domain}"
    evaluation = numbers[domain]
    card = model_card(name, learner, store, evaluation)
    bundle = make_bundle(target, sources.learner, evaluation, domain=domain, card=card)
    return Candidate(bundle, store, episodes, name)


def deploy(
    config: DeployConfig,
    sources: Sources,
    *,
    root: Path,
    runs: RunIds | None = None,
    tags: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Register, judge, try and, if all is well, promote; returns the record of the decision.

    Args:
        runs: the runs that the version belongs to; without them it gets one of its own.
        tags: more tags of the version.

    Raises:
        RegistryError: the registry does not answer, or the served version failed its trial. Such a
            version stays registered, tagged with the reason, and never serves.
    """
    begin = time.time()
    with tempfile.TemporaryDirectory(prefix="metaloom-") as scratch:
        candidate = prepare(config, sources, Path(scratch) / "bundle")
        bundle = candidate.bundle
        registry = Registry(root, candidate.name)
        trial = _trial(candidate, config.smoke.max_queries)
        example = _trial(candidate, EXAMPLE_QUERIES).request
        version, new = registry.register(
            bundle,
            [example],
            run_id=runs.child if runs else None,
            tags={**_lineage(root, candidate), **(tags or {})},
        )
        decision = _judge(config, candidate, registry, version)
        smoke = _try(config, registry, version, trial)
    registry.tag(version, _decision_tags(decision, smoke))
    if smoke.passed:
        _move_aliases(registry, registry.version(version.number), decision)
    return {
        "model": candidate.name,
        "domain": bundle.domain,
        "version": version.number,
        "registered_now": new,
        "registry": registry.shown,
        "bundle": bundle.digest,
        "weights": bundle.weights_digest,
        "decision": decision.as_json(),
        "aliases": registry.aliases(),
        "smoke": smoke.as_json(),
        "runs": {"parent": runs.parent, "child": runs.child} if runs else None,
        "started": round(begin, 3),
        "seconds": round(time.time() - begin, 2),
    }


def refuse_failed_smoke(record: Mapping[str, Any]) -> None:
    """End the stage when the version did not pass its trial.

    Raises:
        RegistryError: it did not; says why.
    """
    if not record["smoke"]["passed"]:
        raise RegistryError(
            f"version {record['version']} of {record['model']} failed the smoke test and does not "
            f"serve: {record['smoke']['reason']}\nThe champion is as it was. Mend the cause and "
            "run `dvc repro deploy`; a slow machine may need a higher deploy.smoke.timeout_seconds."
        )


def _check_belongs(
    numbers: Mapping[str, Any], episodes: Mapping[str, FrozenEpisodes], store: Store, path: Path
) -> None:
    """The card must not carry numbers of other episodes, nor the gate judge on another store."""
    for name, frozen in episodes.items():
        measured_on = numbers.get(name, {}).get("protocol", {}).get("episodes_digest")
        if measured_on != frozen.digest or frozen.protocol["store_digest"] != store.digest:
            raise ArtefactError(
                f"{path} was not measured on the {name} test episodes that are here now. "
                "Bring everything up to date: `dvc repro`."
            )


def _trial(candidate: Candidate, max_queries: int) -> Trial:
    frozen = next(iter(candidate.episodes.values()))
    learner = candidate.bundle.learner
    return make_trial(learner, candidate.store, frozen, max_queries=max_queries)


def _judge(
    config: DeployConfig,
    candidate: Candidate,
    registry: Registry,
    version: Version,
) -> Decision:
    """Score the new learner and the champion anew, from their bytes, and decide."""
    champion = registry.champion()
    bundle, gate = candidate.bundle, config.gate
    if champion is not None and champion.number == version.number:
        reason = "This version is the champion already."
        return Decision("champion", True, reason, ())
    if ROLLED_BACK_TAG in version.tags:
        reason = (
            f"A person rolled this version back at {version.tags[ROLLED_BACK_TAG]}; only a person "
            "brings it back (`metaloom promote`)."
        )
        return Decision("challenger", False, reason, ())
    learners = {"model": bundle.learner}
    if bundle.domain not in gate.floors:
        learners |= _baselines(bundle.learner, candidate.store)
    scores = _score(learners, candidate)
    theirs, digest, problem = _score_champion(registry, champion, candidate)
    return decide(
        gate,
        domain=bundle.domain,
        challenger=scores.pop("model"),
        challenger_digest=bundle.weights_digest,
        baselines=scores,
        champion=theirs,
        champion_digest=digest,
        champion_problem=problem,
    )


def _score_champion(
    registry: Registry, champion: Version | None, candidate: Candidate
) -> tuple[Scores | None, str | None, str | None]:
    """The champion's scores and weights digest, or why it cannot be scored."""
    if champion is None:
        return None, None, None
    digest = champion.tags.get("metaloom.weights", "unknown")
    try:
        with tempfile.TemporaryDirectory() as scratch:
            bundle = registry.fetch(champion, Path(scratch) / "bundle")
            scores = _score({"champion": bundle.learner}, candidate)["champion"]
            return scores, bundle.weights_digest, None
    except PipelineError as error:
        return None, digest, f"version {champion.number}: {error}"


def _score(learners: Mapping[str, Learner], candidate: Candidate) -> dict[str, Scores]:
    total = len(learners) * sum(len(e.support_rows) for e in candidate.episodes.values())
    scores: dict[str, Scores] = {}
    with progress("gate", total=total, unit="episodes") as bar:
        for name, learner in learners.items():
            bar.note(learner=name)
            scores[name] = score_sets(
                learner, candidate.store, candidate.episodes, advance=bar.advance
            )
    return scores


def _baselines(learner: Learner, store: Store) -> dict[str, Learner]:
    """What shows that something was learned; where the training came from is no matter here."""
    return {"pixels": pixel_learner(learner), "untrained": untrained(learner, store, seed=0)}


def _try(config: DeployConfig, registry: Registry, version: Version, trial: Trial) -> SmokeResult:
    environment = {**quiet_environment(), "MLFLOW_TRACKING_URI": registry.uri}
    return smoke_test(version.uri, trial, config.smoke, environment)


def _move_aliases(registry: Registry, version: Version, decision: Decision) -> None:
    """Champion or challenger; a version with the champion's weights gets neither."""
    if decision.already_champion:
        return
    if decision.verdict == "champion":
        registry.promote(version)
    else:
        registry.challenge(version)


def _decision_tags(decision: Decision, smoke: SmokeResult) -> dict[str, str]:
    record = decision.as_json()
    return {
        _ALIAS_TAG: decision.verdict,
        _REASON_TAG: decision.reason,
        _RULES_TAG: json.dumps(record["rules"]),
        SMOKE_TAG: PASSED if smoke.passed else f"failed: {smoke.reason}"[:1000],
    }


def _lineage(root: Path, candidate: Candidate) -> dict[str, str]:
    git = git_state(root)
    first: Sequence[FrozenEpisodes] = list(candidate.episodes.values())[:1]
    return {
        "git.commit": git.commit,
        "git.dirty": str(git.dirty).lower(),
        "dvc.lock": content_hash(root / "dvc.lock") or "none",
        "store.digest": candidate.store.digest,
        "domain": candidate.bundle.domain,
        "split": first[0].split,
    }
