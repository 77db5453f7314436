"""The least FastAPI application that answers an episode: what a service costs is measured by it.

python -m benchmarks.bare_handler BUNDLE PORT
"""

from __future__ import annotations

import base64
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from benchmarks.serving import SUPPORT
from pipeline.deploy.bundle import load_bundle
from pipeline.domains.pictures import decode_picture
from pipeline.engine.learner import Learner


class _Input(BaseModel):
    image: str


class _Example(_Input):
    label: str


class _Queries(BaseModel):
    queries: list[_Input]


class _Episode(_Queries):
    support: list[_Example]


def build(learner: Learner) -> FastAPI:
    """Two routes: ask a learner that is there, or teach and ask."""
    app = FastAPI()

    def pictures(inputs: list[Any]) -> np.ndarray[Any, Any]:
        found = [
            decode_picture(base64.b64decode(one.image), size=28, channels=1).pixels
            for one in inputs
        ]
        return np.stack(found)

    def adapt(support: list[_Example]) -> tuple[Any, list[str]]:
        classes = list(dict.fromkeys(one.label for one in support))
        labels = torch.tensor([classes.index(one.label) for one in support])
        return learner.adapt(pictures(support), labels, len(classes)), classes

    def answer(adapted: Any, classes: list[str], queries: list[_Input]) -> dict[str, Any]:
        with torch.no_grad():
            probabilities = learner.predict(adapted, pictures(queries))
        best = [classes[i] for i in probabilities.argmax(dim=1).tolist()]
        return {"labels": best, "probabilities": probabilities.tolist()}

    known, names = adapt([_Example(**one) for one in SUPPORT])

    @app.get("/ping")
    def ping() -> str:
        return "pong"

    @app.post("/predict")
    def predict(body: _Queries) -> dict[str, Any]:
        return answer(known, names, body.queries)

    @app.post("/both")
    def both(body: _Episode) -> dict[str, Any]:
        return answer(*adapt(body.support), body.queries)

    return app


def main() -> None:
    """Serve on loopback."""
    torch.set_num_threads(1)
    app = build(load_bundle(Path(sys.argv[1])).learner)
    uvicorn.run(app, port=int(sys.argv[2]), http="h11", loop="asyncio", access_log=False)


if __name__ == "__main__":
    main()
