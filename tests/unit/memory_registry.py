"""MLflow's registry in this process: what `Champions` uses of it, for tests that need many calls."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from typing import Any


class RefusedError(Exception):
    """A fault with MLflow's name of it."""

    def __init__(self, error_code: str) -> None:
        super().__init__(error_code)
        self.error_code = error_code


@dataclass
class MemoryVersion:
    """A model version."""

    version: int
    tags: dict[str, str]
    creation_timestamp: float


@dataclass
class MemoryModel:
    """A registered model."""

    aliases: dict[str, str] = field(default_factory=dict)
    versions: dict[int, MemoryVersion] = field(default_factory=dict)
    last: int = 0
    """Of versions that were deleted too: numbers are not given twice."""


class Page(list[MemoryVersion]):
    """A page of a search; there is never another."""

    token = ""


class MemoryRegistry:
    """A client whose server is this object."""

    def __init__(self) -> None:
        self._models: dict[str, MemoryModel] = {}

    def create_registered_model(self, name: str, description: str = "") -> None:
        if name in self._models:
            raise RefusedError("RESOURCE_ALREADY_EXISTS")
        self._models[name] = MemoryModel()

    def get_registered_model(self, name: str) -> MemoryModel:
        return self._model(name)

    def create_model_version(
        self, name: str, source: str, tags: dict[str, str] | None = None, **_: Any
    ) -> MemoryVersion:
        model = self._model(name)
        model.last += 1
        made = MemoryVersion(model.last, dict(tags or {}), time.time() * 1000)
        model.versions[model.last] = made
        return made

    def get_model_version(self, name: str, version: str) -> MemoryVersion:
        found = self._model(name).versions.get(int(version))
        if found is None:
            raise RefusedError("RESOURCE_DOES_NOT_EXIST")
        return found

    def search_model_versions(self, condition: str, **_: Any) -> Page:
        match = re.fullmatch("name = '(.*)'", condition)
        assert match is not None, condition
        model = self._models.get(match.group(1), MemoryModel())
        return Page(model.versions[number] for number in sorted(model.versions))

    def delete_model_version(self, name: str, version: str) -> None:
        self.get_model_version(name, version)
        model = self._model(name)
        del model.versions[int(version)]
        model.aliases = {a: n for a, n in model.aliases.items() if n != str(version)}

    def set_registered_model_alias(self, name: str, alias: str, version: str) -> None:
        self.get_model_version(name, version)
        self._model(name).aliases[alias] = str(version)

    def delete_registered_model_alias(self, name: str, alias: str) -> None:
        self._model(name).aliases.pop(alias, None)

    def set_model_version_tag(self, name: str, version: str, key: str, value: str) -> None:
        self.get_model_version(name, version).tags[key] = value

    def delete_model_version_tag(self, name: str, version: str, key: str) -> None:
        self.get_model_version(name, version).tags.pop(key, None)

    def _model(self, name: str) -> MemoryModel:
        if name not in self._models:
            raise RefusedError("RESOURCE_DOES_NOT_EXIST")
        return self._models[name]
