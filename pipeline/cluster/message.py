"""What the commit of a run's results says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.core.files import read_json

RELEASE = Path("results/deploy/release.json")
METRICS = Path("results/evaluate/metrics.json")


def released(folder: Path) -> dict[str, Any] | None:
    """The model version that a run registered: name, version, aliases; None if it did not."""
    if not (folder / RELEASE).is_file():  # git does not keep it, so it is of this run
        return None
    record = read_json(folder / RELEASE)
    names = [name for name, number in record["aliases"].items() if number == record["version"]]
    return {"model": record["model"], "version": record["version"], "aliases": sorted(names)}


def metrics(folder: Path) -> dict[str, dict[str, float]]:
    """Accuracy and half width of its interval for each setting of a run that went to its end."""
    if not (folder / RELEASE).is_file() or not (folder / METRICS).is_file():
        return {}  # numbers that lie there may be of an earlier run
    settings = next(iter(read_json(folder / METRICS).values()))
    return {
        name: {"accuracy": found["accuracy"], "ci95": found["ci95"]}
        for name, found in settings.items()
    }


def commit_message(
    folder: Path, commit: str, *, differed: Sequence[str], arguments: Sequence[str]
) -> str:
    """Names the commit that was run, the model version and the numbers."""
    return "\n".join(_lines(folder, commit, differed, arguments)) + "\n"


def _lines(
    folder: Path, commit: str, differed: Sequence[str], arguments: Sequence[str]
) -> Iterator[str]:
    model = released(folder)
    yield f"Run of {commit[:7]}" + (f": {named(model)}" if model else "")
    yield ""
    yield f"Commit: {commit}"
    yield f"Command: {' '.join(['dvc repro', *arguments])}"
    if differed:
        yield f"Working tree: differed in {len(differed)} files, which are no part of the run"
    else:
        yield "Working tree: clean"
    if model:
        yield f"Model: {named(model)}"
    for setting, found in metrics(folder).items():
        yield f"Accuracy {setting}: {percent(found)}"


def percent(found: dict[str, float]) -> str:
    """An accuracy with its interval."""
    width = "" if found["ci95"] is None else f" ± {found['ci95']:.2%}"
    return f"{found['accuracy']:.2%}{width}"


def named(model: dict[str, Any]) -> str:
    """A model version as people call it."""
    aliases = ", ".join(f"@{name}" for name in model["aliases"])
    return f"{model['model']} version {model['version']}" + (f" ({aliases})" if aliases else "")
