"""Following objects as they change, whatever becomes of the connection."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from pipeline.cluster.kube.api import Kube, backoff
from pipeline.cluster.kube.errors import ApiError, BusyError, ExpiredError, UnreachableError
from pipeline.cluster.kube.kinds import Kind

_ROUND_SECONDS = 60.0
"""The server is asked to end a watch after this; the next one goes on where it ended."""
_SLACK_SECONDS = 10.0
_AT_LEAST_SECONDS = 0.2
_FAILURES_IN_A_ROW = 12


class Change(NamedTuple):
    """What became of one object: ADDED, MODIFIED or DELETED, and its last state."""

    what: str
    item: dict[str, Any]


def watch(
    kube: Kube, kind: Kind, *, labels: str = "", fields: str = "", seconds: float = float("inf")
) -> Iterator[Change]:
    """First all that there is, then every change, until `seconds` have passed.

    A connection that ends is made again from the last version seen (bookmarks keep that young);
    where the server has forgotten that version (410), everything is listed anew and only what
    differs is told. After a failure the wait grows, with jitter.

    Raises:
        ApiError: it is refused for good, or a dozen tries in a row failed.
    """
    end, known = time.monotonic() + seconds, dict[str, dict[str, Any]]()
    version, failures = "", 0
    while (left := end - time.monotonic()) > 0:
        begin = time.monotonic()
        try:
            if not version:
                items, version = kube.select_with_version(kind, labels=labels, fields=fields)
                yield from _differences(known, items, kind)
            for event in _events(kube, kind, labels, fields, version, min(left, _ROUND_SECONDS)):
                failures = 0
                version = event.item["metadata"]["resourceVersion"]
                if event.what != "BOOKMARK":
                    yield from _noted(known, event)
        except ExpiredError:
            version = ""
        except (UnreachableError, BusyError) as error:
            failures += 1
            if failures > _FAILURES_IN_A_ROW:
                raise
            wait = getattr(error, "wait_seconds", None) or backoff(failures)
            time.sleep(min(wait, max(0.0, end - time.monotonic())))
        # A server that ends every watch at once shall not be asked without end.
        time.sleep(max(0.0, min(begin + _AT_LEAST_SECONDS, end) - time.monotonic()))


def _events(
    kube: Kube, kind: Kind, labels: str, fields: str, version: str, seconds: float
) -> Iterator[Change]:
    query = {
        "watch": "true",
        "allowWatchBookmarks": "true",
        "resourceVersion": version,
        "timeoutSeconds": str(max(1, int(seconds))),
        "labelSelector": labels,
        "fieldSelector": fields,
    }
    rest = b""
    for piece in kube.stream(kind, "", query, seconds=seconds + _SLACK_SECONDS, subresource=""):
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.strip():
                yield _event(json.loads(line), kind)


def _event(told: dict[str, Any], kind: Kind) -> Change:
    if told["type"] != "ERROR":
        return Change(told["type"], told["object"])
    status = told["object"]
    code, words = int(status.get("code", 500)), status.get("message", "no words")
    if code == 410:
        raise ExpiredError(words, code=code)
    if code == 429 or code >= 500:
        raise BusyError(words, code=code, wait_seconds=None)
    raise ApiError(f"watching {kind.qualified} ended: {words}.", code=code)


def _differences(
    known: dict[str, dict[str, Any]], items: list[dict[str, Any]], kind: Kind
) -> Iterator[Change]:
    present = {item["metadata"]["uid"]: item for item in items}
    for uid in set(known) - set(present):
        yield Change("DELETED", known.pop(uid))
    for item in items:
        item.setdefault("kind", kind.kind)  # a list leaves it out
        yield from _noted(known, Change("ADDED", item))


def _noted(known: dict[str, dict[str, Any]], event: Change) -> Iterator[Change]:
    """Pass on what is news, and keep it."""
    metadata = event.item["metadata"]
    uid = metadata["uid"]
    old = known.get(uid)
    if event.what == "DELETED":
        known.pop(uid, None)
        yield event
    elif old is None or old["metadata"]["resourceVersion"] != metadata["resourceVersion"]:
        known[uid] = event.item
        yield Change("ADDED" if old is None else "MODIFIED", event.item)


@contextmanager
def changes_of(kube: Kube, kind: Kind, name: str) -> Iterator[queue.SimpleQueue[Change | ApiError]]:
    """The changes of one object in a queue, so that whoever waits for them can also do else.

    The last entry is the error if the watch has to be given up.
    """
    found: queue.SimpleQueue[Change | ApiError] = queue.SimpleQueue()
    ending = threading.Event()

    def run() -> None:
        try:
            for change in watch(kube, kind, fields=f"metadata.name={name}"):
                if ending.is_set():
                    return
                found.put(change)
        except ApiError as error:
            found.put(error)

    threading.Thread(target=run, daemon=True, name=f"watch {kind.plural} {name}").start()
    try:
        yield found
    finally:
        ending.set()
