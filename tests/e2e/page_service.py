"""The service's contract in memory, with a nearest-picture learner: enough for the page's tests."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import socket
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from PIL import Image

from pipeline.deploy import __file__ as deploy_package

PAGE = Path(deploy_package).parent / "serve" / "page"
KEYS = {"test-key": "read write", "reader-key": "read"}
UNKNOWN_BELOW = 0.55
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; connect-src 'self'; style-src 'self'; "
    "script-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_SIDE = 14
"""Coarse enough that two drawings of one letter share most of their ink."""

Learner = dict[str, Any]


def model(version: int) -> dict[str, Any]:
    return {
        "name": "metaloom-glyphs",
        "version": version,
        "bundle": hashlib.sha256(bytes([version])).hexdigest(),
        "algorithm": "protonet",
        "input": {"kind": "image", "channels": 1, "height": 28, "width": 28},
        "evaluation": {
            "5w1s": {"accuracy": 0.9514, "ci95": 0.0021},
            "5w5s": {"accuracy": 0.9788, "ci95": 0.0012},
        },
    }


def reference(version: int) -> dict[str, Any]:
    return {key: model(version)[key] for key in ("name", "version", "bundle")}


class Shelf:
    """Learners, their pictures and their features, by id."""

    def __init__(self, *, challenger: bool) -> None:
        self.challenger = challenger
        self.learners: dict[str, Learner] = {}
        self.pictures: dict[str, list[bytes]] = {}
        self.labels: dict[str, list[str]] = {}
        self.asked: list[tuple[int, int]] = []
        """Width and height of every picture that was sent."""

    def make(self, body: dict[str, Any]) -> tuple[Learner, bool]:
        name = "lrn_" + hashlib.sha256(json.dumps(body["support"]).encode()).hexdigest()[:32]
        if name in self.learners:
            return self.learners[name], False
        pictures = [self.decode(example) for example in body["support"]]
        labels = [example["label"] for example in body["support"]]
        if len(set(labels)) < 2:
            raise HTTPException(422, "a learner needs at least 2 classes. Add another one.")
        self.pictures[name], self.labels[name] = pictures, labels
        self.learners[name] = {
            "id": name,
            "name": body.get("name"),
            "created": datetime.now(UTC).isoformat(),
            "parent": None,
            "classes": [{"label": k, "shots": n} for k, n in Counter(labels).items()],
            "examples": len(labels),
            "options": {"model": "follow"},
            "model": reference(3),
            "unknown_below": UNKNOWN_BELOW,
        }
        return self.learners[name], True

    def decode(self, example: dict[str, Any]) -> bytes:
        content = base64.b64decode(example["image"].partition(",")[2])
        with Image.open(io.BytesIO(content)) as picture:
            if picture.format != "PNG":
                raise HTTPException(422, "the page sends PNG.")
            self.asked.append(picture.size)
        return content

    def answer(self, name: str, query: bytes, *, challenger: bool) -> dict[str, Any]:
        support = np.stack([features(p) for p in self.pictures[name]])
        similarities = support @ features(query)
        if challenger:
            similarities = similarities**2  # another opinion: less sure, more often unknown
        order = np.argsort(-similarities, kind="stable")[:3]
        labels = self.labels[name]
        best = {
            k: max(s for s, at in zip(similarities, labels, strict=True) if at == k) for k in labels
        }
        powers = {k: float(np.exp(12 * s)) for k, s in best.items()}
        odds = sorted(((p / sum(powers.values()), k) for k, p in powers.items()), reverse=True)
        unknown = bool(similarities[order[0]] < UNKNOWN_BELOW)
        return {
            "label": None if unknown else odds[0][1],
            "unknown": unknown,
            "confidence": odds[0][0],
            "probabilities": [{"label": k, "probability": p} for p, k in odds],
            "nearest": [
                {"example": int(i), "label": labels[i], "similarity": float(similarities[i])}
                for i in order
            ],
        }


def features(content: bytes) -> npt.NDArray[np.float64]:
    """The ink of a picture as a vector of length 1."""
    with Image.open(io.BytesIO(content)) as picture:
        small = picture.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX)
    ink = 255.0 - np.asarray(small, dtype=np.float64).ravel()
    return ink / max(float(np.linalg.norm(ink)), 1e-9)


def make_app(shelf: Shelf) -> FastAPI:
    app = FastAPI()

    @app.middleware("http")
    async def guard(request: Request, call_next: Any) -> Response:
        scope = KEYS.get(request.headers.get("Authorization", "").removeprefix("Bearer "))
        changes = request.method == "DELETE" or request.url.path == "/v1/learners"
        if request.url.path.startswith("/v1/") and scope is None:
            response: Response = problem(request, 401, "the key is unknown. Use the one printed")
        elif scope == "read" and changes and request.method != "GET":
            response = problem(request, 403, "the key may only read. Use one with scope `write`.")
        else:
            response = await call_next(request)
        response.headers["Content-Security-Policy"] = POLICY
        return response

    @app.exception_handler(HTTPException)
    async def refuse(request: Request, error: HTTPException) -> JSONResponse:
        return problem(request, error.status_code, error.detail)

    add_learners(app, shelf)
    add_answers(app, shelf)
    app.mount("/static", StaticFiles(directory=PAGE))

    @app.get("/")
    def page() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    return app


def problem(request: Request, status: int, detail: str) -> JSONResponse:
    content = {"type": "about:blank", "title": "Refused", "status": status, "detail": detail}
    return JSONResponse(
        {**content, "instance": request.url.path, "request_id": "req-17"},
        status,
        media_type="application/problem+json",
    )


def add_learners(app: FastAPI, shelf: Shelf) -> None:
    def known(name: str) -> Learner:
        if name not in shelf.learners:
            raise HTTPException(404, f"there is no learner {name}. GET /v1/learners lists them.")
        return shelf.learners[name]

    @app.post("/v1/learners")
    async def make(request: Request) -> JSONResponse:
        learner, is_new = shelf.make(await request.json())
        return JSONResponse(learner, 201 if is_new else 200)

    @app.get("/v1/learners")
    def listed(limit: int = 50, after: str | None = None) -> dict[str, Any]:
        names = list(shelf.learners)
        start = names.index(after) + 1 if after else 0
        page = names[start : start + limit]
        more = start + limit < len(names)
        return {"learners": [shelf.learners[n] for n in page], "next": page[-1] if more else None}

    @app.get("/v1/learners/{name}")
    def one(name: str) -> Learner:
        return known(name)

    @app.delete("/v1/learners/{name}", status_code=204)
    def delete(name: str) -> None:
        known(name)
        del shelf.learners[name]

    @app.get("/v1/learners/{name}/examples/{number}")
    def example(name: str, number: int) -> Response:
        known(name)
        return Response(shelf.pictures[name][number], media_type="image/png")

    @app.get("/v1/learners/{name}/export")
    def export(name: str) -> Response:
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w") as archive:
            archive.writestr("learner.json", json.dumps(known(name)))
        return Response(content.getvalue(), media_type="application/zip")


def add_answers(app: FastAPI, shelf: Shelf) -> None:
    @app.post("/v1/learners/{name}/predict")
    async def predict(name: str, request: Request) -> dict[str, Any]:
        if name not in shelf.learners:
            raise HTTPException(404, f"there is no learner {name}. GET /v1/learners lists them.")
        body = await request.json()
        challenger = body.get("against") == "challenger"
        if challenger and not shelf.challenger:
            raise HTTPException(409, "there is no challenger. Ask the champion.")
        queries = [shelf.decode(query) for query in body["queries"]]
        return {
            "learner": name,
            "model": reference(4 if challenger else 3),
            "predictions": [shelf.answer(name, q, challenger=challenger) for q in queries],
        }

    @app.get("/v1/model")
    def models() -> dict[str, Any]:
        limits = {"ways": 20, "shots": 20, "queries": 100}
        limits |= {"body_bytes": 10_000_000, "pixels": 4_000_000, "side": 4096}
        return {
            "champion": model(3),
            "challenger": model(4) if shelf.challenger else None,
            "limits": limits,
            "refused": [{"version": 5, "why": "tensors.safetensors is not what its manifest says"}],
        }


@contextmanager
def running(shelf: Shelf) -> Iterator[str]:
    """The address of the service while it runs, on loopback alone."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(make_app(shelf), log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        listener.close()
