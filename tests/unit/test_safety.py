"""Each rule beside accuracy refuses the model that fails it alone, and lets its twin through."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from pipeline.deploy.evidence import Answers, Costs, Latency, measure_latency
from pipeline.deploy.gate import Decision, GateConfig
from pipeline.deploy.rule import AT_MOST, Bootstrap
from pipeline.deploy.safety import group_rules
from pipeline.evaluation.robustness import Robustness
from pipeline.evaluation.scoring import EpisodeScores
from pipeline.evaluation.statistics import calibration, class_bootstrap
from tests.unit.test_gate import CHEAP, CONFIG, EQUAL, answered, as_scores, judge, simulate
from tests.unit.tiny_learner import tiny_learner

T = 40
GROUPS = [f"script {c % 4}" for c in range(T)]
BOOTSTRAP = Bootstrap(confidence=0.95, num_draws=1000, seed=0)


def failed(decision: Decision) -> list[str]:
    names = [rule.rule for rule in decision.rules if not rule.passed]
    assert decision.verdict == ("challenger" if names else "champion")
    return names


def sure(scores: EpisodeScores, confidence: float) -> EpisodeScores:
    same = np.full(scores.confidence.shape, confidence, np.float32)
    return replace(scores, confidence=same)


def spoiled(accuracies: dict[int, float], clean: float = 0.9, seed: int = 0) -> Robustness:
    """Right with a stated probability at each severity, on the episodes of `answered`."""
    scores = {s: answered(a, 10 * seed + s) for s, a in accuracies.items()}
    return Robustness("5w1s", answered(clean, 7), scores, np.zeros((300, 75), np.int64))


def test_confidences_that_are_far_from_the_accuracy_are_refused() -> None:
    """All confidences are c, so the calibration error is |accuracy - c|."""
    config = CONFIG.model_copy(update={"max_calibration_error": 0.05})
    scores = answered(0.9)
    accuracy = float(scores.correct.mean())
    honest, boastful = sure(scores, accuracy), sure(scores, accuracy + 0.06)
    assert failed(judge(honest, None, config)) == []
    decision = judge(boastful, None, config)
    assert failed(decision) == ["calibration"]
    (rule,) = (rule for rule in decision.rules if rule.rule == "calibration")
    assert rule.value == pytest.approx(0.06, abs=1e-6)
    assert rule.value == calibration(boastful.confidence, boastful.correct).error
    assert failed(judge(boastful, None, CONFIG)) == []


def test_every_setting_must_be_calibrated() -> None:
    config = CONFIG.model_copy(update={"max_calibration_error": 0.05})
    scores = answered(0.9)
    good, bad = sure(scores, float(scores.correct.mean())), sure(scores, 0.5)
    decision = judge(good, None, config, challenger=Answers({"5w1s": good, "5w5s": bad}, None))
    assert [(r.rule, r.setting) for r in decision.rules if not r.passed] == [
        ("calibration", "5w5s")
    ]


@pytest.mark.parametrize(
    ("costs", "rule"),
    [
        (Costs(Latency(1000.5, 1001.0, 50), 1000), "latency"),
        (Costs(Latency(5.0, 6.0, 50), 100_000_001), "size"),
    ],
)
def test_a_model_beyond_its_budget_is_refused(costs: Costs, rule: str) -> None:
    assert failed(judge(answered(0.9), None, costs=costs)) == [rule]
    assert failed(judge(answered(0.9), None, costs=CHEAP)) == []


def test_a_slow_tail_alone_is_no_slow_model() -> None:
    """The machine's other work makes single runs slow."""
    costs = Costs(Latency(5.0, 90_000.0, 50), 1000)
    assert failed(judge(answered(0.9), None, costs=costs)) == []


def test_a_first_model_may_lose_so_much_by_spoilt_queries_and_no_more() -> None:
    ours = answered(0.9)

    def decision(accuracies: dict[int, float]) -> Decision:
        answers = Answers({"5w1s": ours}, spoiled(accuracies))
        return judge(ours, None, challenger=answers)

    assert failed(decision({1: 0.88, 2: 0.7, 3: 0.5})) == []
    fragile = decision({1: 0.88, 2: 0.5, 3: 0.5})
    assert [(r.rule, r.setting) for r in fragile.rules if not r.passed] == [
        ("robustness", "5w1s severity 2")
    ]
    found = [r for r in fragile.rules if r.rule == "robustness"]
    assert [r.limit for r in found] == [-0.05, -0.25, -0.5]
    robustness = spoiled({1: 0.88, 2: 0.5, 3: 0.5})
    assert [r.value for r in found] == [-robustness.drop(s) for s in (1, 2, 3)]


