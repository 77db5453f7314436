"""An image's bill of materials: CycloneDX 1.6, the same bytes for the same packages."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.dependency import Dependency
from cyclonedx.output.json import JsonV1Dot6
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL
from packaging.utils import canonicalize_name

from infra.images.contents import Image
from infra.images.licences import OWN, licence_of
from infra.images.resolve import LockError, Package
from pipeline import __version__

_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "metaloom.dev")
_NO_DATE = datetime(2000, 1, 1, tzinfo=UTC)
"""The standard's library insists on a date; the real one would make every bill another file."""


def bill_of(image: Image, packages: Sequence[Package]) -> str:
    """JSON, checked against CycloneDX's own schema.

    Raises:
        LockError: the licence of a package is not known.
    """
    licences = {p.name: licence_of(p.metadata) for p in packages}
    if silent := [name for name, licence in licences.items() if licence is None]:
        raise LockError(
            f"no licence is known of {', '.join(silent)}: read what the package comes with, and "
            f"write it down in {OWN.name}."
        )
    components: dict[str, Component] = {
        canonicalize_name(p.name): _component(p, str(licences[p.name])) for p in packages
    }
    bom = Bom(components=components.values())
    for package in packages:
        needed = [Dependency(components[name].bom_ref) for name in package.requires]
        ref = components[canonicalize_name(package.name)].bom_ref
        bom.dependencies.add(Dependency(ref, dependencies=needed))
    content = "\n".join(f"{p.name}=={p.version} {p.hashes}" for p in packages)
    bom.serial_number = uuid.uuid5(_NAMESPACE, f"{image.name}\n{content}")
    bom.metadata.timestamp = _NO_DATE
    bom.metadata.component = Component(
        name=f"metaloom-{image.name}",
        version=__version__,
        type=ComponentType.CONTAINER,
        bom_ref=f"metaloom-{image.name}",
    )
    root = [Dependency(one.bom_ref) for one in components.values()]
    bom.dependencies.add(Dependency(bom.metadata.component.bom_ref, dependencies=root))
    text = JsonV1Dot6(bom).output_as_string(indent=1) + "\n"
    if error := schema_error(text):
        raise LockError(f"the bill of {image.name} does not meet CycloneDX's schema: {error}")
    return text


def schema_error(text: str) -> Any:
    """What is wrong by CycloneDX's own schema; None if nothing is."""
    return JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)


def _component(package: Package, licence: str) -> Component:
    name = canonicalize_name(package.name)
    return Component(
        name=package.name,
        version=package.version,
        type=ComponentType.LIBRARY,
        bom_ref=f"{name}@{package.version}",
        purl=PackageURL("pypi", None, name, package.version),
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=one) for one in package.hashes],
        licenses=[LicenseFactory().make_from_string(licence)],
    )
