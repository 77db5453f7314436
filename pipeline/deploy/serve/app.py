"""The HTTP application: routes over a service, the page, health and metrics."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Query, Request
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from starlette.responses import Response

from pipeline import __version__
from pipeline.core.errors import ConfigError, MachineError
from pipeline.deploy.serve import problems
from pipeline.deploy.serve.desk import Desk
from pipeline.deploy.serve.drift import LOOKS_PER_WRITE, WRITE_SECONDS, Traffic
from pipeline.deploy.serve.export import archive, media_type
from pipeline.deploy.serve.fleet import ROLES, Fleet
from pipeline.deploy.serve.forms import read
from pipeline.deploy.serve.guard import Asgi, Guard
from pipeline.deploy.serve.keys import Caller, Keys, KeyTold
from pipeline.deploy.serve.learners import Learners, open_database
from pipeline.deploy.serve.measures import Measures
from pipeline.deploy.serve.messages import (
    Episode,
    Health,
    KeyId,
    LearnerId,
    LearnerTold,
    Listed,
    ModelTold,
    MoreExamples,
    NewLearner,
    Predictions,
    Queries,
    Readiness,
)
from pipeline.deploy.serve.model import Version
from pipeline.deploy.serve.problems import MEDIA_TYPE, Problem
from pipeline.deploy.serve.replicas import Replicas
from pipeline.deploy.serve.service import Service
from pipeline.deploy.serve.settings import ServeSettings
from pipeline.deploy.serve.sources import Source
from pipeline.deploy.serve.telling import told
from pipeline.deploy.serve.traces import Traces
from pipeline.deploy.serve.watch import Watch
from pipeline.deploy.signing import read_public_key

_PROBLEM_TEXTS = ("type", "title", "detail", "instance", "request_id")
HUNG = 4
"""Times as long as a client waits: work that takes longer is taken for hung"""
PAGE = Path(__file__).parent / "page"
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {
        "description": what,
        "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }
    for status, what in {
        "4XX": "The request is refused; `detail` says what, where and how to mend it.",
        "5XX": "The service cannot answer now; see Retry-After.",
    }.items()
}


def build_app(source: Source, settings: ServeSettings) -> tuple[Asgi, Service]:
    """The application, and the service behind it.

    Raises:
        PipelineError: the database, or the key of `signed_by`, cannot be used.
    """
    measures = Measures()
    if (key := settings.public_key) is not None:
        read_public_key(key)  # one that cannot be used is told of now, not at the first version
        source = source.strict(key) if settings.strict else source
    engine = open_database(settings.database)
    fleet = Fleet(
        source, Path(settings.cache), settings.rows_per_pass, settings.poll_seconds, signed_by=key
    )
    watch = Watch(settings.budget, on_spent=fleet.withdraw, on_answer=measures.judged)
    replicas = Replicas(engine)
    write_seconds = min(WRITE_SECONDS, LOOKS_PER_WRITE * settings.poll_seconds)
    traffic = Traffic(engine, replicas.name, write_seconds)
    measures.registry.register(traffic)
    service = Service(
        settings=settings,
        fleet=fleet,
        desk=Desk(
            settings.rates.waiting,
            settings.threads,
            settings.passes,
            most_seconds=HUNG * settings.rates.answer_seconds,
            on_pass=measures.rows.observe,
        ),
        learners=Learners(engine),
        keys=Keys(engine),
        watch=watch,
        traces=Traces(),
        on_champion=traffic.answered,
    )

    def looked() -> None:
        measures.looks.inc()
        replicas.report(service.report())
        traffic.write()

    fleet.on_look = looked

    def switched(role: str, version: Version) -> None:
        watch.begin_anew(version)
        measures.switched(role, version)
        if role == "champion":
            traffic.serves(version)

    fleet.on_switch = switched

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.desk.start()
        service.fleet.start()
        yield
        service.draining = True
        service.fleet.stop()
        await asyncio.to_thread(service.desk.stop)
        with contextlib.suppress(MachineError):  # the row is forgotten within the hour
            await asyncio.to_thread(traffic.write, at_once=True)
            await asyncio.to_thread(replicas.leave)
        engine.dispose()
        await asyncio.to_thread(service.traces.close)

    app = FastAPI(
        title="Metaloom",
        version=__version__,
        description="Few-shot learners: teach classes by a few examples each, then ask.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # it would send clients to whatever `Host` they were made to name
    )
    problems.install(app)
    _add_learners(app, service)
    _add_model(app, service)
    _add_keys(app, service)
    _add_health(app, service, measures)
    _add_page(app)
    _describe_problems(app)
    guard = Guard(
        app,
        service.keys,
        settings,
        service.traces,
        on_answer=measures.answered,
        check_room=service.desk.check_room,
    )
    return guard, service


def _caller(scope: str) -> Callable[[Request], Awaitable[Caller]]:
    """Who asks, if the key has this scope."""

    async def check(request: Request) -> Caller:
        caller: Caller = request.scope["caller"]
        if scope not in caller.scopes:
            raise Problem(403, f"this key may not {scope}; its scopes: {', '.join(caller.scopes)}.")
        return caller

    return check


_Reader = Annotated[Caller, Depends(_caller("read"))]
_Writer = Annotated[Caller, Depends(_caller("write"))]
_Admin = Annotated[Caller, Depends(_caller("admin"))]


def _body(*kinds: type[Any]) -> dict[str, Any]:
    """The body's description for OpenAPI: we read it ourselves, in either form."""
    (kind,) = kinds
    reference = {"$ref": f"#/components/schemas/{kind.__name__}"}
    files = {
        "type": "object",
        "description": "Files `support[LABEL]` and `query`; fields `name`, "
        "`options` (JSON), `against`.",
        "additionalProperties": True,
    }
    content = {"application/json": {"schema": reference}, "multipart/form-data": {"schema": files}}
    return {"requestBody": {"required": True, "content": content}}


