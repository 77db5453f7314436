"""The versions that serve: loaded beside each other, tried, switched; a bad one stays outside."""

from __future__ import annotations

import fcntl
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from pipeline.core.errors import ArtefactError, PipelineError
from pipeline.core.files import read_json, write_json
from pipeline.deploy.golden import TOLERANCE, WAYS, difference, made_up_episode
from pipeline.deploy.serve.messages import ModelRef, Refused
from pipeline.deploy.serve.model import Version
from pipeline.deploy.serve.sources import Found, Source
from pipeline.deploy.signing import SignatureError, open_signed
from pipeline.runtime.logs import say

Role = Literal["champion", "challenger"]
ROLES: tuple[Role, ...] = ("champion", "challenger")
_LAST = "last.json"
_KEPT_VERSIONS = 8


@dataclass
class Fleet:
    """Follows the aliases of a source. What serves is switched only to what has been tried."""

    source: Source
    cache: Path
    rows_per_pass: int
    poll_seconds: float
    signed_by: Path | None = None
    """Public key; only bundles that are signed by it are loaded"""
    on_switch: Callable[[Role, Version], None] = lambda role, version: None
    refused: dict[str, Refused] = field(default_factory=dict)
    """By bundle"""
    on_look: Callable[[], None] = lambda: None
    """Called behind every look, in the thread that looks"""
    registry_problem: str = ""
    _unfit: set[str] = field(default_factory=set)
    """Bundles whose bytes are damaged, or that cannot answer, which no second look would mend"""
    _withdrawn: dict[str, tuple[Role, ModelRef, str]] = field(default_factory=dict)
    """By bundle: what the source has yet to be told of"""
    _serving: dict[str, Version] = field(default_factory=dict)
    _before: Version | None = None
    """The champion before this one"""
    _loaded: OrderedDict[str, Version] = field(default_factory=OrderedDict)
    _stop: threading.Event = field(default_factory=threading.Event)
    _wake: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    """Of what is loaded; never held while something is loaded"""

    def start(self) -> None:
        """Serve what served last, if it is in the cache; then look who is champion, and follow."""
        self._from_cache()
        self._thread = threading.Thread(target=self._follow, name="fleet", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._stop.set()
        self._wake.set()

    def serving(self, role: str = "champion") -> Version | None:
        """What serves in this role now."""
        return self._serving.get(role)

    def problems(self) -> list[str]:
        """What keeps a newer version out."""
        refused = list(self.refused.values())
        told = [f"version {one.version} may not serve: {one.why}" for one in refused]
        return told + ([self.registry_problem] if self.registry_problem else [])

    def loaded(self, ref: ModelRef) -> Version | None:
        """A version that is here; whoever asks waits for nothing."""
        with self._lock:
            if ref.bundle in self._loaded:
                self._loaded.move_to_end(ref.bundle)
            return self._loaded.get(ref.bundle)

    def version(self, ref: ModelRef) -> Version:
        """A version that a learner is pinned to, loaded if it has to be: as long as that takes.

        Raises:
            PipelineError: it is neither here nor to be had.
        """
        return self.loaded(ref) or self._keep(self._load(ref))

    def withdraw(self, ref: ModelRef, why: str) -> None:
        """Serve by what was before, here at once; everywhere, as soon as the source is told."""
        serving = {role: self._serving.get(role) for role in ROLES}
        role = next((r for r, one in serving.items() if one and one.ref == ref), None)
        if role is None:
            return
        self._unfit.add(ref.bundle)
        self._withdrawn[ref.bundle] = (role, ref, why)
        if role == "challenger":
            self._serving.pop(role, None)  # a look, in its own thread, may have been quicker
        elif self._before is not None:
            self._switch(role, self._before)
        self._wake.set()

    def look(self) -> None:
        """One look at the aliases; a switch if there is a new version and it is good."""
        self._tell_of_withdrawn()
        try:
            found = self.source.look()
            self.registry_problem = ""
        except PipelineError as error:
            self._troubled(str(error).splitlines()[0])
            return
        for role in ROLES:
            now = self._serving.get(role)
            if role not in found:
                if role == "challenger":
                    self._serving.pop(role, None)
            elif now is None or now.ref != found[role].ref:
                self._consider(role, found[role])
        wanted = {one.ref.bundle for one in found.values()}
        self.refused = {key: one for key, one in self.refused.items() if key in wanted}
        self._unfit &= wanted

    def _consider(self, role: Role, found: Found) -> None:
        """Switch to a version, or say why not; the one before it goes on serving."""
        why = found.refusal if role == "champion" else None
        if why is None and found.ref.bundle in self._unfit:
            return
        try:
            version = self.version(found.ref) if why is None else None
        except SignatureError as error:  # the same bytes may be signed before the next look
            why, version = str(error), None
        except ArtefactError as error:
            why, version = str(error), None
            self._unfit.add(found.ref.bundle)
        except PipelineError as error:  # not to be had now: the next look tries again
            self._troubled(str(error).splitlines()[0])
            return
        if version is None:
            self._refuse(role, found.ref, why or "")
            return
        self.refused.pop(found.ref.bundle, None)
        if role == "champion":
            now = self._serving.get(role)
            self._before = None if now is None or now.ref.bundle in self._unfit else now
            write_json(self.cache / _LAST, version.ref.model_dump())
        self._switch(role, version)
        if role == "champion":
            try:
                self.source.accept(version.ref)
            except PipelineError as error:
                self._troubled(str(error).splitlines()[0])

    def _switch(self, role: Role, version: Version) -> None:
        self._serving[role] = version
        say("switch", role=role, version=str(version.ref.version), bundle=version.ref.bundle[:12])
        self.on_switch(role, version)

    def _tell_of_withdrawn(self) -> None:
        """Roll back where the source says who serves; again at the next look, if that fails."""
        for bundle, (role, ref, why) in list(self._withdrawn.items()):
            try:
                self._refuse(role, ref, why, always=True)
                if role == "champion":
                    self.source.roll_back(ref, why)
                    if (now := self._serving.get(role)) is not None:
                        write_json(self.cache / _LAST, now.ref.model_dump())
                del self._withdrawn[bundle]
            except PipelineError as error:
                self._troubled(str(error).splitlines()[0])

    def _refuse(self, role: Role, ref: ModelRef, why: str, *, always: bool = False) -> None:
        known = self.refused.get(ref.bundle)
        if (role != "champion" and not always) or (known is not None and known.why == why):
            return
        self.refused[ref.bundle] = Refused(version=ref.version or 0, why=why)
        say("refused", version=str(ref.version), why=why)
        try:
            self.source.refuse(ref, why)
        except PipelineError as error:
            self._troubled(str(error).splitlines()[0])

    def _load(self, ref: ModelRef) -> Version:
        """From the cache, where it is whole; else from the source."""
        folder = self.cache / ref.bundle
        with self._alone(folder):
            try:
                bundle = open_signed(folder, ref.bundle, self.signed_by)
            except PipelineError:
                bundle = self.source.fetch(ref, folder, self.signed_by)
        version = Version(ref, bundle, self.rows_per_pass)
        try_out(version)
        return version

    @contextmanager
    def _alone(self, folder: Path) -> Iterator[None]:
        """In a folder of the cache, which replicas of one machine share."""
        self.cache.mkdir(parents=True, exist_ok=True)
        with folder.with_name(f".{folder.name}.lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _keep(self, version: Version) -> Version:
        """The one of this bundle: who loaded it at the same time has the same."""
        with self._lock:
            version = self._loaded.setdefault(version.ref.bundle, version)
            in_use = {one.ref.bundle for one in list(self._serving.values())}
            for name in [n for n in self._loaded if n not in in_use][: -_KEPT_VERSIONS or None]:
                del self._loaded[name]
            return version

    def _from_cache(self) -> None:
        self.cache.mkdir(parents=True, exist_ok=True)
        last = self.cache / _LAST
        if not last.exists():
            return
        try:
            ref = ModelRef.model_validate(read_json(last))
            if ref.name == self.source.name:
                bundle = open_signed(self.cache / ref.bundle, ref.bundle, self.signed_by)
                version = Version(ref, bundle, self.rows_per_pass)
                try_out(version)
                self._serving["champion"] = self._keep(version)
                self.on_switch("champion", version)
        except (PipelineError, ValueError) as error:
            say("cache", why=f"not usable: {str(error).splitlines()[0]}")

    def _follow(self) -> None:
        while not self._stop.is_set():
            try:
                self.look()
            except Exception as error:  # whatever it is, the last good version serves on
                self._troubled(f"{type(error).__name__}: {error}"[:300])
            try:
                self.on_look()
            except PipelineError as error:
                self._troubled(str(error).splitlines()[0])
            self._wake.wait(self.poll_seconds)
            self._wake.clear()

    def _troubled(self, problem: str) -> None:
        if problem != self.registry_problem:
            say("registry", why=problem)
        self.registry_problem = problem


def try_out(version: Version) -> None:
    """Learn and answer the golden episode.

    Raises:
        ArtefactError: it fails, or its answers are no probabilities, or are wrong, or are not those
            that the bundle holds.
    """
    episode = made_up_episode(version.learner.preprocessing.image_shape)
    try:
        with torch.no_grad():
            ready = version.learn(episode.support, episode.labels, WAYS)
            answers = version.answer(ready, episode.query)
    except Exception as error:
        raise ArtefactError(
            f"the bundle {version.ref.bundle[:12]} cannot answer: {type(error).__name__}: {error}"
        ) from None
    found = answers.probabilities
    right = found.shape == (WAYS + 1, WAYS) and found[:WAYS].argmax(dim=1).tolist() == [0, 1]
    if not right or not torch.allclose(found.sum(dim=1), torch.ones(WAYS + 1), atol=1e-4):
        raise ArtefactError(
            f"the bundle {version.ref.bundle[:12]} answers wrongly: two classes that hardly vary "
            f"get {found.tolist()}."
        )
    golden = version.bundle.golden
    if golden is not None and (far := difference(golden, found, answers.similarity)) > TOLERANCE:
        raise ArtefactError(
            f"the bundle {version.ref.bundle[:12]} answers its golden episode otherwise than when "
            f"it was made, by {far:.2g} ({TOLERANCE:g} is allowed): is this another version of the "
            "program, or of PyTorch?"
        )
