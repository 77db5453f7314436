"""From a trained learner to a model version that serves, or to the reasons why it does not."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field

from pipeline.core.config import Section
from pipeline.core.errors import ArtefactError, PipelineError, RegistryError
from pipeline.core.files import read_json
from pipeline.deploy.bundle import Bundle, make_bundle
from pipeline.deploy.by_hand import VERDICT_REASON_TAG, VERDICT_TAG
from pipeline.deploy.card import model_card
from pipeline.deploy.champions import ROLLED_BACK_TAG
from pipeline.deploy.drift_reference import make_reference
from pipeline.deploy.evidence import Answers, Costs, answers, measure_latency, num_scored
from pipeline.deploy.gate import Decision, GateConfig, decide
from pipeline.deploy.lineage import PARENT_RUN_TAG, TRAINING_RUN_TAG, source_tags
from pipeline.deploy.patience import UnansweredError
from pipeline.deploy.promotions import NOBODY, LostRaceError, Standing
from pipeline.deploy.registry import Registry
from pipeline.deploy.rule import Rule
from pipeline.deploy.signing import signing_key
from pipeline.deploy.smoke import SmokeConfig, SmokeResult, Trial, make_trial, smoke_test
from pipeline.deploy.versions import PASSED, SMOKE_TAG, Version
from pipeline.engine.learner import Learner, load_learner
from pipeline.evaluation.baselines import pixel_learner, untrained
from pipeline.evaluation.robustness import RobustnessConfig
from pipeline.evaluation.temperature import fit_calibration
from pipeline.runtime.lineage import content_hash
from pipeline.runtime.logs import progress
from pipeline.runtime.mlflow_tracker import quiet_environment
from pipeline.runtime.tracking import RunIds
from pipeline.store.reader import Store, open_store
from pipeline.tasks.frozen import FrozenEpisodes, read_episodes

EXAMPLE_QUERIES = 5
_RULES_TAG = "gate.rules"


class DeployConfig(Section):
    """What is registered, and what it must show before it serves."""

    model_name: str = Field(default="metaloom", pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    """Registered as <model_name>-<domain>."""
    gate: GateConfig = GateConfig()
    """When a version becomes the champion."""
    robustness: RobustnessConfig = RobustnessConfig()
    """On what a model is tried with spoilt queries."""
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
    answers: Answers
    """On these episodes."""
    name: str
    """Of the registered model."""


def prepare(config: DeployConfig, sources: Sources, target: Path) -> Candidate:
    """Make the bundle of the trained learner in `target`, with what it takes to judge it.

    The temperature, and what traffic is compared with, come from the validation episodes; the test
    episodes only measure.

    Raises:
        ArtefactError: the stages' outputs do not belong together.
    """
    episodes = read_episodes(sources.tasks, "test")
    domain = str(next(iter(episodes.values())).protocol["domain"])
    store = open_store(sources.stores / domain)
    learner = load_learner(sources.learner)
    numbers = read_json(sources.evaluation)
    _check_belongs(numbers.get(domain, {}), episodes, store, sources.evaluation)
    validation = read_episodes(sources.tasks, "val")
    _check_same_store(validation, store)
    name = f"{config.model_name}-{domain}"
    evaluation = numbers[domain]
    fit = fit_calibration(learner, store, validation)
    found = _answers(config, {"model": (learner, fit.temperature)}, store, episodes)["model"]
    spoilt = found.robustness.as_json() if found.robustness else None
    card = model_card(
        name, learner, store, evaluation, calibration=fit.as_json(), robustness=spoilt
    )
    make = partial(
        make_bundle,
        target,
        sources.learner,
        evaluation,
        domain=domain,
        card=card,
        calibration=fit.as_json(),
        robustness=spoilt,
    )
    # What the bundle itself answers becomes a part of it.
    bundle = make(reference=make_reference(make(), store, validation))
    return Candidate(bundle, store, episodes, found, name)


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
    signing_key()  # one that cannot be used is told of before the work
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
            tags={**_lineage(registry, root, sources.learner, candidate), **(tags or {})},
        )
        # Whoever changes the champion between this and the promotion wins; we are told.
        since = registry.standing()
        decision = _judge(config, candidate, registry, version, since)
        smoke = _try(config, registry, version, trial)
    # What the gate said when it made this version the champion stays as it was said.
    stays = since.champion == version.number and VERDICT_TAG in version.tags
    registry.tag(version, _smoke_tag(smoke) if stays else _decision_tags(decision, smoke))
    if smoke.passed:
        _move_aliases(registry, registry.version(version.number), decision, since)
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


def _check_same_store(validation: Mapping[str, FrozenEpisodes], store: Store) -> None:
    """A temperature must not be fitted on other pictures than the episodes mean."""
    for name, frozen in validation.items():
        if frozen.protocol["store_digest"] != store.digest:
            raise ArtefactError(
                f"the {name} validation episodes were drawn from another store than "
                f"{store.folder}. Bring everything up to date: `dvc repro`."
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
    since: Standing,
) -> Decision:
    """Score the new learner and the champion anew, from their bytes, and decide."""
    champion = None if since.champion == NOBODY else registry.version(since.champion)
    bundle, gate = candidate.bundle, config.gate
    if champion is not None and champion.number == version.number:
        return _judged_before(version)
    if ROLLED_BACK_TAG in version.tags:
        reason = (
            f"A person rolled this version back at {version.tags[ROLLED_BACK_TAG]}; only a person "
            "brings it back (`metaloom promote VERSION --force --reason ...`)."
        )
        return Decision("challenger", False, reason, ())
    baselines: dict[str, Answers] = {}
    if bundle.domain not in gate.floors:
        known = _baselines(bundle.learner, candidate.store)
        plain = {name: (learner, 1.0) for name, learner in known.items()}
        baselines = _answers(_without_spoiling(config), plain, candidate.store, candidate.episodes)
    theirs, digest, problem = _answers_of_champion(config, registry, champion, candidate)
    return decide(
        gate,
        domain=bundle.domain,
        groups=[one.group for one in candidate.store.classes],
        challenger=candidate.answers,
        challenger_digest=bundle.weights_digest,
        costs=Costs(measure_latency(bundle.learner), bundle.weights_bytes),
        baselines={name: found.scores for name, found in baselines.items()},
        champion=theirs,
        champion_digest=digest,
        champion_problem=problem,
    )


def _judged_before(champion: Version) -> Decision:
    """What the gate said of the champion; without its record (cut, by hand) that it is champion.

    Judged anew it would meet itself. Whoever was killed behind the promotion asks for this.
    """
    tags = champion.tags
    if tags.get(VERDICT_TAG) == "champion":
        with suppress(ValueError, TypeError):
            rules = tuple(Rule(**rule) for rule in json.loads(tags.get(_RULES_TAG, "")))
            return Decision("champion", True, tags.get(VERDICT_REASON_TAG, ""), rules)
    return Decision("champion", True, "This version is the champion already.", ())


def _answers_of_champion(
    config: DeployConfig, registry: Registry, champion: Version | None, candidate: Candidate
) -> tuple[Answers | None, str | None, str | None]:
    """The champion's answers and weights digest, or why it cannot be scored."""
    if champion is None:
        return None, None, None
    digest = champion.tags.get("metaloom.weights", "unknown")
    try:
        with tempfile.TemporaryDirectory() as scratch:
            bundle = registry.fetch(champion, Path(scratch) / "bundle")
            one = {"champion": (bundle.learner, bundle.temperature)}
            found = _answers(config, one, candidate.store, candidate.episodes)
            return found["champion"], bundle.weights_digest, None
    except UnansweredError:
        raise
    except PipelineError as error:
        if champion.digest == candidate.bundle.digest:
            # The same bundle, registered anew since that one's files are damaged: no rival.
            return None, None, None
        return None, digest, f"version {champion.number}: {error}"