def _add_learners(app: FastAPI, service: Service) -> None:
    limits = service.settings.limits
    common: dict[str, Any] = {"responses": _PROBLEMS, "tags": ["learners"]}
    there = {"model": LearnerTold, "description": "The very same is kept already."}
    making = {**common, "status_code": 201, "responses": {**_PROBLEMS, 200: there}}

    @app.post("/v1/learners", openapi_extra=_body(NewLearner), **making)
    async def make_a_learner(request: Request, response: Response, caller: _Writer) -> LearnerTold:
        """Learn a few classes from examples and keep that; 200 if the very same is kept already."""
        learner, new = await service.make(caller, await read(request, NewLearner, limits))
        response.status_code = 201 if new else 200
        return learner

    @app.get("/v1/learners", **common)
    async def list_learners(
        caller: _Reader,
        limit: Annotated[int, Query(ge=1, le=200)] = 50,
        after: LearnerId | None = None,
    ) -> Listed:
        """Your learners, the newest first."""
        last = await service.find(caller, after) if after else None
        page = await asyncio.to_thread(service.learners.page, caller.owner, limit + 1, last)
        more = page[limit - 1].id if len(page) > limit else None
        return Listed(learners=[told(one) for one in page[:limit]], next=more)

    @app.get("/v1/learners/{id}", **common)
    async def one_learner(id: LearnerId, caller: _Reader) -> LearnerTold:
        """One learner."""
        return told(await service.find(caller, id))

    @app.delete("/v1/learners/{id}", status_code=204, **common)
    async def delete_a_learner(id: LearnerId, caller: _Writer) -> None:
        """Remove a learner and its examples, for good."""
        await service.forget(caller, id)

    @app.post("/v1/learners/{id}/examples", openapi_extra=_body(MoreExamples), **making)
    async def extend_a_learner(
        id: LearnerId, request: Request, response: Response, caller: _Writer
    ) -> LearnerTold:
        """Make a new learner of an old one and more examples; learners never change."""
        more = await read(request, MoreExamples, limits)
        parent = await service.find(caller, id)
        items = await service.examples(parent)
        wanted = NewLearner(
            name=more.name or parent.name,
            support=more.support,
            options={"model": parent.policy},  # type: ignore[arg-type]
        )
        learner, new = await service.make(caller, wanted, parent, items)
        response.status_code = 201 if new else 200
        return learner

    @app.get("/v1/learners/{id}/examples/{number}", response_class=Response, **common)
    async def one_example(id: LearnerId, number: int, caller: _Reader) -> Response:
        """An example as it was sent."""
        found = None
        if 0 <= number < limits.ways * limits.shots:
            found = await asyncio.to_thread(service.learners.item, caller.owner, id, number)
        if found is None:
            raise Problem(404, f"you have no learner {id} with an example {number}.")
        return Response(found.content, media_type=media_type(found))

    @app.get("/v1/learners/{id}/export", response_class=Response, **common)
    async def export_a_learner(id: LearnerId, caller: _Reader) -> Response:
        """A zip: description, tensors, examples, hashes."""
        kept = await service.find(caller, id)
        ready = await service.ready(kept)
        items = await service.examples(kept)
        content = await asyncio.to_thread(archive, kept, ready, items)
        name = {"content-disposition": f'attachment; filename="{id}.zip"'}
        return Response(content, media_type="application/zip", headers=name)

    answers: dict[str, Any] = {"response_model": Predictions, **common}

    @app.post("/v1/learners/{id}/predict", openapi_extra=_body(Queries), **answers)
    async def ask_a_learner(id: LearnerId, request: Request, caller: _Reader) -> Response:
        """Classify queries."""
        wanted = await read(request, Queries, limits)
        return _as_json(await service.ask(caller, id, wanted.queries, wanted.against))

    @app.post("/v1/predict", openapi_extra=_body(Episode), **answers)
    async def learn_and_ask(request: Request, caller: _Reader) -> Response:
        """Learn from examples and classify queries at once; nothing is kept."""
        return _as_json(await service.episode(await read(request, Episode, limits)))


