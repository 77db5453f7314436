"""`python -m infra.manifests`: check the overlays of infra/kubernetes, print what was found."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from infra.manifests.documents import OVERLAYS, overlay_names, render
from infra.manifests.planted import findings, mistakes
from infra.manifests.schemas import has_custom
from infra.manifests.table import CUSTOM, Rule, check, rules
from pipeline.core.errors import ConfigError, PipelineError

_CRDS = os.environ.get("METALOOM_CRDS", "../shared/data/crds")


def main() -> None:
    """Parse, check, and report a mistake without a traceback."""
    parser = argparse.ArgumentParser(prog="python -m infra.manifests", description=__doc__)
    parser.add_argument("overlays", nargs="*", metavar="overlay", help="names, or folders of yours")
    parser.add_argument(
        "--crds",
        type=Path,
        default=Path(_CRDS),
        help="folder of CustomResourceDefinitions (METALOOM_CRDS) [default: %(default)s]",
    )
    parser.add_argument(
        "--planted", action="store_true", help="plant mistakes, and count those that are found"
    )
    asked = parser.parse_args()
    known = rules(asked.crds if any(asked.crds.glob("*.yaml")) else None)
    try:
        good = check_overlays(asked.overlays or overlay_names(), known)
        if asked.planted:
            good &= plant(known)
    except PipelineError as error:
        sys.exit(str(error))
    if CUSTOM not in known:
        print(f"{CUSTOM} was left out: there are no definitions in {asked.crds}.")
    sys.exit(0 if good else 1)


def check_overlays(names: list[str], known: Mapping[str, Rule]) -> bool:
    """Print a line for each overlay, and each finding; whether there is none."""
    whole = 0
    for name in names:
        folder = OVERLAYS / name if (OVERLAYS / name).is_dir() else Path(name)
        if not folder.is_dir():
            raise ConfigError(f"no overlay {name!r}. There are {', '.join(overlay_names())}.")
        documents = render(folder)
        found = check(documents, known)
        whole += len(found)
        without = CUSTOM not in known and has_custom(documents)
        print(
            f"{name:<12} {len(documents):>3} documents  {len(known):>3} rules  "
            f"{len(found):>3} findings{'  (custom resources: own rules alone)' if without else ''}"
        )
        for rule, finding in found:
            print(f"  [{rule}] {finding}")
    return whole == 0


def plant(known: Mapping[str, Rule]) -> bool:
    """Plant each mistake, print how many were found, and which were not."""
    table = [one for one in mistakes() if one.rule in known]
    missed = [one for one in table if not findings(one, known)]
    print(f"planted      {len(table):>3} mistakes   {len(table) - len(missed):>3} found")
    for one in missed:
        print(f"  missed: {one.name} ({one.overlay}, {one.rule})")
    return not missed


if __name__ == "__main__":
    main()
