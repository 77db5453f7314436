"""Where versions come from: a folder, or a registry whose aliases say which one serves."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

from pipeline.core.errors import ConfigError
from pipeline.core.files import MANIFEST, sha256_file
from pipeline.deploy.bundle import Bundle
from pipeline.deploy.serve.admission import REFUSED_TAG, refusal, unsigned_promotion
from pipeline.deploy.serve.messages import ModelRef
from pipeline.deploy.signing import open_signed

if TYPE_CHECKING:
    from pipeline.deploy.registry import Registry
    from pipeline.deploy.versions import Version

_URI = re.compile(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))")


@dataclass(frozen=True)
class Found:
    """A version that an alias names."""

    ref: ModelRef
    refusal: str | None
    """Why it may not serve, as far as its description tells."""


class Source(Protocol):
    """What a service asks; every call may raise a PipelineError."""

    @property
    def name(self) -> str:
        """Of the model."""

    def look(self) -> Mapping[str, Found]:
        """The versions of `champion` and `challenger` now, as far as there are any."""

    def strict(self, public_key: Path) -> Self:
        """The same, where a champion is followed only if its promotion is signed by this key."""

    def fetch(self, ref: ModelRef, target: Path, signed_by: Path | None = None) -> Bundle:
        """A version's bundle, in a folder that may be used for it, verified.

        With a public key the signature is verified too, and lies beside the bundle.
        """

    def refuse(self, ref: ModelRef, why: str) -> None:
        """Leave word with the version that it may not serve."""

    def accept(self, ref: ModelRef) -> None:
        """Take back word that it may not serve, for it does."""

    def roll_back(self, ref: ModelRef, why: str) -> None:
        """Make the champion before this one serve again everywhere, if it is still champion."""


@dataclass(frozen=True)
class FolderSource:
    """One bundle in a folder, which never changes."""

    folder: Path

    @property
    def name(self) -> str:
        """The folder's."""
        return self.folder.name

    def look(self) -> Mapping[str, Found]:
        """The bundle, as champion."""
        digest = sha256_file(self.folder / MANIFEST) if self.folder.is_dir() else ""
        return {"champion": Found(ModelRef(name=self.name, version=None, bundle=digest), None)}

    def strict(self, public_key: Path) -> Self:
        """The same: whoever started the service named this bundle."""
        return self

    def fetch(self, ref: ModelRef, target: Path, signed_by: Path | None = None) -> Bundle:
        """The bundle where it lies."""
        return open_signed(self.folder, ref.bundle or None, signed_by)

    def refuse(self, ref: ModelRef, why: str) -> None:
        """There is nobody to tell."""

    def accept(self, ref: ModelRef) -> None:
        """There is nobody to tell."""

    def roll_back(self, ref: ModelRef, why: str) -> None:
        """There is no other."""


@dataclass
class RegistrySource:
    """The versions of one registered model in MLflow."""

    root: Path
    name: str
    alias: str = "champion"
    """What it follows"""
    number: int | None = None
    """The one version that it serves, whatever the aliases say"""
    promoted_by: Path | None = None
    """Public key by which the promotion of what it follows must be signed"""
    _told: dict[int, str] = field(default_factory=dict)

    def look(self) -> Mapping[str, Found]:
        """The versions of the aliases; one moved by hand is taken into the promotions' record."""
        registry = self._registry()
        found = {}
        if (serves := self._serves(registry)) is not None:
            why = refusal(serves.tags) or self._not_promoted(registry, serves)
            found["champion"] = Found(_ref(serves), why)
        number = registry.aliases().get("challenger")
        if number is not None:
            waits = registry.version(number)
            found["challenger"] = Found(_ref(waits), refusal(waits.tags))
        return found

    def strict(self, public_key: Path) -> Self:
        """The same, for signed promotions alone; a version that is named by its number is served.

        Raises:
            ConfigError: it follows an alias whose moves are not recorded.
        """
        if self.number is None and self.alias != "champion":
            raise ConfigError(
                f"strict follows promotions, and those of @{self.alias} are not recorded. Serve "
                f"models:/{self.name}@champion, or one version, models:/{self.name}/NUMBER."
            )
        return replace(self, promoted_by=public_key)

    def _not_promoted(self, registry: Registry, serves: Version) -> str | None:
        if self.promoted_by is None or self.number is not None:
            return None
        return unsigned_promotion(registry.promotions(), serves, self.promoted_by)

    def _serves(self, registry: Registry) -> Version | None:
        if self.number is not None:
            return registry.version(self.number)
        if self.alias == "champion":
            return registry.champion()
        number = registry.aliases().get(self.alias)
        return None if number is None else registry.version(number)

    def fetch(self, ref: ModelRef, target: Path, signed_by: Path | None = None) -> Bundle:
        """Download a version's bundle, and its signature where that is asked for."""
        registry = self._registry()
        assert ref.version is not None
        return registry.fetch(registry.version(ref.version), target, signed_by)

    def refuse(self, ref: ModelRef, why: str) -> None:
        """As a tag of the version, once."""
        if ref.version is None or self._told.get(ref.version) == why:
            return
        registry = self._registry()
        registry.tag(registry.version(ref.version), {REFUSED_TAG: why})
        self._told[ref.version] = why

    def accept(self, ref: ModelRef) -> None:
        """Remove that tag, where there is one."""
        if ref.version is None:
            return
        self._told.pop(ref.version, None)
        registry = self._registry()
        registry.untag(registry.version(ref.version), REFUSED_TAG)

    def roll_back(self, ref: ModelRef, why: str) -> None:
        """By a record of promotions; another replica, or a person, may have been quicker."""
        registry = self._registry()
        follows = self.number is None and self.alias == "champion"
        if follows and registry.standing().champion == ref.version:
            registry.rollback(reason=why, only=ref.version)

    def _registry(self) -> Registry:
        # MLflow takes seconds to import; a service that starts from its cache does not wait for it.
        from pipeline.deploy.registry import Registry

        return Registry(self.root, self.name)


def _ref(version: Version) -> ModelRef:
    return ModelRef(name=version.name, version=version.number, bundle=version.digest)


def source_of(model: str, root: Path) -> Source:
    """What a person names: a bundle's folder, a registered model, or `models:/...` of one.

    Raises:
        ConfigError: it is none of these.
    """
    if (Path(model) / MANIFEST).is_file():
        return FolderSource(Path(model))
    if named := _URI.fullmatch(model):
        number = int(named[3]) if named[3] else None
        return RegistrySource(root, named[1], named[2] or "champion", number)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", model):
        raise ConfigError(
            f"{model!r} is neither the folder of a bundle, nor a registered model, nor "
            "models:/NAME@ALIAS or models:/NAME/VERSION."
        )
    return RegistrySource(root, model)