def _as_json(predictions: Predictions) -> Response:
    """As it is: FastAPI would check the whole answer once more."""
    return Response(predictions.model_dump_json(), media_type="application/json")


def _add_model(app: FastAPI, service: Service) -> None:
    @app.get("/v1/model", responses=_PROBLEMS, tags=["model"])
    async def what_serves(caller: _Reader) -> ModelTold:
        """The versions that serve, what they take, and those that were refused."""
        challenger = service.fleet.serving("challenger")
        names = ("ways", "shots", "queries", "body_bytes", "pixels", "pixels_together", "side")
        return ModelTold(
            champion=service.version().told(),
            challenger=challenger.told() if challenger else None,
            limits={name: getattr(service.settings.limits, name) for name in names},
            refused=list(service.fleet.refused.values()),
        )


def _add_keys(app: FastAPI, service: Service) -> None:
    common: dict[str, Any] = {"responses": _PROBLEMS, "tags": ["keys"]}

    @app.get("/v1/keys", **common)
    async def list_keys(caller: _Admin) -> list[KeyTold]:
        """The keys of all owners, without their secrets."""
        return await asyncio.to_thread(service.keys.all)

    @app.delete("/v1/keys/{key}", status_code=204, **common)
    async def revoke_a_key(key: KeyId, caller: _Admin) -> None:
        """Take a key back: within five seconds it is refused in every replica."""
        try:
            await asyncio.to_thread(service.keys.revoke, key)
        except ConfigError as error:
            raise Problem(404, str(error)) from None


def _add_health(app: FastAPI, service: Service, measures: Measures) -> None:
    @app.get("/healthz", tags=["health"], responses={503: {"model": Health}})
    async def lives(response: Response) -> Health:
        """The process lives; 503 where only a new one would mend it."""
        trouble = service.desk.trouble
        response.status_code = 503 if trouble else 200
        return Health(status=trouble or "ok")

    @app.get("/readyz", tags=["health"], responses={503: {"model": Readiness}})
    async def is_ready(response: Response) -> Readiness:
        """Requests are answered, by this version; what keeps a newer one out."""
        version, trouble = service.fleet.serving(), service.desk.trouble
        status = "ready" if version else "loading"
        status = "draining" if service.draining else "stuck" if trouble else status
        response.status_code = 200 if status == "ready" else 503
        ref = version.ref if version else None
        problems = [trouble] if trouble else []
        return Readiness(status=status, model=ref, problems=problems + service.fleet.problems())  # type: ignore[arg-type]

    @app.get("/metrics", tags=["health"], response_class=Response)
    async def metrics() -> Response:
        """For Prometheus."""
        measures.waiting.set(service.desk.waiting)
        measures.ready.set(service.fleet.serving() is not None)
        measures.serves({role: service.fleet.serving(role) for role in ROLES})
        measures.refused.set(len(service.fleet.refused))
        return Response(measures.text(), media_type="text/plain; version=0.0.4")


def _add_page(app: FastAPI) -> None:
    app.mount("/static", StaticFiles(directory=PAGE), name="static")

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html", headers={"cache-control": "no-cache"})


def _describe_problems(app: FastAPI) -> None:
    """Add to OpenAPI what FastAPI cannot see: bodies, problems, and the key."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        schema = made()
        parts = schema["components"]["schemas"]
        for kind in (NewLearner, MoreExamples, Queries, Episode):
            own = kind.model_json_schema(ref_template="#/components/schemas/{model}")
            parts |= own.pop("$defs", {})
            parts[kind.__name__] = own
        parts["Problem"] = {
            "type": "object",
            "description": "RFC 9457",
            "required": ["type", "title", "status", "detail"],
            "properties": {
                **{name: {"type": "string"} for name in _PROBLEM_TEXTS},
                "status": {"type": "integer"},
            },
        }
        schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, operations in schema["paths"].items():
            for operation in operations.values():
                operation["security"] = [{"key": []}] if path.startswith("/v1/") else []
        return schema

    app.openapi = openapi  # type: ignore[method-assign]
