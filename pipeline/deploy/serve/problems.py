"""Errors as RFC 9457 problem details: what is wrong, where, and how to mend it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from pipeline.core.errors import MachineError, PipelineError
from pipeline.runtime.logs import say

MEDIA_TYPE = "application/problem+json"
_AWAY_SECONDS = 5.0
_MOST_OF_A_NAME = 50
"""Characters of an unknown field that are told: its name is as long as the client likes."""


class Problem(Exception):  # noqa: N818 - the standard's own word
    """A request that is refused: its status and what to tell the client."""

    def __init__(self, status: int, detail: str, *, retry_after: float | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.retry_after = retry_after


def problem_body(status: int, detail: str, instance: str, request_id: str) -> dict[str, Any]:
    """The members that RFC 9457, section 3.1, defines, and the request's id for the logs."""
    return {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "instance": instance,
        "request_id": request_id,
    }


def problem_headers(retry_after: float | None = None) -> dict[str, str]:
    """Of every answer that is a problem; whole seconds, as HTTP wants them."""
    headers = {"content-type": MEDIA_TYPE, "cache-control": "no-store"}
    if retry_after is not None:
        headers["retry-after"] = str(max(1, round(retry_after)))
    return headers


def away(error: MachineError) -> Problem:
    """Something that the service needs, its database above all, is not there now."""
    say("away", why=str(error))
    return Problem(503, f"{error} Try again in a moment.", retry_after=_AWAY_SECONDS)


def install(app: FastAPI) -> None:
    """Answer every fault of a request with a problem; no client sees a traceback."""

    def answer(
        request: Request, problem: Problem, more: Mapping[str, str] | None = None
    ) -> Response:
        body = problem_body(
            problem.status, problem.detail, request.url.path, request.scope.get("request_id", "")
        )
        headers = {**problem_headers(problem.retry_after), **(more or {})}
        if problem.status == HTTPStatus.UNAUTHORIZED:
            headers["www-authenticate"] = "Bearer"
        return Response(json.dumps(body), problem.status, headers)

    async def on_problem(request: Request, error: Exception) -> Response:
        assert isinstance(error, Problem)
        return answer(request, error)

    async def on_ours(request: Request, error: Exception) -> Response:
        return answer(request, Problem(HTTPStatus.UNPROCESSABLE_ENTITY, str(error)))

    async def on_machine(request: Request, error: Exception) -> Response:
        assert isinstance(error, MachineError)
        return answer(request, away(error))

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        hint = "" if error.status_code != 404 else " The routes are in /openapi.json."
        problem = Problem(error.status_code, f"{error.detail.removesuffix('.')}.{hint}")
        return answer(request, problem, error.headers)  # a 405 says what is allowed

    async def on_form(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return answer(request, Problem(422, places_of(error.errors())))

    async def on_fault(request: Request, error: Exception) -> Response:
        say("fault", request=request.scope.get("request_id", ""), kind=type(error).__name__)
        detail = "a fault of the service; its log names this request's id. Try again later."
        return answer(request, Problem(500, detail))

    app.add_exception_handler(Problem, on_problem)
    app.add_exception_handler(PipelineError, on_ours)
    app.add_exception_handler(MachineError, on_machine)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(RequestValidationError, on_form)
    app.add_exception_handler(Exception, on_fault)


def places_of(errors: Any) -> str:
    """Where a request has another form than it should; never what it holds."""
    told = [f"{_place(error['loc'])}: {error['msg']}" for error in errors[:3]]
    more = f" (and {len(errors) - 3} more)" if len(errors) > 3 else ""
    return f"{'; '.join(told)}{more}. The form is in /openapi.json."


def _place(location: tuple[int | str, ...]) -> str:
    """support[2].label, without the names of the types that were tried."""
    parts = [
        p if isinstance(p, int) else p[:_MOST_OF_A_NAME]
        for p in location
        if isinstance(p, int) or p not in {"body", "int", "str"}
    ]
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return text.removeprefix(".") or "the request"
