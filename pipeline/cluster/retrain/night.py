"""One retraining from end to end: is there anything new, a run of it, the decision, the report."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

from pipeline.cluster import message
from pipeline.cluster.clone import Clone, check_remote, only_runner, resolve_commit, take_clone
from pipeline.cluster.commands import git, try_git
from pipeline.cluster.outcome import compute, identity, push, record
from pipeline.cluster.raw_data import bring_raw_data
from pipeline.cluster.retrain.data import (
    BRANCHES,
    DATA,
    INPUTS,
    Inputs,
    compare,
    describe,
    earlier,
    inputs_of,
    recorded,
    update_imports,
)
from pipeline.cluster.retrain.policy import Because, RetrainConfig, State
from pipeline.cluster.retrain.report import PAGE, RECORD, page, title
from pipeline.cluster.retrain.start import FRESH, Bring, place_start
from pipeline.cluster.retrain.tell import tell, webhook
from pipeline.cluster.share import default_remote, share
from pipeline.core.config import load_section
from pipeline.core.errors import MachineError, PipelineError, StoppedError
from pipeline.core.files import read_json, write_bytes, write_json

KIND = "retrain"
"""Of its clones: no other run takes them."""
_PARAMS = "params.yaml"


@dataclass(frozen=True)
class Request:
    """What set a retraining off, and where its results go."""

    because: Because = "manual"
    commit: str = "HEAD"
    remote: str | None = None
    """A git remote that gets the branch too."""
    num_workers: int = 1
    """For the budget and the cost."""
    date: str = field(default_factory=lambda: time.strftime("%Y-%m-%d"))


@dataclass(frozen=True)
class Outcome:
    """How a retraining ended."""

    record: dict[str, Any]
    branch: str | None
    """Where its lock, its data and its report are; None where it left none."""
    notes: list[str]
    fails: bool
    """Whether the policy wants whoever started it to see a failure."""

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {**self.record, "branch": self.branch, "notes": self.notes}

    def summary(self) -> str:
        """For people."""
        lines = [title(self.record), f"  {self.record['reason']}"]
        lines += [
            f"  {name:<6} {message.percent(one)}" for name, one in self.record["metrics"].items()
        ]
        lines += [f"note: {note}" for note in self.notes]
        if self.branch is not None:
            lines += [
                "",
                f"The report: git show {self.branch}:{PAGE}",
                f"To take it over: git merge {self.branch}",
            ]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Night:
    """What the steps of one retraining share."""

    root: Path
    request: Request
    asked: str
    """The commit that was asked for; the clone's may hold newer data."""
    clone: Clone
    policy: RetrainConfig
    data_remote: str | None
    environment: Mapping[str, str]
    begin: float
    champion: Bring
    listen: Callable[[str], None] | None
    start: str = FRESH
    """What meta-training begins at"""
    notes: list[str] = field(default_factory=list)

    def told(
        self, state: State, reason: str, *, data: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """The record of how it ended."""
        ran = state in ("promoted", "not_promoted")
        release = read_json(self.clone.folder / message.RELEASE) if ran else None
        return {
            "state": state,
            "reason": reason,
            "date": self.request.date,
            "because": self.request.because,
            "commit": self.clone.commit,
            "start": self.start,
            "data": data,
            "model": message.released(self.clone.folder) if ran else None,
            "rules": release["decision"]["rules"] if release else [],
            "metrics": message.metrics(self.clone.folder) if ran else {},
            "cost": self._cost(),
        }

    def _cost(self) -> dict[str, float]:
        seconds = time.time() - self.begin
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return {
            "attempt": self.clone.attempt,
            "seconds": round(seconds, 1),
            "num_workers": self.request.num_workers,
            "worker_hours": round(seconds * self.request.num_workers / 3600, 4),
            "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        }


def retrain(
    root: Path,
    request: Request,
    *,
    champion: Bring = lambda folder: None,
    environment: Mapping[str, str] | None = None,
    listen: Callable[[str], None] | None = None,
) -> Outcome:
    """Retrain on what is new since the last time, if anything is; one process at a time.

    The same inputs are never trained on twice: the branch of the run that did so is looked for by
    the digest of its inputs. Killed at any moment and started again, it ends as if it had not been:
    the clone is taken up again, training goes on from its checkpoint, a bundle that is registered
    is not registered anew, and a branch that is there ends the run.

    Args:
        champion: brings the learner that a policy with `start: champion` begins at.
        environment: set for the stages.
        listen: hears each line that they print.

    Raises:
        PipelineError: a stage, git, DVC or a data source failed; the webhook has been told.
    """
    if request.remote is not None:  # the nights of others are known by their branches
        git(root, "fetch", "--quiet", "--", check_remote(root, request.remote))
    with only_runner(root, KIND):
        commit = resolve_commit(root, request.commit)
        clone = take_clone(root, commit, None, (), kind=KIND)
        policy = load_section(clone.folder / _PARAMS, "retrain", RetrainConfig)
        address = webhook(policy.webhook)
        night = _Night(
            root=root,
            request=request,
            asked=commit,
            clone=clone,
            policy=policy,
            data_remote=default_remote(clone.folder),
            environment=environment or {},
            begin=time.time(),
            champion=champion,
            listen=listen,
        )
        try:
            outcome = _go(night)
        except StoppedError:
            raise
        except PipelineError as error:
            said = str(error).splitlines()
            if problem := tell(address, night.told("failed", said[0] if said else "")):
                raise type(error)(f"{error}\nNobody was told: {problem}.") from None
            raise
    if problem := tell(address, outcome.as_json()):
        outcome.notes.append(problem)
    return outcome


def _go(night: _Night) -> Outcome:
    folder = night.clone.folder
    night = replace(night, clone=_with_new_data(night, update_imports(folder)))
    night.notes.extend(bring_raw_data(night.root, folder, night.data_remote))
    inputs = inputs_of(folder)
    if done := _done_before(night, inputs):
        return done
    changes: dict[str, Any] | None = None
    try:
        with _budget(night.policy.budget_seconds(night.request.num_workers)) as over:
            first = replace(night.clone, arguments=("preprocess",))
            compute(first, night.environment, night.data_remote, push=False, listen=night.listen)
            description = describe(folder, inputs)
            before = _last(night.root, night.asked)
            changes = compare(description, before)
            if reason := _too_few(night.policy, changes, inputs, before):
                night.clone.mark(done=True)
                return _end(night, night.told("too_few", reason, data=changes))
            who = identity(night.root)
            clone, start = place_start(night.clone, night.policy.start, night.champion, who)
            night = replace(night, clone=clone, start=start)
            compute(
                night.clone, night.environment, night.data_remote, push=True, listen=night.listen
            )
    except StoppedError:
        if not over.is_set():
            raise
        if night.data_remote is not None:
            share(folder)  # a pod's disk goes with it
        hours = night.policy.budget_seconds(night.request.num_workers) / 3600
        reason = (
            f"After {hours:g} hours it was stopped behind a checkpoint. The same command goes on "
            "from there; to give it longer, raise retrain.max_hours or retrain.max_worker_hours."
        )
        return _end(night, night.told("over_budget", reason, data=changes), fails=True)
    return _keep(night, description, changes, inputs)


def _with_new_data(night: _Night, updated: list[str]) -> Clone:
    """The clone, at a commit that names the new data: where a model came from is in its lineage."""
    folder = night.clone.folder
    if updated:
        git(folder, "add", "--", *updated)
        text = f"New data: {', '.join(updated)}"
        who = identity(night.root)
        git(folder, *who, "commit", "--quiet", "--no-verify", "--message", text)
    head = git(folder, "rev-parse", "HEAD").strip()
    trailer = git(folder, "log", "-1", f"--format=%(trailers:key={INPUTS})").strip()
    recorded_already = bool(trailer)  # by an attempt that was killed before its branch was out
    return night.clone if recorded_already else night.clone.mark(commit=head)


def _keep(
    night: _Night, description: dict[str, Any], changes: dict[str, Any], inputs: Inputs
) -> Outcome:
    """Commit and push what the run left: data first, then the branch."""
    folder = night.clone.folder
    release = read_json(folder / message.RELEASE)
    promoted = release["decision"]["verdict"] == "champion"
    told = night.told(
        "promoted" if promoted else "not_promoted", release["decision"]["reason"], data=changes
    )
    write_json(folder / DATA, description)
    write_json(folder / RECORD, told)
    write_bytes(folder / PAGE, page(told).encode())
    root, remote = night.root, night.request.remote
    if remote is not None:  # the day's names that others have taken since
        git(root, "fetch", "--quiet", "--", remote)
    clone = night.clone.mark(branch=_new_branch(root, night.request.date))
    text = message.commit_message(folder, clone.commit, differed=(), arguments=())
    trailer = f"\n{INPUTS}: {inputs.digest}\n"
    tip = record(
        root,
        clone,
        f"{title(told)}\n\n{text}{trailer}",
        night.notes,
        also=[DATA, RECORD, PAGE],
    )
    push(root, clone, tip, night.data_remote, None)
    if remote is not None and tip is not None:
        clone = clone.mark(branch=_publish(root, remote, clone.branch, night.request.date))
    clone.mark(done=True)
    fails = not promoted and night.policy.on_failed_gate == "fail"
    return _end(night, told, branch=clone.branch, fails=fails)


def _end(
    night: _Night, told: dict[str, Any], *, branch: str | None = None, fails: bool = False
) -> Outcome:
    return Outcome(record=told, branch=branch, notes=night.notes, fails=fails)


def _done_before(night: _Night, inputs: Inputs) -> Outcome | None:
    """The branch of a run from the same inputs; one that a killed run left here is pushed on."""
    there = [name for name, digest in earlier(night.root, night.asked) if digest == inputs.digest]
    if not there:
        return None
    name, remote = _short(there[0]), night.request.remote
    came = recorded(night.root, there[0], RECORD) or {"state": "unknown"}
    if remote is not None and all(one.startswith("refs/heads/") for one in there):
        # Nobody else has it yet. One that was merged may have been deleted since: let it rest.
        name = _publish(night.root, remote, name, night.request.date)
    night.clone.mark(done=True)
    reason = (
        f"{name} was trained from the same code, parameters and data, and was "
        f"{came['state'].replace('_', ' ')}."
    )
    # The same answer as the first time, to a Job whose pod was killed on its last steps.
    fails = came["state"] == "not_promoted" and night.policy.on_failed_gate == "fail"
    return _end(night, night.told("no_change", reason), branch=name, fails=fails)


def _publish(root: Path, remote: str, branch: str, date: str) -> str:
    """Push a branch; under another name where somebody has taken its own. Returns its name.

    Raises:
        MachineError: the remote does not take it.
    """
    for _ in range(10):
        refused = try_git(root, "push", "--quiet", "--", remote, f"refs/heads/{branch}")
        if refused.returncode == 0:
            return branch
        git(root, "fetch", "--quiet", "--", remote)
        theirs = f"refs/remotes/{remote}/{branch}"
        if try_git(root, "rev-parse", "--verify", "--quiet", theirs).returncode != 0:
            break
        other = _new_branch(root, date)
        git(root, "branch", "--move", branch, other)
        branch = other
    raise MachineError(
        f"{remote} does not take {branch}; it is kept here, and pushed by the next run: "
        f"{refused.stderr.strip()}"
    )


def _short(reference: str) -> str:
    """`retrain/...`, `origin/retrain/...` or a commit, as git takes it."""
    return reference.removeprefix("refs/heads/").removeprefix("refs/remotes/")


def _last(root: Path, commit: str) -> dict[str, Any] | None:
    """What the latest retraining learned from, whatever the gate said to it."""
    for reference, _ in earlier(root, commit):
        if (found := recorded(root, reference, DATA)) is not None:
            return found
    return None


def _too_few(
    policy: RetrainConfig, changes: dict[str, Any], inputs: Inputs, before: dict[str, Any] | None
) -> str | None:
    if before is None or before["inputs"]["code"] != inputs.code:
        return None  # new code or parameters are reason enough
    new = changes["new_examples"]["train"]
    if new >= policy.min_new_examples or not sum(changes["new_examples"].values()):
        return None  # what only went, moved or was labelled anew would never count
    return (
        f"{new:,} new training examples; retrain.min_new_examples asks for "
        f"{policy.min_new_examples:,}. They are kept and count next time."
    )


def _new_branch(root: Path, date: str) -> str:
    """`retrain/<date>`, with a number where the day has one already."""
    listed = git(root, "for-each-ref", "--format=%(refname)", "refs/heads", "refs/remotes")
    taken = {line.partition(f"/{BRANCHES}/")[2] for line in listed.splitlines()}
    names = (date if n == 1 else f"{date}-{n}" for n in range(1, 10_000))
    free = next(name for name in names if name not in taken)
    return f"{BRANCHES}/{free}"


@contextmanager
def _budget(seconds: float) -> Iterator[threading.Event]:
    """Ask this process to stop when its time is over, as a person would; the event tells of it."""
    over = threading.Event()

    def stop() -> None:
        over.set()
        os.kill(os.getpid(), signal.SIGTERM)

    def stopped(number: int, frame: FrameType | None) -> None:
        raise StoppedError("stopped between two stages; the same command goes on from there.")

    before = signal.signal(signal.SIGTERM, stopped)  # while a stage runs, it gets the signal
    timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), stop)
    timer.daemon = True
    timer.start()
    try:
        yield over
    finally:
        timer.cancel()
        signal.signal(signal.SIGTERM, before)
