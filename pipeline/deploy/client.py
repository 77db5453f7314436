"""A typed client of the service: teach, ask, keep.

with Client("http://127.0.0.1:5001", key) as client:
    learner = client.teach({"cat": [Path("a.png")], "dog": [Path("b.png")]})
    print(client.ask(learner.id, [Path("c.png")]).predictions[0].label)
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

import httpx
from pydantic import BaseModel

from pipeline.core.errors import PipelineError
from pipeline.deploy.serve.messages import (
    LearnerTold,
    Listed,
    ModelTold,
    Predictions,
    Readiness,
)
from pipeline.deploy.serve.settings import Policy

Picture = bytes | Path
"""A PNG or JPEG: its bytes, or where it is."""
Support = Mapping[str | int, Sequence[Picture]]
"""Pictures by class."""
Role = Literal["champion", "challenger"]

M = TypeVar("M", bound=BaseModel)
_TIMEOUT_SECONDS = 60.0


class ServiceError(PipelineError):
    """The service refused, or did not answer."""

    def __init__(self, detail: str, http_status: int | None, retry_after: float | None) -> None:
        super().__init__(detail)
        self.http_status = http_status
        """None where there was no answer."""
        self.retry_after = retry_after
        """Seconds after which to try again, if the service said so."""


class Client:
    """One key's view of one service. Every method may raise ServiceError."""

    def __init__(self, url: str, key: str, *, timeout_seconds: float = _TIMEOUT_SECONDS) -> None:
        self._http = httpx.Client(
            base_url=url,
            headers={"authorization": f"Bearer {key}"},
            timeout=timeout_seconds,
            trust_env=False,  # a key goes to the service that was named, never through a proxy
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._http.close()

    def teach(
        self, support: Support, *, name: str | None = None, model: Policy | None = None
    ) -> LearnerTold:
        """Make a learner; the same pictures make the same one."""
        body = {"name": name, "support": _examples(support), "options": {"model": model}}
        return self._post("/v1/learners", body, LearnerTold)

    def extend(self, learner: str, support: Support, *, name: str | None = None) -> LearnerTold:
        """Make a new learner of an old one and more pictures."""
        body = {"name": name, "support": _examples(support)}
        return self._post(f"/v1/learners/{learner}/examples", body, LearnerTold)

    def ask(
        self, learner: str, queries: Sequence[Picture], *, against: Role = "champion"
    ) -> Predictions:
        """Classify pictures."""
        body = {"queries": [_input(one) for one in queries], "against": against}
        return self._post(f"/v1/learners/{learner}/predict", body, Predictions)

    def teach_and_ask(
        self, support: Support, queries: Sequence[Picture], *, against: Role = "champion"
    ) -> Predictions:
        """Both at once; nothing is kept."""
        body = {
            "support": _examples(support),
            "queries": [_input(one) for one in queries],
            "against": against,
        }
        return self._post("/v1/predict", body, Predictions)

    def learner(self, learner: str) -> LearnerTold:
        """One learner."""
        return _parsed(self._send("GET", f"/v1/learners/{learner}"), LearnerTold)

    def learners(self) -> Iterator[LearnerTold]:
        """All learners of this key's owner, the newest first."""
        after: str | None = None
        while True:
            query = f"?after={after}" if after else ""
            page = _parsed(self._send("GET", f"/v1/learners{query}"), Listed)
            yield from page.learners
            after = page.next
            if after is None:
                return

    def delete(self, learner: str) -> None:
        """Remove a learner, for good."""
        self._send("DELETE", f"/v1/learners/{learner}")

    def example(self, learner: str, number: int) -> bytes:
        """A support picture as it was sent."""
        return self._send("GET", f"/v1/learners/{learner}/examples/{number}").content

    def export(self, learner: str) -> bytes:
        """A learner as a zip."""
        return self._send("GET", f"/v1/learners/{learner}/export").content

    def model(self) -> ModelTold:
        """What serves."""
        return _parsed(self._send("GET", "/v1/model"), ModelTold)

    def readiness(self) -> Readiness:
        """Whether requests are answered, and what is wrong."""
        response = self._http.get("/readyz")
        return Readiness.model_validate_json(response.content)

    def _post(self, path: str, body: Mapping[str, Any], kind: type[M]) -> M:
        return _parsed(self._send("POST", path, body), kind)

    def _send(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> httpx.Response:
        try:
            response = self._http.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise ServiceError(
                f"{self._http.base_url} does not answer: {type(error).__name__}: {error}. "
                "Is it running, and is the address right?",
                None,
                None,
            ) from None
        if response.is_success:
            return response
        wait = response.headers.get("retry-after")
        raise ServiceError(_detail(response), response.status_code, float(wait) if wait else None)


def _parsed(response: httpx.Response, kind: type[M]) -> M:
    return kind.model_validate_json(response.content)


def _detail(response: httpx.Response) -> str:
    try:
        return f"{response.status_code}: {response.json()['detail']}"
    except (ValueError, KeyError, TypeError):
        return f"{response.status_code}: {response.text[:200]}"


def _examples(support: Support) -> list[dict[str, Any]]:
    return [
        {**_input(picture), "label": label}
        for label, pictures in support.items()
        for picture in pictures
    ]


def _input(picture: Picture) -> dict[str, str]:
    content = picture.read_bytes() if isinstance(picture, Path) else picture
    return {"image": base64.b64encode(content).decode()}
