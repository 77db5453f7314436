"""What a replica sees of its champion's queries: added up, exported, written for all to add up.

B bins of rank, K vectors of signs, R requests, n queries.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from pipeline.deploy.drift import (
    BINS,
    SIGNALS,
    Counts,
    Reference,
    nearest_shape,
    no_counts,
    signs_of,
)
from pipeline.deploy.serve.learners import REFERENCES, TRAFFIC
from pipeline.deploy.serve.messages import Predictions
from pipeline.deploy.serve.model import Version

Floats: TypeAlias = npt.NDArray[np.float64]
KEPT_DAYS = 60
WRITE_SECONDS, LOOKS_PER_WRITE = 60.0, 6
_KEPT = 8
"""Versions that are remembered."""
_LOWEST = {"similarity": -1.0, "confidence": 0.0}
_FIXED = 20
"""Bins of the exported histograms for a range of one"""
_TOGETHER = 32
"""Requests; a product of matrices this small is computed by one thread"""
_APART = 4.0
"""More than two values of a signal can differ by"""


@dataclass(frozen=True)
class _Request:
    """What is kept of one until it is added up."""

    learner: str
    """Its id, or the digest of the first example of a support set that nobody keeps"""
    ways: int
    examples: int
    similarities: list[float]
    confidences: list[float]


class Seen:
    """One version's traffic; all calls come under the lock of `Traffic`."""

    def __init__(self, version: Version) -> None:
        """Nothing yet."""
        self.label = str(version.ref.version)
        self.reference: Reference | None = version.bundle.reference
        self.fixed = {s: np.zeros(round(_FIXED * (1 - _LOWEST[s])), np.int64) for s in SIGNALS}
        self.total = 0.0
        """Of all confidences"""
        self.ranks = np.zeros((len(SIGNALS), BINS), np.int64)
        self.days: dict[str, Counts] = {}
        self.unwritten: set[str] = set()
        self._shapes: dict[tuple[int, int], int | None] = {}
        self._waiting: list[_Request] = []
        if self.reference is not None:
            edges = (
                np.array(self.reference.edges) + _APART * np.arange(len(self.shapes))[:, None, None]
            )
            self._edges = [edges[:, i].ravel() for i in range(len(SIGNALS))]

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Of the reference."""
        return self.reference.shapes if self.reference is not None else []

    def add(self, request: _Request) -> None:
        """One request; they are added up by some dozens, which costs each a tenth."""
        self._waiting.append(request)
        if len(self._waiting) >= _TOGETHER:
            self.add_up()

    def add_up(self) -> None:
        """Nothing waits from now on."""
        requests, self._waiting = self._waiting, []
        if not requests:
            return
        values_2n = np.array(
            [
                [one for request in requests for one in request.similarities],
                [one for request in requests for one in request.confidences],
            ]
        )
        for signal, values in zip(SIGNALS, values_2n, strict=True):
            fixed = self.fixed[signal]
            places = ((values - _LOWEST[signal]) * _FIXED).astype(np.int64)
            fixed += np.bincount(places.clip(0, len(fixed) - 1), minlength=len(fixed))
        self.total += float(values_2n[1].sum())
        if self.reference is not None:
            self._rank(requests, values_2n)

    def _rank(self, requests: list[_Request], values_2n: Floats) -> None:
        """Add up the ranks of the queries to support sets that the reference has the like of."""
        num = len(requests)
        sizes = [len(request.similarities) for request in requests]
        found = [self._shape(request.ways, request.examples) for request in requests]
        shape_n = np.repeat([-1 if shape is None else shape for shape in found], sizes)
        like = shape_n >= 0
        shape_n, values_2n = shape_n[like], values_2n[:, like]
        request_n = np.repeat(np.arange(num), sizes)[like]
        ranks_R2B = np.empty((num, len(SIGNALS), BINS), np.int64)
        for i, values in enumerate(values_2n):
            # The edges of all shapes in one row, each shape's apart from those of the others.
            places = self._edges[i].searchsorted(values + _APART * shape_n, side="right")
            bins = places - shape_n * (BINS - 1) + request_n * BINS
            ranks_R2B[:, i] = np.bincount(bins, minlength=num * BINS).reshape(num, BINS)
        day = datetime.now(UTC).date().isoformat()
        counts = self.days.setdefault(day, no_counts(len(self.shapes)))
        self.unwritten.add(day)
        ranks_2B = ranks_R2B.sum(axis=0)
        signs_RK = signs_of([request.learner for request in requests]).astype(np.float32)
        signed = signs_RK.T @ ranks_R2B.reshape(num, -1).astype(np.float32)  # whole numbers < 2^24
        for array, more in (
            (self.ranks, ranks_2B),
            (counts.ranks, ranks_2B),
            (counts.shapes, np.bincount(shape_n, minlength=len(self.shapes))),
            (counts.signed, signed.astype(np.int64).reshape(counts.signed.shape)),
        ):
            np.add(array, more, out=array)

    def _shape(self, ways: int, examples: int) -> int | None:
        key = (ways, examples)
        if key not in self._shapes:
            self._shapes[key] = nearest_shape(self.shapes, ways, examples / ways)
        return self._shapes[key]


@dataclass(eq=False)
class Traffic(Collector):
    """Every version's traffic in this process: counts alone, nothing that was sent.

    Queries come from the event loop, `write` from the thread that looks at the registry.
    """

    engine: sa.Engine
    replica: str
    write_seconds: float = WRITE_SECONDS
    _seen: dict[str, Seen] = field(default_factory=dict)
    """By bundle, the latest last"""
    _told: set[str] = field(default_factory=set)
    """Bundles whose reference is in the database"""
    _written: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _writing: threading.Lock = field(default_factory=threading.Lock)
    """Who ends the service writes too, maybe beside the thread that looks"""

    def serves(self, version: Version) -> None:
        """It is the champion from now on."""
        with self._lock:
            self._of(version)

    def answered(self, version: Version, learner: str, examples: int, told: Predictions) -> None:
        """A champion answered queries to a learner (or to a support set that nobody keeps)."""
        request = _Request(
            learner,
            ways=len(told.predictions[0].probabilities),
            examples=examples,
            similarities=[one.nearest[0].similarity for one in told.predictions],
            confidences=[one.confidence for one in told.predictions],
        )
        with self._lock:
            self._of(version).add(request)

    def _of(self, version: Version) -> Seen:
        bundle = version.ref.bundle
        seen = self._seen.pop(bundle) if bundle in self._seen else Seen(version)
        self._seen[bundle] = seen
        for old in list(self._seen)[:-_KEPT]:
            del self._seen[old]
        return seen

    def _add_up(self) -> None:
        for seen in self._seen.values():
            seen.add_up()

    def write(self, *, at_once: bool = False) -> None:
        """Put what is new into the database, if it is time.

        Raises:
            MachineError: the database does not answer; nothing is lost, the next call tries again.
        """
        with self._writing:
            if at_once or time.monotonic() - self._written >= self.write_seconds:
                self._write()
                self._written = time.monotonic()

    def _write(self) -> None:
        with self._lock:
            self._add_up()
            references = {b: s.reference for b, s in self._seen.items() if b not in self._told}
            taken = {
                (bundle, day): copy.deepcopy(seen.days[day])
                for bundle, seen in self._seen.items()
                for day in seen.unwritten
            }
            for seen in self._seen.values():
                seen.unwritten.clear()
        try:
            for bundle, reference in references.items():
                self._tell(bundle, reference)
            self._put({key: counts.text() for key, counts in taken.items()})
        except BaseException:
            with self._lock:
                for bundle, day in taken:
                    if bundle in self._seen:
                        self._seen[bundle].unwritten.add(day)
            raise
        self._forget_bygone_days()

    def _tell(self, bundle: str, reference: Reference | None) -> None:
        """Once for each bundle; empty where it has none."""
        told = "" if reference is None else reference.model_dump_json()
        try:
            with self.engine.begin() as connection:
                here = REFERENCES.c.bundle == bundle
                if connection.execute(sa.select(REFERENCES.c.bundle).where(here)).first() is None:
                    connection.execute(sa.insert(REFERENCES).values(bundle=bundle, told=told))
        except sa.exc.IntegrityError:  # another replica was faster
            pass
        self._told.add(bundle)

    def _put(self, rows: dict[tuple[str, str], str]) -> None:
        if not rows:
            return
        first = (datetime.now(UTC) - timedelta(days=KEPT_DAYS)).date().isoformat()
        with self.engine.begin() as connection:
            for (bundle, day), told in rows.items():
                key = {"replica": self.replica, "bundle": bundle, "day": day}
                here = sa.and_(*(TRAFFIC.c[name] == value for name, value in key.items()))
                update = sa.update(TRAFFIC).where(here).values(told=told)
                if not connection.execute(update).rowcount:
                    connection.execute(sa.insert(TRAFFIC).values(**key, told=told))
            connection.execute(sa.delete(TRAFFIC).where(TRAFFIC.c.day < first))

    def _forget_bygone_days(self) -> None:
        today = datetime.now(UTC).date().isoformat()
        with self._lock:
            for seen in self._seen.values():
                for day in [d for d in seen.days if d < today and d not in seen.unwritten]:
                    del seen.days[day]

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """For Prometheus: histograms with fixed bins, and of the ranks."""
        with self._lock:
            self._add_up()
            seen = list(self._seen.values())
            fixed = [{name: one.fixed[name].copy() for name in SIGNALS} for one in seen]
            ranks, totals = [one.ranks.copy() for one in seen], [one.total for one in seen]
        for signal, text in (
            ("similarity", "Cosine of the champion's queries to their nearest support example."),
            ("confidence", "Probability of the most probable class, of the champion's queries."),
        ):
            family = HistogramMetricFamily(f"metaloom_query_{signal}", text, labels=["version"])
            for one, counts, total in zip(seen, fixed, totals, strict=True):
                # A sum that may fall is none for Prometheus: similarities may be negative.
                kept = total if signal == "confidence" else None
                family.add_metric(
                    [one.label], _buckets(counts[signal], _LOWEST[signal]), sum_value=kept
                )
            yield family
        text = "Ranks of the champion's queries among validation queries: even while all is steady."
        family = HistogramMetricFamily("metaloom_query_rank", text, labels=["version", "signal"])
        for one, counts_2B in zip(seen, ranks, strict=True):
            for signal, counts_B in zip(SIGNALS, counts_2B, strict=True):
                if one.reference is not None:
                    family.add_metric([one.label, signal], _buckets(counts_B, 0.0), sum_value=None)
        yield family


def _buckets(counts: npt.NDArray[np.int64], lowest: float) -> list[Any]:
    """Upper bounds and how many lie below them; the last bin is the rest."""
    below = counts.cumsum().tolist()
    bounds = [f"{lowest + (i + 1) / _FIXED:.2f}" for i in range(len(below) - 1)]
    return list(zip([*bounds, "+Inf"], map(float, below), strict=True))