def test_a_later_model_must_bear_spoilt_queries_as_well_as_the_champion() -> None:
    ours, theirs = answered(0.9, 1), answered(0.8, 2)
    champion = Answers({"5w1s": theirs}, spoiled({1: 0.8, 2: 0.6, 3: 0.4}, seed=1))

    def decision(accuracies: dict[int, float]) -> Decision:
        challenger = Answers({"5w1s": ours}, spoiled(accuracies, seed=2))
        return judge(ours, theirs, challenger=challenger, champion=champion)

    assert failed(decision({1: 0.8, 2: 0.6, 3: 0.4})) == []
    worse = decision({1: 0.8, 2: 0.6, 3: 0.36})
    assert [(r.rule, r.setting) for r in worse.rules if not r.passed] == [
        ("robustness", "5w1s severity 3")
    ]


def test_a_champion_that_was_not_tried_alike_is_no_comparison() -> None:
    ours, theirs = answered(0.9, 1), answered(0.8, 2)
    challenger = Answers({"5w1s": ours}, spoiled({1: 0.8, 2: 0.6, 3: 0.4}))
    decision = judge(ours, theirs, challenger=challenger)
    assert "only one of the two was tried with spoilt queries" in decision.reason
    other = spoiled({1: 0.8, 2: 0.6, 3: 0.4})
    moved = {s: as_scores(x.query_class[::-1], x.predicted_class) for s, x in other.spoilt.items()}
    champion = Answers({"5w1s": theirs}, replace(other, spoilt=moved))
    decision = judge(ours, theirs, challenger=challenger, champion=champion)
    assert "other episodes of 5w1s severity 1" in decision.reason


def hurt(scores: EpisodeScores, group: str, share: float) -> EpisodeScores:
    """Some right answers to one group's queries made wrong: another class of the episode."""
    rng = np.random.default_rng(5)
    member = np.array([GROUPS[c] == group for c in range(T)])[scores.query_class]
    wrong = np.roll(scores.query_class, 15, axis=1)  # the queries of a class stand together
    chosen = member & (rng.random(member.shape) < share)
    return as_scores(scores.query_class, np.where(chosen, wrong, scores.predicted_class))


def test_a_gain_elsewhere_does_not_buy_a_loss_in_one_group() -> None:
    champion = answered(0.7, 1)
    better = answered(0.9, 2)
    assert failed(judge(better, champion, groups=GROUPS)) == []
    unfair = hurt(better, "script 2", 0.35)
    decision = judge(unfair, champion, groups=GROUPS)
    assert failed(decision) == ["group_no_harm"]
    assert "script 2 is the worst" in decision.reason
    assert failed(judge(unfair, champion)) == [], "better over all"
    config = CONFIG.model_copy(update={"margin": 0.2})
    assert failed(judge(unfair, champion, config, groups=GROUPS)) == []


def test_the_worst_of_several_groups_gets_an_interval_as_much_wider() -> None:
    """Of four groups each is judged at 1 - 0.05 / 4."""
    champion, better = answered(0.7, 1), hurt(answered(0.9, 2), "script 2", 0.35)
    ids = np.array([c for c in range(T) if GROUPS[c] == "script 2"])
    given = (better.query_class, better.predicted_class, champion.predicted_class)
    expected = class_bootstrap(*given, num_draws=1000, confidence=1 - 0.05 / 4, among=ids)
    (rule,) = (r for r in judge(better, champion, groups=GROUPS).rules if "group" in r.rule)
    assert rule.value == expected.upper


