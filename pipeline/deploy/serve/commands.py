"""`metaloom serve` and `metaloom keys`."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.core.config import load_section
from pipeline.core.errors import ConfigError, MachineError
from pipeline.deploy.serve.settings import ServeSettings

if TYPE_CHECKING:
    from pipeline.deploy.registry import Registry
    from pipeline.deploy.serve.keys import Keys

_LOOPBACK = {"127.0.0.1", "::1", "localhost"}
_VISIT_DAYS = 1.0

Config = Annotated[
    Path | None, typer.Option(help="YAML file with a section `serve` [default: all defaults].")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]

keys = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="""Keys of the service: who may ask it, and who may make learners.

    They live in the service's database. A key is shown once, when it is made.
    """,
)


def serve(model: str, host: str, port: int, config: Path | None, replicas: str | None) -> None:
    """Serve a model until SIGTERM or Ctrl-C."""
    _require_extra()
    if replicas is not None:
        from pipeline.deploy.serve.ray_serve import Replicas, serve_on_ray

        number = Replicas(*bounds(replicas))
        serve_on_ray(model, settings_from(config), host, port, number)
        return
    from pipeline.deploy.serve.app import build_app
    from pipeline.deploy.serve.server import run
    from pipeline.deploy.serve.sources import source_of

    app, service = build_app(source_of(model, Path.cwd()), settings_from(config))
    address = f"http://{host}:{port}/"
    if sys.stdout.isatty() and host in _LOOPBACK:
        key = service.keys.make("local", ["read", "write"], days=_VISIT_DAYS)
        print(f"{model}: open {address}#key={key}\n(that key is good for a day; Ctrl-C ends)")
    else:
        print(f"{model} on {address} (keys: `metaloom keys make`)", flush=True)
    run(app, service, host, port)


def bounds(text: str) -> tuple[int, int]:
    """Of --replicas: `4` as (4, 4), `2:4` as (2, 4).

    Raises:
        ConfigError: it is neither.
    """
    low, colon, high = text.partition(":")
    numbers = [
        int(part) if part.isdecimal() and len(part) < 5 else 0 for part in (low, high or low)
    ]
    if not 1 <= numbers[0] <= numbers[1] or (colon and not high):
        raise ConfigError(
            f"--replicas is {text!r}. Write a number, or two with a colon between them (1:4: from "
            "1 to 4, as the load asks for)."
        )
    return numbers[0], numbers[1]


def settings_from(config: Path | None) -> ServeSettings:
    """The section `serve` of a file; defaults where no file was named.

    Raises:
        ConfigError: the file is missing, or a key or value in it is not allowed.
    """
    return ServeSettings() if config is None else load_section(config, "serve", ServeSettings)


def say_status(registry: Registry, config: Path | None, *, as_json: bool) -> None:
    """Print what the services of a database tell, beside what the registry wants."""
    _require_extra()
    from pipeline.deploy.drift import DriftRules, drift_in
    from pipeline.deploy.serve.learners import open_database
    from pipeline.deploy.serve.replicas import Replicas
    from pipeline.deploy.serve.status import as_text, status_of

    settings = settings_from(config)
    engine = open_database(settings.database)
    seen = Replicas(engine).all()
    found = status_of(registry, seen, settings, lambda b: drift_in(engine, b, DriftRules()))
    print(json.dumps(found, indent=2) if as_json else as_text(found))


@keys.command("make")
def make_key(
    owner: Annotated[str, typer.Argument(help="Whose learners the key sees.")],
    scope: Annotated[list[str], typer.Option(help="read, write, admin; may be repeated.")] = [  # noqa: B006 - typer's way
        "read"
    ],
    days: Annotated[float | None, typer.Option(help="Until it ends [default: never].")] = None,
    config: Config = None,
) -> None:
    """Make a key and print it: the only time that it can be read."""
    print(_keys(config).make(owner, scope, days))


@keys.command("list")
def list_keys(config: Config = None, as_json: AsJson = False) -> None:
    """Show the keys, without their secrets."""
    found = _keys(config).all()
    if as_json:
        print(json.dumps([vars(one) for one in found], indent=2))
        return
    for one in found:
        state = (
            f"revoked {one.revoked[:10]}"
            if one.revoked
            else f"ends {(one.expires or 'never')[:10]}"
        )
        print(f"{one.id}  {one.owner:<20} {one.scopes:<18} made {one.created[:10]}  {state}")


@keys.command("revoke")
def revoke_key(
    name: Annotated[str, typer.Argument(help="The key's id.")], config: Config = None
) -> None:
    """Take a key back; running services refuse it within five seconds."""
    _keys(config).revoke(name)
    print(f"{name} is revoked.")


def _keys(config: Path | None) -> Keys:
    _require_extra()
    from pipeline.deploy.serve.keys import Keys
    from pipeline.deploy.serve.learners import open_database

    return Keys(open_database(settings_from(config).database))


def _require_extra() -> None:
    """Raises MachineError where the service's libraries are not installed."""
    needed = ("fastapi", "uvicorn", "sqlalchemy", "prometheus_client", "python_multipart")
    if lost := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise MachineError(
            f"{', '.join(lost)} not installed. Install it: pip install 'metaloom[serve]'."
        )
