"""`metaloom reproduce`: the command line of a rebuild."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pipeline.deploy.commands import AsJson, Model, model_name

_STATUS = {"identical": 0, "differs": 1, "fingerprint differs": 3}


def reproduce(
    version: Annotated[int, typer.Argument(help="Its number.")],
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Though this is another kind of machine.")
    ] = False,
    model: Model = None,
    as_json: AsJson = False,
) -> None:
    """Train a registered version anew, and compare the weights bit for bit.

    In a clone of the commit that the version names, from its raw data on, with nothing taken from
    a cache; the number of workers and the launcher may be others than then. MLflow is only read.
    Bits are promised for one kind of machine (PyTorch, CPU features or GPU): on another one it says
    in what that differs and ends; --anyway computes all the same. Status 0: the same weights;
    1: others, though the machine is of the same kind; 3: the machine is of another kind.

    \b
      metaloom reproduce 3
      METALOOM_NUM_WORKERS=4 metaloom reproduce 3 --json
    """
    from pipeline.deploy.registry import Registry
    from pipeline.deploy.reproduce import reproduce as go

    found = go(Registry(Path.cwd(), model or model_name()), version, Path.cwd(), anyway=anyway)
    print(json.dumps(found.as_json(), indent=2) if as_json else found.as_text())
    if status := _STATUS[found.verdict]:
        raise typer.Exit(status)
