"""What the routes do: make learners, extend them, ask them. It knows no HTTP but its problems."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from typing import Any

import numpy as np
from torch import Tensor

from pipeline.core.errors import PipelineError
from pipeline.deploy.serve.desk import Desk, Job
from pipeline.deploy.serve.fleet import Fleet
from pipeline.deploy.serve.inputs import Item, check_queries, check_support, decode, items_of
from pipeline.deploy.serve.keys import Caller, Keys
from pipeline.deploy.serve.learners import Kept, Learners, learner_id, now
from pipeline.deploy.serve.messages import (
    Episode,
    Input,
    LearnerTold,
    ModelRef,
    NewLearner,
    Predictions,
    ReplicaTold,
)
from pipeline.deploy.serve.model import Answers, Pictures, Ready, Version
from pipeline.deploy.serve.problems import Problem
from pipeline.deploy.serve.settings import Policy, ServeSettings
from pipeline.deploy.serve.telling import predictions_of, told
from pipeline.deploy.serve.traces import Traces
from pipeline.deploy.serve.watch import BrokenModelError, Watch, require_probabilities

_By = Callable[[Version], Awaitable[tuple[Ready, Answers]]]
"""A request, answered by whatever version"""
_DECODERS = 4
_LOADERS = 2
_FOUND_SECONDS = 5.0
"""Learners never change; one that another replica deletes is still known for so long."""


@dataclass
class Service:
    """Learners of many owners over one copy of the weights."""

    settings: ServeSettings
    fleet: Fleet
    desk: Desk
    learners: Learners
    keys: Keys
    watch: Watch
    traces: Traces
    on_champion: Callable[[Version, str, int, Predictions], None] = lambda *_: None
    """Told of the champion's answers: which learner, how many examples it has, the answers"""
    draining: bool = False
    """No more work is wanted."""
    _decoders: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(_DECODERS, "decode")
    )
    """Threads of their own: costly pictures keep nobody's key from being looked up"""
    _loaders: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(_LOADERS, "load")
    )
    """Likewise: a registry that hangs keeps only those waiting who need a version of it"""
    _loading: dict[str, asyncio.Future[Version]] = field(default_factory=dict)
    """By bundle: once for all who wait for it"""
    _shadow: float = 0.0
    """Of an answer in the shadow that is due"""
    _shadows: set[asyncio.Future[None]] = field(default_factory=set)
    _found: dict[tuple[str, str], tuple[float, Kept]] = field(default_factory=dict)
    _ready: OrderedDict[tuple[str, str, str], asyncio.Future[Ready]] = field(
        default_factory=OrderedDict
    )

    async def make(
        self,
        caller: Caller,
        wanted: NewLearner,
        parent: Kept | None = None,
        items: Sequence[Item] = (),
    ) -> tuple[LearnerTold, bool]:
        """Learn a support set and keep it; whether it is new.

        Args:
            parent: the learner that it extends, whose examples, `items`, come first.
        """
        labels = [*(parent.labels if parent else ()), *(one.label for one in wanted.support)]
        check_support(labels, self.settings.limits)
        version = self.version()
        policy = wanted.options.model or self.settings.policy
        every = [*items, *items_of(wanted.support, "support")]
        name = learner_id(every, labels, policy, version.ref.bundle)
        if (known := await asyncio.to_thread(self.learners.get, caller.owner, name)) is not None:
            return told(known), False
        await self._check_room(caller)
        kept = Kept(
            owner=caller.owner,
            id=name,
            name=wanted.name,
            created=now(),
            parent=parent.id if parent else None,
            policy=policy,
            model=version.ref,
            labels=tuple(labels),
            unknown_below=None,
        )
        with _told_to_the_client(version), self.watch.over(version):
            ready = await self._learn(version, kept, every)
        kept = dataclasses.replace(kept, unknown_below=ready.unknown_below)
        new = await asyncio.to_thread(self.learners.add, kept, every)
        self._remember(kept, version, ready)
        if not new:  # somebody else made the same at the same time
            kept = await self.find(caller, name)
        return told(kept), new

    async def find(self, caller: Caller, name: str) -> Kept:
        """One of the caller's learners; Problem 404 if there is none."""
        until, kept = self._found.get((caller.owner, name), (0.0, None))
        if kept is not None and time.monotonic() < until:
            return kept
        kept = await asyncio.to_thread(self.learners.get, caller.owner, name)
        if kept is None:
            raise _no_learner(name)
        if len(self._found) >= self.settings.ready_learners:
            self._found.clear()
        self._found[caller.owner, name] = time.monotonic() + _FOUND_SECONDS, kept
        return kept

    async def ask(
        self, caller: Caller, name: str, queries: Sequence[Input], against: str
    ) -> Predictions:
        """Answer queries by one of the caller's learners."""
        check_queries(queries, self.settings.limits)
        kept = await self.find(caller, name)

        async def by(version: Version) -> tuple[Ready, Answers]:
            ready = await self._ready_for(kept, version)
            return ready, await self._answer(version, ready, queries)

        first = await self._version_for(kept, against)
        return await self._answered(kept, by, first, against, name)

    async def episode(self, wanted: Episode) -> Predictions:
        """Learn, answer, keep nothing."""
        check_support([one.label for one in wanted.support], self.settings.limits)
        check_queries(wanted.queries, self.settings.limits)
        first = self.version(wanted.against)
        support, queries = items_of(wanted.support, "support"), items_of(wanted.queries, "queries")
        kept = Kept(
            owner="",
            id="",
            name=None,
            created=now(),
            parent=None,
            policy="follow",
            model=first.ref,
            labels=tuple(one.label for one in wanted.support),
            unknown_below=None,
        )

        async def by(version: Version) -> tuple[Ready, Answers]:
            examples, pictures = await self._decoded(version, support=support, queries=queries)
            finish = partial(_learn_and_answer, kept, version, examples, pictures)
            job = Job(version, np.concatenate([examples, pictures]), finish)
            found: tuple[Ready, Answers] = await self._done(job)
            return found

        return await self._answered(kept, by, first, wanted.against, support[0].digest)

    async def _answered(
        self, kept: Kept, by: _By, version: Version, against: str, canary: str
    ) -> Predictions:
        """By the champion; for a share of the learners by the challenger, if it can."""
        challenger = self.fleet.serving("challenger")
        follows = against == "champion" and kept.policy == "follow"
        if challenger is not None and follows and is_canary(canary, self.settings.challenge.share):
            try:
                return predictions_of(kept, challenger, *await self._watched(by, challenger))
            except (BrokenModelError, Problem):
                challenger = None  # the champion answers, and nobody is the worse for it
        with _told_to_the_client(version):
            ready, answers = await self._watched(by, version)
        if challenger is not None and follows:
            self._in_the_shadow(by, challenger, answers)
        found = predictions_of(kept, version, ready, answers)
        if against == "champion" and version is self.fleet.serving():
            self.on_champion(version, canary, len(kept.labels), found)
        return found

    async def _watched(self, by: _By, version: Version) -> tuple[Ready, Answers]:
        with self.watch.over(version):
            ready, answers = await by(version)
            require_probabilities(answers)
        return ready, answers

    def _in_the_shadow(self, by: _By, challenger: Version, seen: Answers) -> None:
        """Now and then, and only while nobody waits, let the challenger answer too."""
        self._shadow += self.settings.challenge.shadow
        if self._shadow < 1 or self.desk.waiting:
            self._shadow = min(self._shadow, 1.0)
            return
        self._shadow -= 1

        async def compare() -> None:
            with contextlib.suppress(BrokenModelError, Problem, PipelineError):  # counted, or busy
                _, answers = await self._watched(by, challenger)
                same = answers.probabilities.argmax(dim=1) == seen.probabilities.argmax(dim=1)
                self.watch.compared(challenger, int(same.sum()), len(same))

        task = asyncio.ensure_future(compare())
        self._shadows.add(task)  # or it might be collected before it has run
        task.add_done_callback(self._shadows.discard)

    def report(self) -> ReplicaTold:
        """What this replica serves, and how that does."""
        champion, challenger = (self.fleet.serving(role) for role in ("champion", "challenger"))
        return ReplicaTold(
            champion=champion.ref if champion else None,
            challenger=challenger.ref if challenger else None,
            tallies={
                "champion": self.watch.tally(champion),
                "challenger": self.watch.tally(challenger),
            },
            share=self.settings.challenge.share,
            refused=list(self.fleet.refused.values()),
        )

    async def examples(self, kept: Kept) -> list[Item]:
        """A learner's examples; Problem 404 if it has been deleted since it was found."""
        items = await asyncio.to_thread(self.learners.items, kept.owner, kept.id)
        if len(items) != len(kept.labels):
            raise _no_learner(kept.id)
        return items

    async def ready(self, kept: Kept) -> Ready:
        """What the version that answers for a learner has learned of it."""
        return await self._ready_for(kept, await self._version_for(kept, "champion"))

    async def forget(self, caller: Caller, name: str) -> None:
        """Delete a learner; Problem 404 if there is none."""
        deleted = await asyncio.to_thread(self.learners.delete, caller.owner, name)
        self._found.pop((caller.owner, name), None)
        if not deleted:
            raise _no_learner(name)
        for key in [key for key in self._ready if key[:2] == (caller.owner, name)]:
            del self._ready[key]

    def version(self, role: str = "champion") -> Version:
        """What serves in a role; a Problem where nothing does."""
        version = self.fleet.serving(role)
        if version is None and role == "challenger":
            raise Problem(HTTPStatus.CONFLICT, "there is no challenger now; ask the champion.")
        if version is None:
            raise Problem(503, "no model is loaded yet; /readyz says why.", retry_after=2)
        return version

    async def _check_room(self, caller: Caller) -> None:
        most = self.settings.limits.learners
        if await asyncio.to_thread(self.learners.count, caller.owner) >= most:
            raise Problem(HTTPStatus.CONFLICT, f"you keep {most:,} learners already. Delete some.")

    async def _version_for(self, kept: Kept, against: str) -> Version:
        policy: Policy = kept.policy
        if against == "challenger" or policy == "follow":
            return self.version(against)
        try:
            return self.fleet.loaded(kept.model) or await self._load(kept.model)
        except PipelineError as error:
            detail = f"{kept.id} is pinned to a version that is not to be had: {error}"
            raise Problem(503, detail, retry_after=5) from None

    async def _load(self, ref: ModelRef) -> Version:
        """For as long as the client waits; for the next ones it is loaded on."""
        bundle, loop = ref.bundle, asyncio.get_running_loop()
        if bundle not in self._loading:
            self._loading[bundle] = loop.run_in_executor(self._loaders, self.fleet.version, ref)
            self._loading[bundle].add_done_callback(lambda _: self._loading.pop(bundle))
        return await asyncio.shield(self._loading[bundle])

    async def _ready_for(self, kept: Kept, version: Version) -> Ready:
        """Learned once for each version, however many ask at the same time."""
        key = (kept.owner, kept.id, version.ref.bundle)
        if (known := self._ready.get(key)) is not None:
            self._ready.move_to_end(key)
            return await asyncio.shield(known)
        # A task of its own: the others who wait need it when the first one's time is over.
        task = self._ready[key] = asyncio.ensure_future(self._learn_kept(version, kept))
        task.add_done_callback(partial(self._learned, key))
        return await asyncio.shield(task)

    async def _learn_kept(self, version: Version, kept: Kept) -> Ready:
        return await self._learn(version, kept, await self.examples(kept))

    def _learned(self, key: tuple[str, str, str], task: asyncio.Future[Ready]) -> None:
        failed = task.cancelled() or task.exception() is not None
        if failed and self._ready.get(key) is task:
            del self._ready[key]
        self._forget_oldest()

    def _remember(self, kept: Kept, version: Version, ready: Ready) -> None:
        future = asyncio.get_running_loop().create_future()
        future.set_result(ready)
        self._ready[kept.owner, kept.id, version.ref.bundle] = future
        self._forget_oldest()

    def _forget_oldest(self) -> None:
        while len(self._ready) > self.settings.ready_learners:
            self._ready.popitem(last=False)

    async def _learn(self, version: Version, kept: Kept, items: Sequence[Item]) -> Ready:
        (pictures,) = await self._decoded(version, support=items)
        finish = partial(version.learn, pictures, kept.targets, len(kept.classes))
        ready: Ready = await self._done(Job(version, pictures, finish))
        return ready

    async def _answer(self, version: Version, ready: Ready, queries: Sequence[Input]) -> Answers:
        (pictures,) = await self._decoded(version, queries=items_of(queries, "queries"))
        job = Job(version, pictures, partial(version.answer, ready, pictures))
        answers: Answers = await self._done(job)
        return answers

    async def _decoded(self, version: Version, **places: Sequence[Item]) -> list[Pictures]:
        """The pictures of each place, in one visit to the threads that decode."""
        shape, limits = version.learner.preprocessing.image_shape, self.settings.limits
        loop = asyncio.get_running_loop()

        def decode_all() -> list[Pictures]:
            return [decode(items, shape, limits, place) for place, items in places.items()]

        with self.traces.part("decode", pictures=sum(map(len, places.values()))):
            return await loop.run_in_executor(self._decoders, decode_all)

    async def _done(self, job: Job) -> Any:
        with self.traces.part("model", pictures=len(job.pictures)):
            return await self.desk.do(job)


@contextmanager
def _told_to_the_client(version: Version) -> Iterator[None]:
    try:
        yield
    except BrokenModelError:
        detail = (
            f"version {version.ref.version} of the model failed on this request. That is counted: "
            "a version that fails too often is rolled back. Try again later."
        )
        raise Problem(HTTPStatus.INTERNAL_SERVER_ERROR, detail) from None


def is_canary(name: str, share: float) -> bool:
    """Whether the challenger answers for this learner: always the same ones, spread evenly."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) < share * 16**8


def _no_learner(name: str) -> Problem:
    return Problem(404, f"you have no learner {name}. GET /v1/learners lists yours.")


def _learn_and_answer(
    kept: Kept, version: Version, support: Pictures, queries: Pictures, features: Tensor | None
) -> tuple[Ready, Answers]:
    """Both, from features that came out of one pass; the bits are those of two."""
    own = None if features is None else features[: len(support)]
    asked = None if features is None else features[len(support) :]
    ready = version.learn(support, kept.targets, len(kept.classes), own)
    return ready, version.answer(ready, queries, asked)
