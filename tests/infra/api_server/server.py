"""HTTP in front of the store: paths, verbs, watches, logs, and faults by rule."""

from __future__ import annotations

import base64
import json
import re
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from tests.infra.api_server.certificates import certificate
from tests.infra.api_server.kinds import BUILT_IN, CUSTOM, Resource
from tests.infra.api_server.patches import merged, strategically_merged
from tests.infra.api_server.status import (
    RefusedError,
    bad_request,
    forbidden,
    no_such_path,
    throttled,
    unauthorized,
    unsupported_patch,
)
from tests.infra.api_server.store import Object, Store

TOKEN = "a-token-of-the-tests"


@dataclass
class Rule:
    """A fault: requests that match get `answer`, as often as `times` says (None: always)."""

    answer: Callable[[Request], None]
    """Raises RefusedError, or DroppedError to cut the connection."""
    verb: str = ".*"
    resource: str = ".*"
    times: int | None = None
    lose_answer: bool = False


def _nothing(request: Request) -> None:
    """It is the answer that is lost."""


class DroppedError(Exception):
    """The connection ends without an answer."""


@dataclass
class Request:
    """What was asked, in the words of RBAC."""

    verb: str
    resource: Resource
    namespace: str
    name: str
    subresource: str
    query: dict[str, str]
    user: str
    lost: bool = False
    """The answer does not reach the client"""

    @property
    def what(self) -> str:
        return self.resource.plural + (f"/{self.subresource}" if self.subresource else "")


class PodLogs:
    """Lines of containers, each with the time when it was written."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self._lines: dict[tuple[str, str], list[tuple[str, str]]] = {}

    def write(self, namespace: str, pod: str, line: str) -> None:
        stamp = datetime.now(UTC)
        nanoseconds = (
            f"{stamp:%Y-%m-%dT%H:%M:%S}.{stamp.microsecond:06d}{time.time_ns() % 1000:03d}Z"
        )
        self.append(namespace, pod, nanoseconds, line)

    def append(self, namespace: str, pod: str, stamp: str, line: str) -> None:
        """A line with a stamp of one's own."""
        with self.changed:
            self._lines.setdefault((namespace, pod), []).append((stamp, line))
            self.changed.notify_all()

    def lines(self, namespace: str, pod: str) -> list[tuple[str, str]]:
        with self.changed:
            return list(self._lines.get((namespace, pod), []))


