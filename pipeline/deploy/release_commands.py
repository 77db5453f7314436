"""`metaloom release` and `metaloom release status`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import typer

from pipeline.core.config import load_section
from pipeline.core.files import read_json
from pipeline.deploy.commands import PARAMS, RECORD, AsJson, Model, model_name
from pipeline.deploy.serve import commands

METRICS = Path("results/evaluate/metrics.json")

release = typer.Typer(invoke_without_command=True, rich_markup_mode=None)


@release.callback()
def say_release(context: typer.Context, as_json: AsJson = False) -> None:
    """Say what was released; register it where it is missing.

    A record of a release can be here without the release being in the registry: another registry
    was chosen since, or its database is gone. This asks the registry and makes up for it; where
    the release is registered it changes nothing, but for signing it with METALOOM_SIGNING_KEY.
    """
    if context.invoked_subcommand is not None:
        return
    from pipeline.deploy.registry import Registry
    from pipeline.deploy.release import DeployConfig, Sources, deploy, refuse_failed_smoke
    from pipeline.deploy.summary import summary

    config = load_section(PARAMS, "deploy", DeployConfig)
    record = read_json(RECORD)
    registry = Registry(Path.cwd(), record["model"])
    known = registry.find(record["bundle"])
    if known is None:
        print("This registry does not have the release yet: registering it.", file=sys.stderr)
        record = deploy(config, Sources(), root=Path.cwd())
        refuse_failed_smoke(record)
    else:
        registry.sign(known)
        record = {**record, "version": known.number, "aliases": registry.aliases()}
    if as_json:
        print(json.dumps(record, indent=2))
    else:
        numbers = read_json(METRICS).get(record["domain"], {})
        print(summary(record, numbers, _command_name()))


@release.command()
def status(model: Model = None, config: commands.Config = None, as_json: AsJson = False) -> None:
    """Show what every service serves, and how that does.

    Beside it, what the registry wants. Services tell of themselves in their database at every look
    at the registry (`poll_seconds`); name the file that they were started with by --config. agrees
    is the share of queries that the challenger answered in the shadow with the champion's label.
    """
    from pipeline.deploy.registry import Registry

    registry = Registry(Path.cwd(), model or model_name())
    commands.say_status(registry, config, as_json=as_json)


def _command_name() -> str:
    """What can be typed here again: by its path where it lies in this folder (`.venv/bin`)."""
    called = Path(sys.argv[0]).absolute()
    if called.name != "metaloom" or not called.is_relative_to(Path.cwd()):
        return "metaloom"
    return str(called.relative_to(Path.cwd()))