def _answers(
    config: DeployConfig,
    learners: Mapping[str, tuple[Learner, float]],
    store: Store,
    episodes: Mapping[str, FrozenEpisodes],
) -> dict[str, Answers]:
    """Of learners, each with its temperature, on all test episodes."""
    primary = config.gate.first_primary(episodes)
    total = len(learners) * num_scored(episodes, config.robustness, primary)
    found: dict[str, Answers] = {}
    with progress("gate", total=total, unit="episodes") as bar:
        for name, (learner, temperature) in learners.items():
            bar.note(learner=name)
            found[name] = answers(
                learner,
                store,
                episodes,
                config.robustness,
                primary=primary,
                temperature=temperature,
                advance=bar.advance,
            )
    return found


def _without_spoiling(config: DeployConfig) -> DeployConfig:
    """Baselines are beaten on clean queries."""
    none = config.robustness.model_copy(update={"num_episodes": 0})
    return config.model_copy(update={"robustness": none})


def _baselines(learner: Learner, store: Store) -> dict[str, Learner]:
    """What shows that something was learned; where the training came from is no matter here."""
    return {"pixels": pixel_learner(learner), "untrained": untrained(learner, store, seed=0)}


def _try(config: DeployConfig, registry: Registry, version: Version, trial: Trial) -> SmokeResult:
    environment = {**quiet_environment(), "MLFLOW_TRACKING_URI": registry.uri}
    return smoke_test(version.uri, trial, config.smoke, environment)


def _move_aliases(
    registry: Registry, version: Version, decision: Decision, since: Standing
) -> None:
    """Champion or challenger; a version with the champion's weights gets neither.

    Raises:
        RegistryError: another release was promoted since this one was judged; the version is
            registered, tagged with that, and serves under no alias.
    """
    if decision.already_champion:
        return
    if decision.verdict != "champion":
        registry.challenge(version)
        return
    try:
        registry.promote(version, since=since, reason=f"the gate: {decision.reason}")
    except LostRaceError as error:
        registry.tag(version, {VERDICT_TAG: "overtaken", VERDICT_REASON_TAG: str(error)})
        raise


def _decision_tags(decision: Decision, smoke: SmokeResult) -> dict[str, str]:
    record = decision.as_json()
    return {
        VERDICT_TAG: decision.verdict,
        VERDICT_REASON_TAG: decision.reason,
        _RULES_TAG: json.dumps(record["rules"]),
        **_smoke_tag(smoke),
    }


def _smoke_tag(smoke: SmokeResult) -> dict[str, str]:
    return {SMOKE_TAG: PASSED if smoke.passed else f"failed: {smoke.reason}"[:1000]}


def _lineage(registry: Registry, root: Path, learner: Path, candidate: Candidate) -> dict[str, str]:
    """Where this came from, for `metaloom lineage`; what is not known is left out, not made up."""
    episodes = {name: frozen.digest for name, frozen in candidate.episodes.items()}
    first: Sequence[FrozenEpisodes] = list(candidate.episodes.values())[:1]
    tags = {
        **source_tags(root),
        "store.digest": candidate.store.digest,
        "episodes": json.dumps(episodes, sort_keys=True),
        "domain": candidate.bundle.domain,
        "split": first[0].split,
    }
    if fingerprint := candidate.bundle.learner.origin.get("fingerprint"):
        tags["fingerprint"] = json.dumps(fingerprint, sort_keys=True)
    runs = registry.makers(learner.as_posix(), content_hash(root / learner) or "absent")
    return {**tags, **dict(zip((TRAINING_RUN_TAG, PARENT_RUN_TAG), runs, strict=False))}
