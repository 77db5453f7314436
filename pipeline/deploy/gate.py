"""The release gate: a model is promoted on evidence, or not at all. Scores in, decision out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from pipeline.core.config import Section
from pipeline.deploy.evidence import Answers, Costs, Scores
from pipeline.deploy.rule import Bootstrap, Rule
from pipeline.deploy.safety import (
    budget_rules,
    calibration_rules,
    group_rules,
    robustness_rules,
)
from pipeline.domains.table import DOMAINS
from pipeline.evaluation.robustness import Robustness
from pipeline.evaluation.scoring import EpisodeScores
from pipeline.evaluation.statistics import mean_interval

Setting: TypeAlias = Annotated[str, Field(pattern=r"^\d+w\d+s$")]

Accuracy: TypeAlias = Annotated[float, Field(ge=0, le=1)]

Comparison: TypeAlias = Literal["beats_baseline", "beats_champion", "no_harm"]

_GLYPH_FLOORS = {"5w1s": 0.97, "20w1s": 0.90}


class GateConfig(Section):
    """What a model must show before it may serve."""

    floors: dict[str, Annotated[dict[Setting, Accuracy], Field(min_length=1)]] = Field(
        default={"glyphs": _GLYPH_FLOORS}
    )
    """By domain and setting: the least that the lower end of the accuracy's 95 % interval may be.
    A model of a domain without floors must beat the best baseline instead (raw pixels, and the
    same algorithm untrained): it has to have learned something."""
    primary: tuple[Setting, ...] = ("5w1s",)
    """Settings in which a later model must be better than the champion; empty: in all of them."""
    margin: Accuracy = 0.0
    """The lower bound of the difference to the champion must lie above -margin. 0 asks for evidence
    of a better model; a scheduled refresh on newer data may allow, say, 0.002."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Of the two-sided bootstrap interval: 0.95 lets an equal model through once in forty times."""
    num_bootstrap: int = Field(default=10_000, ge=1000)
    """Bootstrap draws over the test classes."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of the bootstrap draws: the same scores give the same decision."""
    min_group_classes: int = Field(default=5, ge=2)
    """Groups of fewer test classes (scripts, alphabets) are named as not judged; in the others
    the champion must not be better by more than the margin."""
    max_calibration_error: Accuracy = 0.05
    """Of the confidences with the fitted temperature, in each setting. The default model has 0.002
    to 0.014, an untrained one 0.04 to 0.44."""
    robustness_margin: Accuracy = 0.01
    """With spoilt queries the champion must not be better by more than this, at each severity."""
    max_drops: tuple[Accuracy, Accuracy, Accuracy] = (0.05, 0.25, 0.5)
    """Without a champion: the most accuracy that spoilt queries may cost, by severity. The default
    model loses 0.02, 0.15 and 0.37."""
    max_latency_milliseconds: PositiveFloat = 1000.0
    """Median time to adapt and answer 5 ways, 1 shot, 15 queries on one thread."""
    max_weights_bytes: PositiveInt = 100_000_000
    """Size of the weights, which every replica loads."""

    @field_validator("floors")
    @classmethod
    def _no_misspelt_domain(
        cls, floors: dict[str, dict[str, float]]
    ) -> dict[str, dict[str, float]]:
        """A floor under a name that is nearly a domain's would hold for nothing, silently."""
        for name in set(floors) - set(DOMAINS):
            if near := difflib.get_close_matches(name, DOMAINS, n=1, cutoff=0.75):
                raise ValueError(f"there is no domain {name!r}; {near[0]!r} was meant, it seems")
        return floors

    @property
    def bootstrap(self) -> Bootstrap:
        """How answers are compared."""
        return Bootstrap(self.confidence, self.num_bootstrap, self.seed)

    def first_primary(self, settings: Iterable[str]) -> str:
        """The setting whose queries are spoilt: the first primary one that is evaluated."""
        known = list(settings)
        return next((name for name in self.primary if name in known), known[0])


