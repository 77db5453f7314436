"""The service as KubeRay's RayService starts it: by its import path, with arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.core.config import Section, parse_section
from pipeline.deploy.serve.commands import bounds, settings_from
from pipeline.deploy.serve.ray_serve import Replicas, bound_application


class Arguments(Section):
    """`args` of an application in serveConfigV2."""

    model: str
    """As for `metaloom serve`: a registered model, models:/NAME@ALIAS, or a bundle's folder."""
    config: str
    """File with the service's settings, at the same path on every node."""
    replicas: str = "1"
    """A number, or two with a colon between them, as the load asks for."""


def application(arguments: dict[str, Any]) -> Any:
    """What Ray Serve deploys.

    Raises:
        ConfigError: an argument is unknown or missing, the settings cannot be read, or `replicas`
            is neither number nor bounds.
    """
    told = parse_section(arguments, Arguments, where="serveConfigV2: args")
    settings = settings_from(Path(told.config))
    return bound_application(told.model, settings, Replicas(*bounds(told.replicas)))
