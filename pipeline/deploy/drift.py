"""Drift: whether what a service is asked still looks like what its model was validated on.

Two things about a query can be seen without its label: how alike it is to its nearest support
example, and how sure the answer is. Both depend on the number of classes and examples, so a query
is placed among the validation queries of a like-shaped support set: its rank. Ranks of steady
traffic are spread evenly whatever learners are asked, and can be added up over all of them.

B bins of rank, K vectors of signs, L learners, M shapes (ways, shots), 2 signals.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, Field, PositiveInt, model_validator

from pipeline.core.config import Section

if TYPE_CHECKING:
    import sqlalchemy as sa

Floats: TypeAlias = npt.NDArray[np.float64]
Ints: TypeAlias = npt.NDArray[np.int64]
SIGNALS = ("similarity", "confidence")
BINS = 20
NUM_SIGNS = 128
_NUM_DRAWS = 4_000
_TESTS = 4
"""Two numbers for each of two signals: each gets its part of the false alarms"""
_SUMS_TO_ONE = 1e-3
_LIKE = 1.5
"""Ratio of the ways times ratio of the shots, up to which two shapes are alike"""


class Reference(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """What validation queries look like; a part of the bundle."""

    split: Literal["val"]
    episodes: dict[str, str]
    """Digest of every set of episodes, by setting."""
    classes: int
    """Distinct classes of the queries."""
    shapes: list[tuple[PositiveInt, PositiveInt]] = Field(min_length=1, max_length=200)
    """[M] (ways, shots)"""
    edges: list[list[list[float]]]
    """[M, 2, B - 1] ascending: between these values the ranks of a shape lie."""
    shares: list[list[list[float]]]
    """[M, 2, B] of the validation queries; 1/B each but for values that occur often."""
    noise: list[list[float]]
    """[2B, 2B] covariance of the shares, over the classes: how far other classes may lie."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        num = len(self.shapes)
        for name, shape in (
            ("edges", (num, 2, BINS - 1)),
            ("shares", (num, 2, BINS)),
            ("noise", (2 * BINS, 2 * BINS)),
        ):
            found = np.array(getattr(self, name), dtype=np.float64)  # ragged ones raise ValueError
            if found.shape != shape:
                raise ValueError(f"{name} has the shape {found.shape}, not {shape}")
        shares = np.array(self.shares)
        if (np.diff(self.edges, axis=2) < 0).any() or (shares < 0).any():
            raise ValueError("edges must ascend, and no share be negative")
        if (np.abs(shares.sum(axis=2) - 1) > _SUMS_TO_ONE).any():
            raise ValueError("the shares of a shape must sum to one")
        return self


@dataclass(frozen=True)
class Counts:
    """What was asked, added up: no query and no learner can be told from it."""

    shapes: Ints
    """[M] queries by the shape of their support set"""
    ranks: Ints
    """[2, B]"""
    signed: Ints
    """[K, 2, B] the same, each learner's with a sign of its own"""

    def __add__(self, other: Counts) -> Counts:
        """Of both; a learner that is in both is one learner still."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Counts(*(a + b for a, b in pairs))

    @property
    def queries(self) -> int:
        """How many."""
        return int(self.shapes.sum())

    @property
    def learners(self) -> float:
        """How many learners with equally many queries each would tell as much.

        With m_l queries of learner l that is (Σ m_l)² / Σ m_l². The random signs s_l of any one of
        the K sums have E[(Σ s_l m_l)²] = Σ m_l², wherever and whenever the m_l were counted.
        """
        squares = float((self.signed[:, 0].sum(axis=1).astype(np.float64) ** 2).mean())
        return self.queries**2 / squares if squares else 0.0

    def text(self) -> str:
        """As JSON."""
        return json.dumps({name: array.tolist() for name, array in vars(self).items()})


def counts_of(text: str, num_shapes: int) -> Counts:
    """Counts from their JSON.

    Raises:
        ValueError: it is none, or of another reference.
    """
    found = json.loads(text)
    wanted = {"shapes": (num_shapes,), "ranks": (2, BINS), "signed": (NUM_SIGNS, 2, BINS)}
    if not isinstance(found, dict) or set(found) != set(wanted):
        raise ValueError("these are no counts")
    arrays = {name: np.array(found[name], dtype=np.int64) for name in wanted}
    if any(arrays[name].shape != shape for name, shape in wanted.items()):
        raise ValueError("these counts are of another reference")
    return Counts(**arrays)


def no_counts(num_shapes: int) -> Counts:
    """Nothing yet."""
    zeros = [(num_shapes,), (2, BINS), (NUM_SIGNS, 2, BINS)]
    return Counts(*(np.zeros(shape, dtype=np.int64) for shape in zeros))


def signs_of(learners: Sequence[str]) -> npt.NDArray[np.int8]:
    """[L, K] each -1 or 1: a learner's own, the same everywhere and always."""
    size = NUM_SIGNS // 8
    digests = [hashlib.blake2b(one.encode(), digest_size=size).digest() for one in learners]
    bytes_Lk = np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(len(learners), size)
    return np.unpackbits(bytes_Lk, axis=1).astype(np.int8) * np.int8(2) - np.int8(1)


