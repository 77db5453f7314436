"""What a run prints: every line once, whatever becomes of the connection."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from pipeline.cluster.kube.api import Kube, backoff
from pipeline.cluster.kube.errors import ApiError, BusyError, MissingError, UnreachableError
from pipeline.cluster.kube.kinds import CONTAINER, JOBS, PODS
from pipeline.cluster.kube.retraining import state_of
from pipeline.cluster.kube.runs import pods_of, trouble_of
from pipeline.core.errors import MachineError

_SILENCE_SECONDS = 60.0
_POLL_SECONDS = 1.0
_MARGIN = timedelta(seconds=1)
"""Two threads stamp the two streams of a container: a line may be older than the one before."""
_FAILURES_IN_A_ROW = 12
_OVER = ("succeeded", "failed", "cancelled")


class Seen:
    """The lines that were passed on lately: to know them when they come again."""

    def __init__(self) -> None:
        self._newest = ""
        self._lately: Counter[bytes] = Counter()

    def since(self) -> str:
        """From where to read on: whole seconds, for that is what a kubelet goes by."""
        if not self._newest:
            return ""
        moment = datetime.fromisoformat(self._newest[:19]).replace(tzinfo=UTC) - _MARGIN
        return moment.strftime("%Y-%m-%dT%H:%M:%SZ")

    def fresh(self, again: Counter[bytes], line: bytes) -> bool:
        """Whether a line is new; `again` counts what this connection has repeated so far."""
        again[line] += 1
        if again[line] <= self._lately[line]:
            return False
        self._lately[line] += 1
        stamp = line[:19].decode(errors="replace")
        if stamp[:1].isdigit() and stamp > self._newest[:19]:
            self._newest = stamp
            self._forget()
        return True

    def _forget(self) -> None:
        since = self.since()[:19].encode()
        for line in [old for old in self._lately if old[:19] < since]:
            del self._lately[line]


def read_logs(kube: Kube, job: Mapping[str, Any], *, follow: bool) -> Iterator[str]:
    """The lines of a run's driver, those of pods that were given up first.

    With `follow`, until the run has ended: pod after pod, if the Job starts another one.

    Raises:
        MachineError: there is nothing to read, and why.
    """
    name, done = job["metadata"]["name"], set[str]()
    end_seen = False
    while True:
        pods = [pod for pod in pods_of(kube, job) if pod["metadata"]["uid"] not in done]
        for pod in pods:
            if _phase(pod) == "Pending":
                break
            yield from _pod_lines(kube, pod, follow=follow)
            done.add(pod["metadata"]["uid"])
        if not follow:
            if not done:
                raise _nothing(kube, job)
            return
        if end_seen:
            return
        try:
            end_seen = state_of(kube.get(JOBS, name)) in _OVER  # then once more, for a last pod
        except MissingError:
            return
        if not end_seen:
            time.sleep(_POLL_SECONDS)


def _nothing(kube: Kube, job: Mapping[str, Any]) -> MachineError:
    name = job["metadata"]["name"]
    why = trouble_of(kube, job)
    told = f": {why}" if why else "; its pod has not started, or is gone. Wait with --follow."
    return MachineError(f"the run {name} has printed nothing ({state_of(job)}){told}")


def _pod_lines(kube: Kube, pod: Mapping[str, Any], *, follow: bool) -> Iterator[str]:
    """All lines of a pod; a connection that breaks is made again from where it was."""
    name, seen, failures = pod["metadata"]["name"], Seen(), 0
    container = _container(pod)
    while True:
        over = not follow or _is_over(kube, name)
        again: Counter[bytes] = Counter()
        torn = b""
        try:
            for line in _lines(kube, name, container, seen.since(), follow=not over):
                if not line.endswith(b"\n"):
                    torn = line
                elif seen.fresh(again, line):
                    failures = 0
                    yield _text(line)
            if over:
                if torn and seen.fresh(again, torn):  # a last line without an end is one, too
                    yield _text(torn)
                return
        except MissingError:
            return
        except (UnreachableError, BusyError) as error:
            failures += 1
            if failures > _FAILURES_IN_A_ROW:
                raise
            time.sleep(getattr(error, "wait_seconds", None) or backoff(failures))
        except ApiError as error:
            if error.code != 400 or not follow:  # 400: the container has not started yet
                raise
            time.sleep(_POLL_SECONDS)


def _lines(kube: Kube, pod: str, container: str, since: str, *, follow: bool) -> Iterator[bytes]:
    query = {"container": container, "timestamps": "true"}
    if since:
        query["sinceTime"] = since
    if follow:
        query["follow"] = "true"
    rest = b""
    for piece in kube.stream(PODS, pod, query, seconds=_SILENCE_SECONDS, subresource="log"):
        *lines, rest = (rest + piece).split(b"\n")
        yield from (line + b"\n" for line in lines)
    if rest:
        yield rest


def _text(line: bytes) -> str:
    """Without the stamp that the kubelet put before it."""
    return line.partition(b" ")[2].decode(errors="replace").rstrip("\n")


def _container(pod: Mapping[str, Any]) -> str:
    names = [container["name"] for container in pod["spec"]["containers"]]
    return CONTAINER if CONTAINER in names else str(names[0])


def _phase(pod: Mapping[str, Any]) -> str:
    return str((pod.get("status") or {}).get("phase", "Pending"))


def _is_over(kube: Kube, name: str) -> bool:
    try:
        return _phase(kube.get(PODS, name)) in ("Succeeded", "Failed")
    except MissingError:
        return True
