"""The service without HTTP: who waits for what."""

from __future__ import annotations

import asyncio
from pathlib import Path

from pipeline.deploy.serve.desk import Desk
from pipeline.deploy.serve.fleet import Fleet
from pipeline.deploy.serve.keys import Caller, Keys
from pipeline.deploy.serve.learners import Learners, open_database
from pipeline.deploy.serve.messages import Input, NewLearner, Predictions
from pipeline.deploy.serve.service import Service
from pipeline.deploy.serve.settings import ServeSettings
from pipeline.deploy.serve.sources import FolderSource
from pipeline.deploy.serve.traces import Traces
from pipeline.deploy.serve.watch import Watch
from tests.serve.asking import queries, support
from tests.unit.tiny_learner import tiny_bundle

CALLER = Caller("key", "owner", frozenset({"read", "write"}))


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