@dataclass(frozen=True)
class Decision:
    """Where a model version goes."""

    verdict: Literal["champion", "challenger"]
    already_champion: bool
    """These weights serve already: nothing is to be done."""
    reason: str
    rules: tuple[Rule, ...]

    def as_json(self) -> dict[str, Any]:
        """The record for release.json and the version's tags."""
        return asdict(self) | {"rules": [asdict(rule) for rule in self.rules]}


def decide(
    config: GateConfig,
    *,
    domain: str,
    groups: Sequence[str],
    challenger: Answers,
    challenger_digest: str,
    costs: Costs,
    baselines: Mapping[str, Scores],
    champion: Answers | None = None,
    champion_digest: str | None = None,
    champion_problem: str | None = None,
) -> Decision:
    """Judge a new model by its answers on the frozen test episodes.

    The first model that meets the floors becomes the champion. A later one must also beat the
    champion on the same episodes: the lower bound of the class-clustered bootstrap of the
    difference lies above -margin in every primary setting, and in no other setting, and in no
    group of classes, does its upper bound lie below -margin. Either must be calibrated, bear
    spoilt queries, and keep to the budgets.

    Args:
        groups: the group of every class of the store.
        costs: what serving the new model takes.
        challenger_digest: SHA-256 of the new weights.
        baselines: scores by baseline name; used where the domain has no floors.
        champion: scores of the present champion, `None` where there is no champion or where it
            cannot be scored.
        champion_digest: SHA-256 of the champion's weights, `None` if there is no champion.
        champion_problem: why the champion cannot be scored on these episodes (other image shape,
            other store, damaged), if so; promoting then needs a person.
    """
    if champion_digest is not None and champion_digest == challenger_digest:
        return Decision("champion", True, "These weights are the champion already.", ())
    rules = list(_finite(challenger.scores))
    rules += _floors(config, domain, challenger.scores, baselines)
    rules += calibration_rules(challenger.scores, config.max_calibration_error)
    rules += budget_rules(
        costs,
        max_latency_milliseconds=config.max_latency_milliseconds,
        max_weights_bytes=config.max_weights_bytes,
    )
    if champion_digest is None and champion is None:
        rules += _robustness(config, challenger, None)
    elif problem := champion_problem or _not_comparable(challenger, champion):
        reason = (
            f"The champion cannot be compared: {problem}. A person must decide (`metaloom promote "
            "VERSION --force --reason ...`)."
        )
        rules.append(Rule("comparable", None, None, None, False, reason))
    elif champion is not None:
        rules += _against_champion(config, challenger.scores, champion.scores, groups)
        rules += _robustness(config, challenger, champion)
    failed = [rule for rule in rules if not rule.passed]
    if failed:
        return Decision("challenger", False, " ".join(r.reason for r in failed), tuple(rules))
    reached = "meets every floor" if domain in config.floors else "beats its best baseline"
    reason = f"It {reached} and is the first model."
    if champion is not None:
        reason = f"It {reached} and beats the champion on the same episodes."
    return Decision("champion", False, reason, tuple(rules))


def _finite(challenger: Scores) -> Iterable[Rule]:
    for setting, scores in challenger.items():
        share = float(np.isfinite(scores.confidence).mean())
        reason = f"{setting}: {share:.2%} of the answers are finite numbers."
        yield Rule("finite", setting, share, 1.0, share == 1.0, reason)


def _floors(
    config: GateConfig, domain: str, challenger: Scores, baselines: Mapping[str, Scores]
) -> Iterable[Rule]:
    if domain not in config.floors:
        return [
            _beats_baseline(config, s, challenger, baselines) for s in _primary(config, challenger)
        ]
    return [_floor(setting, limit, challenger) for setting, limit in config.floors[domain].items()]


def _primary(config: GateConfig, challenger: Scores) -> tuple[str, ...]:
    return config.primary or tuple(challenger)


def _floor(setting: str, limit: float, challenger: Scores) -> Rule:
    if setting not in challenger:
        reason = (
            f"{setting}: has a floor and was not evaluated; add it to sample_tasks, or drop "
            "the floor."
        )
        return Rule("floor", setting, None, limit, False, reason)
    value = mean_interval(challenger[setting].accuracy).lower
    passed = value >= limit
    reason = f"{setting}: accuracy is at least {value:.4f}, the floor is {limit:.4f}."
    return Rule("floor", setting, value, limit, passed, reason)