class DriftRules(Section):
    """When traffic counts as drifted."""

    days: PositiveInt = 7
    """Of traffic that are looked at, today included."""
    false_alarms: float = Field(default=0.01, gt=0, lt=0.5)
    """Share of looks at steady traffic that may call it drift."""
    least_queries: PositiveInt = 200
    """With fewer nothing is said."""
    least_learners: float = Field(default=30.0, ge=10)
    """With fewer, counted as if all were asked alike often, nothing is said."""
    least_distance: float = Field(default=0.1, ge=0, le=1)
    """Kolmogorov-Smirnov distance below which a shift is too small to matter, however certain."""
    least_index: float = Field(default=0.2, ge=0)
    """The same for the population stability index."""


@dataclass(frozen=True)
class Shift:
    """How the traffic lies in one signal."""

    ks: float
    """Largest difference between the shares below a rank (Kolmogorov-Smirnov, binned)."""
    ks_limit: float
    psi: float
    """Population stability index."""
    psi_limit: float
    lower: float
    """By how much the mean rank is lower than it was, in [-0.5, 0.5]; negative: higher."""

    @property
    def drifted(self) -> bool:
        """Beyond either limit."""
        return self.ks > self.ks_limit or self.psi > self.psi_limit


@dataclass(frozen=True)
class DriftTold:
    """What is known of a version's traffic."""

    verdict: Literal["drift", "steady", "too_few", "unknown"]
    why: str
    """A sentence."""
    bundle: str
    """Digest."""
    days: int
    queries: int = 0
    learners: float = 0.0
    """As if all had been asked alike often."""
    similarity: Shift | None = None
    confidence: Shift | None = None

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


def judge(reference: Reference, counts: Counts, rules: DriftRules, *, bundle: str) -> DriftTold:
    """Compare what was served with what the model was validated on.

    A limit is the larger of two: what the distance must have to matter (`least_distance`,
    `least_index`), and what luck alone brings about in the share `false_alarms` of looks at steady
    traffic. Luck is that of the learners (all queries of one share its support set; the signed
    sums give their covariance as a bootstrap of learners with random signs would) and that of the
    validation classes, which are a few of many. So few queries need a large distance, many queries
    do not make a small one matter, and the index, whose value for steady traffic falls with the
    number of queries, has no fixed threshold.

    Pure: the same counts give the same answer.
    """
    told = {"bundle": bundle, "days": rules.days, "queries": counts.queries}
    learners = round(counts.learners, 1)
    if counts.queries < rules.least_queries or learners < rules.least_learners:
        why = (
            f"{counts.queries:,} queries to as good as {learners:,.0f} learners say nothing; it "
            f"takes {rules.least_queries:,} and {rules.least_learners:,.0f}"
        )
        return DriftTold("too_few", why, learners=learners, **told)  # type: ignore[arg-type]
    shifts = _shifts(reference, counts, rules)
    drifted = [name for name, one in shifts.items() if one.drifted]
    why = "; ".join(_sentence(name, one) for name, one in shifts.items())
    verdict = "drift" if drifted else "steady"
    return DriftTold(verdict, why, learners=learners, **told, **shifts)  # type: ignore[arg-type]


def _sentence(name: str, one: Shift) -> str:
    limits = f"KS {one.ks:.3f} (limit {one.ks_limit:.3f}), PSI {one.psi:.3f} ({one.psi_limit:.3f})"
    return f"{name} {limits}, {'lower' if one.lower > 0 else 'higher'} by {abs(one.lower):.0%}"


def _shifts(reference: Reference, counts: Counts, rules: DriftRules) -> dict[str, Shift]:
    n = counts.queries
    weights_M = counts.shapes / n
    expected_2B = np.einsum("m,msb->sb", weights_M, np.array(reference.shares))
    served_2B = counts.ranks / n
    noise_D2B = draws(np.array(reference.noise) + served_noise(counts))
    steady_D2B = expected_2B + noise_D2B
    beyond = 1 - rules.false_alarms / _TESTS
    found = {}
    for i, name in enumerate(SIGNALS):
        luck_ks = np.quantile(distance(steady_D2B[:, i], expected_2B[i]), beyond)
        luck_psi = np.quantile(stability_index(steady_D2B[:, i], expected_2B[i], n), beyond)
        middles = (np.arange(BINS) + 0.5) / BINS
        found[name] = Shift(
            ks=round(float(distance(served_2B[i], expected_2B[i])), 4),
            ks_limit=round(max(rules.least_distance, float(luck_ks)), 4),
            psi=round(float(stability_index(served_2B[i], expected_2B[i], n)), 4),
            psi_limit=round(max(rules.least_index, float(luck_psi)), 4),
            lower=round(float((expected_2B[i] - served_2B[i]) @ middles), 4),
        )
    return found


