"""How versions do on real requests: what fails, who agrees, and when it is enough."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from pipeline.core.errors import PipelineError
from pipeline.deploy.serve.messages import ModelRef, Tally
from pipeline.deploy.serve.model import Answers, Version
from pipeline.deploy.serve.problems import Problem
from pipeline.deploy.serve.settings import Budget
from pipeline.runtime.logs import say

_KEPT = 8
"""Versions whose tallies are kept."""


class BrokenModelError(Exception):
    """A version failed, or answered with what are no probabilities."""


@dataclass
class _Watched:
    tally: Tally = field(default_factory=Tally)
    recent: deque[bool] = field(default_factory=deque)
    """Whether each of the latest answers failed"""
    spent: bool = False


@dataclass
class Watch:
    """Counts for each version; all calls come from the event loop."""

    budget: Budget
    on_spent: Callable[[ModelRef, str], None]
    """Called once, when a version has failed more often than its budget allows"""
    on_answer: Callable[[ModelRef, str], None] = lambda ref, outcome: None
    _watched: dict[str, _Watched] = field(default_factory=dict)
    """By bundle, the latest last"""

    @contextmanager
    def over(self, version: Version) -> Iterator[None]:
        """Count what a version does in the body: well, or not.

        Raises:
            BrokenModelError: it failed. A client's mistake, a busy service or a client that has
                gone are no failures of the model, and pass through.
        """
        try:
            yield
        except (Problem, PipelineError):
            raise
        except Exception as error:
            self._failed(version.ref, f"{type(error).__name__}: {error}")
            raise BrokenModelError(str(version.ref.version)) from error
        self._count(version.ref, failed=False)

    def compared(self, version: Version, agreed: int, queries: int) -> None:
        """A challenger answered in the shadow what the champion had answered."""
        tally = self._of(version.ref).tally
        tally.compared += queries
        tally.agreed += agreed
        self.on_answer(version.ref, "agreed" if agreed == queries else "differed")

    def tally(self, version: Version | None) -> Tally:
        """What is known of a version."""
        known = self._watched.get(version.ref.bundle) if version else None
        return known.tally.model_copy() if known else Tally()

    def begin_anew(self, version: Version) -> None:
        """It serves from now on: what was before is forgiven, and the budget is whole."""
        self._watched.pop(version.ref.bundle, None)

    def _failed(self, ref: ModelRef, why: str) -> None:
        watched = self._of(ref)
        if not watched.tally.failed:
            say("failure", version=str(ref.version), why=why.splitlines()[0][:200])
        self._count(ref, failed=True)
        failures = sum(watched.recent)
        if failures > self.budget.failures and not watched.spent:
            watched.spent = True
            share = f"{failures} of its latest {len(watched.recent)} answers failed"
            cause = why.splitlines()[0][:200]
            self.on_spent(ref, f"its error budget is spent: {share} ({cause})")

    def _count(self, ref: ModelRef, *, failed: bool) -> None:
        watched = self._of(ref)
        watched.tally.answered += not failed
        watched.tally.failed += failed
        watched.recent.append(failed)
        while len(watched.recent) > self.budget.answers:
            watched.recent.popleft()
        self.on_answer(ref, "failed" if failed else "answered")

    def _of(self, ref: ModelRef) -> _Watched:
        known = self._watched.pop(ref.bundle, None) or _Watched()
        self._watched[ref.bundle] = known
        for old in list(self._watched)[:-_KEPT]:
            del self._watched[old]
        return known


def require_probabilities(answers: Answers) -> None:
    """Raises FloatingPointError where a version answered with NaN or infinity."""
    if not torch.isfinite(answers.probabilities).all():
        raise FloatingPointError("its answers are no probabilities")
