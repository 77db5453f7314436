"""When a retraining goes on, what it may cost, and who is told."""

from __future__ import annotations

from typing import Literal, TypeAlias

from pydantic import Field, NonNegativeInt, PositiveFloat

from pipeline.core.config import Section

Because: TypeAlias = Literal["cron", "data", "drift", "manual"]
"""What set a retraining off: the clock, new data, drift of the served traffic, or a person."""

State: TypeAlias = Literal[
    "promoted", "not_promoted", "no_change", "too_few", "steady", "over_budget", "failed"
]
"""How a retraining ended."""
WORTH_TELLING: frozenset[State] = frozenset({"promoted", "not_promoted", "over_budget", "failed"})
"""What the webhook hears of; a night without news is silent."""


class RetrainConfig(Section):
    """The policy of `metaloom retrain`."""

    min_new_examples: NonNegativeInt = 1
    """New training examples that a retraining needs, where neither code nor parameters changed."""
    start: Literal["scratch", "champion"] = "scratch"
    """Where meta-training begins: `scratch` at the best candidate of pre-training, `champion` at
    the weights that serve now (the first model has none)."""
    max_hours: PositiveFloat = 6.0
    """Wall-clock hours; a run that takes longer is stopped behind a checkpoint and reported."""
    max_worker_hours: PositiveFloat | None = None
    """Hours times workers (times GPUs, where each worker has one); none: no such limit."""
    on_failed_gate: Literal["report", "fail"] = "report"
    """What a candidate that is not promoted means to whoever started the run: `report` ends well,
    with the reasons in the report; `fail` ends with status 3 besides."""
    webhook: str = Field(
        default="", pattern=r"^(https://.+|http://(127\.0\.0\.1|localhost)(:\d+)?/.*)?$"
    )
    """Address that is sent each outcome worth knowing, as JSON. One that holds a secret belongs in
    METALOOM_WEBHOOK instead, which wins."""

    def budget_seconds(self, num_workers: int) -> float:
        """How long a run with so many workers may take."""
        hours = self.max_hours
        if self.max_worker_hours is not None:
            hours = min(hours, self.max_worker_hours / num_workers)
        return 3600 * hours
