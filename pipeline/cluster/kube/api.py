"""Requests to an API server: bounded in time, tried again where that may help."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.cluster.kube.errors import BusyError, UnreachableError, refusal
from pipeline.cluster.kube.kinds import REVIEWS, Kind, Object

CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 30.0
_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.25, 10.0
_PAGE = 250
_METADATA_ONLY = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1,application/json"


@dataclass(frozen=True)
class Kube:
    """One namespace of one cluster."""

    client: Any
    """The ApiClient of the `kubernetes` package: addresses, certificates, logins."""
    namespace: str
    patience_seconds: float = 10.0
    """How long one request is tried again while the server is busy or does not answer"""
    answer_seconds: float = ANSWER_SECONDS
    """How long a server that has been reached may be silent"""

    def get(self, kind: Kind, name: str, *, metadata_only: bool = False) -> dict[str, Any]:
        """One object.

        Args:
            metadata_only: leave out what it holds: of secrets, only whether they exist matters.

        Raises:
            MissingError: there is none of that name.
            ApiError: any other refusal.
        """
        accept = _METADATA_ONLY if metadata_only else None
        return self._send("GET", "get", kind, name, accept=accept)

    def select(self, kind: Kind, *, labels: str = "", fields: str = "") -> list[dict[str, Any]]:
        """All objects that the selectors choose."""
        return self.select_with_version(kind, labels=labels, fields=fields)[0]

    def select_with_version(
        self, kind: Kind, *, labels: str = "", fields: str = ""
    ) -> tuple[list[dict[str, Any]], str]:
        """Also the version of the whole list, from which a watch can go on."""
        query = {"labelSelector": labels, "fieldSelector": fields, "limit": str(_PAGE)}
        found: list[dict[str, Any]] = []
        while True:
            page = self._send("GET", "list", kind, query=query)
            found += page["items"]
            rest = page["metadata"].get("continue")
            if not rest:
                return found, page["metadata"]["resourceVersion"]
            query["continue"] = rest

    def create(self, kind: Kind, item: Object, *, dry_run: bool = False) -> dict[str, Any]:
        """Make an object; unknown fields are refused.

        Raises:
            ExistsError: there is one of that name.
            ApiError: any other refusal.
        """
        query = {"fieldValidation": "Strict", **_dry(dry_run)}
        named = str(item["metadata"].get("name", ""))
        return self._send("POST", "create", kind, query=query, body=item, named=named)

    def replace(self, kind: Kind, item: Object) -> dict[str, Any]:
        """Write an object; its resourceVersion says what it was made of.

        Raises:
            ConflictError: it has been changed since.
            ApiError: any other refusal.
        """
        return self._send("PUT", "update", kind, item["metadata"]["name"], body=item)

    def patch(
        self, kind: Kind, name: str, change: Object, *, dry_run: bool = False, subresource: str = ""
    ) -> dict[str, Any]:
        """Merge a change into an object (RFC 7386); with a resourceVersion in it, into that one.

        Raises:
            ConflictError: that version is not the present one.
            ApiError: any other refusal.
        """
        query = {"fieldValidation": "Strict", **_dry(dry_run)}
        return self._send(
            "PATCH", "patch", kind, name, query=query, body=change, subresource=subresource
        )

    def delete(self, kind: Kind, name: str, *, uid: str = "", dry_run: bool = False) -> None:
        """Delete an object and, behind it, what belongs to it.

        Args:
            uid: of the very object that is meant; another of the same name is left alone.

        Raises:
            MissingError: it is gone already.
            ConflictError: it is another object than the one that is meant.
        """
        options: dict[str, Any] = {"propagationPolicy": "Background"}
        if uid:
            options["preconditions"] = {"uid": uid}
        self._send("DELETE", "delete", kind, name, query=_dry(dry_run), body=options)

    def allowed(self, verb: str, kind: Kind, subresource: str = "") -> bool:
        """Whether RBAC lets us do this."""
        attributes = {
            "verb": verb,
            "group": kind.group,
            "resource": kind.plural,
            **({"subresource": subresource} if subresource else {}),
            **({"namespace": self.namespace} if kind.namespaced else {}),
        }
        body = {
            "apiVersion": REVIEWS.api_version,
            "kind": REVIEWS.kind,
            "spec": {"resourceAttributes": attributes},
        }
        answer = self._send("POST", "create", REVIEWS, body=body)
        return bool(answer.get("status", {}).get("allowed"))

    def ask(self, path: str) -> dict[str, Any]:
        """A document that is no object: `/version`, `/apis/...`; empty if there is none.

        Raises:
            ApiError: the server does not answer, or not to us.
        """
        nothing = Kind("", "v1", path.strip("/"), "", namespaced=False)
        try:
            return self._send("GET", "get", nothing, path=path)
        except BusyError:
            raise
        except Exception as error:
            if getattr(error, "code", 0) == 404:
                return {}
            raise

    def stream(
        self, kind: Kind, name: str, query: Mapping[str, str], *, seconds: float, subresource: str
    ) -> Iterator[bytes]:
        """The pieces of a long answer, as they come; the last line may be torn.

        Args:
            seconds: the longest silence.

        Raises:
            ApiError: it is refused before the first piece.
            UnreachableError: the connection broke, or was silent for too long.
        """
        import urllib3

        verb = "get" if subresource else "watch"
        path = kind.path(self.namespace, name, subresource)
        response = self._call("GET", path, query, None, None, seconds)
        try:
            if response.status != 200:
                self._refuse(response, verb, kind, name)
            yield from response.response.stream(2**16, decode_content=True)
        except urllib3.exceptions.HTTPError as error:
            raise self._unreachable(error) from None
        finally:
            response.response.close()

    def _send(
        self,
        method: str,
        verb: str,
        kind: Kind,
        name: str = "",
        *,
        query: Mapping[str, str] | None = None,
        body: Object | None = None,
        subresource: str = "",
        accept: str | None = None,
        path: str = "",
        named: str = "",
    ) -> dict[str, Any]:
        """One request, tried again within our patience while the server is busy or away.

        A POST that was cut off is sent again too: everything that we create has a name of its own,
        so a second one finds the first.
        """
        path = path or kind.path(self.namespace, name, subresource)
        end = time.monotonic() + self.patience_seconds
        for attempt in range(100):
            try:
                response = self._call(method, path, query or {}, body, accept, self.answer_seconds)
                content = response.read()
                if not 200 <= response.status < 300:
                    self._refuse(response, verb, kind, name or named)
                return _parsed(content)
            except (BusyError, UnreachableError) as error:
                wait = backoff(attempt)
                if isinstance(error, BusyError) and error.wait_seconds is not None:
                    wait = error.wait_seconds + random.uniform(0, 0.1)
                if time.monotonic() + wait > end:
                    raise
                time.sleep(wait)
        raise AssertionError("the patience is bounded")

    def _call(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        body: Object | None,
        accept: str | None,
        seconds: float,
    ) -> Any:
        import urllib3

        headers = {"Accept": accept or "application/json"}
        if body is not None:
            kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
            headers["Content-Type"] = kind
        request = self.client.param_serialize(
            method=method,
            resource_path=path,
            query_params=[(key, value) for key, value in query.items() if value],
            header_params=headers,
            body=body,
            auth_settings=["BearerToken"],
        )
        try:
            timeout = (min(CONNECT_SECONDS, seconds), seconds)
            return self.client.call_api(*request, _request_timeout=timeout)
        except urllib3.exceptions.HTTPError as error:
            raise self._unreachable(error) from None
        except Exception as error:
            if type(error).__name__ != "ApiException":  # of the package; TLS trouble, mostly
                raise
            raise self._unreachable(error) from None

    def _unreachable(self, error: Exception) -> UnreachableError:
        words = str(getattr(error, "reason", None) or error)
        why = re.sub(r"^(<[^>]*>|\w+\([^)]*\)): ", "", words.strip().splitlines()[-1])[:200].rstrip(
            "."
        )
        return UnreachableError(
            f"the API server at {self.client.configuration.host} does not answer ({why}). Look at "
            "the network, the VPN and `kubectl cluster-info`, or choose another --context."
        )

    def _refuse(self, response: Any, verb: str, kind: Kind, name: str) -> None:
        content = response.read()
        try:
            status = json.loads(content)
        except ValueError:
            status = {"message": content.decode(errors="replace")[:200]}
        status = status if isinstance(status, dict) else {}
        error = refusal(response.status, status, verb, kind, name, self.namespace)
        waits = response.headers.get("Retry-After") or ""
        if isinstance(error, BusyError) and error.wait_seconds is None and waits.isdecimal():
            error.wait_seconds = float(waits)
        raise error


def backoff(attempt: int) -> float:
    """Seconds to wait after so many failures in a row, spread so that clients do not march."""
    longest = min(_FIRST_WAIT_SECONDS * 2.0 ** min(attempt, 20), _LONGEST_WAIT_SECONDS)
    return random.uniform(longest / 2, longest)


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError:
        found = {}
    return found if isinstance(found, dict) else {}


def _dry(dry_run: bool) -> dict[str, str]:
    return {"dryRun": "All"} if dry_run else {}
