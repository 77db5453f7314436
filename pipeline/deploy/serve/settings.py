"""How the service runs: limits, rates, where learners are kept, which versions it follows."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from pipeline.core.config import Section

Policy = Literal["follow", "pin"]
"""What a learner does when the champion changes: is learned anew by it, or stays with its own."""


class Limits(Section):
    """What one request may hold; more is refused before any work is done."""

    body_bytes: PositiveInt = 10_000_000
    """Of a whole request; 413 beyond."""
    ways: int = Field(default=20, ge=2)
    """Classes of a learner."""
    shots: PositiveInt = 20
    """Examples of one class."""
    queries: PositiveInt = 100
    """Queries of one request."""
    pixels: PositiveInt = 4_000_000
    """Of one picture, judged by its header, before decoding."""
    pixels_together: PositiveInt = 40_000_000
    """Of all examples, or all queries, of one request: it is time that they take, and a picture of
    one colour has a thousand pixels to a byte."""
    side: PositiveInt = 4096
    """Pixels of a picture's longer side."""
    learners: PositiveInt = 10_000
    """Learners that one owner may keep."""


class Rates(Section):
    """How much work is taken on; what is over is told to come back later."""

    requests_per_second: PositiveFloat = 200.0
    """Of one key, on average; 429 beyond."""
    burst: PositiveInt = 400
    """Requests of one key that may come at once."""
    concurrent: PositiveInt = 64
    """Requests of one key in work; 429 beyond."""
    waiting: PositiveInt = 256
    """Requests of all keys that may wait for the model; 503 beyond."""
    body_seconds: PositiveFloat = 10.0
    """For a client to send its request; 408 beyond."""
    answer_seconds: PositiveFloat = 30.0
    """For an answer to be ready; 503 beyond."""


class Challenge(Section):
    """What the version of @challenger does while it waits for a decision."""

    share: float = Field(default=0.0, ge=0, le=1)
    """Of the learners that follow the champion: it answers these (a canary), always the same ones;
    where it fails, the champion answers."""
    shadow: float = Field(default=0.0, ge=0, le=1)
    """Of the champion's answers: it gives these too, seen by nobody, while nothing else waits."""


class Budget(Section):
    """How often a version may fail before the one before it serves again."""

    failures: PositiveInt = 5
    """Failed answers; one more, and the version goes."""
    answers: PositiveInt = 500
    """Among so many of its latest."""


class ServeSettings(Section):
    """Everything about a service but its model's name and its address."""

    database: str = "sqlite:///.metaloom/serve/learners.db"
    """Where learners and keys are kept: any SQLAlchemy URL; PostgreSQL for several replicas."""
    cache: str = ".metaloom/serve/versions"
    """Folder of verified bundles: the service starts from here when the registry is away."""
    policy: Policy = "follow"
    """For learners that do not say."""
    poll_seconds: PositiveFloat = 10.0
    """Between two looks at @champion."""
    rows_per_pass: PositiveInt = 16
    """Pictures in a pass of the network, always: so an answer has the same bits in any company."""
    threads: PositiveInt = 1
    """Of a pass; the same number gives the same bits."""
    passes: PositiveInt = 1
    """At once, each in threads of its own; any number gives the same bits. More than one is for
    networks that take most of the time: small ones wait for Python's interpreter instead."""
    ready_learners: PositiveInt = 2000
    """Adapted learners kept in memory."""
    drain_seconds: NonNegativeFloat = 0.0
    """From the wish to stop, when /readyz begins to say no, until no more requests are taken."""
    challenge: Challenge = Challenge()
    """Of a waiting version."""
    budget: Budget = Budget()
    """Of every version."""
    signed_by: str | None = None
    """Public key (PEM); only bundles that are signed by it serve. None: signatures are not looked
    at."""
    strict: bool = False
    """Follow @champion only where the record of its promotion is signed by that key too."""
    limits: Limits = Limits()
    """Of one request."""
    rates: Rates = Rates()
    """Of all requests."""

    @property
    def public_key(self) -> Path | None:
        """Where the key of `signed_by` is."""
        return None if self.signed_by is None else Path(self.signed_by)

    @model_validator(mode="after")
    def _strict_needs_a_key(self) -> Self:
        if self.strict and self.signed_by is None:
            raise ValueError("strict needs signed_by, the public key that promotions are signed by")
        return self