@dataclass
class ApiServer:
    """A cluster without nodes; `kubeconfig()` is how to reach it.

    The controllers of tests/infra/api_server/controllers.py stand in for the real ones.
    """

    resources: list[Resource] = field(default_factory=lambda: [*BUILT_IN, *CUSTOM])
    rules: list[Rule] = field(default_factory=list)
    denied: list[tuple[str, str]] = field(default_factory=list)
    """(verb, resource) that RBAC does not allow, as regular expressions."""
    minor: str = "37"
    """Of its version"""
    bookmark_seconds: float = 1.0
    log_cut_lines: int | None = None
    """Cut the connection of a followed log after so many lines, in the middle of the next."""
    requests: list[Request] = field(default_factory=list)
    store: Store = field(default_factory=Store)
    logs: PodLogs = field(default_factory=PodLogs)
    stopped: threading.Event = field(default_factory=threading.Event)
    create_pod_fault: RefusedError | None = None
    """What the controller of Jobs meets when it makes a pod"""
    watching: set[socket.socket] = field(default_factory=set)
    connected: set[socket.socket] = field(default_factory=set)

    def __post_init__(self) -> None:
        handler = type("Handler", (_Handler,), {"api": self})
        self._http = _Server(("127.0.0.1", 0), handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._authority, chain = certificate()
        context.load_cert_chain(chain)
        self._http.socket = context.wrap_socket(
            self._http.socket, server_side=True, do_handshake_on_connect=False
        )
        self.port = self._http.server_address[1]
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True, args=(0.05,))
        self._thread.start()

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def stop(self) -> None:
        self.stopped.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()
        _shut(self.connected)

    def kubeconfig(self, path: Path, namespace: str = "metaloom", token: str = TOKEN) -> Path:
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [
                {
                    "name": "test",
                    "cluster": {
                        "server": self.url,
                        "certificate-authority-data": base64.b64encode(self._authority).decode(),
                    },
                }
            ],
            "users": [{"name": "test", "user": {"token": token}}],
            "contexts": [
                {
                    "name": "test",
                    "context": {"cluster": "test", "user": "test", "namespace": namespace},
                }
            ],
        }
        path.write_text(yaml.safe_dump(config))
        path.chmod(0o600)
        return path

    def service_account(self, folder: Path, namespace: str) -> None:
        """What a kubelet mounts into a pod; with KUBERNETES_SERVICE_HOST and _PORT it is all."""
        folder.mkdir()
        (folder / "token").write_text(TOKEN)
        (folder / "ca.crt").write_bytes(self._authority)
        (folder / "namespace").write_text(namespace)

    def resource(self, plural: str) -> Resource:
        return next(r for r in self.resources if r.plural == plural)

    def refuse(self, verb: str, resource: str, error: Exception, times: int | None = None) -> None:
        """Answer matching requests with this error."""

        def answer(request: Request) -> None:
            raise error

        self.rules.append(Rule(answer, verb, resource, times))

    def be_silent(self, verb: str, resource: str) -> None:
        """Take matching requests and never answer, as behind a load balancer without a server."""

        def answer(request: Request) -> None:
            self.stopped.wait()
            raise DroppedError

        self.rules.append(Rule(answer, verb, resource))

    def lose_answers(self, verb: str, resource: str, times: int) -> None:
        """Do what matching requests ask for, and cut the connection instead of answering."""
        self.rules.append(Rule(_nothing, verb, resource, times, lose_answer=True))

    def cut_watches(self) -> None:
        """Break the connections of all watches that go on."""
        _shut(self.watching)

    def throttle(self, verb: str, resource: str, seconds: int, times: int) -> None:
        self.refuse(verb, resource, throttled(seconds), times)

    def admit(self, request: Request) -> None:
        """RBAC first, then faults."""
        if self.is_denied(request.verb, request.what):
            name = request.name if request.verb not in ("create", "list", "watch") else ""
            raise forbidden(request.user, request.verb, request.resource, name, request.namespace)
        for rule in list(self.rules):
            if not re.fullmatch(rule.verb, request.verb) or not re.fullmatch(
                rule.resource, request.what
            ):
                continue
            if rule.times is not None:
                if rule.times <= 0:
                    continue
                rule.times -= 1
            request.lost = rule.lose_answer
            rule.answer(request)

    def is_denied(self, verb: str, what: str) -> bool:
        return any(re.fullmatch(v, verb) and re.fullmatch(w, what) for v, w in self.denied)