def _beats_baseline(
    config: GateConfig, setting: str, challenger: Scores, baselines: Mapping[str, Scores]
) -> Rule:
    known = {name: scores[setting] for name, scores in baselines.items() if setting in scores}
    if setting not in challenger:
        reason = f"{setting}: is a primary setting of the gate and was not evaluated; set primary."
        return Rule("beats_baseline", setting, None, 0.0, False, reason)
    if not known:
        reason = (
            f"{setting}: the domain has no floors, and there is no baseline to beat; "
            "give it floors."
        )
        return Rule("beats_baseline", setting, None, 0.0, False, reason)
    name = max(sorted(known), key=lambda name: float(known[name].accuracy.mean()))
    return _compare(config, "beats_baseline", setting, challenger[setting], known[name], name, 0.0)


def _against_champion(
    config: GateConfig, challenger: Scores, champion: Scores, groups: Sequence[str]
) -> Iterable[Rule]:
    for setting in dict.fromkeys([*_primary(config, challenger), *challenger]):
        if setting not in challenger:
            reason = (
                f"{setting}: is a primary setting of the gate and was not evaluated; add it to "
                "sample_tasks."
            )
            yield Rule("beats_champion", setting, None, None, False, reason)
            continue
        primary = setting in _primary(config, challenger)
        kind: Comparison = "beats_champion" if primary else "no_harm"
        pair = (challenger[setting], champion[setting])
        yield _compare(config, kind, setting, *pair, "the champion", 0.0 - config.margin)
    yield from group_rules(
        challenger,
        champion,
        groups,
        config.bootstrap,
        margin=config.margin,
        min_classes=config.min_group_classes,
    )


def _robustness(
    config: GateConfig, challenger: Answers, champion: Answers | None
) -> Iterable[Rule]:
    if challenger.robustness is None:
        return ()
    return robustness_rules(
        challenger.robustness,
        champion.robustness if champion else None,
        config.bootstrap,
        margin=config.robustness_margin,
        max_drops=config.max_drops,
    )


def _not_comparable(challenger: Answers, champion: Answers | None) -> str | None:
    """Why two learners cannot be compared, or None."""
    if champion is None:
        return "it was not scored"
    if problem := _different_episodes(challenger.scores, champion.scores):
        return problem
    ours, theirs = challenger.robustness, champion.robustness
    if (ours is None) != (theirs is None):
        return "only one of the two was tried with spoilt queries"
    if ours is None or theirs is None:
        return None
    return _different_episodes(_by_name(ours), _by_name(theirs))


def _by_name(robustness: Robustness) -> Scores:
    return {
        f"{robustness.setting} severity {severity}": scores
        for severity, scores in robustness.spoilt.items()
    }


def _different_episodes(challenger: Scores, champion: Scores) -> str | None:
    """What differs between the episodes of two learners, or None."""
    for setting, scores in challenger.items():
        if setting not in champion:
            return f"it was not scored on {setting}"
        if not np.array_equal(scores.query_class, champion[setting].query_class):
            return f"it was scored on other episodes of {setting}"
    return None


def _compare(
    config: GateConfig,
    kind: Comparison,
    setting: str,
    ours: EpisodeScores,
    theirs: EpisodeScores,
    name: str,
    limit: float,
) -> Rule:
    bounds = config.bootstrap.difference(ours, theirs)
    value = bounds.upper if kind == "no_harm" else bounds.lower
    passed = value >= limit if kind == "no_harm" else value > limit
    end = "at most" if kind == "no_harm" else "at least"
    reason = (
        f"{setting}: against {name} the accuracy differs by {bounds.difference:+.4f}, {end} "
        f"{value:+.4f} over {bounds.num_classes} resampled classes; the limit is {limit:+.4f}."
    )
    return Rule(kind, setting, value, limit, passed, reason)
