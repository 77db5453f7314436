"""The licence of a package as an SPDX expression, from what the package says of itself."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from typing import Any

from cyclonedx.spdx import fixup_id, is_expression
from packaging.utils import canonicalize_name

from infra.images.contents import FOLDER

OWN = FOLDER / "licences.toml"
"""What was found out by reading, for packages that do not say it in a form to rely on."""

_WORDS = {
    "apache 2.0": "Apache-2.0",
    "apache license 2.0": "Apache-2.0",
    "apache license, version 2.0": "Apache-2.0",
    "3-clause bsd license": "BSD-3-Clause",
    "mit license": "MIT",
    "isc license": "ISC",
    "sil ofl 1.1": "OFL-1.1",
    "new bsd": "BSD-3-Clause",
    "nvidia proprietary software": "LicenseRef-NVIDIA-Proprietary",
}
_CLASSIFIERS = {
    "Apache Software License": "Apache-2.0",
    "MIT License": "MIT",
    "ISC License (ISCL)": "ISC",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
    "The Unlicense (Unlicense)": "Unlicense",
    "SIL Open Font License 1.1 (OFL-1.1)": "OFL-1.1",
}
"""Only those that name one licence: `BSD License` may be any of several."""


@cache
def own_findings() -> Mapping[str, str]:
    """Expressions by canonical name."""
    found: Mapping[str, Mapping[str, str]] = tomllib.loads(OWN.read_text())
    return {canonicalize_name(name): entry["licence"] for name, entry in found.items()}


def licence_of(metadata: Mapping[str, Any]) -> str | None:
    """Our own finding, else the package's expression, field or classifiers; None: not known."""
    name = canonicalize_name(metadata["name"])
    if name in own_findings():
        return own_findings()[name]
    if stated := metadata.get("license_expression"):
        return str(stated)
    text = " ".join((metadata.get("license") or "").split())
    if found := fixup_id(text) or _WORDS.get(text.lower()):
        return found
    if text.startswith("LicenseRef-") or (text and is_expression(text)):
        return text
    return _from_classifiers(metadata.get("classifier", []))


def _from_classifiers(classifiers: list[str]) -> str | None:
    """Several are alternatives as often as not, so only a single one is taken."""
    names = {c.rpartition(" :: ")[2] for c in classifiers if c.startswith("License ::")}
    names.discard("OSI Approved")
    return _CLASSIFIERS.get(names.pop()) if len(names) == 1 else None