def _shut(connections: set[socket.socket]) -> None:
    for connection in list(connections):
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away in the middle is no news."""


class _Handler(BaseHTTPRequestHandler):
    api: ApiServer
    protocol_version = "HTTP/1.1"
    wbufsize = 0
    disable_nagle_algorithm = True

    def handle(self) -> None:
        self.api.connected.add(self.connection)
        try:
            super().handle()
        finally:
            self.api.connected.discard(self.connection)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: what was asked is in `requests`."""

    def do_GET(self) -> None:
        self._answer()

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET  # noqa: N815

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self._body = self.rfile.read(length) if length else b""
        try:
            self._route()
        except RefusedError as refused:
            self._send(refused.code, refused.body(), refused.retry_after)
        except DroppedError:
            self._cut()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _cut(self) -> None:
        self.close_connection = True
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            return

    def _send(self, code: int, body: Any, retry_after: int | None = None) -> None:
        content = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if retry_after is not None:
            self.send_header("Retry-After", str(retry_after))
        self.end_headers()
        self.wfile.write(content)

    def _route(self) -> None:
        parts = urlsplit(self.path)
        query = {k: v[-1] for k, v in parse_qs(parts.query, keep_blank_values=True).items()}
        scheme, _, token = (self.headers.get("Authorization") or "").partition(" ")
        if scheme.lower() != "bearer" or token != TOKEN:
            raise unauthorized()
        pieces = [unquote(piece) for piece in parts.path.strip("/").split("/")]
        if self._discovery(pieces):
            return
        request = self._understand(pieces, query)
        self.api.requests.append(request)
        self.api.admit(request)
        self._perform(request)

    # Discovery

    def _discovery(self, pieces: list[str]) -> bool:
        groups = sorted({(r.group, r.version) for r in self.api.resources if r.group})
        if pieces == ["version"]:
            minor = self.api.minor
            told = {"major": "1", "minor": minor, "gitVersion": f"v1.{minor}.0"}
            self._send(200, told)
        elif pieces in (["livez"], ["readyz"], ["healthz"]):
            self._send(200, "ok")
        elif pieces == ["api"]:
            self._send(200, {"kind": "APIVersions", "versions": ["v1"]})
        elif pieces == ["apis"]:
            listed = [
                {
                    "name": group,
                    "versions": [{"groupVersion": f"{group}/{version}", "version": version}],
                    "preferredVersion": {"groupVersion": f"{group}/{version}", "version": version},
                }
                for group, version in groups
            ]
            self._send(200, {"kind": "APIGroupList", "apiVersion": "v1", "groups": listed})
        elif pieces == ["api", "v1"] or (
            len(pieces) == 3 and pieces[0] == "apis" and tuple(pieces[1:]) in groups
        ):
            self._send(200, self._resource_list("/".join(pieces[1:])))
        else:
            return False
        return True

    def _resource_list(self, group_version: str) -> Object:
        listed = [
            {
                "name": r.plural,
                "singularName": r.kind.lower(),
                "namespaced": r.namespaced,
                "kind": r.kind,
                "verbs": ["create", "delete", "get", "list", "patch", "update", "watch"],
            }
            for r in self.api.resources
            if r.api_version == group_version
        ]
        return {
            "kind": "APIResourceList",
            "apiVersion": "v1",
            "groupVersion": group_version,
            "resources": listed,
        }

    # Requests for objects

    def _understand(self, pieces: list[str], query: dict[str, str]) -> Request:
        if pieces[:2] == ["api", "v1"]:
            group, version, rest = "", "v1", pieces[2:]
        elif pieces[0] == "apis" and len(pieces) > 3:
            group, version, rest = pieces[1], pieces[2], pieces[3:]
        else:
            raise no_such_path()
        namespace = ""
        if rest[:1] == ["namespaces"] and len(rest) > 2:
            namespace, rest = rest[1], rest[2:]
        found = [
            r
            for r in self.api.resources
            if (r.group, r.version, r.plural) == (group, version, rest[0])
        ]
        if not found or len(rest) > 3:
            raise no_such_path()
        name = rest[1] if len(rest) > 1 else ""
        subresource = rest[2] if len(rest) > 2 else ""
        verb = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}.get(
            self.command, "get" if name else "list"
        )
        if verb == "list" and query.get("watch") in ("1", "true"):
            verb = "watch"
        if verb == "delete" and not name:
            verb = "deletecollection"
        return Request(verb, found[0], namespace, name, subresource, query, "tester")

    def _perform(self, request: Request) -> None:
        if request.resource.kind == "SelfSubjectAccessReview":
            self._review()
        elif request.verb == "watch":
            self._watch(request)
        elif request.verb == "list":
            self._list(request)
        elif request.subresource == "log":
            self._log(request)
        else:
            code, body = self._write_or_get(request)
            if request.lost:
                raise DroppedError
            self._send(code, body)

    def _write_or_get(self, request: Request) -> tuple[int, Object]:
        store, resource, query = self.api.store, request.resource, request.query
        dry_run, strict = query.get("dryRun") == "All", query.get("fieldValidation") == "Strict"
        where = (resource, request.namespace, request.name)
        if query.get("dryRun") not in (None, "", "All"):
            raise bad_request(f"invalid dryRun value: {query['dryRun']}")
        if request.verb == "get":
            return 200, self._shown(store.get(*where))
        if request.verb == "create":
            item = self._json()
            return 201, store.create(
                resource, request.namespace, item, dry_run=dry_run, strict=strict
            )
        if request.verb == "delete":
            return 200, self._delete(request, dry_run)
        if request.verb == "update":
            wanted = self._json()
            change: Callable[[Object], Object] = lambda old: wanted  # noqa: E731
        elif request.verb == "patch":
            change = self._patch(request)
            if self.headers.get("Content-Type") == "application/apply-patch+yaml":
                try:
                    store.get(*where)
                except RefusedError:
                    item = change({})
                    return 201, store.create(
                        resource, request.namespace, item, dry_run=dry_run, strict=strict
                    )
        else:
            raise RefusedError(405, "MethodNotAllowed", "the server does not allow this method")
        return 200, store.update(
            *where, change, subresource=request.subresource, dry_run=dry_run, strict=strict
        )

    def _shown(self, item: Object) -> Object:
        """The object, or its metadata alone where that was asked for."""
        if "as=PartialObjectMetadata" not in (self.headers.get("Accept") or ""):
            return item
        return {
            "kind": "PartialObjectMetadata",
            "apiVersion": "meta.k8s.io/v1",
            "metadata": item["metadata"],
        }

    def _json(self) -> Object:
        if "protobuf" in (self.headers.get("Content-Type") or ""):
            raise unsupported_patch("application/vnd.kubernetes.protobuf")
        try:
            found = yaml.safe_load(self._body) if self._body[:1] != b"{" else json.loads(self._body)
        except (ValueError, yaml.YAMLError) as error:
            raise bad_request(f"the body could not be decoded: {error}") from None
        if not isinstance(found, dict):
            raise bad_request("the body is no object")
        return found

    def _patch(self, request: Request) -> Callable[[Object], Object]:
        kind = self.headers.get("Content-Type") or ""
        patch = self._json()
        if kind == "application/merge-patch+json":
            return lambda old: merged(old, patch)
        if kind == "application/strategic-merge-patch+json":
            if "." in request.resource.group and not request.resource.group.endswith(".k8s.io"):
                raise unsupported_patch(kind)
            return lambda old: strategically_merged(old, patch)
        if kind == "application/apply-patch+yaml":
            if not request.query.get("fieldManager"):
                raise bad_request(
                    "PatchOptions.meta.k8s.io is invalid: fieldManager: Required value: is required for apply patch"
                )
            return lambda old: strategically_merged(old, patch)
        raise unsupported_patch(kind)

    def _delete(self, request: Request, dry_run: bool) -> Object:
        options = self._json() if self._body else {}
        propagation = options.get("propagationPolicy") or request.query.get("propagationPolicy")
        if propagation is None and request.resource.plural == "jobs":
            propagation = "Orphan"  # batch/v1's own default
        gone = self.api.store.delete(
            request.resource,
            request.namespace,
            request.name,
            uid=(options.get("preconditions") or {}).get("uid", ""),
            propagation=propagation or "Background",
            dry_run=dry_run or options.get("dryRun") == ["All"],
        )
        return {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Success",
            "details": {"name": request.name, "uid": gone["metadata"]["uid"]},
        }

    def _review(self) -> None:
        asked = self._json()
        about = asked["spec"]["resourceAttributes"]
        what = about["resource"] + (f"/{about['subresource']}" if about.get("subresource") else "")
        allowed = not self.api.is_denied(about["verb"], what)
        self._send(201, {**asked, "status": {"allowed": allowed}})

    def _list(self, request: Request) -> None:
        query = request.query
        items, version = self.api.store.select(
            request.resource,
            request.namespace,
            query.get("labelSelector", ""),
            query.get("fieldSelector", ""),
        )
        metadata: dict[str, Any] = {"resourceVersion": str(version)}
        begin = int(query.get("continue") or 0)
        limit = int(query.get("limit") or 0)
        if limit and begin + limit < len(items):
            metadata["continue"] = str(begin + limit)
            metadata["remainingItemCount"] = len(items) - begin - limit
        chosen = items[begin : begin + limit] if limit else items[begin:]
        body = {
            "kind": f"{request.resource.kind}List",
            "apiVersion": request.resource.api_version,
            "metadata": metadata,
            # As the real server: the items of a list do not say what kind they are.
            "items": [
                {k: v for k, v in i.items() if k not in ("kind", "apiVersion")} for i in chosen
            ],
        }
        self._send(200, body)

    def _begin_stream(self, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _chunk(self, content: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(content), content))

    def _watch(self, request: Request) -> None:
        query, store = request.query, self.api.store
        asked = query.get("resourceVersion") or ""
        present: list[Object] = []
        if asked in ("", "0"):
            selectors = query.get("labelSelector", ""), query.get("fieldSelector", "")
            present, version = store.select(request.resource, request.namespace, *selectors)
        else:
            version = int(asked)
        self._begin_stream("application/json")
        for item in present:
            self._chunk(json.dumps({"type": "ADDED", "object": item}).encode() + b"\n")
        bookmarks = query.get("allowWatchBookmarks") in ("1", "true")
        self.api.watching.add(self.connection)
        try:
            for event in store.watch(
                request.resource,
                request.namespace,
                version,
                labels=query.get("labelSelector", ""),
                fields=query.get("fieldSelector", ""),
                seconds=float(query.get("timeoutSeconds") or 1800),
                bookmarks=self.api.bookmark_seconds if bookmarks else None,
                stopped=self.api.stopped,
            ):
                if event is not None:
                    self._chunk(json.dumps(event).encode() + b"\n")
                elif self._hung_up():
                    self.close_connection = True
                    return
        except RefusedError as refused:
            event = {"type": "ERROR", "object": refused.body()}
            self._chunk(json.dumps(event).encode() + b"\n")
        finally:
            self.api.watching.discard(self.connection)
        self._chunk(b"")

    def _hung_up(self) -> bool:
        """A client that waits for an answer says nothing, unless it takes its leave."""
        return bool(select.select([self.connection], [], [], 0)[0])

    def _log(self, request: Request) -> None:
        pod = self.api.store.get(request.resource, request.namespace, request.name)
        containers = [c["name"] for c in pod["spec"]["containers"]]
        asked = request.query.get("container", containers[0])
        if asked not in containers:
            raise bad_request(f"container {asked} is not valid for pod {request.name}")
        if pod["status"].get("phase") == "Pending":
            raise bad_request(
                f'container "{asked}" in pod "{request.name}" is waiting to start: ContainerCreating'
            )
        follow = request.query.get("follow") == "true"
        stamped = request.query.get("timestamps") == "true"
        since = request.query.get("sinceTime", "").split(".")[0].rstrip("Z")
        self._begin_stream("text/plain")
        sent = at = 0
        while True:
            lines = self.api.logs.lines(request.namespace, request.name)
            for stamp, text in lines[at:]:
                at += 1
                if stamp[:19] < since:
                    continue
                line = f"{stamp} {text}\n" if stamped else f"{text}\n"
                if follow and self.api.log_cut_lines is not None and sent >= self.api.log_cut_lines:
                    self._chunk(line.encode()[: len(line) // 2])
                    raise DroppedError
                self._chunk(line.encode())
                sent += 1
            if not follow or (
                self._is_over(request)
                and at == len(self.api.logs.lines(request.namespace, request.name))
            ):
                break
            if self.api.stopped.is_set() or self._hung_up():
                self.close_connection = True
                return
            with self.api.logs.changed:
                self.api.logs.changed.wait(0.1)
        self._chunk(b"")

    def _is_over(self, request: Request) -> bool:
        try:
            pod = self.api.store.get(request.resource, request.namespace, request.name)
        except RefusedError:
            return True
        return pod["status"].get("phase") in ("Succeeded", "Failed")