def distance(shares: Floats, expected_B: Floats) -> Any:
    """Kolmogorov-Smirnov distance of shares [..., B] from others, on these bins."""
    return np.abs(np.cumsum(shares - expected_B, axis=-1)).max(axis=-1)


def stability_index(shares: Floats, expected_B: Floats, queries: int) -> Any:
    """Σ (p - e) log(p / e) of shares [..., B]; an empty bin counts as half a query."""
    least = 0.5 / queries
    p, e = np.maximum(shares, least), np.maximum(expected_B, least)
    return ((p - e) * np.log(p / e)).sum(axis=-1)


def served_noise(counts: Counts) -> Floats:
    """Covariance [2B, 2B] of the served shares, when learners are what is drawn.

    Learner l with m_l queries, n_l of them by bin, contributes n_l - m_l p to the deviation from
    the shares p. Sums of these with random signs have the covariance Σ (n_l - m_l p)(...)ᵀ on
    average, and it is that of the deviation, for learners that are independent of each other.
    """
    n = counts.queries
    signed_K2B = counts.signed.astype(np.float64)
    total_K21 = signed_K2B.sum(axis=2, keepdims=True)
    rest = (signed_K2B - total_K21 * (counts.ranks / n)).reshape(NUM_SIGNS, -1) / n
    found: Floats = rest.T @ rest / NUM_SIGNS
    return found


def draws(covariance: Floats) -> Floats:
    """Deviations [D, 2, B] with this covariance; always the same random numbers."""
    values, vectors = np.linalg.eigh(covariance)
    factor = vectors * np.sqrt(np.maximum(values, 0))
    normal = np.random.default_rng(0).standard_normal((_NUM_DRAWS, len(values)))
    found: Floats = (normal @ factor.T).reshape(_NUM_DRAWS, 2, -1)
    return found


def served_drift(database_url: str, bundle: str, rules: DriftRules | None = None) -> DriftTold:
    """Whether the traffic that a version answered as champion has drifted, over all replicas.

    Services write what they count into their database about once a minute; this adds it up over
    `rules.days` days. Read-only but for tables that are not there yet; takes well below a second.

    Args:
        database_url: of the services (`serve.database`), as SQLAlchemy takes it.
        bundle: digest of the version's bundle (`Version.digest`, `ModelRef.bundle`).
        rules: limits; the defaults where None.

    Returns:
        Verdict `drift` or `steady`; `too_few` while there is too little traffic to tell; `unknown`
        where nothing was told of this bundle, or it has no reference (it was made by a version of
        this program that made none). `why` says it in words.

    Raises:
        ConfigError: that is no address of a database.
        MachineError: it does not answer, or its driver is not installed.
    """
    from pipeline.deploy.serve.learners import open_database

    engine = open_database(database_url)
    try:
        return drift_in(engine, bundle, rules or DriftRules())
    finally:
        engine.dispose()


def drift_in(engine: sa.Engine, bundle: str, rules: DriftRules) -> DriftTold:
    """`served_drift`, in a database that is open.

    Raises:
        MachineError: it does not answer.
    """
    import sqlalchemy as sa

    from pipeline.deploy.serve.learners import REFERENCES, TRAFFIC

    first = (datetime.now(UTC) - timedelta(days=rules.days - 1)).date().isoformat()
    here = (TRAFFIC.c.bundle == bundle) & (TRAFFIC.c.day >= first)
    with engine.connect() as connection:
        known = connection.execute(
            sa.select(REFERENCES.c.told).where(REFERENCES.c.bundle == bundle)
        ).scalar_one_or_none()
        rows = connection.execute(sa.select(TRAFFIC.c.told).where(here)).scalars().all()
    if not known:
        why = "no service has told of its traffic" if known is None else "it has no reference"
        return DriftTold("unknown", f"bundle {bundle[:12]}: {why}", bundle, rules.days)
    try:
        reference = Reference.model_validate_json(known)
    except ValueError:
        why = f"bundle {bundle[:12]}: its reference is of another version of this program"
        return DriftTold("unknown", why, bundle, rules.days)
    return judge(reference, added_up(rows, len(reference.shapes)), rules, bundle=bundle)


def added_up(rows: Sequence[str], num_shapes: int) -> Counts:
    """The sum of what replicas have written; what is of another version of this is left out."""
    total = no_counts(num_shapes)
    for row in rows:
        try:
            total = total + counts_of(row, num_shapes)
        except (ValueError, OverflowError, TypeError):
            continue
    return total


def nearest_shape(shapes: Sequence[tuple[int, int]], ways: int, shots: float) -> int | None:
    """The shape that is the most like a support set, by the ratios of both numbers.

    None where even that is too far: ranks among its queries would be shifted without any drift.
    """
    ratios = [abs(math.log(ways / w)) + abs(math.log(shots / s)) for w, s in shapes]
    best = min(ratios)
    return ratios.index(best) if best <= math.log(_LIKE) else None