def test_groups_of_few_classes_are_named_not_passed_in_silence() -> None:
    groups = ["rare" if c < 4 else f"script {c % 2}" for c in range(T)]
    champion, better = answered(0.8, 1), answered(0.9, 2)
    (rule,) = (r for r in judge(better, champion, groups=groups).rules if "group" in r.rule)
    assert "of 2 groups" in rule.reason
    assert "Not judged, with fewer than 5 classes: rare." in rule.reason
    config = CONFIG.model_copy(update={"min_group_classes": T})
    (rule,) = (r for r in judge(better, champion, config, groups=groups).rules if "group" in r.rule)
    assert (rule.value, rule.passed) == (None, True)
    assert "no group has enough classes" in rule.reason
    assert "rare, script 0, script 1" in rule.reason


@pytest.mark.parametrize("groups", [(), [""] * T, ["one"] * T])
def test_one_group_or_none_is_the_setting_itself(groups: list[str]) -> None:
    decision = judge(answered(0.9, 2), answered(0.8, 1), groups=groups)
    assert "group_no_harm" not in {rule.rule for rule in decision.rules}


def test_equal_models_are_seldom_refused_for_a_group() -> None:
    """Five groups of eight classes, none of them worse: 2.5 % for the worst of them."""
    rng = np.random.default_rng(0)
    groups = [f"script {c % 5}" for c in range(T)]
    refused = 0
    for _ in range(60):
        ours, theirs = ({"5w1s": one} for one in simulate(rng, EQUAL, T=T, E=150))
        (rule,) = group_rules(ours, theirs, groups, BOOTSTRAP, margin=0.0, min_classes=5)
        refused += not rule.passed
    assert refused <= 4


def test_the_bootstrap_among_all_classes_is_the_plain_one() -> None:
    first, second = answered(0.9, 1), answered(0.8, 2)
    given = (first.query_class, first.predicted_class, second.predicted_class)
    plain = class_bootstrap(*given, num_draws=1000)
    assert class_bootstrap(*given, num_draws=1000, among=np.arange(T)) == plain


def test_the_bootstrap_among_some_classes_is_about_their_queries() -> None:
    """The groups' differences, weighted by their queries, add up to that of all."""
    first, second = answered(0.9, 1), hurt(answered(0.9, 1), "script 1", 0.5)
    given = (first.query_class, first.predicted_class, second.predicted_class)
    whole, share = 0.0, first.query_class.size
    for name in sorted(set(GROUPS)):
        ids = np.array([c for c in range(T) if GROUPS[c] == name])
        asked = np.isin(first.query_class, ids)
        bounds = class_bootstrap(*given, num_draws=1000, among=ids)
        direct = float(first.correct[asked].mean() - second.correct[asked].mean())
        assert bounds.difference == pytest.approx(direct, abs=1e-12)
        assert bounds.num_classes == len(ids)
        assert (bounds.lower > 0.2) == (name == "script 1")
        whole += direct * asked.sum() / share
    assert class_bootstrap(*given, num_draws=1000).difference == pytest.approx(whole, abs=1e-12)


def test_latency_is_measured_on_one_thread_and_leaves_the_setting() -> None:
    import torch

    before = torch.get_num_threads()
    found = measure_latency(tiny_learner())
    assert 0 < found.median_milliseconds <= found.p95_milliseconds
    assert found.num_runs >= 5
    assert torch.get_num_threads() == before


def test_every_rule_says_value_and_limit_and_which_side_is_good() -> None:
    ours, theirs = answered(0.9, 1), answered(0.8, 2)
    spoilt = spoiled({1: 0.8, 2: 0.6, 3: 0.4})
    decision = judge(
        ours,
        theirs,
        challenger=Answers({"5w1s": ours}, spoilt),
        champion=Answers({"5w1s": theirs}, spoilt),
        groups=GROUPS,
    )
    assert decision.verdict == "champion"
    for rule in decision.rules:
        assert rule.value is not None and rule.limit is not None and rule.reason
        good = rule.value <= rule.limit if rule.rule in AT_MOST else rule.value >= rule.limit
        assert good == rule.passed


@pytest.mark.parametrize(
    "change",
    [
        {"max_drops": [0.1, 0.2]},
        {"max_calibration_error": -0.1},
        {"max_latency_milliseconds": 0},
        {"max_weights_bytes": 0},
        {"min_group_classes": 1},
    ],
)
def test_limits_that_cannot_be_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        GateConfig.model_validate(change)
