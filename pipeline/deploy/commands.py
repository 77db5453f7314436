"""`metaloom promote`, and what commands about a registered model have in common."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.core.config import load_value
from pipeline.core.errors import ConfigError, RegistryError
from pipeline.core.files import read_json

if TYPE_CHECKING:
    from pipeline.deploy.registry import Registry

RECORD = Path("results/deploy/release.json")
PARAMS = Path("params.yaml")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Model = Annotated[
    str | None,
    typer.Option("--model", help="Registered name [default: the one of the last release]."),
]


def promote(
    version: Annotated[
        int | None, typer.Argument(help="Version [default: @challenger; with --to, @champion].")
    ] = None,
    to: Annotated[
        str | None, typer.Option("--to", help="Copy it to this registered model.")
    ] = None,
    only_copy: Annotated[
        bool, typer.Option("--only-copy", help="With --to: leave the champion there as it is.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Though the gate did not pass it.")
    ] = False,
    reason: Annotated[str | None, typer.Option(help="Why; recorded. Needed with --force.")] = None,
    model: Model = None,
    as_json: AsJson = False,
) -> None:
    """Make a registered version the champion, here or of another registered model.

    One that the gate did not pass needs --force and --reason: the reason is kept in the record of
    promotions and as a tag of the version. Forced or not, a version must have passed its smoke
    test, and its bundle must be the one that was registered. The old champion stays registered
    as @previous; `metaloom rollback` brings it back. Moving the alias in MLflow does the same,
    without these checks.

    With --to the version becomes one of that model as well (it is made if there is none), with its
    lineage, verdicts and card, and the champion there. Tags tell where it came from, by whom and
    when. The same MLflow holds both; no file is copied, and doing it again changes nothing.

    \b
      metaloom promote 3
      metaloom promote 3 --to glyphs-staging
      metaloom promote --model glyphs-staging --to glyphs-prod
    """
    from pipeline.deploy.by_hand import promote_by_hand
    from pipeline.deploy.champions import CHALLENGER, CHAMPION
    from pipeline.deploy.registry import Registry

    if only_copy and to is None:
        raise ConfigError("--only-copy needs --to NAME: it says what to leave out of a copy.")
    registry = Registry(Path.cwd(), model or model_name())
    default = CHALLENGER if to is None else CHAMPION
    number = version if version is not None else registry.aliases().get(default)
    if number is None:
        raise RegistryError(
            f"{registry.name} has no {default}. Name the version: `metaloom promote VERSION`."
        )
    if to is not None:
        _copy(registry, number, to, only_copy, force, reason, as_json)
        return
    old = promote_by_hand(registry, registry.version(number), force=force, reason=reason)
    was = f"; version {old.number} is @previous" if old else ""
    say(as_json, f"{registry.name}: version {number} is @champion{was}.", registry.aliases())


def _copy(
    registry: Registry,
    number: int,
    to: str,
    only_copy: bool,
    force: bool,
    reason: str | None,
    as_json: bool,
) -> None:
    from pipeline.deploy.copying import copy_to
    from pipeline.deploy.registry import Registry

    target = Registry(Path.cwd(), to)
    version = registry.version(number)
    done = copy_to(registry, version, target, force=force, reason=reason, only_copy=only_copy)
    there, aliases = done.version, target.aliases()
    if as_json:
        told = {"from": version.uri, "model": to, "version": there.number, "new": done.new}
        told |= {"promoted": done.promoted, "bundle": there.digest, "aliases": aliases}
        print(json.dumps(told, indent=2))
        return
    how = "is a copy of" if done.new else "holds this bundle already, that of"
    if done.promoted:
        champion = "It is @champion now" + (
            f"; version {done.before.number} is @previous." if done.before else "."
        )
    elif aliases.get("champion") == there.number:
        champion = "It was @champion before."
    else:
        champion = f"@champion is version {aliases.get('champion', 'none')}, as before."
    print(f"{to}: version {there.number} {how} {version.uri}. {champion}")


def model_name() -> str:
    """The registered model of the last release, or the one that params.yaml leads to."""
    if RECORD.is_file():
        return str(read_json(RECORD)["model"])
    name = load_value(PARAMS, "deploy.model_name", str)
    return f"{name}-{load_value(PARAMS, 'preprocess.domain', str)}"


def say(as_json: bool, text: str, aliases: Mapping[str, int]) -> None:
    """A sentence for people, or the aliases for programs."""
    print(json.dumps({"aliases": dict(aliases)}) if as_json else text)
