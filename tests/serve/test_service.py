"""The service without HTTP: who waits for what."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from pipeline.deploy.bundle import Bundle
from pipeline.deploy.serve.app import build_app
from pipeline.deploy.serve.desk import Desk
from pipeline.deploy.serve.fleet import Fleet
from pipeline.deploy.serve.keys import Caller, Keys
from pipeline.deploy.serve.learners import Learners, open_database
from pipeline.deploy.serve.messages import Input, ModelRef, NewLearner, Predictions
from pipeline.deploy.serve.model import Version
from pipeline.deploy.serve.ray_serve import Health
from pipeline.deploy.serve.service import Service
from pipeline.deploy.serve.settings import ServeSettings
from pipeline.deploy.serve.sources import FolderSource, Source
from pipeline.deploy.serve.traces import Traces
from pipeline.deploy.serve.watch import Watch
from tests.serve.asking import queries, support
from tests.unit.tiny_learner import tiny_bundle

CALLER = Caller("key", "owner", frozenset({"read", "write"}))
PATIENCE_SECONDS = 60


def with_app(
    source: Source,
    folder: Path,
    use: Callable[[Service, httpx.AsyncClient], Awaitable[None]],
    **more: Any,
) -> None:
    """The whole application in this process, with its desk at work."""
    database = f"sqlite:///{folder / 'app.db'}"
    settings = {"database": database, "cache": str(folder / "versions"), **more}
    app, service = build_app(source, ServeSettings.model_validate(settings))

    async def run() -> None:
        service.desk.start()
        await asyncio.to_thread(service.fleet.look)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://app") as web:
            await asyncio.wait_for(use(service, web), PATIENCE_SECONDS)
        await asyncio.to_thread(service.desk.stop)

    asyncio.run(run())


def new_key(service: Service) -> dict[str, str]:
    """Which the service has to look up."""
    return {"authorization": f"Bearer {service.keys.make('owner', ['read', 'write'])}"}


def service_in(folder: Path) -> Service:
    """Whose desk does not work yet."""
    settings = ServeSettings(database=f"sqlite:///{folder / 'learners.db'}")
    engine = open_database(settings.database)
    fleet = Fleet(FolderSource(tiny_bundle(folder).folder), folder, 16, poll_seconds=3600)
    fleet.look()
    watch = Watch(settings.budget, fleet.withdraw)
    return Service(settings, fleet, Desk(100, 1), Learners(engine), Keys(engine), watch, Traces())


def test_who_waits_for_a_learner_gets_it_though_the_first_asker_has_gone(tmp_path: Path) -> None:
    """A request at the end of its time is cancelled; what it began is begun for all."""
    service = service_in(tmp_path)
    asked = [Input.model_validate(one) for one in queries()]

    async def kept() -> str:
        service.desk.start()
        made, _ = await service.make(CALLER, NewLearner.model_validate({"support": support()}))
        service.desk.stop()
        return made.id

    async def ask_twice(name: str) -> Predictions:
        first = asyncio.create_task(service.ask(CALLER, name, asked, "champion"))
        while not service.desk.waiting:
            await asyncio.sleep(0)
        second = asyncio.create_task(service.ask(CALLER, name, asked, "champion"))
        await asyncio.sleep(0)  # it is known by now which learner this is: it waits for the first
        first.cancel()
        service.desk.start()
        answer = await second
        service.desk.stop()
        assert first.cancelled()
        return answer

    name = asyncio.run(kept())
    service._ready.clear()  # as after a restart: the learner is kept, and not learned yet
    assert asyncio.run(ask_twice(name)).learner == name


@dataclass(frozen=True)
class Hanging(FolderSource):
    """Has one more bundle, which does not come before it is let go."""

    slow: Path
    asked: threading.Event = field(default_factory=threading.Event)
    let_go: threading.Event = field(default_factory=threading.Event)

    def fetch(self, ref: ModelRef, target: Path, signed_by: Path | None = None) -> Bundle:
        if ref == self.look()["champion"].ref:
            return super().fetch(ref, target, signed_by)
        self.asked.set()
        self.let_go.wait()
        return FolderSource(self.slow).fetch(ref, target, signed_by)


def test_a_registry_that_hangs_holds_up_those_alone_who_need_it(tmp_path: Path) -> None:
    """Learners pinned to a version that is being fetched; any number of them, for any time."""
    first, second = (tiny_bundle(tmp_path, seed).folder for seed in (1, 2))
    source = Hanging(second, first)
    asked, pinned = {"queries": queries()}, {"support": support(), "options": {"model": "pin"}}
    paths = list[str]()

    async def teach(service: Service, web: httpx.AsyncClient) -> None:
        made = await web.post("/v1/learners", json=pinned, headers=new_key(service))
        paths.append(f"/v1/learners/{made.json()['id']}/predict")

    async def ask(service: Service, web: httpx.AsyncClient) -> None:
        await teach(service, web)
        key = new_key(service)
        stuck = [
            asyncio.create_task(web.post(paths[0], json=asked, headers=key)) for _ in range(40)
        ]
        while not source.asked.is_set():
            await asyncio.sleep(0.01)
        for _ in range(3):
            there = await web.post(paths[1], json=asked, headers=new_key(service))
            assert there.status_code == 200 and not any(one.done() for one in stuck)
        told = await asyncio.gather(*stuck)
        assert {one.status_code for one in told} == {503}
        source.let_go.set()
        later = await web.post(paths[0], json=asked, headers=key)
        assert later.status_code == 200
        assert later.json()["model"]["bundle"] != there.json()["model"]["bundle"]

    with_app(FolderSource(first), tmp_path, teach)
    try:
        with_app(source, tmp_path, ask, rates={"answer_seconds": 8.0})
    finally:
        source.let_go.set()


def test_a_network_that_hangs_is_told_to_whoever_replaces_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_go, embed = threading.Event(), Version.embed

    def hang(version: Version, *arguments: Any) -> Any:
        let_go.wait()
        return embed(version, *arguments)

    async def ask(service: Service, web: httpx.AsyncClient) -> None:
        replica = Health()
        replica.desk = service.desk

        async def states() -> list[int]:
            return [(await web.get(path)).status_code for path in ("/healthz", "/readyz")]

        async def become(wanted: list[int]) -> None:
            while await states() != wanted:
                await asyncio.sleep(0.01)

        assert await states() == [200, 200]
        replica.check_health()
        monkeypatch.setattr(Version, "embed", hang)
        body = {"support": support(), "queries": queries()}
        told = await web.post("/v1/predict", json=body, headers=new_key(service))
        assert told.status_code == 503
        await become([503, 503])
        ready = (await web.get("/readyz")).json()
        assert ready["status"] == "stuck" and "at work on the same pictures" in ready["problems"][0]
        assert (await web.get("/healthz")).json() == {"status": ready["problems"][0]}
        with pytest.raises(RuntimeError, match="at work on the same pictures"):
            replica.check_health()
        let_go.set()
        await become([200, 200])

    try:
        source = FolderSource(tiny_bundle(tmp_path).folder)
        with_app(source, tmp_path, ask, rates={"answer_seconds": 0.25})
    finally:
        let_go.set()
