"""One retraining at a time: a Lease that its holder renews, and that others respect."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from pipeline.cluster.kube.api import Kube
from pipeline.cluster.kube.errors import ApiError, ConflictError, ExistsError, MissingError
from pipeline.cluster.kube.kinds import LEASES, PROGRESS_NOTE, RETRAIN
from pipeline.core.errors import MachineError

DURATION_SECONDS, RENEW_SECONDS = 120.0, 10.0
GRACE_SECONDS = 75.0
"""Of the duration, for the work to end in: a stage that is told to stop is killed after 60 s."""
_INSTANCE_NOTE = "metaloom.dev/instance"
_POLL_SECONDS = 0.5


class HeldError(MachineError):
    """Somebody else holds the Lease."""

    def __init__(self, message: str, holder: str) -> None:
        super().__init__(message)
        self.holder = holder


class LostError(MachineError):
    """We no longer hold the Lease, or cannot know it."""


class Held:
    """A Lease while we hold it."""

    def __init__(self) -> None:
        self._lost = threading.Event()
        self._why = ""
        self._progress = ""
        self._lock = threading.Lock()
        self.renewed = time.monotonic()
        self.trouble = "the API server does not answer."
        """Why the last renewal came to nothing."""
        self.news = threading.Event()
        self.on_lost: Callable[[], None] = lambda: None
        """Called once, from a thread of the Lease's."""

    def note(self, progress: Mapping[str, Any]) -> None:
        """Show how far the work is (`metaloom cluster status`); written with the next renewal."""
        updated = {**progress, "updated": datetime.now(UTC).isoformat(timespec="seconds")}
        with self._lock:
            self._progress = json.dumps(updated, sort_keys=True)
        self.news.set()

    def progress(self) -> str:
        """What was noted last, as JSON; empty if nothing was."""
        with self._lock:
            return self._progress

    def lose(self, why: str) -> None:
        """It is somebody else's now, or will be before the work has ended."""
        with self._lock:
            if self.lost:
                return
            self._why = why
            self._lost.set()
        self.on_lost()

    @property
    def lost(self) -> bool:
        """Whether the work has to stop."""
        return self._lost.is_set()

    def check(self) -> None:
        """Go on only while the Lease is ours.

        Raises:
            LostError: it is not, or has not been renewed for so long that it may not be soon.
        """
        if self.lost:
            raise LostError(f"{self._why} This run stops, so that no two work at once.")


@dataclass(frozen=True)
class _Terms:
    name: str
    holder: str
    instance: str
    duration_seconds: float
    renew_seconds: float
    grace_seconds: float


@contextmanager
def single_flight(
    kube: Kube,
    holder: str,
    *,
    name: str = RETRAIN,
    duration_seconds: float = DURATION_SECONDS,
    renew_seconds: float = RENEW_SECONDS,
    grace_seconds: float = GRACE_SECONDS,
) -> Iterator[Held]:
    """Hold a Lease while the body runs; a thread renews it, another one watches the clock.

    Whatever the API server does (it may take a request and never answer), the Lease is given up so
    long before it runs out that the work can end in between.

    A Lease that is free is taken, and one of the same holder (its pod was killed and came again)
    too. One of somebody else that has run out by our clock is watched for a while longer first: a
    holder whose clock is behind ours would renew it.

    Args:
        holder: who we are: the name of our Job.
        duration_seconds: how long it lasts without renewal; whole seconds.
        grace_seconds: of these, what the work needs to end.

    Raises:
        HeldError: somebody else holds it.
        ApiError: the API server refuses.
    """
    assert duration_seconds > grace_seconds + renew_seconds, "it could never be renewed in time"
    terms = _Terms(name, holder, uuid.uuid4().hex, duration_seconds, renew_seconds, grace_seconds)
    lease = _acquire(kube, terms)
    held, ending = Held(), threading.Event()
    held.renewed = _when_renewed(lease)
    threads = [
        threading.Thread(target=_renew, args=(kube, terms, lease, held, ending), daemon=True),
        threading.Thread(target=_watch_the_clock, args=(terms, held, ending), daemon=True),
    ]
    for thread in threads:
        thread.start()
    try:
        yield held
    finally:
        ending.set()
        held.news.set()
        for thread in threads:
            thread.join(2 * renew_seconds)
        if not held.lost:
            with suppress(ApiError):  # it runs out by itself
                _release(kube, terms, held)


