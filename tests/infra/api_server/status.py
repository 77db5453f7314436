"""Refusals, as the `Status` objects that kube-apiserver answers with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.infra.api_server.kinds import Resource


class RefusedError(Exception):
    """A request that ends with a Status object."""

    def __init__(
        self,
        code: int,
        reason: str,
        message: str,
        *,
        details: dict[str, Any] | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.code, self.reason, self.message = code, reason, message
        self.details, self.retry_after = dict(details or {}), retry_after
        if retry_after is not None:
            self.details["retryAfterSeconds"] = retry_after

    def body(self) -> dict[str, Any]:
        status = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
            "code": self.code,
        }
        return {**status, "details": self.details} if self.details else status


def _of(resource: Resource, name: str = "") -> dict[str, Any]:
    details: dict[str, Any] = {"kind": resource.plural}
    if resource.group:
        details["group"] = resource.group
    if name:
        details["name"] = name
    return details


def not_found(resource: Resource, name: str) -> RefusedError:
    message = f'{resource.qualified} "{name}" not found'
    return RefusedError(404, "NotFound", message, details=_of(resource, name))


def no_such_path() -> RefusedError:
    return RefusedError(404, "NotFound", "the server could not find the requested resource")


def exists(resource: Resource, name: str) -> RefusedError:
    message = f'{resource.qualified} "{name}" already exists'
    return RefusedError(409, "AlreadyExists", message, details=_of(resource, name))


def conflict(resource: Resource, name: str, why: str = "") -> RefusedError:
    why = why or (
        "the object has been modified; please apply your changes to the latest version and try again"
    )
    message = f'Operation cannot be fulfilled on {resource.qualified} "{name}": {why}'
    return RefusedError(409, "Conflict", message, details=_of(resource, name))


def forbidden(user: str, verb: str, resource: Resource, name: str, namespace: str) -> RefusedError:
    what = f'{resource.qualified} "{name}"' if name else resource.qualified
    where = f'in the namespace "{namespace}"' if namespace else "at the cluster scope"
    message = (
        f'{what} is forbidden: User "{user}" cannot {verb} resource "{resource.plural}" in API '
        f'group "{resource.group}" {where}'
    )
    return RefusedError(403, "Forbidden", message, details=_of(resource, name))


def over_quota(resource: Resource, name: str, quota: str, asked: str) -> RefusedError:
    message = f'{resource.qualified} "{name}" is forbidden: exceeded quota: {quota}, {asked}'
    return RefusedError(403, "Forbidden", message, details=_of(resource, name))


def throttled(seconds: int) -> RefusedError:
    message = "the server has received too many requests and has asked us to try again later"
    return RefusedError(429, "TooManyRequests", message, retry_after=seconds)


def unauthorized() -> RefusedError:
    return RefusedError(401, "Unauthorized", "Unauthorized")


def expired(asked: int, oldest: int) -> RefusedError:
    return RefusedError(410, "Expired", f"too old resource version: {asked} ({oldest})")


def bad_request(message: str) -> RefusedError:
    return RefusedError(400, "BadRequest", message)


def unsupported_patch(kind: str) -> RefusedError:
    message = f"the body of the request was in an unknown format - accepted media types do not include {kind}"
    return RefusedError(415, "UnsupportedMediaType", message)


def invalid(resource: Resource, name: str, causes: Sequence[tuple[str, str]]) -> RefusedError:
    """Args: causes: (field, message) pairs, the message as the real server words it."""
    told = ", ".join(f"{field}: {message}" for field, message in causes)
    listed = f"[{told}]" if len(causes) > 1 else told
    message = f'{resource.qualified_kind} "{name}" is invalid: {listed}'
    details = {
        **_of(resource, name),
        "kind": resource.kind,
        "causes": [
            {"reason": "FieldValueInvalid", "message": text, "field": field}
            for field, text in causes
        ],
    }
    return RefusedError(422, "Invalid", message, details=details)
