"""A request's body as a message: JSON, or files in multipart/form-data."""

from __future__ import annotations

import base64
import re
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.datastructures import UploadFile
from starlette.requests import Request

from pipeline.deploy.serve.problems import Problem, places_of
from pipeline.deploy.serve.settings import Limits

M = TypeVar("M", bound=BaseModel)

_SUPPORT = re.compile(r"support\[(.+)\]", re.DOTALL)
_FIELDS = ("name", "options", "against")


async def read(request: Request, kind: type[M], limits: Limits) -> M:
    """The body as a message of this kind.

    Raises:
        Problem: 415, it is neither; 400 or 422, it has another form; says where.
    """
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media == "multipart/form-data":
        try:
            return _checked(kind, await _from_files(request, limits))
        except UnicodeError:  # some codecs that `charset` may name raise it whatever they are given
            raise Problem(400, "a part's name or text is not in the charset it claims.") from None
    if media not in ("application/json", ""):
        raise Problem(415, "send application/json or multipart/form-data.")
    try:
        return kind.model_validate_json(await request.body())
    except ValidationError as error:
        raise _form(error) from None


def _checked(kind: type[M], values: dict[str, Any]) -> M:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _form(error) from None


def _form(error: ValidationError) -> Problem:
    found = error.errors(include_input=False, include_url=False)
    status = 400 if found[0]["type"] == "json_invalid" else 422
    return Problem(status, places_of(found))


async def _from_files(request: Request, limits: Limits) -> dict[str, Any]:
    """Parts `support[LABEL]` and `query` are pictures; name, options and against are fields."""
    most = limits.ways * limits.shots + limits.queries
    values: dict[str, Any] = {}
    async with request.form(
        max_files=most, max_fields=len(_FIELDS), max_part_size=limits.body_bytes
    ) as form:
        for name, part in form.multi_items():
            labelled = _SUPPORT.fullmatch(name)
            if isinstance(part, UploadFile) and (labelled or name == "query"):
                example = {"image": base64.b64encode(await part.read()).decode()}
                if labelled:
                    values.setdefault("support", []).append({**example, "label": labelled[1]})
                else:
                    values.setdefault("queries", []).append(example)
            elif isinstance(part, str) and name in _FIELDS:
                values[name] = _json(part) if name == "options" else part
            else:
                raise Problem(
                    422,
                    f"part {name[:50]!r}: pictures are files named `support[LABEL]` or `query`; "
                    f"fields are {', '.join(_FIELDS)}.",
                )
    return values


def _json(text: str) -> Any:
    try:
        return from_json(text)  # with a limit of depth, which `json` has not
    except ValueError:
        raise Problem(422, "options: is not JSON.") from None
