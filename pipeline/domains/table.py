"""The domains by name: a new one is a file beside this, a row here, a row in its contract test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pipeline.domains.base import Domain
from pipeline.domains.glyphs import Glyphs
from pipeline.domains.image_folder import ImageFolder
from pipeline.domains.omniglot import Omniglot

DOMAINS: Mapping[str, Callable[[Any, Any], Domain]] = {
    "glyphs": Glyphs,
    "image_folder": ImageFolder,
    "omniglot": Omniglot,
}
"""Each is made of its section of the configuration and a Frame."""
