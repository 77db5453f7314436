"""`metaloom promote` and `metaloom export`, and what commands about registered models share."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.core.config import load_value
from pipeline.core.errors import ConfigError, RegistryError
from pipeline.core.files import read_json

if TYPE_CHECKING:
    from pipeline.deploy.bundle import Bundle
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
    """Make a registered version the champion, here or elsewhere.

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


def export(
    onnx: Annotated[Path, typer.Option("--onnx", help="File to write.")],
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="[VERSION]",
            help="A version's number, models:/NAME@ALIAS, models:/NAME/VERSION, or the folder of a "
            "bundle [default: @champion].",
        ),
    ] = None,
    model: Model = None,
    as_json: AsJson = False,
) -> None:
    """Write a learner's encoder as an ONNX file.

    uint8 pictures in, features out; the normalisation is inside, the size of the batch is free.
    Before the file is there, onnxruntime gives the features of 64 made-up pictures, and they are
    compared with those of the service; if they differ by more than 1e-4 relative, nothing is
    written. Learners whose features depend on the episode (MAML, batch statistics of the support
    set) have no encoder.

    \b
      metaloom export 3 --onnx encoder.onnx
      metaloom export models:/glyphs-prod@champion --onnx encoder.onnx
    """
    from pipeline.deploy.onnx_encoder import export_encoder

    with tempfile.TemporaryDirectory() as scratch:
        bundle, origin = _opened(what, model, Path(scratch) / "bundle")
        done = export_encoder(bundle, onnx, origin=origin)
    if as_json:
        print(json.dumps({**vars(done), "file": str(done.file), "origin": origin}, indent=2))
        return
    print(
        f"{done.file}: {done.bytes} bytes, {done.input} -> {done.output}, of bundle "
        f"{done.bundle[:12]}….\nOn {done.pictures} pictures onnxruntime's features differ by at "
        f"most {done.difference:.2g} relative from the service's (limit {done.limit:.0e})."
    )


def _opened(what: str | None, model: str | None, scratch: Path) -> tuple[Bundle, str]:
    """A version's bundle, verified, and its address; empty for a folder's.

    Raises:
        RegistryError: there is no such version.
    """
    from pipeline.deploy.serve.sources import source_of

    if what is None or what.isdecimal():
        name = model or model_name()
        what = f"models:/{name}@champion" if what is None else f"models:/{name}/{what}"
    source = source_of(what, Path.cwd())
    found = source.look().get("champion")
    if found is None:
        raise RegistryError(f"there is no {what}: nothing to export. Name a version by its number.")
    ref = found.ref
    origin = "" if ref.version is None else f"models:/{ref.name}/{ref.version}"
    return source.fetch(ref, scratch), origin


def model_name() -> str:
    """The registered model of the last release, or the one that params.yaml leads to."""
    if RECORD.is_file():
        return str(read_json(RECORD)["model"])
    name = load_value(PARAMS, "deploy.model_name", str)
    return f"{name}-{load_value(PARAMS, 'preprocess.domain', str)}"


def say(as_json: bool, text: str, aliases: Mapping[str, int]) -> None:
    """A sentence for people, or the aliases for programs."""
    print(json.dumps({"aliases": dict(aliases)}) if as_json else text)
