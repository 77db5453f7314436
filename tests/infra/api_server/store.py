"""The objects, their versions, and the history that watches read."""

from __future__ import annotations

import copy
import random
import string
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any, NamedTuple

from tests.infra.api_server.checks import check_update, check_write, with_defaults
from tests.infra.api_server.kinds import Resource
from tests.infra.api_server.selectors import fields_match, labels_match
from tests.infra.api_server.status import bad_request, conflict, exists, expired, not_found

Object = dict[str, Any]


class Change(NamedTuple):
    """One entry of the history."""

    version: int
    resource: Resource
    before: Object | None
    after: Object | None


class Store:
    """All objects; every write gets the next version, as etcd counts them."""

    def __init__(self) -> None:
        self.changed = threading.Condition(threading.RLock())
        self.version = 1
        self._items: dict[tuple[str, str, str], Object] = {}
        self._resources: dict[str, Resource] = {}
        self._history: deque[Change] = deque(maxlen=2000)
        self._oldest = 1

    # Reading

    def get(self, resource: Resource, namespace: str, name: str) -> Object:
        with self.changed:
            found = self._items.get((resource.qualified, namespace, name))
            if found is None:
                raise not_found(resource, name)
            return copy.deepcopy(found)

    def select(
        self, resource: Resource, namespace: str, labels: str = "", fields: str = ""
    ) -> tuple[list[Object], int]:
        with self.changed:
            found = [
                copy.deepcopy(item)
                for (kind, space, _), item in sorted(self._items.items())
                if kind == resource.qualified
                and (not namespace or space == namespace)
                and labels_match(item, labels)
                and fields_match(item, fields)
            ]
            return found, self.version

    def forget_history(self) -> None:
        """Compaction: watches from older versions are refused with 410."""
        with self.changed:
            self._history.clear()
            self._oldest = self.version + 1
            self.version += 1
            self.changed.notify_all()

    def changes_since(self, version: int) -> list[Change]:
        """Raises: RefusedError: 410, that part of the history is gone."""
        with self.changed:
            if len(self._history) == self._history.maxlen:
                self._oldest = max(self._oldest, self._history[0].version)
            if version + 1 < self._oldest:
                raise expired(version, self._oldest)
            return [change for change in self._history if change.version > version]

    # Writing

    def create(
        self, resource: Resource, namespace: str, item: Object, *, dry_run: bool, strict: bool
    ) -> Object:
        item = copy.deepcopy(item)
        metadata = item.setdefault("metadata", {})
        with self.changed:
            if resource.namespaced:
                self._check_namespace(namespace, metadata)
            if not metadata.get("name") and metadata.get("generateName"):
                suffix = "".join(random.choices(string.ascii_lowercase + string.digits, k=5))
                metadata["name"] = metadata["generateName"] + suffix
            if not metadata.get("name"):
                raise bad_request("name or generateName is required")
            if metadata.get("resourceVersion"):
                raise bad_request("resourceVersion should not be set on objects to be created")
            item.setdefault("apiVersion", resource.api_version)
            item.setdefault("kind", resource.kind)
            key = (resource.qualified, namespace, metadata["name"])
            if resource.has_status:
                item.pop("status", None)
            check_write(resource, item, strict=strict)
            if key in self._items:
                raise exists(resource, metadata["name"])
            metadata["uid"] = str(uuid.uuid4())
            metadata["creationTimestamp"] = now()
            metadata["generation"] = 1
            item = with_defaults(resource, item)
            return self._put(resource, key, item, dry_run)

    def _check_namespace(self, namespace: str, metadata: Object) -> None:
        if metadata.setdefault("namespace", namespace) != namespace:
            raise bad_request(
                "the namespace of the provided object does not match the namespace sent on the request"
            )
        if ("namespaces", "", namespace) not in self._items:
            raise not_found(Resource("", "v1", "namespaces", "Namespace", False), namespace)

    def update(
        self,
        resource: Resource,
        namespace: str,
        name: str,
        change: Callable[[Object], Object],
        *,
        subresource: str,
        dry_run: bool,
        strict: bool,
    ) -> Object:
        """Apply `change` to the stored object; one that names another version is refused (409)."""
        with self.changed:
            old = self.get(resource, namespace, name)
            new = change(copy.deepcopy(old))
            metadata = new.get("metadata") or {}
            if metadata.get("name", name) != name:
                raise bad_request("the name of the object does not match the name on the URL")
            wanted = metadata.get("resourceVersion")
            if wanted and wanted != old["metadata"]["resourceVersion"]:
                raise conflict(resource, name)
            if metadata.get("uid") and metadata["uid"] != old["metadata"]["uid"]:
                raise conflict(resource, name, "the UID in the precondition does not match")
            new = self._kept(resource, old, new, subresource)
            check_write(resource, new, strict=strict)
            check_update(resource, old, new)
            if _same(old, new):
                return old
            if old.get("spec") != new.get("spec"):
                new["metadata"]["generation"] = old["metadata"].get("generation", 1) + 1
            key = (resource.qualified, namespace, name)
            stored = self._put(resource, key, new, dry_run)
            deleting = stored["metadata"].get("deletionTimestamp")
            if deleting and not stored["metadata"].get("finalizers") and not dry_run:
                self._remove(resource, key)
            return stored

    def _kept(self, resource: Resource, old: Object, new: Object, subresource: str) -> Object:
        """What a write cannot touch stays as it was: status, or all but status."""
        if subresource == "status":
            metadata = {
                **old["metadata"],
                **{
                    k: v
                    for k, v in (new.get("metadata") or {}).items()
                    if k in ("labels", "annotations")
                },
            }
            return {**old, "metadata": metadata, "status": new.get("status", {})}
        fixed = ("name", "namespace", "uid", "creationTimestamp", "deletionTimestamp", "generation")
        metadata = {k: v for k, v in (new.get("metadata") or {}).items() if k not in fixed}
        metadata |= {k: old["metadata"][k] for k in fixed if k in old["metadata"]}
        kept = {**new, "metadata": metadata, "kind": old["kind"], "apiVersion": old["apiVersion"]}
        if resource.has_status:
            kept.pop("status", None)
            if "status" in old:
                kept["status"] = old["status"]
        return kept

    def delete(
        self,
        resource: Resource,
        namespace: str,
        name: str,
        *,
        uid: str = "",
        propagation: str = "",
        dry_run: bool = False,
    ) -> Object:
        with self.changed:
            old = self.get(resource, namespace, name)
            if uid and uid != old["metadata"]["uid"]:
                raise conflict(
                    resource,
                    name,
                    f"the UID in the precondition ({uid}) does not match the UID in record ({old['metadata']['uid']}). The object might have been deleted and then recreated",
                )
            if dry_run:
                return old
            key = (resource.qualified, namespace, name)
            if old["metadata"].get("finalizers"):
                marked = {**old, "metadata": {**old["metadata"], "deletionTimestamp": now()}}
                return self._put(resource, key, marked, False)
            self._remove(resource, key)
            if propagation != "Orphan":
                self._remove_dependents(old["metadata"]["uid"])
            if resource.kind == "Namespace":
                for kind, space, inner in [k for k in self._items if k[1] == name]:
                    self._remove(self._resources[kind], (kind, space, inner))
            return old

    def _remove_dependents(self, owner: str) -> None:
        owned = [
            key
            for key, item in self._items.items()
            if any(o["uid"] == owner for o in item["metadata"].get("ownerReferences") or [])
        ]
        for key in owned:
            if key in self._items:
                uid = self._items[key]["metadata"]["uid"]
                self._remove(self._resources[key[0]], key)
                self._remove_dependents(uid)

    def _put(
        self, resource: Resource, key: tuple[str, str, str], item: Object, dry_run: bool
    ) -> Object:
        before = self._items.get(key)
        if dry_run:
            shown = copy.deepcopy(item)
            shown["metadata"].pop("resourceVersion", None)
            if before is not None:
                shown["metadata"]["resourceVersion"] = before["metadata"]["resourceVersion"]
            return shown
        self.version += 1
        item["metadata"]["resourceVersion"] = str(self.version)
        self._items[key] = copy.deepcopy(item)
        self._resources[resource.qualified] = resource
        self._history.append(Change(self.version, resource, before, self._items[key]))
        self.changed.notify_all()
        return copy.deepcopy(item)

    def _remove(self, resource: Resource, key: tuple[str, str, str]) -> None:
        before = self._items.pop(key)
        self.version += 1
        self._history.append(Change(self.version, resource, before, None))
        self.changed.notify_all()

    # Watching

    def watch(
        self,
        resource: Resource,
        namespace: str,
        version: int,
        *,
        labels: str,
        fields: str,
        seconds: float,
        bookmarks: float | None,
        stopped: threading.Event,
    ) -> Iterator[Object | None]:
        """Events after a version; None now and then, to find out that nobody listens any more.

        Args:
            bookmarks: seconds between two of them; None for none.
        """
        end = time.monotonic() + seconds
        last_mark = time.monotonic()
        while not stopped.is_set() and time.monotonic() < end:
            with self.changed:
                changes = self.changes_since(version)
                if not changes:
                    self.changed.wait(min(0.2, max(0.01, end - time.monotonic())))
                    changes = self.changes_since(version)
            for change in changes:
                version = change.version
                event = _event(change, resource, namespace, labels, fields)
                if event is not None:
                    yield event
            if bookmarks is not None and time.monotonic() - last_mark > bookmarks:
                last_mark = time.monotonic()
                yield {
                    "type": "BOOKMARK",
                    "object": {
                        "kind": resource.kind,
                        "apiVersion": resource.api_version,
                        "metadata": {"resourceVersion": str(version)},
                    },
                }
            yield None


def _event(
    change: Change, resource: Resource, namespace: str, labels: str, fields: str
) -> Object | None:
    if change.resource.qualified != resource.qualified:
        return None

    def seen(item: Object | None) -> bool:
        return (
            item is not None
            and (not namespace or item["metadata"].get("namespace") == namespace)
            and labels_match(item, labels)
            and fields_match(item, fields)
        )

    if seen(change.after):
        kind = "MODIFIED" if seen(change.before) else "ADDED"
        return {"type": kind, "object": copy.deepcopy(change.after)}
    if seen(change.before):
        assert change.before is not None
        last = copy.deepcopy(change.before)
        last["metadata"]["resourceVersion"] = str(change.version)
        return {"type": "DELETED", "object": last}
    return None


def _same(old: Object, new: Object) -> bool:
    def plain(item: Object) -> Object:
        metadata = {k: v for k, v in item["metadata"].items() if k != "resourceVersion"}
        return {**item, "metadata": metadata}

    return plain(old) == plain(new)


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