def holder_of(lease: Mapping[str, Any], now: float | None = None) -> str:
    """Who holds it; empty if nobody does, or not any more."""
    holder = str(_spec(lease).get("holderIdentity") or "")
    return "" if _has_run_out(lease, time.time() if now is None else now) else holder


def _acquire(kube: Kube, terms: _Terms) -> dict[str, Any]:
    try:
        found = kube.get(LEASES, terms.name)
    except MissingError:
        return _create(kube, terms)
    holder = str(_spec(found).get("holderIdentity") or "")
    if holder not in ("", terms.holder):
        if not _has_run_out(found, time.time()) or not _stays_silent(kube, terms, found):
            raise _held_by(found, terms.name)
        found = kube.get(LEASES, terms.name)
        if _spec(found).get("holderIdentity") not in ("", None, holder):
            raise _held_by(found, terms.name)
    taken = _written(found, terms, transitions=int(holder != terms.holder))
    try:
        return kube.replace(LEASES, taken)
    except ConflictError:  # of two that reach for it, one is first
        raise _held_by(kube.get(LEASES, terms.name), terms.name) from None


def _create(kube: Kube, terms: _Terms) -> dict[str, Any]:
    blank: dict[str, Any] = {
        "apiVersion": LEASES.api_version,
        "kind": LEASES.kind,
        "metadata": {"name": terms.name, "namespace": kube.namespace},
        "spec": {},
    }
    try:
        return kube.create(LEASES, _written(blank, terms, transitions=0))
    except ExistsError:
        found = kube.get(LEASES, terms.name)
        if (found["metadata"].get("annotations") or {}).get(_INSTANCE_NOTE) == terms.instance:
            return found  # our own request, whose answer did not reach us
        raise _held_by(found, terms.name) from None


def _written(lease: Mapping[str, Any], terms: _Terms, *, transitions: int) -> dict[str, Any]:
    """The Lease as ours, renewed now; it keeps its version, so nobody's change is overwritten."""
    now, spec = _stamp(), dict(_spec(lease))
    if transitions or not spec.get("holderIdentity"):
        spec["leaseTransitions"] = int(spec.get("leaseTransitions") or 0) + transitions
    if spec.get("holderIdentity") != terms.holder:
        spec["acquireTime"] = now
    spec |= {
        "holderIdentity": terms.holder,
        "leaseDurationSeconds": max(1, int(terms.duration_seconds)),
        "renewTime": now,
    }
    metadata = dict(lease["metadata"])
    notes = {**(metadata.get("annotations") or {}), _INSTANCE_NOTE: terms.instance}
    return {**lease, "metadata": {**metadata, "annotations": notes}, "spec": spec}


def _stays_silent(kube: Kube, terms: _Terms, lease: Mapping[str, Any]) -> bool:
    """Whether nobody renews it for one and a half renewals."""
    end = time.monotonic() + 1.5 * terms.renew_seconds
    while time.monotonic() < end:
        time.sleep(min(_POLL_SECONDS, terms.renew_seconds / 4))
        found = kube.get(LEASES, terms.name)
        if found["metadata"]["resourceVersion"] != lease["metadata"]["resourceVersion"]:
            return False
    return True


def _renew(
    kube: Kube, terms: _Terms, lease: dict[str, Any], held: Held, ending: threading.Event
) -> None:
    """Write the time, and what was noted, again and again, until the Lease is lost."""
    half = terms.renew_seconds / 2  # for the last try, and for those before it
    brief = replace(
        kube,
        patience_seconds=min(kube.patience_seconds, half),
        answer_seconds=min(kube.answer_seconds, half),
    )
    while not ending.is_set() and not held.lost:
        due = held.renewed + terms.renew_seconds
        while not ending.is_set() and time.monotonic() < due:
            held.news.wait(max(0.0, due - time.monotonic()))
            if held.news.is_set():
                held.news.clear()
                due = min(due, time.monotonic() + _POLL_SECONDS)
        if ending.is_set():
            return
        try:
            lease = _renewed(brief, terms, lease, held.progress())
            held.renewed = _when_renewed(lease)
        except (ConflictError, MissingError):
            try:
                lease = _still_ours(brief, terms)
                held.renewed = _when_renewed(lease)  # by a request whose answer was lost, perhaps
            except (HeldError, MissingError) as error:
                held.lose(str(error))
                return
            except ApiError:
                pass
        except ApiError as error:
            held.trouble = str(error)
            ending.wait(min(1.0, terms.renew_seconds / 4))


def _watch_the_clock(terms: _Terms, held: Held, ending: threading.Event) -> None:
    """Give the Lease up while there is time to end the work; no request can delay this."""
    while not held.lost:
        left = held.renewed + terms.duration_seconds - terms.grace_seconds - time.monotonic()
        if left <= 0:
            held.lose(f"the Lease {terms.name} could not be renewed: {held.trouble}")
        elif ending.wait(left):
            return


def _when_renewed(lease: Mapping[str, Any]) -> float:
    """By our monotonic clock: when the request was made, whenever its answer came."""
    ago = time.time() - datetime.fromisoformat(_spec(lease)["renewTime"]).timestamp()
    return time.monotonic() - max(0.0, ago)


def _renewed(kube: Kube, terms: _Terms, lease: Mapping[str, Any], progress: str) -> dict[str, Any]:
    mine = _written(lease, terms, transitions=0)
    if progress:
        mine["metadata"]["annotations"][PROGRESS_NOTE] = progress
    return kube.replace(LEASES, mine)


def _still_ours(kube: Kube, terms: _Terms) -> dict[str, Any]:
    """The Lease as it is now, if somebody has only touched it."""
    found = kube.get(LEASES, terms.name)
    instance = (found["metadata"].get("annotations") or {}).get(_INSTANCE_NOTE)
    if _spec(found).get("holderIdentity") != terms.holder or instance != terms.instance:
        raise _held_by(found, terms.name)
    return found


def _release(kube: Kube, terms: _Terms, held: Held) -> None:
    for _ in range(3):
        found = _still_ours(kube, terms)
        notes = dict(found["metadata"].get("annotations") or {})
        notes.pop(_INSTANCE_NOTE, None)
        if progress := held.progress():
            notes[PROGRESS_NOTE] = progress
        spec = {**_spec(found), "holderIdentity": "", "renewTime": _stamp()}
        metadata = {**found["metadata"], "annotations": notes}
        with suppress(ConflictError):
            kube.replace(LEASES, {**found, "metadata": metadata, "spec": spec})
            return


def _held_by(lease: Mapping[str, Any], name: str) -> HeldError:
    spec = _spec(lease)
    holder = str(spec.get("holderIdentity") or "somebody who has just let go of it")
    text = (
        f"the Lease {name} is held by {holder} (renewed {spec.get('renewTime')}): one retraining "
        "at a time. Wait for it to end, or `metaloom cluster cancel` it."
    )
    return HeldError(text, holder)


def _spec(lease: Mapping[str, Any]) -> Mapping[str, Any]:
    """What it says; a Lease of the manifests that nobody has held yet says nothing."""
    return lease.get("spec") or {}


def _has_run_out(lease: Mapping[str, Any], now: float) -> bool:
    spec = _spec(lease)
    if not spec.get("holderIdentity") or not spec.get("renewTime"):
        return True
    renewed = datetime.fromisoformat(spec["renewTime"]).timestamp()
    return now > renewed + float(spec.get("leaseDurationSeconds") or 0)


def _stamp() -> str:
    """The time as a MicroTime."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
